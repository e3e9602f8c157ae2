"""The files a run leaves on disk: their names, and how they are read and written, in one place.

runs/<run_id>/
|- status.json    what the run is doing now, replaced every few seconds
|- report.html    what the run was and did, with report.md and report.json, written when it ends
|- meta/          config.json (resolved settings), config_origin.json (where each value came from),
|                 provenance.json (code, packages, hardware, seeds, command lines), dataset_fingerprint.json
|- checkpoints/   step_000500/ ... and the one-line pointers best, last, final
|- metrics/       scalars.jsonl: one row per logged step; ternary.jsonl: codes and scales of every matrix;
|                 system.jsonl: CPU, memory, GPU; events.jsonl: starts, stops, anomalies and what was decided
|- eval/          eval_results.jsonl: one row per evaluation; lm_eval_000500.json: tasks, of step 500;
|                 alignment.json: the newest checkpoint against the definition of BitNet b1.58
|- samples/       samples.jsonl: generated text
|- anomalies/     step_000812_loss_spike/ ...: evidence, enough to replay the step
|- logs/          train.log, training_log.csv, eval_log.csv, tensorboard/
|- stream/        token blocks read ahead, for data that are streamed
|- wandb/         what the wandb package writes
`- run.lock       held while a process trains here

A sweep is a folder of runs: runs/<sweep_id>/sweep.json, and beside it the runs, called <sweep_id>/<run_id>; so is a
twin, the two arms of a comparison: runs/<twin_id>/twin.json.
"""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.files import held, replace_durably, synchronize_folder

SWEEP = "sweep.json"
TWIN = "twin.json"
SCORES = "scores"
"""The one folder in that of a twin that is no run."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunDirectory:
    """One run's folder.

    Args:
        path: The folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.status = path / "status.json"
        self.config = path / "meta" / "config.json"
        self.config_origin = path / "meta" / "config_origin.json"
        self.provenance = path / "meta" / "provenance.json"
        self.data_fingerprint = path / "meta" / "dataset_fingerprint.json"
        self.checkpoints = path / "checkpoints"
        self.scalars = path / "metrics" / "scalars.jsonl"
        self.ternary = path / "metrics" / "ternary.jsonl"
        self.system = path / "metrics" / "system.jsonl"
        self.events = path / "metrics" / "events.jsonl"
        self.evaluations = path / "eval" / "eval_results.jsonl"
        self.alignment = path / "eval" / "alignment.json"
        self.samples = path / "samples" / "samples.jsonl"
        self.anomalies = path / "anomalies"
        self.stream = path / "stream"
        self.wandb = path / "wandb"
        self.log = path / "logs" / "train.log"
        self.training_csv = path / "logs" / "training_log.csv"
        self.evaluation_csv = path / "logs" / "eval_log.csv"
        self.tensorboard = path / "logs" / "tensorboard"

    def task_results(self, step: int) -> Path:
        """Results of lm-evaluation-harness's tasks on the checkpoint of a step."""
        return self.path / "eval" / f"lm_eval_{step:06d}.json"

    def create(self) -> None:
        """Make the folder and its parts.

        Raises:
            SettingsError: A run of this name exists already.
            EnvironmentFault: The folder cannot be written.
        """
        if self.config.exists():
            raise SettingsError(
                f"run '{self.path}' exists already. Continue it with 'ternlm resume {self.path}' "
                "or choose another name with --run-id."
            )
        self.ensure_writable()

    def ensure_writable(self) -> None:
        """Make missing folders and prove that they take files.

        Raises:
            EnvironmentFault: They do not.
        """
        try:
            for file in (self.config, self.scalars, self.evaluations, self.samples, self.log):
                file.parent.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            replace_durably(self.path / "meta" / ".probe", b"")
            (self.path / "meta" / ".probe").unlink()
            for folder in (self.path, *self.path.parents[:2]):  # a power cut must not take the folders of saved steps
                with suppress(PermissionError):  # above the run, reading may not be allowed
                    synchronize_folder(folder)
        except OSError as error:
            raise EnvironmentFault(
                f"run folder '{self.path}' cannot be written: {error.strerror}. Choose another with --runs-dir."
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system frees it however the process ends.

        Raises:
            EnvironmentFault: Another process trains here.
        """
        in_use = EnvironmentFault(
            f"run '{self.path}' is being trained by another process. Stop it first, or choose another run."
        )
        with held(self.path / "run.lock", in_use):
            yield

    def cut_after(self, step: int) -> None:
        """Drop rows of steps after `step` and torn last lines, before a resumed run appends to the files.

        Events stay: they are the history of the run, not of its result.
        """
        for file in (self.scalars, self.ternary, self.system, self.evaluations, self.samples):
            if file.exists():
                kept = [line for line, row in _rows(file) if _step(row.get("step", 0)) <= step]
                replace_durably(file, b"".join(kept))
        for file in (self.training_csv, self.evaluation_csv):
            if file.exists():
                complete = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
                kept = [line for line in complete[1:] if _step(line.partition(b",")[0]) <= step]
                replace_durably(file, b"".join([*complete[:1], *kept]))


def use_command(run: RunDirectory, objective: object) -> str:
    """What a user of the trained model would run first: generation, or for an encoder the filling of masks."""
    if objective == "mlm":
        return f"ternlm fill {run.path} 'A text with a [MASK] in it.'"
    return f"ternlm generate {run.path} --prompt '...'"


def new_run_id(recipe: str) -> str:
    """A name that sorts by time and does not collide: ``demo-20261120-153401-ab12``."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{recipe}-{stamp}-{secrets.token_hex(2)}"


def check_run_id(run_id: str) -> str:
    """The id itself, if it is one plain folder name.

    Raises:
        SettingsError: It is not.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise SettingsError(f"run id '{run_id}' is not a plain name. Use letters, digits, '.', '_' and '-'.")
    return run_id


def runs_root(given: str | None = None) -> Path:
    """Where runs live: the argument, else ``TERNLM_RUNS_DIR``, else ``./runs``."""
    return Path(given or os.environ.get("TERNLM_RUNS_DIR") or "runs")


def find_run(reference: str, root: Path) -> RunDirectory:
    """A run by path, name, unique prefix of a name, or ``latest``.

    Raises:
        EnvironmentFault: No run matches, or several do.
    """
    path = Path(reference)
    if (path / "meta").is_dir():
        return RunDirectory(path)
    folders = (run for folder in root.glob("*/") for run in runs_in(folder))
    known = sorted(folder for folder in folders if (folder / "meta").is_dir())
    by_age = sorted(known, key=lambda folder: (folder / "meta").stat().st_mtime)
    if reference == "latest":
        if not known:
            raise EnvironmentFault(f"there are no runs in '{root}'. Start one with 'ternlm train'.")
        return RunDirectory(by_age[-1])
    named = {folder.relative_to(root).as_posix(): folder for folder in known}
    matches = [name for name in named if name == reference] or [name for name in named if name.startswith(reference)]
    if len(matches) == 1:
        return RunDirectory(named[matches[0]])
    if matches:
        raise EnvironmentFault(f"'{reference}' matches several runs: {', '.join(matches)}. Write more of the name.")
    names = ", ".join(folder.relative_to(root).as_posix() for folder in by_age[-5:]) or "none"
    raise EnvironmentFault(f"no run '{reference}' in '{root}' (newest runs: {names}). Give its path or name.")


def runs_around(run: RunDirectory) -> Path:
    """The folder in which other runs are known by name: the run's own, or around a sweep's trial that of the sweep."""
    folder = run.path.parent
    return folder.parent if _holds_trials(folder) else folder


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of a sweep or a twin."""
    if not _holds_trials(folder):
        return [folder]
    is_twin = (folder / TWIN).is_file()
    return [path for path in sorted(folder.glob("*/")) if not (is_twin and path.name == SCORES)]


def _holds_trials(folder: Path) -> bool:
    return (folder / SWEEP).is_file() or (folder / TWIN).is_file()


def append_jsonl(file: Path, row: Mapping[str, Any]) -> None:
    """Append one row as strict JSON: numbers that are not finite, such as the loss of a skipped step, become null.

    Raises:
        OSError: As `append_line`.
    """
    try:
        line = json.dumps(row, allow_nan=False, ensure_ascii=False)
    except ValueError:
        line = json.dumps(_without_nan(row), allow_nan=False, ensure_ascii=False)
    append_line(file, line)


def append_line(file: Path, line: str) -> None:
    """Append one line with one write, so that readers never see lines mixed, and never behind a torn one.

    Raises:
        OSError: It could not be written, e.g. because the disk is full; what arrived of it is taken back.
    """
    content = line.encode("utf-8", "backslashreplace") + b"\n"  # in JSON, that is how half a surrogate pair is spelled
    descriptor = os.open(file, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":  # a process ended while it wrote
                content = b"\n" + content
        if os.write(descriptor, content) < len(content):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(descriptor)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """All complete rows; an unfinished last line and lines that are no JSON object are skipped."""
    return [row for _, row in _rows(file)]


def _rows(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Complete lines, each as it is in the file and as what it says."""
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield line, row


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _step(value: Any) -> float:
    """A row's step; of what is no number, more than any."""
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return float("inf")
