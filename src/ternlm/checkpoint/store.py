"""Checkpoints of one run on disk: found, pointed at, pruned, and set aside.

Names decide: `step_NNNNNN` is complete, `.tmp-` being written, `.del-` being deleted, `.rolled-` abandoned by
a roll-back. What has another name is never touched.
"""

import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from ternlm.checkpoint.manifest import MANIFEST, read_manifest, verify
from ternlm.errors import CheckpointError, EnvironmentFault, StorageFault
from ternlm.files import read_regular, replace_durably, synchronize_folder
from ternlm.run_directory import find_run

POINTERS = ("best", "last", "final")

_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})")
_Found = TypeVar("_Found")


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:06d}"


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, in numeric order."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def newest_valid(root: Path, report: Callable[[str], None] | None = None) -> Path:
    """The checkpoint with the highest step that verifies.

    Args:
        root: A run's checkpoints folder.
        report: Called with one sentence for each newer checkpoint that does not verify.

    Raises:
        CheckpointError: None verifies.
    """
    return first_good(root, lambda path: (verify(path), path)[1], report)


def first_good(root: Path, read: Callable[[Path], _Found], report: Callable[[str], None] | None = None) -> _Found:
    """What `read` makes of the newest checkpoint that it accepts.

    Args:
        root: A run's checkpoints folder.
        read: Raises CheckpointError for a checkpoint that is no good.
        report: Called with one sentence for each newer checkpoint that is no good.

    Raises:
        CheckpointError: None is good.
    """
    candidates = sorted(steps(root), reverse=True)
    for step in candidates:
        try:
            return read(folder(root, step))
        except CheckpointError as error:
            if report is not None:
                report(f"{error} Trying the previous checkpoint.")
    found = f"{len(candidates)} damaged ones" if candidates else "none"
    raise CheckpointError(f"no usable checkpoint in '{root}' ({found}). Start a new run with 'ternlm train'.")


def resolve(reference: str, runs: Path) -> Path:
    """A checkpoint by folder path, or by run: ``RUN``, ``RUN@best``, ``RUN@last``, ``RUN@500``.

    A run is a path, a name, a unique prefix or ``latest``; without ``@`` its newest valid
    checkpoint is meant.

    Raises:
        CheckpointError: The reference leads to no checkpoint.
    """
    if (Path(reference) / MANIFEST).is_file() or _NAME.fullmatch(Path(reference).name):
        if not Path(reference).is_dir():
            raise CheckpointError(f"checkpoint '{reference}' does not exist. Check the path.")
        return Path(reference)
    run_name, _, which = reference.partition("@")
    try:
        run = find_run(run_name, runs)
    except EnvironmentFault as error:
        raise CheckpointError(f"'{reference}' is no checkpoint folder, and as a run: {error}") from None
    if which in ("", "last"):
        return newest_valid(run.checkpoints)
    if which in ("best", "final"):
        step = _pointed_step(run.checkpoints, which)
        if step is None:
            raise CheckpointError(f"run '{run.id}' has no '{which}' checkpoint yet. Use {run_name}@last.")
        return folder(run.checkpoints, step)
    digits = which.removeprefix("step_")
    path = folder(run.checkpoints, int(digits)) if re.fullmatch(r"[0-9]{1,18}", digits) else run.checkpoints / which
    if not path.is_dir() or path.parent != run.checkpoints:
        have = ", ".join(map(str, steps(run.checkpoints))) or "none"
        raise CheckpointError(f"run '{run.id}' has no checkpoint '{which}'. It has steps: {have}.")
    return path


def point(root: Path, name: str, target: Path) -> None:
    """Write the one-line pointer `name` (best, last, final) to a checkpoint.

    Raises:
        StorageFault: The disk is full or the folder cannot be written.
    """
    try:
        replace_durably(root / name, f"{target.name}\n".encode())
    except OSError as error:
        raise StorageFault(
            f"pointer '{root / name}' cannot be written: {error.strerror}. Checkpoint '{target}' is complete; "
            "free disk space, then resume."
        ) from error


def prune(
    root: Path,
    keep_last: int,
    keep_every: int | None = None,
    run_id: str | None = None,
    before: int | None = None,
    protect: Collection[int] = (),
) -> list[int]:
    """Delete checkpoints that policy does not keep, and return their steps.

    Kept are the last `keep_last`, every `keep_every`-th step, the best, all pinned ones, and `protect`.

    Args:
        root: A run's checkpoints folder.
        keep_last: Newest checkpoints to keep, at least 1.
        keep_every: Also keep multiples of this.
        run_id: Look only at checkpoints whose manifest carries it; None looks at all.
        before: Look only at checkpoints of smaller steps: a higher number is damaged or foreign.
        protect: Steps to keep for other reasons.

    Raises:
        StorageFault: One cannot be removed.
    """
    older = [step for step in steps(root) if before is None or step < before]
    left = max(keep_last, 1)
    while older and left:
        left -= _belongs(folder(root, older.pop()), run_id)
    kept = {_pointed_step(root, "best"), *protect}
    removed = []
    for step in older:
        path = folder(root, step)
        if step in kept or (keep_every and step % keep_every == 0) or not _belongs(path, run_id) or _is_pinned(path):
            continue
        try:
            remove(path)
        except OSError as error:
            raise StorageFault(
                f"old checkpoint '{path}' cannot be removed: {error.strerror}. Check the folder's owner."
            ) from error
        removed.append(step)
    return removed


def remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one never carries a valid name.

    Raises:
        OSError: It cannot be renamed.
    """
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    synchronize_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def abandon(root: Path, after: int) -> list[int]:
    """Set the checkpoints of later steps aside as `.rolled-step_NNNNNN`, so that no resume finds them.

    Pointers to them are removed. Calling it again after a crash completes what was begun.

    Args:
        root: A run's checkpoints folder.
        after: The step that training goes back to.

    Returns:
        The steps that were set aside by this call.

    Raises:
        StorageFault: The folder cannot be written.
    """
    abandoned = [step for step in steps(root) if step > after]
    try:
        for name in POINTERS:
            if (_pointed_step(root, name) or 0) > after:
                (root / name).unlink(missing_ok=True)
        for step in abandoned:
            aside = root / f".rolled-{folder(root, step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder(root, step).rename(aside)
        if root.is_dir():
            synchronize_folder(root)
    except OSError as error:
        raise StorageFault(
            f"checkpoints after step {after} in '{root}' cannot be set aside: {error.strerror}. "
            "Check the folder's owner, then resume."
        ) from error
    return abandoned


def remove_unfinished(root: Path) -> None:
    """Delete what a killed process left half-written or half-deleted, and all but the newest of what was abandoned."""
    for pattern in (".tmp-step_*", ".del-step_*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for name in POINTERS:
        for path in root.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    rolled = {int(match[1]): path for path in root.glob(".rolled-step_*") if (match := _NAME.fullmatch(path.name[8:]))}
    for step in sorted(rolled)[:-1]:
        shutil.rmtree(rolled[step], ignore_errors=True)


def _belongs(path: Path, run_id: str | None) -> bool:
    """Whether a checkpoint carries the id of a run; None is every run."""
    return run_id is None or _manifest(path).get("run_id") == run_id


def _is_pinned(path: Path) -> bool:
    return bool(_manifest(path).get("pinned"))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except CheckpointError:
        return {}


def _pointed_step(root: Path, name: str) -> int | None:
    """The step that a pointer names, or None if it is missing or damaged."""
    try:
        text = read_regular(root / name, limit=64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    match = _NAME.fullmatch(text)
    return int(match[1]) if match else None
