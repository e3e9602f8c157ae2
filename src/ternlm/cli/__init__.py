"""The command line: one file per verb, each importing what it needs only when it runs."""

import os
import sys

import typer

import ternlm
from ternlm.cli import (
    analyze,
    benchmark,
    calibrate,
    chat,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    experiment,
    export,
    fill,
    generate,
    inspect,
    plan,
    recipes,
    replay,
    report,
    resume,
    runs,
    status,
    sweep,
    tokenizer,
    train,
    twin,
)
from ternlm.errors import TernlmError

app = typer.Typer(
    name="ternlm",
    help="Train, measure and ship ternary language models.",
    epilog="New here? Run: ternlm demo (a few minutes, downloads nothing)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", "-V", is_eager=True, help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"ternlm {ternlm.__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command; an expected error becomes one sentence on stderr and its exit code."""
    try:
        app()
    except TernlmError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if "torch" not in sys.modules:
            raise
        from ternlm.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        typer.echo(f"MemoryExhausted: {error}. Lower the batch size or the sequence length.", err=True)
        sys.exit(5)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


_START, _MODEL, _DATA, _MACHINE = "Start", "Use a model", "Data", "This machine"

app.command("demo", rich_help_panel=_START)(demo.demo)
app.command("train", rich_help_panel=_START)(train.train)
app.command("resume", rich_help_panel=_START)(resume.resume)
app.command("status", rich_help_panel=_START)(status.status)
app.command("watch", hidden=True)(status.watch)
app.command("runs", rich_help_panel=_START)(runs.runs)
app.command("report", rich_help_panel=_START)(report.report)
app.command("replay", rich_help_panel=_START)(replay.replay)
app.command("sweep", rich_help_panel=_START)(sweep.sweep)
app.command("twin", rich_help_panel=_START)(twin.twin)
app.command("experiment", rich_help_panel=_START)(experiment.experiment)
app.command("plan", rich_help_panel=_START)(plan.plan)
app.command("recipes", rich_help_panel=_START)(recipes.recipes)
app.command("presets", hidden=True)(recipes.recipes)
app.command("evaluate", rich_help_panel=_MODEL)(evaluate.evaluate)
app.command("eval", hidden=True)(evaluate.evaluate)
app.command("compare", rich_help_panel=_MODEL)(compare.compare)
app.command("calibrate", rich_help_panel=_MODEL)(calibrate.calibrate)
app.command("export", rich_help_panel=_MODEL)(export.export)
app.command("generate", rich_help_panel=_MODEL)(generate.generate)
app.command("fill", rich_help_panel=_MODEL)(fill.fill)
app.command("chat", rich_help_panel=_MODEL)(chat.chat)
app.command("inspect", rich_help_panel=_MODEL)(inspect.inspect)
app.command("analyze", rich_help_panel=_MODEL)(analyze.analyze)
app.add_typer(data.app, name="data", rich_help_panel=_DATA)
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel=_DATA)
app.command("doctor", rich_help_panel=_MACHINE)(doctor.doctor)
app.command("benchmark", rich_help_panel=_MACHINE)(benchmark.benchmark)
