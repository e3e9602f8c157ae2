"""`ternlm recipes`: list the shipped recipes, sweeps and experiments, or print one."""

from typing import Annotated

import typer

from ternlm.cli.options import Json, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List recipes, sweeps over them and whole experiments, or print one as YAML to copy and change."""
    from ternlm.experiment import load_experiment
    from ternlm.recipes import (
        experiment_names,
        experiment_text,
        load_recipe,
        load_sweep,
        recipe_names,
        recipe_text,
        sweep_names,
        sweep_text,
    )

    if name is not None:
        text = sweep_text if name in sweep_names() else experiment_text if name in experiment_names() else recipe_text
        typer.echo(text(name), nl=False)
        return
    loaded = [load_recipe(recipe) for recipe in recipe_names()]
    if as_json:
        print_json({recipe.name: recipe.description for recipe in loaded})
        return
    sweeps = [found for shipped in sweep_names() if (found := load_sweep(shipped)) is not None]
    experiments = [load_experiment(shipped) for shipped in experiment_names()]
    width = max(map(len, [*recipe_names(), *sweep_names(), *experiment_names()]))
    for recipe in loaded:
        typer.echo(f"{recipe.name:<{width}}  {recipe.description}")
    typer.echo("\nsweeps")
    for sweep in sweeps:
        typer.echo(f"{sweep.name:<{width}}  {sweep.description}")
    typer.echo("\nexperiments")
    for experiment in experiments:
        typer.echo(f"{experiment.name:<{width}}  {experiment.description}")
    typer.echo(
        "\nternlm recipes NAME prints one; ternlm plan NAME counts it; ternlm train NAME trains it; "
        "ternlm sweep NAME runs a sweep, ternlm experiment NAME an experiment."
    )
