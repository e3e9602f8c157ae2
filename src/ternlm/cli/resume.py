"""`ternlm resume`: continue a run exactly where it stopped."""

from typing import Annotated, Any

import typer

from ternlm.cli.options import Overrides, RunsDir, flag_values
from ternlm.cli.train import prepare_run


def resume(
    run: Annotated[str, typer.Argument(help="Path, name, unique prefix, or latest.", show_default=False)],
    settings: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="New length in steps; replaces other limits.")] = None,
    tokens: Annotated[str | None, typer.Option(help="New length in tokens; replaces other limits.")] = None,
    epochs: Annotated[str | None, typer.Option(help="New length in epochs; replaces other limits.")] = None,
    runs_dir: RunsDir = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing while training.")] = False,
) -> None:
    """Continue a run from its newest valid checkpoint; on a CPU the result is bit-identical to never stopping.

    Limits, cadences, device and micro-batch size may change; anything else makes another run.
    """
    from ternlm.cli.report import reported
    from ternlm.run_directory import find_run, runs_root
    from ternlm.settings.resolve import parse_overrides
    from ternlm.training import launch

    flags: dict[str, Any] = {
        "training.max_steps": steps, "training.max_tokens": tokens, "training.max_epochs": epochs,
    }  # fmt: skip
    overrides = flag_values(flags) | parse_overrides(settings or [])
    found = find_run(run, runs_root(runs_dir))
    with reported(found, quiet):
        launch.resume(found, overrides, prepare_run, quiet)
