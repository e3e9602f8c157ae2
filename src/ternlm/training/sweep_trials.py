"""Running trials, as those of a sweep: each in a process of its own, as `ternlm train` or `ternlm resume`.

A trial that fails, diverges or takes the machine's last memory ends alone; the others go on. What a trial left on
disk decides what is still to do, so a sweep can be stopped anywhere and given again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic

from ternlm.errors import Diverged, Interrupted, Preempted
from ternlm.files import from_json, read_regular
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import ENVIRONMENT_PREFIX
from ternlm.training.interruption import Interruption
from ternlm.training.status import FINAL
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import End, Record, TrialFolder, TrialRecord

_POLL_S, _PATIENCE_S = 0.05, 20.0
_UNFINISHED = (Interrupted.exit_code, Preempted.exit_code)
_LARGEST_STATUS, _LONGEST_ERROR = 2**20, 2000


def end_of(folder: TrialFolder[Any], record: TrialRecord, trial: Trial) -> End | None:
    """How a trial ended; None if it has not been run, or was stopped, or killed, and has more to do."""
    known = _last_word(folder.run(trial)) or record.ends.get(trial.id)
    return None if known is None or known.code in _UNFINISHED or known.code < 0 else known


def is_settled(end: End | None) -> bool:
    """Whether the trial has a result: it is finished, or has diverged."""
    return end is not None and end.code in (0, Diverged.exit_code)


def pending(folder: TrialFolder[Any], record: TrialRecord, retry_failed: bool) -> list[Trial]:
    """The trials still to run: those without an end, and on request those that failed."""
    ends = {trial.id: end_of(folder, record, trial) for trial in record.trials}
    return [
        trial
        for trial in record.trials
        if ends[trial.id] is None or (retry_failed and not is_settled(ends[trial.id]))
    ]  # fmt: skip


class TrialRunner(Generic[Record]):
    """Runs trials, a few at a time, and keeps the folder's file up to date.

    Args:
        folder: Where their runs are, held by this process.
        record: What they belong to.
        parallel: How many trials run at the same time.
        show: Whether a trial's own output is shown; only one at a time can be.
        began: Called with a trial before it starts.
        ended: Called after the file was brought up to date with the end of a trial.
    """

    def __init__(
        self,
        folder: TrialFolder[Record],
        record: Record,
        parallel: int = 1,
        show: bool = False,
        began: Callable[[Trial], None] = lambda trial: None,
        ended: Callable[[Trial, End], None] = lambda trial, end: None,
    ) -> None:
        self.folder, self.record, self.parallel = folder, record, parallel
        self._show, self._began, self._ended = show and parallel == 1, began, ended
        self._running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}

    def run(self, trials: list[Trial]) -> None:
        """Run trials in this order.

        Ctrl-C and SIGTERM are passed on once, so that the running trials save; the next signal ends them at once.

        Raises:
            Interrupted, Preempted: A signal arrived; the message says how to go on.
        """
        interruption, waiting, is_told = Interruption(), list(trials), False
        with interruption.watched():
            try:
                while self._running or (waiting and interruption.received is None):
                    while waiting and len(self._running) < self.parallel and interruption.received is None:
                        self._start(waiting.pop(0))
                    if interruption.received is not None and not is_told:
                        self._signal(interruption.received)
                        is_told = True
                    self._collect()
                    time.sleep(_POLL_S)
            finally:
                self._end_all()
        if interruption.received is not None:
            ends = [end_of(self.folder, self.record, trial) for trial in self.record.trials]
            raise interruption.error(
                f"{sum(map(is_settled, ends))} of {len(ends)} trials are done, what ran is saved. "
                f"Continue with: {self.folder.resume_command}"
            )

    def _start(self, trial: Trial) -> None:
        slot = next(place for place in range(self.parallel) if place not in self._running)
        self._began(trial)
        with self.folder.log(trial).open("ab") as log:
            process = subprocess.Popen(
                self.command(trial),
                stdin=subprocess.DEVNULL,
                stdout=None if self._show else subprocess.DEVNULL,
                stderr=log,
                env=self._environment(trial, slot),
                start_new_session=True,  # a Ctrl-C of the terminal reaches this process alone, which passes it on once
            )
        self._running[slot] = (trial, process)

    def command(self, trial: Trial) -> list[str]:
        """What a user would type for this trial."""
        run, quiet = self.folder.run(trial), [] if self._show else ["--quiet"]
        ternlm = [sys.executable, "-m", "ternlm"]
        if run.config.exists():
            return [*ternlm, "resume", str(run.path), *quiet]
        words = assignments({**self.record.shared, **trial.overrides()})
        place = ["--run-id", trial.id, "--runs-dir", str(self.folder.path)]
        return [*ternlm, "train", self.record.recipe, *words, *place, *quiet]

    def _environment(self, trial: Trial, slot: int) -> dict[str, str]:
        """Settings of the environment are part of the sweep already; trials side by side share cores and GPUs out."""
        given = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
        given[f"{ENVIRONMENT_PREFIX}tracking__report"] = "false"  # of trials there are too many
        given.setdefault("WANDB_RUN_GROUP", self.folder.id)
        given.setdefault("WANDB_NAME", f"{self.folder.id}/{trial.id}")
        if self.parallel > 1:
            given.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.parallel, 1)))
            gpus = _gpus(given)
            if len(gpus) > 1:
                given["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return given

    def _collect(self) -> None:
        for slot, (trial, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                self._keep(trial, process.returncode)

    def _keep(self, trial: Trial, code: int) -> None:
        log = self.folder.log(trial)
        end = End(code, _last_line(log) if code else None)
        self.record.ends[trial.id] = end
        with suppress(OSError):
            if not log.stat().st_size:
                log.unlink()
        self.folder.write(self.record)
        self._ended(trial, end)

    def _signal(self, number: int) -> None:
        for _, process in self._running.values():
            process.send_signal(number)

    def _end_all(self) -> None:
        """Leave no process behind, however this one ends; what they saved stays."""
        self._signal(signal.SIGTERM)
        until = time.monotonic() + _PATIENCE_S
        for trial, process in self._running.values():
            try:
                process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.record.ends[trial.id] = End(process.returncode, _last_line(self.folder.log(trial)))
        if self._running:
            self._running.clear()
            self.folder.write(self.record)


def assignments(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` words; values are JSON, which a YAML parser reads as they are."""
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


def _last_word(run: RunDirectory) -> End | None:
    """What the run's own status file says of its end; None if it says nothing, or that it is running."""
    try:
        status = from_json(read_regular(run.status, _LARGEST_STATUS))
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or status.get("state") not in FINAL or not isinstance(status["exit_code"], int):
        return None
    return End(status["exit_code"], status.get("error"))


def _last_line(log: Path) -> str | None:
    try:
        lines = log.read_bytes()[-4 * _LONGEST_ERROR :].decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    return next((line.strip()[:_LONGEST_ERROR] for line in reversed(lines) if line.strip()), None)


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]
