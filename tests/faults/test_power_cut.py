"""The power fails at any moment of a save or a preparation: the old state or the new one is found, or damage is named.

The calls are recorded once; then, in memory, the disk is cut off after every single one of them, with random fates of
what was not synchronized (`write_list` says which). Names arrive in order or not, and once fsync does nothing at all.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from harness import Row
from scenes import SCENES, contents, files_of, is_intact, metrics, place, prepared
from write_list import Disk, WriteList, recorded, write_tree

from ternlm import checkpoint
from ternlm.data.corpus import load_corpus
from ternlm.errors import CheckpointError, DataError
from ternlm.run_directory import RunDirectory, read_jsonl

pytestmark = pytest.mark.faults

SEED = 3
Check = Callable[[Path, set[str], bool], str]
"""From a tree, what the program had said by then, and whether fsync lied, to what was found, in a word."""


@pytest.mark.parametrize("fsync_lies", [False, True], ids=["fsync holds", "fsync lies"])
def test_a_power_cut_while_saving(folder: Path, row: Row, fsync_lies: bool) -> None:
    """Old or new, never anything else, and new as soon as the save has said so."""
    place(folder)
    search(row, recorded_saves(folder), folder, check_saved, fsync_lies)


def test_a_power_cut_at_the_first_save_of_a_run(folder: Path, row: Row) -> None:
    """The folders of a new run are on the disk when its first save says that it is."""
    place(folder)
    (folder / "new").mkdir()
    with recorded(folder / "new") as log:
        run = RunDirectory(folder / "new" / "runs" / "run-1")
        run.create()
        with checkpoint.Writer(run.checkpoints, 2, None, 0, False) as writer:
            writer.submit(8, contents(8))
        log.mark("saved")
    search(row, log, folder, check_first_save, fsync_lies=False)


@pytest.mark.parametrize("kind", ["fsync holds", "sectors tear", "fsync lies"])
def test_a_power_cut_while_preparing(folder: Path, row: Row, kind: str) -> None:
    """The next start goes on and ends with the same bytes; on a disk that breaks its word it may name the damage."""
    place(folder)
    check = partial(check_prepared, may_refuse=kind != "fsync holds")
    search(row, recorded_preparation(folder), folder, check, kind == "fsync lies", tears=kind != "fsync holds")


def test_a_power_cut_while_recording(folder: Path, row: Row) -> None:
    """Metrics are not synchronized: rows may be missing, but none is wrong, and readers never stumble."""
    place(folder)
    SCENES["record"].set_up(folder / "work")
    with recorded(folder / "work") as log:
        SCENES["record"].act(folder / "work")
    search(row, log, folder, check_recorded, fsync_lies=False)


def test_the_model_notices_what_is_left_out(folder: Path, row: Row) -> None:
    """Negative controls: without a checksum or without one kind of fsync the same search finds damage."""
    place(folder)
    saves, preparation = recorded_saves(folder), recorded_preparation(folder)
    bugs = {
        "no fsync and no checksum": (saves, check_without_checksum, True),
        "no fsync of folders": (unsynchronized(saves, folders=True), check_saved, False),
        "no fsync of files": (unsynchronized(saves, folders=False), check_saved, False),
        "no fsync of shards": (unsynchronized(preparation, folders=False), check_prepared, False),
    }
    damage = {bug: find_damage(log, folder / bug, check, lies) for bug, (log, check, lies) in bugs.items()}
    assert all(damage.values()), damage
    row.trials, row.injected = len(bugs), "seeded bugs"
    row.result = ", ".join(f"{bug}: {n} bad states" for bug, n in damage.items())
    row.controls = f"{len(damage)} of {len(bugs)}"


# The search


def search(
    row: Row, log: WriteList, folder: Path, check: Check, fsync_lies: bool, tears: bool = True, repeats: int = 10
) -> None:
    """Check every cut, with names in order and not, and fill in the row."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    draw, disk = random.Random(SEED), Disk(log, fsync_lies, tears)
    for cut in range(len(log.events) + 1):
        if cut:
            disk.take(log.events[cut - 1])
        for repeat in range(2 * repeats):
            tree = disk.cut(draw, is_ordered=repeat % 2 == 0)
            row.trials += 1
            key = hash((tuple(tree.items()), frozenset(disk.said)))
            if key in seen:
                continue
            seen.add(key)
            write_tree(tree, folder / "state")
            try:
                found[check(folder / "state", disk.said, fsync_lies)] += 1
            except Exception as error:
                where = f"seed {SEED}, cut after {cut} of {len(log.events)} calls"
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            shutil.rmtree(folder / "state")
    row.injected = f"{len(seen):,} different disks after {len(log.events)} calls"
    row.result = ", ".join(f"{n:,} {what}" for what, n in found.most_common())


def find_damage(log: WriteList, folder: Path, check: Check, fsync_lies: bool) -> int:
    """How many of some hundred states the check finds fault with."""
    draw, disk, bad = random.Random(SEED), Disk(log, fsync_lies), 0
    for cut, event in enumerate(log.events):
        disk.take(event)
        for repeat in range(4 if cut % 3 == 0 else 0):
            write_tree(disk.cut(draw, is_ordered=repeat % 2 == 0), folder)
            try:
                check(folder, disk.said, fsync_lies)
            except Exception:  # noqa: BLE001 (any failure is a find)
                bad += 1
            shutil.rmtree(folder)
    return bad


def unsynchronized(log: WriteList, folders: bool) -> WriteList:
    """The same list without the synchronization of folders, or of files."""
    events = [event for event in log.events if event.kind != "sync" or log.is_folder(event.inode) != folders]
    return WriteList(log.folders, log.files, events, log.made)


# What must hold


def recorded_saves(folder: Path) -> WriteList:
    """Two saves in a row, with pointers and retention."""
    SCENES["save"].set_up(folder / "saves")
    with recorded(folder / "saves") as log, checkpoint.Writer(folder / "saves", 2, None, 0, False) as writer:
        for step in (8, 9):
            writer.submit(step, contents(step), pointers=("last", "best"))
            log.mark(f"saved {step}")
    return log


def recorded_preparation(folder: Path) -> WriteList:
    """A preparation from nothing."""
    SCENES["prepare"].set_up(folder / "preparation")
    with recorded(folder / "preparation") as log:
        SCENES["prepare"].act(folder / "preparation")
        log.mark("prepared")
    return log


def check_saved(folder: Path, said: set[str], fsync_lies: bool) -> str:
    try:
        newest = checkpoint.newest_valid(folder)
    except CheckpointError:
        assert fsync_lies, "nothing loads"
        return "refused by name"
    step = int(newest.name[5:])
    least = max([7, *(int(text.split()[1]) for text in said)])
    assert is_intact(folder, step), f"step {step} verifies and is not what was saved"
    assert least <= step <= 9 or fsync_lies, f"step {least} was promised, {step} is there"
    for name in ("last", "best"):
        text = (folder / name).read_text(errors="replace") if (folder / name).exists() else ""
        assert fsync_lies or text in {f"step_{n:06d}\n" for n in (7, 8, 9)}, f"pointer {name}: {text!r}"
    checkpoint.remove_unfinished(folder)
    return f"found at step {step}"


def check_first_save(folder: Path, said: set[str], fsync_lies: bool) -> str:
    root = RunDirectory(folder / "runs" / "run-1").checkpoints
    found = checkpoint.steps(root)
    if said or found:
        assert found == [8], "the save had said that the checkpoint is on the disk"
        assert is_intact(root, 8)
    return "found" if found else "not yet there"


def check_without_checksum(folder: Path, said: set[str], fsync_lies: bool) -> str:
    """What a loader does that takes the newest name for good."""
    step = checkpoint.steps(folder)[-1]
    model = safetensors.torch.load_file(folder / f"step_{step:06d}" / "model.safetensors")
    assert all(torch.equal(model[name], tensor) for name, tensor in contents(step).model.items())
    return "loaded"


def check_prepared(folder: Path, said: set[str], fsync_lies: bool, may_refuse: bool = False) -> str:
    try:
        if said and (folder / "corpus").exists():  # a whole corpus that vanished is made again
            load_corpus(folder / "corpus", verify=True)
        SCENES["prepare"].act(folder)
        load_corpus(folder / "corpus", verify=True)
    except DataError as error:
        assert may_refuse, f"the disk held everything that was synchronized, and was refused: {error}"
        return "refused by name"
    assert files_of(folder / "corpus") == prepared(), "a corpus that verifies is not what was prepared"
    return "completed with the same bytes"


def check_recorded(folder: Path, said: set[str], fsync_lies: bool) -> str:
    run = RunDirectory(folder)
    rows = read_jsonl(run.scalars) if run.scalars.exists() else []
    assert all(row == metrics(row["step"]) for row in rows), "a row is wrong"
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    run.cut_after(10)
    assert [row["step"] for row in read_jsonl(run.scalars)] == [step for step in steps if step <= 10]
    return "readable"
