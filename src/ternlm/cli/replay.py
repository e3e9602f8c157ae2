"""`ternlm replay`: compute an anomalous step again, and say whether it comes out the same."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Json, RunsDir, print_json
from ternlm.cli.train import prepare_run
from ternlm.errors import EnvironmentFault, SettingsError, TernlmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ternlm.run_directory import RunDirectory
    from ternlm.training.replay import Numbers, Replay

_NAME = re.compile(r"step_(\d{6,18})_(\w+)")
_LINE_EVERY_S = 10.0


def replay(
    evidence: Annotated[
        str,
        typer.Argument(help="A folder below RUN/anomalies, or a run with --step.", show_default=False),
    ],
    step: Annotated[int | None, typer.Option(help="Which step's evidence, if a run is given.")] = None,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Compute the step of an anomaly again, and compare loss and gradients with its evidence.

    Exit code 0 if they come out the same: the cause lies in data, weights or settings. 1 if not.
    The run is only read; a stream's missing blocks are fetched again.
    """
    from rich.console import Console

    from ternlm.training.replay import replay as compute

    folder = find_evidence(evidence, step, runs_dir)
    console = Console(stderr=True, highlight=False)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    with _progress_line(console) as progress:
        result = compute(folder, prepare_run, say, progress)
    if as_json:
        print_json(_as_json(folder, result))
    else:
        _show(folder, result)
    if result.verdict == "not reproduced":
        raise TernlmError(f"step {result.evidence.step} is not reproduced: {result.likely_reason}")


def find_evidence(reference: str, step: int | None, runs_dir: str | None) -> Path:
    """The folder of evidence that is meant: itself, or the first of a step in a run.

    Raises:
        EnvironmentFault: There is none.
        SettingsError: A run is given without a step.
    """
    from ternlm.run_directory import find_run, runs_root

    folder = Path(reference).absolute()
    if step is None and _NAME.fullmatch(folder.name):
        if not (folder.is_dir() and folder.parent.name == "anomalies" and (folder.parents[1] / "meta").is_dir()):
            raise EnvironmentFault(f"'{reference}' is no evidence of a run. Give a folder below RUN/anomalies.")
        return folder
    run = find_run(reference, runs_root(runs_dir))
    kept = _kept(run)
    found = [path for number, path in kept if number == step]
    if found:
        return found[0]
    have = ", ".join(path.name for _, path in kept) or "none"
    if step is None:
        raise SettingsError(f"which anomaly? Give --step N; run '{run.id}' holds evidence of: {have}.")
    raise EnvironmentFault(f"run '{run.id}' holds no evidence of step {step}. There is: {have}.")


def _kept(run: "RunDirectory") -> list[tuple[int, Path]]:
    """Steps and folders of all evidence of a run, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in run.anomalies.glob("step_*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


@contextmanager
def _progress_line(console: "Console") -> "Iterator[Callable[[int, int], None]]":
    """A bar on a terminal, one line every ten seconds elsewhere."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replay", total=None)
        shown_s = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal shown_s
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - shown_s >= _LINE_EVERY_S:
                shown_s = time.monotonic()
                console.print(f"{done}/{total} steps")

        yield show


def _show(folder: Path, result: "Replay") -> None:
    from rich.console import Console
    from rich.table import Table

    then, now = result.recorded, result.replayed
    batch = {True: "the same", False: "another", None: "not recorded"}[result.same_batch]
    table = Table(box=None, pad_edge=False)
    table.add_column(overflow="fold")
    for heading in ("recorded", "replayed"):
        table.add_column(heading, no_wrap=True)  # the last digits are what matters
    table.add_row("tokens", f"{len(result.evidence.tokens)} rows", batch)
    table.add_row("codes (sha256)", _short(then.codes_sha256), _short(now.codes_sha256))
    table.add_row("loss", repr(then.loss), repr(now.loss))
    table.add_row("gradient norm", repr(then.grad_norm), repr(now.grad_norm))
    for name, before, after in result.notable():
        table.add_row(f"  {name}", repr(before), repr(after))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{folder.name}: {result.verdict}", markup=False, soft_wrap=True)


def _short(digest: str) -> str:
    """The beginning of a sum; evidence is a file that anybody may have written."""
    return digest[:12] if digest.isalnum() else "malformed"


def _as_json(folder: Path, result: "Replay") -> dict[str, Any]:
    is_reproduced = result.verdict != "not reproduced"
    return {
        "evidence": str(folder),
        "step": result.evidence.step,
        "checkpoint": None if result.start.opened is None else result.start.step,
        "steps_replayed": result.evidence.step - result.start.step,
        "verdict": result.verdict,
        "likely_reason": None if is_reproduced else result.likely_reason,
        "same_batch": result.same_batch,
        "recorded": _numbers(result.recorded),
        "replayed": _numbers(result.replayed),
    }


def _numbers(numbers: "Numbers") -> dict[str, Any]:
    """Strict JSON: what is not finite is spelled as in the evidence, "nan" or "inf"."""
    norms = {name: _spelled(norm) for name, norm in numbers.gradient_norms.items()}
    spelled = {"loss": _spelled(numbers.loss), "grad_norm": _spelled(numbers.grad_norm)}
    return {**numbers._asdict(), **spelled, "gradient_norms": norms}


def _spelled(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
