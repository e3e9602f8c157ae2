"""One sitting of a run: a process that trains it, and the record of how that ended."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ternlm.device import is_out_of_memory
from ternlm.errors import Diverged, EnvironmentFault, Interrupted, MemoryExhausted, Preempted, TernlmError
from ternlm.run_directory import RunDirectory
from ternlm.training import provenance
from ternlm.training.status import FinalState, StatusFile

_STATES: dict[type[TernlmError], FinalState] = {
    Preempted: "preempted",
    Interrupted: "stopped",
    Diverged: "diverged",
    MemoryExhausted: "out_of_memory",
}


@contextmanager
def sitting(run: RunDirectory, status: StatusFile) -> Iterator[None]:
    """However the block that trains the run ends, the end is recorded with its exit code.

    Recorded are `status.json`, the sitting's entry in `meta/provenance.json`, and for what nobody expected the
    traceback in `logs/train.log`.

    Args:
        run: The run, held by this process.
        status: Its status file; a `reason` set there means that a limit ended the run before its last step.
    """
    try:
        yield
    except BaseException as error:
        state, code, reason = outcome(error)
        if state == "failed" and not isinstance(error, TernlmError):
            _keep_traceback(run)
        _record(run, status, state, code, reason)
        raise
    _record(run, status, "stopped" if status.reason else "finished", 0, status.reason)


def outcome(error: BaseException) -> tuple[FinalState, int, str]:
    """State, exit code and reason of a run that ended with an error."""
    reason = str(error) or type(error).__name__
    if isinstance(error, TernlmError):
        states = (state for kind, state in _STATES.items() if isinstance(error, kind))
        return next(states, "failed"), error.exit_code, reason
    if is_out_of_memory(error):
        return "out_of_memory", MemoryExhausted.exit_code, reason
    if isinstance(error, KeyboardInterrupt):
        return "stopped", Interrupted.exit_code, "interrupted before it could be saved"
    if isinstance(error, SystemExit):
        return "stopped", error.code if isinstance(error.code, int) else 1, "ended by a second signal"
    return "failed", 1, f"{type(error).__name__}: {reason}"


def _record(run: RunDirectory, status: StatusFile, state: FinalState, code: int, reason: str | None) -> None:
    finished = state == "finished"
    next_command = f"ternlm {'evaluate' if finished else 'resume'} {run.path}"
    status.final(state, code, reason, error=reason if code else None, next_command=next_command)
    with suppress(EnvironmentFault):  # the disk that is full has been reported, and status.json is the record
        provenance.record_stop(run, state, code, reason, status.step)


def _keep_traceback(run: RunDirectory) -> None:
    try:
        with run.log.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
    except OSError:
        pass  # the disk that failed may be the reason for the end
