"""Going back to an earlier checkpoint, as a transaction that survives being killed at any point.

The newest checkpoint is the one with the highest step, so an abandoned future must not be found again:

1. the intent (where to return to, and where the data go on) is written to ``checkpoints/rollback.json``;
2. checkpoints after the target are renamed so that nothing takes them for valid;
3. the target is loaded and its position replaced by the intent's;
4. the intent is removed once a checkpoint that already counts this roll-back is on disk.

Each step may be repeated, so a process that finds an intent at start-up simply goes on with step 2.
"""

import json
from pathlib import Path
from typing import Any

from ternlm import checkpoint
from ternlm.errors import CheckpointError
from ternlm.files import replace_durably, to_json
from ternlm.training.progress import Progress

_INTENT = "rollback.json"


def begin(root: Path, target: int, roll_backs: list[dict[str, int]]) -> None:
    """Record that the run returns to a step, and hide what came after it.

    Args:
        root: The run's checkpoints folder.
        target: Step of the checkpoint to return to.
        roll_backs: All roll-backs of the run, this one last (`Progress.roll_backs`).
    """
    replace_durably(root / _INTENT, to_json({"to": target, "roll_backs": roll_backs}))
    checkpoint.abandon(root, target)


def unfinished(root: Path) -> dict[str, Any] | None:
    """The intent of a roll-back that no checkpoint carries yet, or None.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = root / _INTENT
    if not path.exists():
        return None
    try:
        intent = json.loads(path.read_bytes())
        if not isinstance(intent["to"], int) or not isinstance(intent["roll_backs"], list):
            raise TypeError("wrong types")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' is damaged ({error}). Delete it to resume from the newest checkpoint."
        ) from None
    return dict(intent)


def settle(root: Path) -> None:
    """Finish hiding what a roll-back abandoned, if the process was killed in the middle of one."""
    intent = unfinished(root)
    steps = checkpoint.steps(root)
    if intent is None or not steps:
        return
    newest = checkpoint.newest_valid(root)
    if checkpoint.verify(newest).get("rollbacks", 0) < len(intent["roll_backs"]):
        checkpoint.abandon(root, intent["to"])


def complete(root: Path, progress: Progress) -> bool:
    """Apply an unfinished roll-back to the position just loaded; whether there was one that it does not count."""
    intent = unfinished(root)
    if intent is None or len(progress.roll_backs) >= len(intent["roll_backs"]):
        return False
    progress.roll_backs = list(intent["roll_backs"])
    progress.samples = progress.roll_backs[-1]["samples_to"]
    progress.best_loss = None  # what was best may be among the abandoned
    return True


def forget(root: Path, counted: int) -> None:
    """Remove the intent, now that a checkpoint that counts so many roll-backs is on disk."""
    intent = unfinished(root)
    if intent is not None and counted >= len(intent["roll_backs"]):
        (root / _INTENT).unlink(missing_ok=True)
