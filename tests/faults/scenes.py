"""The three things that write, made small, and what must hold wherever one of them is cut off.

Each scene knows a state before, the act that is disturbed, and the truth to compare with, which was computed in memory
and never written.
"""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_bitnet, tiny_contents, tiny_data_settings
from ternlm import checkpoint
from ternlm.data import shards
from ternlm.data.corpus import load_corpus
from ternlm.data.shards import prepare
from ternlm.errors import DataError
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tokenizers import ByteTokenizer
from ternlm.tracking.csv import CsvTracker
from ternlm.tracking.jsonl import JsonlTracker
from ternlm.training.status import StatusFile

RUN = "run-1"


class Scene(ABC):
    """Something that writes.

    Attributes:
        name: For messages.
        may_fail_with: What `act` may raise when the disk refuses.
    """

    name: str
    may_fail_with: tuple[type[Exception], ...] = ()

    @abstractmethod
    def set_up(self, folder: Path) -> None:
        """Make the state before, in a folder that does not exist."""

    @abstractmethod
    def act(self, folder: Path) -> None:
        """What is cut off."""

    @abstractmethod
    def check(self, folder: Path, completed: bool) -> None:
        """Assert that the folder holds the old or the new state, and that work goes on from there.

        Args:
            folder: What is left.
            completed: Whether `act` came to its end, so that only the new state will do.
        """


class Saving(Scene):
    """A checkpoint of step 8 beside those of 3, 5 and 7, with pointers and retention."""

    name = "save"

    def set_up(self, folder: Path) -> None:
        shutil.copytree(_saved(), folder)

    def act(self, folder: Path) -> None:
        with checkpoint.Writer(folder, keep_last=2, min_free=0, asynchronous=False) as writer:
            writer.submit(8, contents(8), pointers=("last", "best"))

    def check(self, folder: Path, completed: bool) -> None:
        for step in checkpoint.steps(folder):
            assert is_intact(folder, step), f"{step} has a valid name and is not what was saved"
        newest = checkpoint.newest_valid(folder).name
        assert newest in (("step_000008",) if completed else ("step_000007", "step_000008"))
        for name in ("last", "best"):
            assert (folder / name).read_text().strip() in ("step_000007", newest)
        checkpoint.remove_unfinished(folder)
        self.act(folder)
        assert checkpoint.newest_valid(folder).name == "step_000008"
        visible = {path.name for path in folder.iterdir() if path.name[:5] in (".tmp-", ".del-") or path.name[0] != "."}
        assert visible == {"step_000007", "step_000008", "last", "best"}
        assert is_intact(folder, 8)


class Recording(Scene):
    """Four rows of metrics in JSON and CSV, and the status after each."""

    name = "record"
    may_fail_with = (OSError,)
    steps = range(11, 15)

    def set_up(self, folder: Path) -> None:
        run = RunDirectory(folder)
        run.create()
        for step in (9, 10):
            JsonlTracker(run).log("train", metrics(step))
            CsvTracker(run).log("train", metrics(step))
        StatusFile(run, print).update("starting", step=10)

    def act(self, folder: Path) -> None:
        run = RunDirectory(folder)
        status = StatusFile(run, print)
        for step in self.steps:
            JsonlTracker(run).log("train", metrics(step))
            CsvTracker(run).log("train", metrics(step))
            status.update("training" if step % 2 else "saving", step=step)
        status.final("finished", 0)

    def check(self, folder: Path, completed: bool) -> None:
        run = RunDirectory(folder)
        JsonlTracker(run).log("train", metrics(20))
        CsvTracker(run).log("train", metrics(20))
        rows = read_jsonl(run.scalars)
        reached = [row["step"] for row in rows[:-1]]
        assert reached == list(range(9, 9 + len(reached))), "a row is missing in the middle"
        assert len(reached) >= (6 if completed else 2), "a row is lost that was there before"
        assert rows == [metrics(step) for step in [*reached, 20]], "a row is not what was logged"
        assert json.loads(run.status.read_bytes())["step"] in range(10, 15)
        run.cut_after(10)
        assert read_jsonl(run.scalars) == [metrics(9), metrics(10)]
        assert run.training_csv.read_text() == "step,elapsed_seconds,loss,lr,grad_norm,bpb,perplexity\n" + "".join(
            f"{step},{step / 3},{1 / step},,,,\n" for step in (9, 10)
        )


class Preparing(Scene):
    """A corpus of two splits in many shards, from nothing."""

    name = "prepare"

    def set_up(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def act(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SHARD_TOKENS", 200)
            patch.setattr(shards, "COMMIT_TOKENS", 150)
            patch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 90)
            prepare(_data(), ByteTokenizer(), folder / "corpus")

    def check(self, folder: Path, completed: bool) -> None:
        if (folder / "corpus" / "manifest.json").exists():
            complete = {name: content for name, content in files_of(folder / "corpus").items() if name in prepared()}
            assert complete == prepared(), "a manifest stands for a corpus that is complete"
        else:
            assert not completed
            with pytest.raises(DataError, match="no prepared corpus"):
                load_corpus(folder / "corpus")
        self.act(folder)
        assert files_of(folder / "corpus") == prepared()
        load_corpus(folder / "corpus", verify=True)


SCENES: dict[str, Scene] = {scene.name: scene for scene in (Saving(), Recording(), Preparing())}


@cache
def contents(step: int) -> checkpoint.Contents:
    """What a checkpoint of a step holds; every step has other weights."""
    model = tiny_bitnet(vocab_size=256, hidden_size=8, num_hidden_layers=1, intermediate_size=24, seed=step)
    state = {"run_id": RUN, "progress": {"step": step, "samples": 3 * step, "rollbacks": 0}, "loss_scale": {}}
    made = tiny_contents(model, state)
    return made._replace(model={name: tensor.detach().clone() for name, tensor in made.model.items()})


def is_intact(root: Path, step: int) -> bool:
    """Whether the checkpoint of a step holds exactly what was saved under it."""
    _, _, model, optimizer, state = checkpoint.open_checkpoint(root / f"step_{step:06d}")
    truth = contents(step)
    same = _equal(model, truth.model) and _equal(optimizer, truth.optimizer)
    return same and all(state[name] == value for name, value in truth.state.items())


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every visible file below a folder, by its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _equal(found: Any, truth: Any) -> bool:
    return found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)


def metrics(step: int) -> dict[str, Any]:
    """One logged row."""
    return {"step": step, "wall_s": step / 3, "train/loss": 1 / step, "text": "naïve 🙂\n" * step}


_FOLDERS: dict[str, Path] = {}


def place(folder: Path) -> None:
    """Make the states before below a folder, undisturbed; once per test and process."""
    _FOLDERS["base"] = folder
    for make in (_saved, _data, prepared):
        make.cache_clear()
        make()


@cache
def _saved() -> Path:
    root = _FOLDERS["base"] / "saved"
    for step in (3, 5, 7):
        checkpoint.save(root, step, contents(step))
    for name in ("last", "best"):
        checkpoint.point(root, name, root / "step_000007")
    return root


@cache
def _data() -> Any:
    documents = [f"Tale {i}: a fox. " + "It ran. " * (i % 7) for i in range(12)]
    held_out = [f"Tale {i} again." for i in range(3)]
    return tiny_data_settings(_FOLDERS["base"] / "source", documents, held_out)


@cache
def prepared() -> dict[str, str]:
    """The files of the corpus that nothing disturbed."""
    SCENES["prepare"].set_up(_FOLDERS["base"] / "whole")
    SCENES["prepare"].act(_FOLDERS["base"] / "whole")
    return files_of(_FOLDERS["base"] / "whole" / "corpus")
