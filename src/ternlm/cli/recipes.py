"""`ternlm recipes`: list the shipped recipes and sweeps, or print one."""

from typing import Annotated

import typer

from ternlm.cli.options import Json, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe or sweep.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List recipes, and sweeps over them, or print one as YAML to copy and change."""
    from ternlm.recipes import load_recipe, load_sweep, recipe_names, recipe_text, sweep_names, sweep_text

    if name is not None:
        typer.echo(sweep_text(name) if name in sweep_names() else recipe_text(name), nl=False)
        return
    loaded = [load_recipe(recipe) for recipe in recipe_names()]
    if as_json:
        print_json({recipe.name: recipe.description for recipe in loaded})
        return
    sweeps = [found for shipped in sweep_names() if (found := load_sweep(shipped)) is not None]
    width = max(len(recipe.name) for recipe in [*loaded, *sweeps])
    for recipe in loaded:
        typer.echo(f"{recipe.name:<{width}}  {recipe.description}")
    typer.echo("\nsweeps")
    for sweep in sweeps:
        typer.echo(f"{sweep.name:<{width}}  {sweep.description}")
    typer.echo(
        "\nternlm recipes NAME prints one; ternlm plan NAME counts it; ternlm train NAME trains it; "
        "ternlm sweep NAME runs a sweep."
    )
