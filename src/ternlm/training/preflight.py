"""Ten steps of a recipe with everything switched on, in a folder of its own, and a look at everything they leave.

A run of days that fails on its first evaluation, its first sample or its first stage boundary has cost a night.
Here all of them happen within ten steps, with the recipe's own model, data, batch and precision; then the run is
resumed for one more step, and every file is read back by other means than those that wrote it.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.device import choose_device
from ternlm.errors import TernlmError
from ternlm.evaluation.evaluate import evaluate
from ternlm.generation import has_mask
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Layer, Resolved
from ternlm.training import launch
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings, resolve_settings

STEPS = 10
_EVALUATED_WINDOWS = 8


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: Whether it is as it should be.
        detail: What was found, in a few words.
    """

    name: str
    passed: bool
    detail: str


def preflight(resolved: Resolved, run: RunDirectory, prepare: launch.Prepare, quiet: bool = True) -> list[Check]:
    """Train ten steps and one more after resuming, and check every artifact.

    Args:
        resolved: The recipe's settings, as a real run would have them.
        run: A folder that does not exist yet.
        prepare: Gives the data.
        quiet: Show nothing while training.

    Raises:
        TernlmError: The run itself failed; that is the answer.
    """
    settings = launch.settings_from(resolved)
    layers = [Layer("recipe", resolved.values), Layer("preflight", _everything_on(settings))]
    shortened = resolve_settings(layers)
    prepared: list[Prepared] = []

    def kept(given: RunSettings, folder: Path) -> Prepared:
        prepared.append(prepare(given, folder))
        return prepared[-1]

    launch.start(shortened, run, kept, quiet=quiet)
    first_sitting = checkpoint.steps(run.checkpoints)
    launch.resume(run, {"training.max_steps": STEPS + 1}, kept, quiet=quiet)
    return [*_checks(run, launch.settings_from(shortened), first_sitting, prepared[0])]


def _everything_on(settings: RunSettings) -> dict[str, Any]:
    windows = _EVALUATED_WINDOWS * settings.data.sequence_length
    warmup = settings.schedule.warmup_steps
    return {
        "training": {"max_steps": STEPS, "max_tokens": None, "max_epochs": None, "max_time": None,
                     "checkpoint_every_steps": 4},
        "schedule": {"warmup_steps": None if warmup is None else min(warmup, 2)},
        "evaluation": {"every_steps": 5, "sample_every_steps": STEPS, "sample_tokens": 16,
                       "max_tokens": min(settings.evaluation.max_tokens or windows, windows)},
        "tracking": {"every_steps": 1, "ternary_every_steps": 2, "system_every_seconds": 1e-3, "csv": True,
                     "tensorboard": True},
    }  # fmt: skip


def _checks(run: RunDirectory, settings: RunSettings, first_sitting: list[int], prepared: Prepared) -> Iterator[Check]:
    for name, look in (
        ("end", _end), ("provenance", _provenance), ("data", _data), ("losses", _losses), ("rates", _rates),
        ("ternary codes", _ternary), ("system", _system), ("evaluations", _evaluations), ("samples", _samples),
        ("spreadsheets", _spreadsheets), ("TensorBoard", _tensorboard),
    ):  # fmt: skip
        yield _checked(name, partial(look, run, settings))
    yield _checked("checkpoints", partial(_checkpoints, run, settings, first_sitting))
    yield _checked("reloaded model", partial(_reloaded, run, settings, prepared))


def _checked(name: str, look: Callable[[], str]) -> Check:
    """A look that returns what it found, or fails with what is wrong."""
    try:
        return Check(name, True, look())
    except (TernlmError, AssertionError, OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        return Check(name, False, str(error) or type(error).__name__)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _end(run: RunDirectory, settings: RunSettings) -> str:
    status = json.loads(run.status.read_bytes())
    _require(status["state"] == "finished" and status["exit_code"] == 0, f"status says {status['state']}")
    _require(status["step"] == STEPS + 1, f"status stands at step {status['step']}")
    return f"finished, {status['step_time_ms'] / 1e3:.2f} s per step"


def _provenance(run: RunDirectory, settings: RunSettings) -> str:
    record = json.loads(run.provenance.read_bytes())
    sittings = record["sittings"]
    _require(len(sittings) == 2, f"{len(sittings)} sittings instead of 2")
    _require(sittings[0]["seeds"]["run"] == settings.training.seed, "the seed is not recorded")
    _require("torch" in sittings[0]["packages"], "package versions are missing")
    git = sittings[0]["git"]["ternlm"] or sittings[0]["git"]["working_directory"]
    commit = f"commit {git['commit'][:12]}" if git else "no git repository"
    return f"2 sittings, torch {sittings[0]['packages']['torch']}, {commit}"


def _data(run: RunDirectory, settings: RunSettings) -> str:
    record = json.loads(run.data_fingerprint.read_bytes())
    _require(len(record["first_token_ids"]) > 0, "the first tokens are missing")
    return f"{record['source']}, first {len(record['first_token_ids'])} tokens {record['first_token_ids_sha256'][:12]}"


def _losses(run: RunDirectory, settings: RunSettings) -> str:
    rows = read_jsonl(run.scalars)
    _require([row["step"] for row in rows] == list(range(1, STEPS + 2)), "steps are missing or repeated")
    losses = [row["train/loss"] for row in rows]
    _require(all(map(math.isfinite, losses)), f"losses {losses}")
    _require(all(row["train/grad_norm"] > 0 for row in rows), "a gradient norm is 0")
    expected = math.log(settings.model.vocab_size or len(losses))
    _require(
        settings.model.vocab_size is None or abs(losses[0] - expected) < 1,
        f"starts at {losses[0]:.2f}, ln V is {expected:.2f}",
    )
    return f"{losses[0]:.3f} to {losses[-1]:.3f} nats"


def _rates(run: RunDirectory, settings: RunSettings) -> str:
    optimizer = settings.optimizer
    schedule = Schedule(settings.schedule, optimizer.learning_rate, optimizer.weight_decay, STEPS)
    for row in read_jsonl(run.scalars)[:STEPS]:
        k = row["step"] - 1
        _require(row["train/learning_rate"] == schedule.learning_rate(k), f"learning rate of step {k}")
        _require(row["train/weight_decay"] == schedule.weight_decay(k), f"weight decay of step {k}")
    stages = sorted({row["train/stage"] for row in read_jsonl(run.scalars)})
    return f"as scheduled, stages {stages}"


def _ternary(run: RunDirectory, settings: RunSettings) -> str:
    rows = read_jsonl(run.ternary)
    if settings.quantization.weights != "ternary":
        return f"weights are {settings.quantization.weights}"
    _require(len(rows) >= STEPS // 2, f"{len(rows)} rows")
    last = rows[-1]
    total = sum(last[f"ternary/all/frac_{name}"] for name in ("neg", "zero", "pos"))
    _require(abs(total - 1) < 1e-6, f"fractions add up to {total}")
    flips = last["ternary/all/flip_rate"]
    matrices = sum(name.endswith("/scale") for name in last) - 1
    return f"{matrices} matrices, {last['ternary/all/frac_zero']:.0%} zeros, flips {flips:.2%}"


def _system(run: RunDirectory, settings: RunSettings) -> str:
    rows = read_jsonl(run.system)
    _require(bool(rows), "no rows")
    return f"{len(rows)} rows, memory {rows[-1]['system/ram_percent']:.0f}%"


def _evaluations(run: RunDirectory, settings: RunSettings) -> str:
    rows = read_jsonl(run.evaluations)
    _require({STEPS // 2, STEPS} <= {row["step"] for row in rows}, "evaluations are missing")
    _require(len({row["eval_id"] for row in rows}) == 1, "the evaluated text changed")
    return f"{len(rows)} evaluations, {rows[-1]['n_targets']:,} targets, {rows[-1]['val/loss']:.3f} nats"


def _samples(run: RunDirectory, settings: RunSettings) -> str:
    rows = [row for row in read_jsonl(run.samples) if row["step"] == STEPS]
    evaluation = settings.evaluation
    if settings.objective.masking is None:
        expected = len(evaluation.prompts) * len(evaluation.sample_modes)
    else:
        expected = sum(map(has_mask, evaluation.prompts))
    _require(len(rows) == expected, f"{len(rows)} samples instead of {expected}")
    _require(all(row["mean_entropy"] is not None for row in rows), "entropies are missing")
    mean = sum(row["mean_entropy"] for row in rows) / max(expected, 1)
    return f"{expected} samples, entropy {mean:.2f} nats" if expected else "no prompt has a mask to fill"


def _spreadsheets(run: RunDirectory, settings: RunSettings) -> str:
    lines = run.training_csv.read_text().splitlines()
    _require(len(lines) == STEPS + 2, f"{len(lines)} lines in {run.training_csv.name}")
    return f"{len(lines) - 1} rows"


def _tensorboard(run: RunDirectory, settings: RunSettings) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    steps = [event.step for event in events.Scalars("train/loss")]
    _require(steps == list(range(1, STEPS + 2)), f"steps {steps}")
    return f"{len(names)} curves"


def _checkpoints(run: RunDirectory, settings: RunSettings, first_sitting: list[int]) -> str:
    optimizer = settings.optimizer
    schedule = Schedule(settings.schedule, optimizer.learning_rate, optimizer.weight_decay, STEPS)
    sides = {side for boundary in schedule.boundaries() for side in (boundary, boundary + 1)}
    missing = (sides | {STEPS}) - set(first_sitting)
    _require(not missing, f"no checkpoints of steps {sorted(missing)}")
    _require(sides <= set(checkpoint.steps(run.checkpoints)), "a stage boundary was pruned")
    size = 0
    for step in checkpoint.steps(run.checkpoints):
        manifest = checkpoint.verify(checkpoint.folder(run.checkpoints, step))
        size = sum(entry["bytes"] for entry in manifest["files"].values())
    return f"steps {checkpoint.steps(run.checkpoints)} verified, {size / 2**20:,.0f} MiB each"


def _reloaded(run: RunDirectory, settings: RunSettings, prepared: Prepared) -> str:
    """The loss of a model loaded from disk is the one that was logged."""
    path = checkpoint.folder(run.checkpoints, STEPS)
    if not path.is_dir():
        path = checkpoint.newest_valid(run.checkpoints)
    loaded = checkpoint.load(path, choose_device(settings.training.device))
    length, evaluation = settings.data.sequence_length, settings.evaluation
    result = evaluate(
        loaded.model, prepared.corpus.split("validation"), loaded.tokenizer, length, evaluation.batch_size or 4,
        evaluation.max_tokens, masking=settings.objective.masking,
    )  # fmt: skip
    logged = next(row["val/loss"] for row in read_jsonl(run.evaluations) if row["step"] == loaded.state["step"])
    _require(abs(result.loss - logged) < 1e-3, f"{result.loss:.4f} nats after loading, {logged:.4f} in the log")
    return f"{result.loss:.4f} nats, as logged"
