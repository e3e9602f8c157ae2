"""Any list of models on one machine: training and inference, in groups that fit into its memory together."""

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ternlm.benchmark.candidate import Candidate, described
from ternlm.benchmark.inference import compare_inference
from ternlm.benchmark.machine import available_bytes, describe_machine
from ternlm.benchmark.process import process_memory, train_apart
from ternlm.benchmark.subject import Subject, Work
from ternlm.benchmark.training import compare_training
from ternlm.errors import TernlmError

SCHEMA = 1
_USABLE = 0.9  # of the memory that nobody uses
_LEAST_LENGTH = 128

Say = Callable[[str], None]


@dataclass
class Options:
    """How models are measured.

    Attributes:
        device: Where.
        training, inference: What is measured.
        work: One training step; a model for which memory does not suffice takes fewer rows, then shorter ones.
        prompt_length, new_tokens, rows: One turn of inference.
        warmup, repeats: Steps and turns of each model that do not count, and that do.
        process_memory: Also measure the memory of a process of its own, of each model on the CPU.
        tokens: Ids that models read, by name; of others they are made up at random.
    """

    device: torch.device
    training: bool = True
    inference: bool = True
    work: Work = field(default_factory=lambda: Work(2, 512))
    prompt_length: int = 256
    new_tokens: int = 64
    rows: int = 1
    warmup: int = 3
    repeats: int = 12
    process_memory: bool = True
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


def measure(
    candidates: Sequence[Candidate],
    options: Options,
    check: Callable[[], None] = lambda: None,
    say: Say = lambda sentence: None,
) -> dict[str, Any]:
    """Measure all candidates.

    Args:
        candidates: With different names.
        options: How.
        check: Called before each step; may raise to stop.
        say: Takes a sentence about what happens.

    Returns:
        `schema`, `machine`, `options`, `base` (name of the model that ratios are to), `models` (who they are, by
        `Candidate` and parameters), `training` and `inference` (as `compare_training` and `compare_inference` give
        them, each row with its `group`, whether it is `interleaved` with the base, and `process_mb`; None where not
        asked for), and `skipped`: a sentence for each thing that was not measured.
    """
    base = next((candidate for candidate in candidates if not candidate.is_quantized), candidates[0])
    suite = _Suite(options, check, say, base)
    training = suite.train(candidates) if options.training else None
    inference = suite.infer(candidates) if options.inference else None
    return {
        "schema": SCHEMA,
        "machine": describe_machine(options.device),
        "options": _as_json(options),
        "base": base.name,
        "models": [suite.models[each.name] for each in candidates if each.name in suite.models],
        "training": training,
        "inference": inference,
        "skipped": suite.skipped,
    }


class _Suite:
    """One measurement of many models."""

    def __init__(self, options: Options, check: Callable[[], None], say: Say, base: Candidate) -> None:
        self.options, self.check, self.say, self.base = options, check, say, base
        self.models: dict[str, dict[str, Any]] = {}
        self.skipped: list[str] = []
        self.works: dict[str, Work] = {}

    def train(self, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
        """`compare_training` group by group."""
        room = _USABLE * available_bytes(self.options.device)
        works = {each.name: work for each in candidates if (work := self._fitting(each, room)) is not None}
        self.works = works
        sizes = {each.name: each.training_bytes(works[each.name]) for each in candidates if each.name in works}

        def run(group: list[Candidate], subjects: list[Subject]) -> dict[str, Any]:
            options = self.options
            chosen = [works[each.name] for each in group]
            return compare_training(subjects, chosen, options.warmup, options.repeats, check=self.check, say=self.say)

        result = self._by_groups([each for each in candidates if each.name in works], sizes, room, True, run)
        for row in result["rows"] if result else ():
            candidate = next(each for each in candidates if each.name == row["name"])
            tokens = candidate.epoch_tokens
            row["epoch_s"] = None if tokens is None else tokens / row["tokens_per_sec"]
            if "process_mb" not in row:
                row["process_mb"] = self._process_mb(candidate, {"work": works[candidate.name][:2]})
        return result

    def infer(self, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
        """`compare_inference` group by group; layers of a peer are made for training and stay out."""
        own = [each for each in candidates if not each.peer]
        options, room = self.options, _USABLE * available_bytes(self.options.device)
        sizes = {each.name: each.inference_bytes() for each in own}
        turn = (options.prompt_length, options.new_tokens, options.rows)

        def run(group: list[Candidate], subjects: list[Subject]) -> dict[str, Any]:
            return compare_inference(subjects, *turn, repeats=max(2, options.repeats // 2), check=self.check)

        result = self._by_groups([each for each in own if self._fits(each, sizes, room)], sizes, room, False, run)
        for row in result["rows"] if result else ():
            candidate = next(each for each in own if each.name == row["name"])
            task = dict(zip(("prompt_length", "new_tokens", "rows"), turn, strict=True))
            row["process_mb"] = self._process_mb(candidate, task)
        return result

    def _by_groups(
        self, candidates: list[Candidate], sizes: Mapping[str, int], room: float, trains: bool, run: Callable[..., Any]
    ) -> dict[str, Any] | None:
        """Results of all groups as one; the base is in each in which it has room, and its row is that of the first."""
        merged: dict[str, Any] | None = None
        for number, group in enumerate(groups_of(candidates, sizes, room, self.base.name)):
            names = ", ".join(each.name for each in group)
            self.say(f"{'training' if trains else 'inference'}: {names}")
            self.check()
            if trains and len(group) == 1 and number:
                result = self._train_apart(group[0])
                merged = merged if result is None else _merge(merged, result, number + 1, self.base.name)
                continue
            built = [self._build(each, trains) for each in group]
            ready = [(each, subject) for each, subject in zip(group, built, strict=True) if subject is not None]
            del built
            if not ready:
                continue
            result = run([each for each, _ in ready], [subject for _, subject in ready])
            del ready
            release_memory()
            merged = _merge(merged, result, number + 1, self.base.name)
        return merged

    def _train_apart(self, candidate: Candidate) -> dict[str, Any] | None:
        """In a process of its own, so that a machine that runs out of memory after all takes nothing else along."""
        options, tokens = self.options, self.options.tokens.get(candidate.name)
        result = train_apart(candidate, {
            "device": str(options.device), "threads": torch.get_num_threads(), "work": self.works[candidate.name],
            "warmup": options.warmup, "repeats": options.repeats, "tokens": None if tokens is None else tokens.tolist(),
        })  # fmt: skip
        if result is None:
            self.skipped.append(f"{candidate.name}: its process of its own ended early, mostly for lack of memory.")
            return None
        self.models.setdefault(candidate.name, result.pop("model"))
        return result

    def _build(self, candidate: Candidate, trains: bool) -> Subject | None:
        try:
            subject = candidate.build(self.options.device, trains)
        except TernlmError as error:
            self.skipped.append(f"{candidate.name}: {error}")
            return None
        subject.tokens = self.options.tokens.get(candidate.name)
        self.models.setdefault(candidate.name, described(candidate, subject))
        return subject

    def _fitting(self, candidate: Candidate, room: float) -> Work | None:
        """The largest part of the asked batch that memory suffices for."""
        work = asked = self.options.work
        try:
            while (needed := candidate.training_bytes(work)) > room:
                if work.rows == 1 and work.length // 2 < _LEAST_LENGTH:
                    self.skipped.append(
                        f"{candidate.name}: training needs about {needed / 2**30:.1f} GiB even with {work.length} "
                        f"tokens per step, {room / 2**30:.1f} GiB are free; it was not trained."
                    )
                    return None
                is_long = work.rows == 1
                work = work._replace(rows=max(1, work.rows // 2), length=work.length // 2 if is_long else work.length)
        except TernlmError as error:
            self.skipped.append(f"{candidate.name}: {error}")
            return None
        if work != asked:
            self.skipped.append(
                f"{candidate.name}: trained on {work.rows} x {work.length} tokens per step instead of "
                f"{asked.rows} x {asked.length}, for which memory does not suffice."
            )
        return work

    def _fits(self, candidate: Candidate, sizes: Mapping[str, int], room: float) -> bool:
        fits = sizes[candidate.name] <= room
        if not fits:
            self.skipped.append(f"{candidate.name}: inference needs {sizes[candidate.name] / 2**30:.1f} GiB; left out.")
        return fits

    def _process_mb(self, candidate: Candidate, task: dict[str, Any]) -> float | None:
        if not self.options.process_memory or self.options.device.type != "cpu":
            return None
        self.check()
        self.say(f"memory of a process: {candidate.name}")
        return process_memory(candidate, {"threads": torch.get_num_threads(), **task})


def groups_of(
    candidates: Sequence[Candidate], sizes: Mapping[str, int], room: float, base: str
) -> list[list[Candidate]]:
    """Candidates that fit into memory side by side, in order; the base begins each group in which it has room too."""
    groups: list[list[Candidate]] = []
    first = next((each for each in candidates if each.name == base), None)
    waiting = list(candidates)
    while waiting:
        is_base_there = first is not None and (not groups or sizes[base] + sizes[waiting[0].name] <= room)
        group = [first] if first is not None and is_base_there else []
        if group and not groups:
            waiting.remove(group[0])
        used = sum(sizes[each.name] for each in group)
        while waiting and (not group or used + sizes[waiting[0].name] <= room):
            used += sizes[waiting[0].name]
            group.append(waiting.pop(0))
        groups.append(group)
    return groups


def release_memory() -> None:
    """Give what was freed back to the system, for what comes next."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _merge(merged: dict[str, Any] | None, result: dict[str, Any], group: int, base: str) -> dict[str, Any]:
    is_together = any(row["name"] == base for row in result["rows"])
    for row in result["rows"]:
        row |= {"group": group, "interleaved": is_together}
    if merged is None:
        return result
    if not is_together:
        for row in result["rows"]:
            _take_apart(row, next((each for each in merged["rows"] if each["name"] == base), None), result["clock"])
    known = {row["name"] for row in merged["rows"]}
    return merged | {"rows": merged["rows"] + [row for row in result["rows"] if row["name"] not in known]}


def _take_apart(row: dict[str, Any], base: dict[str, Any] | None, clock: str) -> None:
    """The ratio of medians for a row that was not measured in turns with the base, without a spread."""
    if "step_wall_ms" in row:
        row["ratio"] = _apart(row, base, f"step_{clock}_ms", "median", "tokens_per_step")
        return
    for part, quantity in (("prefill", "median"), ("decode", "p50")):
        if row[part] is not None:
            row[part]["ratio"] = _apart(row[part], base and base[part], f"{clock}_ms", quantity)


def _apart(
    own: dict[str, Any], base: dict[str, Any] | None, times: str, quantity: str, tokens: str = ""
) -> dict[str, Any] | None:
    if base is None:
        return None
    factor = base[tokens] / own[tokens] if tokens else 1.0
    return {"median": own[times][quantity] / base[times][quantity] * factor, "low": None, "high": None}


def _as_json(options: Options) -> dict[str, Any]:
    values = dict(vars(options))
    reads = sorted(values.pop("tokens"))
    return values | {"device": str(options.device), "work": options.work._asdict(), "reads_text": reads}
