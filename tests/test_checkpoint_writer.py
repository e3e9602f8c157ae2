"""Saving beside the training loop: the state of the moment, one at a time, failures told, nothing old lost.

Operations of the disk are made to fail, or to kill the thread, one after the other until a save meets none of them.
"""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from builders import Fault, tiny_bitnet
from ternlm import checkpoint
from ternlm.checkpoint import snapshot as snapshot_module
from ternlm.checkpoint import writer as module
from ternlm.checkpoint.writer import Saved, Writer
from ternlm.errors import CheckpointError, Diverged, SettingsError, StorageFault, TernlmError
from test_checkpoint import contents, fake

STATE = {"run_id": "mine", "progress": {"step": 0, "best_loss": 1.5}}
BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["thread", "in place"])


def made(seed: int = 0, run_id: str = "mine") -> checkpoint.Contents:
    model = tiny_bitnet(vocab_size=256, num_hidden_layers=1, hidden_size=8, intermediate_size=8, seed=seed)
    return contents(seed, model, state={**STATE, "run_id": run_id, "seed": seed})


def seed_of(root: Path, step: int) -> int:
    return int(checkpoint.open_checkpoint(root / f"step_{step:06d}").state["seed"])


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def pointers(root: Path) -> dict[str, str]:
    return {name: (root / name).read_text().strip() for name in ("best", "last", "final") if (root / name).exists()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints: 3 is the best, 4 and 5 are the last two."""
    root = tmp_path_factory.mktemp("saved")
    with Writer(root, asynchronous=False) as writer:
        for step, names in ((3, ["best", "last"]), (4, ["last"]), (5, ["last"])):
            writer.submit(step, made(step), pointers=names)
    assert checkpoint.steps(root) == [3, 4, 5]
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


class Gate(NamedTuple):
    """Holds every save before its first file is written."""

    reached: threading.Event
    opened: threading.Event

    def wait_until_reached(self) -> None:
        assert self.reached.wait(30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, real = Gate(threading.Event(), threading.Event()), module.write_snapshot

    def held(*args: Any) -> None:
        made.reached.set()
        assert made.opened.wait(30)
        real(*args)

    monkeypatch.setattr(module, "write_snapshot", held)
    yield made
    made.opened.set()


def no_space(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# What is saved


def test_thread_and_place_write_the_same_bytes(tmp_path: Path) -> None:
    for name, asynchronous in (("a", True), ("b", False)):
        with Writer(tmp_path / name, asynchronous=asynchronous) as writer:
            writer.submit(7, made(), pinned="end", pointers=["best", "last", "final"])
            outcome = writer.wait()
        assert outcome is not None
        assert (outcome.step, outcome.path, outcome.removed) == (7, tmp_path / name / "step_000007", [])
        assert outcome.bytes > 10_000
    path = checkpoint.save(tmp_path / "c", 7, made(), pinned="end")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    for name in "ab":
        assert {f.name: f.read_bytes() for f in (tmp_path / name / "step_000007").iterdir()} == files
        assert pointers(tmp_path / name) == dict.fromkeys(("best", "last", "final"), "step_000007")


def test_l11_the_saved_state_is_that_of_the_moment_of_submission(tmp_path: Path, gate: Gate) -> None:
    model = tiny_bitnet(vocab_size=256)
    state: dict[str, Any] = {"run_id": "mine", "progress": {"step": 6}, "window": [1.0, 2.0]}
    taken = contents(model=model, state=state)
    weights = {name: tensor.clone() for name, tensor in taken.model.items()}
    moments = {name: tensor.clone() for name, tensor in taken.optimizer.items()}
    writer = Writer(tmp_path)
    writer.submit(6, taken)
    gate.wait_until_reached()
    with torch.no_grad():
        for tensor in (*taken.model.values(), *taken.optimizer.values()):
            tensor.fill_(77.0)
    state["progress"]["step"] = 9
    state["window"].append(3.0)
    gate.opened.set()
    writer.close()
    opened = checkpoint.open_newest(tmp_path)
    for found, wanted in ((opened.model, weights), (opened.optimizer, moments)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (opened.state["progress"], opened.state["window"]) == ({"step": 6}, [1.0, 2.0])


def test_the_memory_of_copies_is_used_again_and_given_back() -> None:
    buffers = snapshot_module.Buffers()
    first = buffers.copy("a", torch.ones(3, 5))
    assert buffers.copy("a", torch.zeros(3, 5)) is first
    assert not first.any()
    other = buffers.copy("a", torch.ones(5, 3).t())
    assert other is first, "views that are not contiguous fit as well"
    assert other.is_contiguous()
    assert torch.equal(other, torch.ones(3, 5))
    for value in (torch.ones(4, 5), torch.ones(3, 5).half()):
        copy = buffers.copy("a", value)
        assert (copy.shape, copy.dtype) == (value.shape, value.dtype)
    kept = buffers.copy("b", torch.ones(2))
    buffers.clear()
    assert buffers.copy("b", torch.ones(2)) is not kept


@BOTH
@pytest.mark.parametrize("where", ["model", "optimizer", "state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_at_once_and_harms_nothing(
    root: Path, asynchronous: bool, where: str, value: float
) -> None:
    good = made(6)
    if where == "state":
        bad = good._replace(state={**good.state, "progress": {"best_loss": value}})
    else:
        tensors = {name: tensor.clone() for name, tensor in getattr(good, where).items()}
        last = list(tensors)[-2]
        tensors[last].view(-1)[-1] = value
        bad = good._replace(**{where: tensors})
    writer = Writer(root, asynchronous=asynchronous)
    with pytest.raises(Diverged, match="finite") as caught:
        writer.submit(6, bad)
    assert caught.value.exit_code == 4
    assert writer.wait() is None
    assert checkpoint.steps(root) == [3, 4, 5]
    writer.submit(6, good)
    writer.close()
    assert seed_of(root, 6) == 6


def test_large_finite_values_are_saved(tmp_path: Path) -> None:
    good = made()
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in good.model.items()}
    path = checkpoint.save(tmp_path, 1, good._replace(model=huge))
    assert checkpoint.verify(path)["finite"] is True


# One at a time


def test_submit_returns_while_the_save_goes_on_and_the_next_one_waits(tmp_path: Path, gate: Gate) -> None:
    writer = Writer(tmp_path)
    assert writer.submit(1, made(1)) is None
    gate.wait_until_reached()
    assert writer.poll() is None
    assert checkpoint.steps(tmp_path) == []
    earlier: list[Saved | None] = []
    second = threading.Thread(target=lambda: earlier.append(writer.submit(2, made(2))))
    second.start()
    second.join(0.05)
    assert second.is_alive(), "the second save waits for the first"
    gate.opened.set()
    second.join(30)
    assert earlier[0] is not None
    assert earlier[0].step == 1
    outcome = writer.wait()
    assert outcome is not None
    assert (outcome.step, writer.wait(), writer.poll()) == (2, None, None), "told once"
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_poll_tells_a_finished_save_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.submit(1, made(1))
    assert writer._thread is not None
    writer._thread.join()
    outcome = writer.poll()
    assert outcome is not None
    assert outcome.step == 1
    assert writer.poll() is None


def test_a_process_that_must_end_is_not_held_up_and_close_waits(tmp_path: Path, gate: Gate) -> None:
    writer = Writer(tmp_path)
    writer.submit(1, made(1))
    gate.wait_until_reached()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint")
    threading.Timer(0.05, gate.opened.set).start()
    outcome = writer.close()
    assert outcome is not None
    assert checkpoint.newest_valid(tmp_path) == outcome.path
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_two_hundred_saves_leave_no_descriptor_and_no_thread_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    taken, writer = made(), Writer(tmp_path)
    counts = []
    for step in range(200):
        writer.submit(step, taken)
        writer.wait()
        counts.append((len(list(descriptors.iterdir())), threading.active_count()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        for step in range(200, 230):
            writer.submit(step, taken)
            with pytest.raises(StorageFault):
                writer.wait()
            counts.append((len(list(descriptors.iterdir())), threading.active_count()))
    assert len(set(counts)) == 1
    assert checkpoint.steps(tmp_path) == [198, 199]


# Failures


@pytest.mark.parametrize("how", ["poll", "wait", "submit", "close"])
def test_a_failure_is_told_once_with_its_cause_and_the_next_save_succeeds(
    root: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    writer = Writer(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        writer.submit(6, made(6), pointers=["best", "last"])
        assert writer._thread is not None
        writer._thread.join()
    with pytest.raises(StorageFault, match=r"step_000006.*No space left.*untouched") as caught:
        writer.submit(7, made(7)) if how == "submit" else getattr(writer, how)()
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "write_snapshot" in {entry.name for entry in caught.traceback} | {
        frame.tb_frame.f_code.co_name for frame in walk(caught.value.__cause__.__traceback__)
    }
    assert writer.poll() is None, "an error is told once"
    assert checkpoint.steps(root) == [3, 4, 5], "and the save that waited for it was not begun"
    assert hidden(root) == []
    assert pointers(root) == {"best": "step_000003", "last": "step_000005"}
    writer.submit(7, made(7))
    outcome = writer.close()
    assert outcome is not None
    assert outcome.removed == [4]
    assert checkpoint.steps(root) == [3, 5, 7]


def walk(traceback: Any) -> Iterator[Any]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def test_a_mistake_in_the_thread_is_not_swallowed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_snapshot", lambda *args: {}["nothing"])
    writer = Writer(root)
    writer.submit(6, made(6))
    with pytest.raises(KeyError):
        writer.wait()
    assert hidden(root) == []


def test_leaving_the_block_tells_a_failure_but_never_in_place_of_another_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(StorageFault), Writer(root) as writer:
        writer.submit(6, made(6))
    with pytest.raises(Diverged) as caught, Writer(root) as writer:
        writer.submit(6, made(6))
        raise Diverged("the loss is not finite.")
    assert "No space left" in caught.value.__notes__[0]


def test_a_disk_that_changes_bytes_on_the_way_is_noticed_before_anything_moves(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is that of the memory, so a hash of what the disk took would pass here."""
    real = os.write

    def corrupting(descriptor: int, content: Any) -> int:
        damaged = bytearray(content)
        damaged[-1] ^= 1
        return real(descriptor, damaged if len(content) > 5000 else content)

    writer = Writer(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", corrupting)
        writer.submit(6, made(6), pointers=["best", "last"])
        with pytest.raises(StorageFault, match=r"does not read back.*model\.safetensors"):
            writer.wait()
    assert checkpoint.steps(root) == [3, 4, 5]
    assert hidden(root) == []
    assert pointers(root) == {"best": "step_000003", "last": "step_000005"}


def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of what a save does, as words."""
    order: list[str] = []

    def tell(owner: Any, name: str, word: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def told(*args: Any, **options: Any) -> Any:
            order.append(word(*args))
            return real(*args, **options)

        monkeypatch.setattr(owner, name, told)

    tell(os, "rename", lambda a, b: f"name {Path(b).name}")
    tell(os, "replace", lambda a, b: f"name {Path(b).name}")
    tell(os, "fsync", lambda descriptor: "fsync")
    tell(module, "verify", lambda path: f"verify {path.name}")
    tell(shutil, "rmtree", lambda path: f"delete {Path(path).name}")
    return order


@BOTH
def test_l11_nothing_moves_or_goes_before_the_new_checkpoint_is_durable_and_verified(
    root: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    order = trace(monkeypatch)
    with Writer(root, asynchronous=asynchronous) as writer:
        writer.submit(6, made(6), pointers=["best", "last", "final"])
    words = [word for word in order if word != "fsync" and not word.startswith("name tokenizer")]
    gone = [f"{verb} .del-step_{step:06d}" for step in (3, 4) for verb in ("delete", "name", "delete")]
    assert words == [
        "delete .tmp-step_000006", "name step_000006", "verify step_000006",
        "name best", "name last", "name final", *gone,
    ]  # fmt: skip
    named = order.index("name step_000006")
    assert order[named - 1] == order[named + 1] == "fsync", "the folder, then the name"
    assert order[order.index("name .del-step_000003") + 1] == "fsync", "before its content goes"
    assert checkpoint.steps(root) == [5, 6]


class Killed(BaseException):
    """The process is gone: no handler of the package has a right to see it."""


class Kill(Fault):
    """Lets the process die at the n-th operation: neither it nor any later one happens."""

    OPERATIONS = (*Fault.OPERATIONS, "unlink", "rmdir")

    def _failing(self, name: str, real: Any, n: int, sticks: bool) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count < n:
                return real(*args, **options)
            self.met = True
            if name == "close":
                with suppress(OSError):  # the interpreter goes on and may close twice
                    real(*args, **options)
            raise Killed

        return operation


def submit_and_wait(root: Path, taken: checkpoint.Contents, asynchronous: bool) -> None:
    writer = Writer(root, asynchronous=asynchronous)
    writer.submit(6, taken, pointers=["best", "last"])
    writer.close()


def require_old_or_new(root: Path) -> bool:
    """Whether the new checkpoint is there; everything that is promised of either case holds."""
    opened = checkpoint.open_newest(root)
    assert opened.state["seed"] == opened.manifest["step"] == int(opened.path.name[-1])
    is_new = opened.manifest["step"] == 6
    assert is_new or checkpoint.steps(root) == [3, 4, 5], "nothing goes before the new one is there"
    assert 5 in checkpoint.steps(root)
    assert seed_of(root, 5) == 5
    for name in pointers(root).values():
        assert checkpoint.verify(root / name)
    assert is_new or pointers(root) == {"best": "step_000003", "last": "step_000005"}
    return is_new


@pytest.mark.parametrize(("how", "asynchronous"), [("once", True), ("sticks", True), ("kill", True), ("once", False)])
def test_l11_a_fault_at_any_operation_leaves_the_old_or_the_new_and_is_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, asynchronous: bool
) -> None:
    ended, taken = {True: 0, False: 0}, made(6)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it may fail, and takes no time
    for n in range(1, 200):
        root = Path(shutil.copytree(saved, tmp_path / str(n)))
        with monkeypatch.context() as patch:
            fault = (Kill if how == "kill" else Fault)(patch.setattr, n, how == "sticks")
            try:
                submit_and_wait(root, taken, asynchronous)
                failed = False
            except (TernlmError, Killed) as error:
                failed = True
                assert isinstance(error, Killed if how == "kill" else StorageFault)
        if not fault.met:
            break
        is_new = require_old_or_new(root)
        ended[is_new] += 1
        assert failed or is_new, "a save that is told to be good is good"
        if how == "once" and not is_new:
            assert hidden(root) == [], "what failed is cleared away"
        checkpoint.remove_unfinished(root)
        submit_and_wait(root, taken, asynchronous)
        assert checkpoint.open_newest(root).state["seed"] == 6
        assert hidden(root) == []
        assert checkpoint.steps(root) == [5, 6]
        assert pointers(root) == {"best": "step_000006", "last": "step_000006"}
        shutil.rmtree(root)
    else:
        pytest.fail("the save never ended")
    assert ended[False] > 20
    assert ended[True] > 5


# Disks that are nearly full


def disk(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free()}))


@BOTH
def test_a_disk_that_is_nearly_full_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fake(tmp_path, 3)
    disk(monkeypatch, lambda: 100_000_000)
    order = trace(monkeypatch)
    writer = Writer(tmp_path, asynchronous=asynchronous)
    with pytest.raises(StorageFault, match=r"100 MB free.*needs 200 MB.*free disk space") as caught:
        writer.submit(6, made(6))
        writer.wait()
    assert caught.value.exit_code == 3
    assert [word for word in order if word == "fsync" or word.startswith("name")] == []
    assert checkpoint.newest_valid(tmp_path).name == "step_000003"
    assert checkpoint.steps(tmp_path) == [3]


def test_room_for_a_fifth_more_than_the_checkpoint_and_a_reserve_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, lambda: 1_200_000_500)
    checkpoint.require_room(tmp_path / "new", 10**9, min_free=500)
    with pytest.raises(StorageFault):
        checkpoint.require_room(tmp_path, 10**9, min_free=501)
    size = checkpoint.Writer(tmp_path, asynchronous=False)
    size.submit(1, made())
    saved = size.wait()
    assert saved is not None
    files = [file for file in saved.path.iterdir() if "tokenizer" not in file.name and file.name != "manifest.json"]
    assert saved.bytes == sum(file.stat().st_size for file in files)
    disk(monkeypatch, lambda: saved.bytes + saved.bytes // 5 + 999)
    with pytest.raises(StorageFault):
        Writer(tmp_path, asynchronous=False, min_free=1000).submit(2, made())
    Writer(tmp_path, asynchronous=False, min_free=999).submit(2, made())


def test_old_checkpoints_make_room_first_and_never_the_last_good_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / ".tmp-step_000002").mkdir()
    disk(monkeypatch, lambda: 10**12 if len(checkpoint.steps(root)) < 3 else 0)
    writer = Writer(root)
    writer.submit(6, made(6))
    outcome = writer.wait()
    assert outcome is not None
    assert outcome.removed == [4], "not the best, and not the newest"
    assert checkpoint.steps(root) == [3, 5, 6]
    assert hidden(root) == []


def test_room_is_not_made_at_the_cost_of_the_last_checkpoint_that_verifies(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "best").unlink()
    (root / "step_000005" / "model.safetensors").write_bytes(b"")
    disk(monkeypatch, lambda: 0)
    writer = Writer(root)
    writer.submit(6, made(6))
    with pytest.raises(StorageFault):
        writer.wait()
    assert checkpoint.steps(root) == [4, 5]
    assert checkpoint.newest_valid(root).name == "step_000004"
    (root / "step_000004" / "manifest.json").write_bytes(b"")
    writer.submit(6, made(6))
    with pytest.raises(StorageFault):
        writer.wait()
    assert checkpoint.steps(root) == [4, 5], "where nothing verifies nothing is deleted"


def test_a_disk_whose_room_cannot_be_asked_for_costs_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", no_space)
    with pytest.raises(StorageFault), Writer(root) as writer:
        writer.submit(6, made(6))
    assert checkpoint.steps(root) == [3, 4, 5]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
def test_l11_a_disk_that_is_full_at_any_size_keeps_the_last_good_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in (root / "step_000005").iterdir())
    failures = 0
    for limit in [*range(0, largest, largest // 25), largest - 1]:
        writer = Writer(root)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            writer.submit(6, made(6))
            writer.wait()
        except StorageFault:
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoint.open_newest(root).state["seed"] == 5
        assert hidden(root) == []
    assert failures == 27
    writer.submit(6, made(6))
    writer.close()
    assert checkpoint.open_newest(root).state["seed"] == 6


# Retention


def test_a_writer_keeps_the_last_the_best_the_pinned_and_the_protected(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_last=2, keep_every=10)
    removed = []
    for step in range(1, 13):
        names = ["best", "last"] if step in (2, 7) else ["last"]
        writer.submit(step, made(step), "boundary" if step == 4 else None, names, {1} if step < 9 else ())
        outcome = writer.wait()
        assert outcome is not None
        removed += outcome.removed
    assert checkpoint.steps(tmp_path) == [4, 7, 10, 11, 12]
    assert removed == [3, 2, 5, 6, 1, 8, 9], "the best of step 2 goes once step 7 is better"
    assert pointers(tmp_path) == {"best": "step_000007", "last": "step_000012"}


def test_checkpoints_of_other_runs_and_of_higher_steps_stay(tmp_path: Path) -> None:
    fake(tmp_path, 1, 2, 9, 10, run_id="mine")
    fake(tmp_path, 3, 11, run_id="another")
    fake(tmp_path, 4, run_id=None)
    with Writer(tmp_path) as writer:
        writer.submit(8, made(8))
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 8, 9, 10, 11]
    with Writer(tmp_path) as writer:
        writer.submit(8, made(8)._replace(state={}))
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 8, 9, 10, 11], "a run without a name deletes nothing"


def test_a_damaged_checkpoint_of_the_same_step_gives_way(root: Path) -> None:
    (root / "step_000005" / "manifest.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(CheckpointError):
        checkpoint.verify(root / "step_000005")
    with Writer(root) as writer:
        writer.submit(5, made(8))
    assert seed_of(root, 5) == 8
    assert hidden(root) == []


def test_a_checkpoint_saved_as_a_folder_is_one_like_any_other_with_its_reports(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibrated"
    given = made(7)._replace(optimizer={}, reports={"report.json": {"loss": 1.25}})
    assert checkpoint.save_as(path, 7, given) == path
    assert json.loads((path / "report.json").read_text()) == {"loss": 1.25}
    assert "report.json" in checkpoint.verify(path)["files"]
    opened = checkpoint.open_checkpoint(path)
    assert (opened.state["step"], opened.optimizer) == (7, {})
    assert checkpoint.resolve(str(path), tmp_path) == path
    (path / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"report\.json"):
        checkpoint.verify(path)


def test_a_checkpoint_is_never_saved_as_a_folder_that_is_there(tmp_path: Path) -> None:
    for there in (tmp_path, tmp_path / "file"):
        if there != tmp_path:
            there.write_text("mine")
        with pytest.raises(SettingsError, match="exists already"):
            checkpoint.save_as(there, 7, made(7))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing_of_a_checkpoint_saved_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        with pytest.raises(StorageFault, match=r"cannot be written: No space left.*choose another folder"):
            checkpoint.save_as(tmp_path / "calibrated", 7, made(7))
    assert list(tmp_path.iterdir()) == []
