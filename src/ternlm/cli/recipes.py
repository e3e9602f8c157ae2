"""`ternlm recipes`: list the shipped recipes, or print one."""

from typing import Annotated

import typer

from ternlm.cli.options import Json, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List recipes, or print one as YAML to copy and change."""
    from ternlm.recipes import load_recipe, recipe_names, recipe_text

    if name is not None:
        typer.echo(recipe_text(name), nl=False)
        return
    loaded = [load_recipe(recipe) for recipe in recipe_names()]
    if as_json:
        print_json({recipe.name: recipe.description for recipe in loaded})
        return
    width = max(len(recipe.name) for recipe in loaded)
    for recipe in loaded:
        typer.echo(f"{recipe.name:<{width}}  {recipe.description}")
    typer.echo("\nternlm recipes NAME prints one; ternlm plan NAME counts it; ternlm train NAME trains it.")
