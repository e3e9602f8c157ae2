"""Checkpoints of a run in their folder: found, named, pointed at, pruned and set aside."""

import shutil
from pathlib import Path

import pytest

from builders import Fault
from ternlm import checkpoint
from ternlm.errors import CheckpointError, StorageFault
from test_checkpoint import contents, fake


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for step in (3, 7):
        checkpoint.save(root, step, contents(seed=step))
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# What is left over


def test_what_a_killed_process_left_is_ignored_and_removed(root: Path) -> None:
    for name in (".tmp-step_000009", ".del-step_000001"):
        shutil.copytree(root / "step_000007", root / name)
    (root / ".last.4711").touch()
    (root / "step_12").mkdir()
    (root / "step_000011.bak").mkdir()
    assert checkpoint.steps(root) == [3, 7]
    checkpoint.remove_unfinished(root)
    assert sorted(path.name for path in root.iterdir()) == ["step_000003", "step_000007", "step_000011.bak", "step_12"]


# Retention and order


def test_e11_steps_are_ordered_by_number_and_not_by_name(tmp_path: Path) -> None:
    fake(tmp_path, 9_000, 10_000, 999_999, 1_000_000, 200)
    assert checkpoint.steps(tmp_path) == [200, 9_000, 10_000, 999_999, 1_000_000]
    assert checkpoint.newest_valid(tmp_path).name == "step_1000000"
    assert sorted(path.name for path in tmp_path.iterdir() if len(path.name) == 11) == [
        "step_000200",
        "step_009000",
        "step_010000",
        "step_999999",
    ]


def test_pruning_keeps_the_last_the_best_the_pinned_and_every_nth(tmp_path: Path) -> None:
    fake(tmp_path, *range(100, 1100, 100), pinned=(200,))
    checkpoint.point(tmp_path, "best", tmp_path / "step_000300")
    assert checkpoint.prune(tmp_path, keep_last=2, keep_every=400) == [100, 500, 600, 700]
    assert checkpoint.steps(tmp_path) == [200, 300, 400, 800, 900, 1000]
    assert checkpoint.prune(tmp_path, keep_last=2, keep_every=400) == []
    assert not list(tmp_path.glob(".del-*"))


def test_pruning_never_deletes_the_only_checkpoint_nor_what_it_did_not_write(tmp_path: Path) -> None:
    fake(tmp_path, 5)
    (tmp_path / "step_5_notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.prune(tmp_path, keep_last=0) == []
    assert {path.name for path in tmp_path.iterdir()} == {"step_000005", "step_5_notes", "notes.txt"}


def test_pruning_looks_at_the_checkpoints_of_its_own_run_only(tmp_path: Path) -> None:
    fake(tmp_path, 1, 3, 4, 9)
    fake(tmp_path, 2, 5, run_id="another")
    fake(tmp_path, 6, run_id=None)
    assert checkpoint.prune(tmp_path, keep_last=2, run_id="mine") == [1, 3]
    assert checkpoint.steps(tmp_path) == [2, 4, 5, 6, 9]
    (tmp_path / "step_000004" / "manifest.json").write_bytes(b"{")
    assert checkpoint.prune(tmp_path, keep_last=1, run_id="mine") == [], "whose it is cannot be read"


def test_pruning_neither_counts_nor_deletes_what_has_a_higher_number(tmp_path: Path) -> None:
    fake(tmp_path, 1, 3, 4, 8, 9)
    assert checkpoint.prune(tmp_path, keep_last=2, run_id="mine", before=5) == [1]
    assert checkpoint.steps(tmp_path) == [3, 4, 8, 9]


def test_protected_steps_survive_pruning(tmp_path: Path) -> None:
    fake(tmp_path, *range(1, 8))
    assert checkpoint.prune(tmp_path, keep_last=1, protect={2, 5, 99}) == [1, 3, 4, 6]


def test_pruning_renames_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, 1, 2, 3)
    deleted: list[str] = []
    monkeypatch.setattr(checkpoint.store.shutil, "rmtree", lambda path, **options: deleted.append(Path(path).name))
    checkpoint.prune(tmp_path, keep_last=2)
    assert set(deleted) == {".del-step_000001"}
    assert checkpoint.steps(tmp_path) == [2, 3]


# Going back


def test_abandoned_checkpoints_are_set_aside_and_the_next_resume_finds_the_older_one(root: Path) -> None:
    checkpoint.save(root, 9, contents(seed=9))
    for name, step in (("best", 7), ("last", 9), ("final", 3)):
        checkpoint.point(root, name, root / f"step_{step:06d}")
    assert checkpoint.abandon(root, after=3) == [7, 9]
    assert checkpoint.open_newest(root).state["step"] == 3
    left = {path.name for path in root.iterdir()}
    assert left == {"step_000003", ".rolled-step_000007", ".rolled-step_000009", "final"}
    assert checkpoint.abandon(root, after=3) == []
    assert {path.name for path in root.iterdir()} == left
    checkpoint.remove_unfinished(root)
    assert {path.name for path in root.iterdir()} == left - {".rolled-step_000007"}, "the newest is kept"


def test_a_second_abandoned_checkpoint_of_a_step_replaces_the_first(root: Path) -> None:
    first = (root / "step_000007" / "manifest.json").read_bytes()
    checkpoint.abandon(root, after=3)
    checkpoint.save(root, 7, contents(seed=1))
    checkpoint.abandon(root, after=3)
    assert (root / ".rolled-step_000007" / "manifest.json").read_bytes() != first
    assert checkpoint.steps(root) == [3]
    assert checkpoint.abandon(root / "missing", after=0) == []


@pytest.mark.parametrize("sticks", [False, True])
def test_abandoning_that_is_cut_off_anywhere_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticks: bool
) -> None:
    failures = 0
    for n in range(1, 50):
        root = tmp_path / str(n)
        fake(root, 3, 7, 9)
        fake(root / "before", 9)
        (root / "before" / "step_000009").rename(root / ".rolled-step_000009")
        checkpoint.point(root, "last", root / "step_000009")
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            try:
                checkpoint.abandon(root, after=3)
            except StorageFault:
                failures += 1
        if not fault.met:
            break
        assert (root / "step_000003").is_dir()
        checkpoint.abandon(root, after=3)
        assert checkpoint.steps(root) == [3]
        assert checkpoint.newest_valid(root).name == "step_000003"
        assert not (root / "last").exists()
    else:
        pytest.fail("it never ended")
    assert failures > 2


# Names


@pytest.fixture
def runs(root: Path, tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo-1"
    (run / "meta").mkdir(parents=True)
    shutil.copytree(root, run / "checkpoints")
    checkpoint.point(run / "checkpoints", "best", run / "checkpoints" / "step_000003")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("reference", "step"),
    [
        ("demo-1", 7),
        ("demo", 7),
        ("latest", 7),
        ("demo-1@last", 7),
        ("demo-1@best", 3),
        ("demo-1@3", 3),
        ("demo-1@step_000003", 3),
        ("latest@000007", 7),
    ],
)
def test_a_run_and_a_step_lead_to_a_checkpoint(runs: Path, reference: str, step: int) -> None:
    assert checkpoint.resolve(reference, runs) == runs / "demo-1" / "checkpoints" / f"step_{step:06d}"


def test_a_checkpoint_folder_is_a_reference_too(runs: Path, tmp_path: Path) -> None:
    path = runs / "demo-1" / "checkpoints" / "step_000003"
    assert checkpoint.resolve(str(path), tmp_path) == path
    moved = Path(shutil.copytree(path, tmp_path / "my-model"))
    assert checkpoint.resolve(str(moved), tmp_path) == moved
    assert checkpoint.resolve(str(runs / "demo-1"), tmp_path).name == "step_000007"


def test_the_last_falls_back_and_a_named_step_never_does(runs: Path) -> None:
    newest = runs / "demo-1" / "checkpoints" / "step_000007"
    (newest / "model.safetensors").write_bytes(b"")
    assert checkpoint.resolve("demo-1", runs).name == "step_000003"
    assert checkpoint.resolve("demo-1@7", runs) == newest
    with pytest.raises(CheckpointError):
        checkpoint.load(newest)


@pytest.mark.parametrize(
    "reference",
    [
        "nothing",
        "demo-1@8",
        "demo-1@final",
        "demo-1@x",
        "a/step_000003",
        "demo-1@../..",
        "demo-1@²",
        "demo-1@" + "9" * 200,
    ],
)
def test_a_reference_that_leads_nowhere_is_one_sentence(runs: Path, reference: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resolve(reference, runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"../../etc\n", b"\xff\xfe\x00", b"step_9\n", b"step_000003\nstep_000007\n"])
def test_a_damaged_pointer_is_one_sentence_and_pruning_survives_it(runs: Path, content: bytes) -> None:
    root = runs / "demo-1" / "checkpoints"
    (root / "best").write_bytes(content)
    with pytest.raises(CheckpointError, match="no 'best' checkpoint"):
        checkpoint.resolve("demo-1@best", runs)
    assert checkpoint.prune(root, keep_last=2) == []


def test_a_pointer_that_cannot_be_written_is_a_typed_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.point(root, "last", root / "step_000003")
    with monkeypatch.context() as patch:
        Fault(patch.setattr, 1, sticks=True)
        with pytest.raises(StorageFault, match="last"):
            checkpoint.point(root, "last", root / "step_000007")
    assert (root / "last").read_text() == "step_000003\n"
    assert not list(root.glob(".last*"))
