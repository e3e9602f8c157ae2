"""Computing an anomalous step again: from a checkpoint that leads to it, on the same batch, beside its evidence.

A run that rolled back has passed the same step more than once, each time on other data. The sample counter
of the evidence tells which time is meant: it only grows, so a checkpoint leads to the evidence exactly if training
on from there arrives at the step with that counter. The run folder is only read; what is trained here lives in a
temporary one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch

import ternlm
from ternlm import checkpoint
from ternlm.checkpoint import Opened
from ternlm.data.preparation import Prepared
from ternlm.data.stream_loader import StreamLoader
from ternlm.device import choose_device, set_up
from ternlm.errors import CheckpointError, DataError, EnvironmentFault
from ternlm.files import from_json, read_regular
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import Layer, read_mapping
from ternlm.training import launch, roll_back
from ternlm.training.anomaly import Detector
from ternlm.training.compilation import compile_blocks
from ternlm.training.evidence import Evidence, codes_sha256, gradient_norms, read_evidence
from ternlm.training.progress import Progress
from ternlm.training.settings import RunSettings, resolve_settings
from ternlm.training.step import StepResult
from ternlm.training.trainer import Trainer

TOLERANCE = 1e-3
"""Of the loss and of the whole gradient's norm: the most that other arithmetic may change."""

Verdict = Literal["reproduced bit for bit", "reproduced within 1e-3", "not reproduced"]
Say = Callable[[str], None]

_LARGEST_RECORD = 64 * 2**20


class Start(NamedTuple):
    """Where a replay begins.

    Attributes:
        step: Completed steps.
        opened: The checkpoint, or None for initial weights.
        roll_backs: The run's roll-backs up to the one that led back to this checkpoint and on past some data;
            None where the run went on from it as it was saved.
    """

    step: int
    opened: Opened | None = None
    roll_backs: list[dict[str, int]] | None = None


class Numbers(NamedTuple):
    """What is compared of a step.

    Attributes:
        codes_sha256: Of all ternary codes and scales before the update.
        loss, grad_norm: As `StepResult` has them.
        gradient_norms: By parameter.
    """

    codes_sha256: str
    loss: float
    grad_norm: float
    gradient_norms: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """A step as it was recorded and as it was computed again.

    Attributes:
        evidence: What was recorded.
        start: Where the replay began.
        device: Where it was computed again.
        same_batch: Whether all token ids are the same, None if the evidence holds none.
        other_length: The schedule of the run is not that of the checkpoint any more.
        recorded, replayed: The numbers.
    """

    evidence: Evidence
    start: Start
    device: str
    same_batch: bool | None
    other_length: bool
    recorded: Numbers
    replayed: Numbers

    @property
    def verdict(self) -> Verdict:
        """Codes may differ within the tolerance, where a scale's last bit makes them another sum."""
        then, now = self.recorded, self.replayed
        pairs = {name: (norm, now.gradient_norms.get(name, 0.0)) for name, norm in then.gradient_norms.items()}
        if self.same_batch is False or now.gradient_norms.keys() - pairs:
            return "not reproduced"
        whole = [(then.loss, now.loss), (then.grad_norm, now.grad_norm)]
        if then.codes_sha256 == now.codes_sha256 and all(_same(*pair) for pair in [*whole, *pairs.values()]):
            return "reproduced bit for bit"
        room = TOLERANCE * then.grad_norm if math.isfinite(then.grad_norm) else 0.0
        is_close = all(_close(*pair) for pair in whole) and all(_close(*pair, room) for pair in pairs.values())
        return "reproduced within 1e-3" if is_close else "not reproduced"

    @property
    def likely_reason(self) -> str:
        """Why the step was not reproduced, as far as the numbers tell, in one sentence."""
        event, there = self.evidence.event, []
        for name, here in (("device", self.device), ("torch", torch.__version__), ("ternlm", ternlm.__version__)):
            if str(event.get(name)) != here:
                there.append(f"{name} {event.get(name)!r:.40} instead of {here!r}")
        other = f" (recorded with {', '.join(there)})" if there else ""
        if self.same_batch is False:
            return "the batch has other tokens: the data or the tokenizer have changed."
        then, now = self.recorded, self.replayed
        if then.codes_sha256 == now.codes_sha256 and _same(then.loss, now.loss):
            return (
                "codes, batch and loss are the same and the gradient is not: a fault of the hardware, or one "
                f"injected from outside{other}."
            )
        lengths = "the run was given another length since, " if self.other_length else ""
        return (
            f"the numbers before the update differ: {lengths}another machine, device or thread count{other}, a fault "
            "of the hardware, or one injected from outside, at this step or on the way to it."
        )

    def notable(self, most: int = 5) -> list[tuple[str, float, float]]:
        """(parameter, recorded, replayed) of the largest gradients, those that are not finite first."""
        then, now = self.recorded.gradient_norms, self.replayed.gradient_norms
        rows = [(name, then.get(name, 0.0), now.get(name, 0.0)) for name in now]
        return sorted(rows, key=lambda row: max(map(_rank, row[1:])), reverse=True)[:most]


def replay(
    folder: Path, prepare: launch.Prepare, say: Say, progress: Callable[[int, int], None] = lambda done, total: None
) -> Replay:
    """Train up to an anomaly without leaving a trace, and compute its gradient again.

    Args:
        folder: Evidence, below RUN/anomalies.
        prepare: Gives the run's data.
        say: Called with one sentence, first with how many steps lie ahead.
        progress: Called before each step with steps done and steps to do.

    Raises:
        EnvironmentFault: The evidence is damaged, no checkpoint leads there, or the data are not those of the run.
    """
    evidence, run = read_evidence(folder), RunDirectory(folder.parent.parent)
    settings = launch.settings_from(resolve_settings([Layer("run", read_mapping(run.config))]))
    set_up(choose_device(settings.training.device), settings.training.threads, settings.training.deterministic)
    start = find_start(run, evidence, settings.training.batch_size)
    if settings.data.stream and not (run.stream / "stream.json").is_file():
        raise DataError(f"'{run.stream}' is gone, and with it what the run was trained on.")
    prepared = prepare(settings, run.stream)
    try:
        _require_same_data(run, start, prepared)
        with TemporaryDirectory(prefix="ternlm-replay-") as temporary:
            scratch = RunDirectory(Path(temporary) / run.id)
            scratch.checkpoints.mkdir(parents=True)
            if start.roll_backs is not None:
                roll_back.begin(scratch.checkpoints, start.step, start.roll_backs)
            trainer = _trainer(settings, prepared, scratch, start, evidence, say)
            ahead, since = evidence.step - start.step, "the initial weights"
            if start.opened is not None:
                since = f"checkpoint {start.opened.path}"
            say(f"replaying step {evidence.step}: {ahead} step{'s' * (ahead != 1)} from {since}, then the step itself")
            _advance(trainer, ahead, progress)
            return _compare(trainer, evidence, start)
    finally:
        prepared.corpus.close()


def find_start(run: RunDirectory, evidence: Evidence, batch_size: int) -> Start:
    """The newest valid checkpoint that leads to the evidence, or else the initial weights if they do.

    Raises:
        CheckpointError: Nothing leads there.
    """
    known = cache(partial(_all_roll_backs, run))
    kept = checkpoint.steps(run.checkpoints)
    for step in reversed([step for step in kept if step <= evidence.step]):
        try:
            opened = checkpoint.open_checkpoint(checkpoint.folder(run.checkpoints, step))
            saved = Progress.from_state(opened.state, opened.path)
        except CheckpointError:
            continue
        wanted = evidence.counter - (evidence.step - step) * batch_size  # samples drawn before the next step
        if saved.samples == wanted:
            return Start(step, opened)
        for roll_backs in _later_returns(saved, known):
            if roll_backs[-1]["samples_to"] == wanted:
                return Start(step, opened, roll_backs)
    if evidence.step >= 0 and evidence.counter == evidence.step * batch_size and _began_from_nothing(run):
        return Start(0)
    have = ", ".join(map(str, kept)) or "none"
    raise CheckpointError(
        f"no checkpoint of run '{run.path}' leads to step {evidence.step} on the same data (steps kept: {have}). "
        "Runs keep more of them with training.keep_every."
    )


def _later_returns(saved: Progress, known: Callable[[], list[dict[str, int]]]) -> Iterator[list[dict[str, int]]]:
    """The run's roll-backs up to each one that came back to a checkpoint after it was saved."""
    every = known()
    for count in range(len(saved.roll_backs) + 1, len(every) + 1):
        if every[count - 1]["to_step"] == saved.step:
            yield every[:count]


def _all_roll_backs(run: RunDirectory) -> list[dict[str, int]]:
    """As the newest checkpoint counts them, or the intent of one that no checkpoint counts yet."""
    intent = roll_back.unfinished(run.checkpoints)
    if intent is not None:
        return list(intent["roll_backs"])
    newest = checkpoint.open_newest(run.checkpoints)
    return Progress.from_state(newest.state, newest.path).roll_backs


def _began_from_nothing(run: RunDirectory) -> bool:
    """Whether the first sitting began with initial weights, not with another run's checkpoint."""
    try:
        first = from_json(read_regular(run.provenance, _LARGEST_RECORD))["sittings"][0]
        return bool(first["first_step"] == 0)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _require_same_data(run: RunDirectory, start: Start, prepared: Prepared) -> None:
    try:
        if start.opened is not None:
            expected = start.opened.state["data_fingerprint"]
        else:
            expected = from_json(read_regular(run.data_fingerprint, _LARGEST_RECORD))["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # without a record the tokens of the batch decide
    if expected != prepared.corpus.fingerprint:
        raise DataError(
            f"the data in '{prepared.corpus.directory}' are not what run '{run.id}' was trained on. "
            "Restore the source files, then give the same command again."
        )


def _trainer(
    settings: RunSettings, prepared: Prepared, scratch: RunDirectory, start: Start, evidence: Evidence, say: Say
) -> Trainer:
    """A trainer that stands at the start and computes as the run did."""
    settings = launch.with_vocab_size(settings, prepared)
    trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, scratch, start.opened, quiet=True)
    if evidence.step >= trainer.total_steps:
        raise EnvironmentFault(
            f"run '{scratch.id}' has {trainer.total_steps} steps, the evidence is of step {evidence.step}. "
            "It belongs to another run, or the run was shortened since."
        )
    size = evidence.event.get("micro_batch_size")
    if isinstance(size, int) and 0 < size <= settings.training.batch_size:
        trainer.stepper.micro_batch_size = size  # where sums are split decides their last bits
    trainer.stepper.warn = say
    if isinstance(trainer.loader, StreamLoader):
        told = cache(say)
        trainer.loader.while_waiting = lambda complaint: None if complaint is None else told(complaint)
    if settings.training.compile:
        compile_blocks(trainer.model, trainer.warm_up, say)
    trainer.model.train()  # compiling leaves it in evaluation mode
    return trainer


def _advance(trainer: Trainer, steps: int, progress: Callable[[int, int], None]) -> None:
    for done in range(steps):
        progress(done, steps)
        batch = trainer.loader.batch(trainer.progress.samples)
        trainer.train_step(batch, partial(_decide, trainer.detector, trainer.progress.step))
    progress(steps, steps)


def _decide(detector: Detector, step: int, result: StepResult) -> bool:
    """Make the updates that the run made; nothing is reported or dumped again."""
    return detector.judge(step, result.loss, result.grad_norm).action == "update"


def _compare(trainer: Trainer, evidence: Evidence, start: Start) -> Replay:
    norms: dict[str, float] = {}

    def look(result: StepResult) -> bool:
        norms.update(gradient_norms(trainer.model))
        return False

    codes = codes_sha256(trainer.model)
    batch = trainer.loader.batch(evidence.counter)
    result = trainer.train_step(batch, look)
    length = None if start.opened is None else start.opened.state.get("total_steps")
    return Replay(
        evidence,
        start,
        str(trainer.device),
        batch.tokens.tolist() == evidence.tokens if any(evidence.tokens) else None,
        length not in (None, trainer.total_steps),
        Numbers(evidence.codes_sha256, evidence.loss, evidence.grad_norm, evidence.gradient_norms),
        Numbers(codes, result.loss, result.grad_norm, norms),
    )


def _same(then: float, now: float) -> bool:
    return then == now or (math.isnan(then) and math.isnan(now))


def _close(then: float, now: float, room: float = 0.0) -> bool:
    return _same(then, now) or math.isclose(then, now, rel_tol=TOLERANCE, abs_tol=room)


def _rank(norm: float) -> float:
    return norm if math.isfinite(norm) else math.inf
