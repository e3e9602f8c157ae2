"""The files a run leaves on disk: their names, and how they are read and written, in one place.

runs/<run_id>/
|- meta/          config.yaml (resolved settings), config_origin.json (where each value came from)
|- checkpoints/   step_000500/ ... and the one-line pointers best, last, final
|- metrics/       scalars.jsonl: one row per logged step
|- eval/          eval_results.jsonl: one row per evaluation
|- samples/       samples.jsonl: generated text
|- logs/          train.log, training_log.csv, eval_log.csv, tensorboard/
`- run.lock       held while a process trains here
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.files import held, replace_durably

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunDirectory:
    """One run's folder.

    Args:
        path: The folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.config = path / "meta" / "config.yaml"
        self.config_origin = path / "meta" / "config_origin.json"
        self.checkpoints = path / "checkpoints"
        self.scalars = path / "metrics" / "scalars.jsonl"
        self.evaluations = path / "eval" / "eval_results.jsonl"
        self.samples = path / "samples" / "samples.jsonl"
        self.log = path / "logs" / "train.log"
        self.training_csv = path / "logs" / "training_log.csv"
        self.evaluation_csv = path / "logs" / "eval_log.csv"
        self.tensorboard = path / "logs" / "tensorboard"

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
        """Drop rows of steps after `step` and torn last lines, before a resumed run appends to the files."""
        for file in (self.scalars, self.evaluations, self.samples):
            if file.exists():
                rows = [row for row in read_jsonl(file) if row.get("step", 0) <= step]
                replace_durably(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        for file in (self.training_csv, self.evaluation_csv):
            if file.exists():
                complete = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
                kept = [line for line in complete[1:] if _csv_step(line) <= step]
                replace_durably(file, "".join([*complete[:1], *kept]).encode())


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
    known = sorted(folder for folder in root.glob("*/") if (folder / "meta").is_dir())
    if reference == "latest":
        if not known:
            raise EnvironmentFault(f"there are no runs in '{root}'. Start one with 'ternlm train'.")
        return RunDirectory(max(known, key=lambda folder: (folder / "meta").stat().st_mtime))
    matches = [folder for folder in known if folder.name == reference]
    matches = matches or [folder for folder in known if folder.name.startswith(reference)]
    if len(matches) == 1:
        return RunDirectory(matches[0])
    if matches:
        names = ", ".join(folder.name for folder in matches)
        raise EnvironmentFault(f"'{reference}' matches several runs: {names}. Write more of the name.")
    names = ", ".join(folder.name for folder in known[-5:]) or "none"
    raise EnvironmentFault(f"no run '{reference}' in '{root}' (newest runs: {names}). Give its path or name.")


def append_jsonl(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line with one write, so that lines of concurrent readers are never mixed."""
    line = json.dumps(row, allow_nan=True, ensure_ascii=False) + "\n"
    descriptor = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """All complete rows; an unfinished last line and lines that are no JSON object are skipped."""
    rows = []
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _csv_step(row: str) -> float:
    try:
        return float(row.partition(",")[0])
    except ValueError:
        return float("inf")
