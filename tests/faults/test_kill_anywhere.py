"""`kill -9` at any instant of a run, again and again: what comes out in the end is what an undisturbed run makes.

The run is the real one: it prepares its data in many small shards, trains, evaluates, samples and saves often. The
oracle is a run left alone: weights, optimizer and corpus by sha256, every metrics row by value.
"""

import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Row, apart, forked

from builders import tiny_data_settings, tiny_settings
from ternlm import checkpoint, files
from ternlm.data import shards
from ternlm.data.preparation import prepare_data
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.training import launch, trainer
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings
from ternlm.training.trainer import Trainer

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="kills and /proc are used as Linux has them"),
]

KILLS, STEPS, SEED = 200, 40, 1
FSYNC_S = 0.0005
LATEST = 0.35  # of an undisturbed run, so that most children are killed
HELD_OUT = [f"{i} old hens met a fox who ran {'away ' * (i % 4)}" for i in range(9)]
DOCUMENTS = [f"Tale {i}: the {'red' if i % 2 else 'blue'} fox met hens." + " It ran." * (i % 5) for i in range(900)]


def test_kill_anywhere(folder: Path, row: Row) -> None:
    """200 kills spread over the whole life of a run change nothing."""
    found = apart(kill_again_and_again, str(folder), SEED, KILLS, None, seconds=600)
    where = found["where"]
    row.trials, row.injected = found["kills"], ", ".join(f"{n} in {place}" for place, n in sorted(where.items()))
    assert not found["differences"], "\n".join(found["differences"])
    assert found["kills"] >= KILLS
    for place in ("data", "training", "checkpoint"):
        assert where.get(place, 0) >= 10, f"too few kills fell into {place}: {where}"
    controls = apart(find_every_bug, str(folder / "bugs"), SEED, seconds=300)
    assert all(controls.values()), f"bugs that nobody noticed: {[bug for bug in controls if not controls[bug]]}"
    row.controls = f"{sum(controls.values())} of {len(controls)}"
    row.result = f"{found['runs']} of {found['runs']} runs identical to the undisturbed one"


# In a process of its own


def kill_again_and_again(folder: str, seed: int, kills: int, bug: str | None) -> dict[str, Any]:
    """Runs killed until they end; stops after so many kills, or at the first run that ends otherwise than it should."""
    with small_and_slow():
        train(sources_in(Path(folder) / "warm"))
        started = time.perf_counter()
        train(sources_in(Path(folder) / "alone"))
        whole = time.perf_counter() - started
        expected = outcome(Path(folder) / "alone")
        where: Counter[str] = Counter()
        differences: list[str] = []
        runs = 0
        while where.total() < kills and not differences:
            draw = random.Random(f"{seed}/{runs}")
            differences = one_run(sources_in(Path(folder) / f"run-{runs}"), draw, whole, bug, where, expected)
            differences = [f"run {runs} of seed {seed}, bug {bug}: {text}" for text in differences]
            runs += 1
    return {"kills": where.total(), "where": where, "runs": runs, "differences": differences}


def find_every_bug(folder: str, seed: int) -> dict[str, bool]:
    """Whether the same harness notices each of the seeded bugs within 60 kills."""
    return {
        bug: bool(kill_again_and_again(f"{folder}/{number}", seed, 60, bug)["differences"])
        for number, bug in enumerate(BUGS)
    }


def one_run(
    folder: Path, draw: random.Random, whole: float, bug: str | None, where: Counter[str], expected: dict[str, Any]
) -> list[str]:
    """Start, kill, resume, kill ... until the run is complete; how it differs from the expected outcome."""
    for _ in range(200):
        began = time.time_ns()
        code, said = forked(lambda: train(folder, bug), kill_after=draw.uniform(0, LATEST * whole))
        if code == 0:
            found = outcome(folder)
            return [f"{name} differs: {found[name]!r:.500}" for name in expected if found[name] != expected[name]]
        if code > 0 and "by another process" in said:
            time.sleep(0.05)  # a process that the dead one was starting (git) holds its lock for a moment longer
            continue
        if code > 0:
            return [f"a child ended with {code} after {dict(where)}: {said}"]
        where[place_of_death(folder, began)] += 1
    return ["the run did not end after 200 kills"]


def train(folder: Path, bug: str | None = None) -> None:
    """Start the run of a folder, or resume it if it was started before."""
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            BUGS[bug](patch)
        run = RunDirectory(folder / "run")
        if run.config.exists():
            launch.resume(run, {}, prepare, quiet=True)
        else:
            launch.start(Resolved(settings(folder).model_dump(mode="json"), {}), run, prepare, quiet=True)


def prepare(settings: RunSettings, stream: Path) -> Any:
    return prepare_data(settings.data, settings.tokenizer)


def sources_in(folder: Path) -> Path:
    """A folder with the documents of a run; they are not part of what is killed."""
    tiny_data_settings(folder, DOCUMENTS, HELD_OUT)
    return folder


def settings(folder: Path) -> RunSettings:
    paths = {"source": folder / "train.txt", "validation_path": folder / "validation.txt", "cache": folder / "cache"}
    return tiny_settings(
        folder / "unused",
        data={name: str(path) for name, path in paths.items()},
        training={"max_steps": STEPS, "batch_size": 5, "checkpoint_every_steps": 2, "keep_every": 20},
        schedule={"name": "two_stage", "warmup_steps": 3},
        tracking={"every_steps": 1, "tensorboard": False},
        evaluation={"every_steps": 20, "sample_every_steps": 10, "sample_tokens": 3, "prompts": ["The"]},
    )


@contextmanager
def small_and_slow() -> Iterator[None]:
    """Dozens of commits and shards in a few kilobytes of text, on a disk whose fsync takes half a millisecond.

    The folder is in memory, so that the time does not depend on who else uses the disk; a kill loses nothing that was
    written, synchronized or not. What does depend on fsync is the model of `test_power_cut`.
    """
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(FSYNC_S)
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(shards, "SHARD_TOKENS", 1000)
        patch.setattr(shards, "COMMIT_TOKENS", 500)
        patch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 300)
        yield


def outcome(folder: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was killed."""
    run = RunDirectory(folder / "run")
    newest = checkpoint.newest_valid(run.checkpoints)
    hashes = {name: sha256(newest / f"{name}.safetensors") for name in ("model", "optimizer")}
    state = json.loads((newest / "trainer_state.json").read_text())
    state["progress"].pop("elapsed_s")
    (corpus,) = (folder / "cache").glob("*/manifest.json")
    return {
        "last checkpoint": newest.name,
        "checkpoints": checkpoint.steps(run.checkpoints),
        "pointers": {name: read(run.checkpoints / name) for name in ("best", "last", "final")},
        "counters": {name: state[name] for name in ("progress", "data_fingerprint", "step")},
        **hashes,
        "train rows": values(run.scalars, "step", "tokens_seen", "train/loss", "train/grad_norm"),
        "eval rows": values(run.evaluations, "step", "tokens_seen", "val/loss"),
        "sample rows": values(run.samples, "step", "generated_ids"),
        "shards": {f"{path.parent.name}/{path.name}": sha256(path) for path in sorted(corpus.parent.rglob("*.bin"))},
        "left over": sorted(path.name for path in folder.rglob("*") if re.search(r"\.part$|^\.(tmp|del)-", path.name)),
    }


def place_of_death(folder: Path, began: int) -> str:
    """What the child that began at a time was doing, read off what it left."""
    run, cache = RunDirectory(folder / "run"), folder / "cache"
    for pattern in (".tmp-step_*", ".del-step_*"):
        if any(path.stat().st_mtime_ns >= began for path in run.checkpoints.glob(pattern)):
            return "checkpoint"
    if list(cache.rglob("progress.json")):
        return "data"
    rows = [run.scalars, run.evaluations, run.samples]
    return "training" if any(path.exists() and path.stat().st_mtime_ns >= began for path in rows) else "start"


def values(file: Path, *names: str) -> list[list[Any]]:
    return [[row[name] for name in names] for row in read_jsonl(file)]


def read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Negative controls: bugs of real trainers


def _restored_then(patch: pytest.MonkeyPatch, change: Callable[[Trainer], None]) -> None:
    real = Trainer._restore

    def restore(self: Trainer, path: Path) -> None:
        real(self, path)
        change(self)

    patch.setattr(Trainer, "_restore", restore)


def _schedule_restarted(patch: pytest.MonkeyPatch) -> None:
    begun, real = [0], Schedule.learning_rate
    _restored_then(patch, lambda self: begun.insert(0, self.progress.step))
    patch.setattr(Schedule, "learning_rate", lambda self, step: real(self, max(step - begun[0], 0)))


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "data position lost": lambda patch: _restored_then(patch, lambda self: setattr(self.progress, "samples", 0)),
    "step off by one": lambda patch: _restored_then(
        patch, lambda self: setattr(self.progress, "step", self.progress.step + 1)
    ),
    "optimizer not restored": lambda patch: patch.setattr(trainer, "load_optimizer_tensors", lambda *_: None),
    "metrics not cut back": lambda patch: patch.setattr(RunDirectory, "cut_after", lambda *_: None),
    "shards not cut back": lambda patch: patch.setattr(files.os, "ftruncate", lambda *_: None),
    "schedule restarted": _schedule_restarted,
}
