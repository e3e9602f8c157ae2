"""Where the time of a pass goes: before the first block, in each block, after the last one."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.evaluation.untouched import untouched
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict

Clock = Callable[[], float]


def measure_time(
    model: LanguageModel,
    batch: Batch,
    repeats: int = 5,
    backward: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Milliseconds of each part of a pass over one batch, the median of several passes after one that warms up.

    Blocks run as written, not compiled, in evaluation mode. ``embedding`` is everything before the first block,
    ``head`` everything after the last one, the loss of a backward pass included.

    Args:
        model: Put back as it was; gradients of its parameters are neither read nor written.
        batch: What is read.
        repeats: Passes that count, at least 1.
        backward: Also measure the backward pass of the mean loss.
        check: Called before each pass; may raise to stop.

    Returns:
        `tokens` of the batch, `repeats`, and `parts`: rows with `name`, `block`, `forward_ms` and
        `backward_ms` (None unless asked for).
    """
    clock = partial(_now, batch.tokens.device)
    with untouched(model):
        forward = _medians(lambda: _forward(model, batch, clock), repeats, check)
        behind = _medians(lambda: _backward(model, batch, clock), repeats, check) if backward else None
    last = len(forward) - 1
    names = ["embedding", *(f"block {number}" for number in range(last - 1)), "head"]
    parts = [
        {
            "name": name,
            "block": number - 1 if 0 < number < last else None,
            "forward_ms": forward[number],
            "backward_ms": behind[number] if behind else None,
        }
        for number, name in enumerate(names)
    ]
    return {"tokens": batch.tokens.numel(), "repeats": repeats, "parts": parts}


@torch.no_grad()
def _forward(model: LanguageModel, batch: Batch, clock: Clock) -> list[float]:
    """Seconds before the blocks, in each, and after all of them; a block that runs twice counts twice."""
    blocks = list(model.blocks())
    spent = [0.0] * len(blocks)
    first, last = float("inf"), 0.0
    entered = 0.0

    def enter(module: Any, inputs: Any) -> None:
        nonlocal first, entered
        entered = clock()
        first = min(first, entered)

    def leave(module: Any, inputs: Any, output: Any, number: int) -> None:
        nonlocal last
        last = clock()
        spent[number] += last - entered

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(partial(leave, number=number)) for number, block in enumerate(blocks)]
    try:
        begun = clock()
        predict(model, batch.tokens, batch.targets)
        ended = clock()
    finally:
        for hook in hooks:
            hook.remove()
    return [first - begun, *spent, ended - last]


def _backward(model: LanguageModel, batch: Batch, clock: Clock) -> list[float]:
    """Seconds of the backward pass, in the order of `_forward`: when its gradient crosses the edges of the blocks."""
    blocks = list(model.blocks())
    crossed: dict[int, float] = {}

    def mark(gradient: Tensor, edge: int) -> None:
        crossed[edge] = clock()

    def watch_input(module: Any, inputs: Any, edge: int) -> None:
        inputs[0].register_hook(partial(mark, edge=edge))

    def watch_output(module: Any, inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        stream.register_hook(partial(mark, edge=len(blocks)))

    hooks = [block.register_forward_pre_hook(partial(watch_input, edge=edge)) for edge, block in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(watch_output))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.enable_grad():
            logits = predict(model, batch.tokens, batch.targets).logits
            begun = clock()
            scored = batch.targets != IGNORED
            scored_logits = logits if logits.dim() == 2 else logits[scored]
            loss = F.cross_entropy(scored_logits.float(), batch.targets[scored])
            torch.autograd.grad(loss, parameters, allow_unused=True)
            ended = clock()
    finally:
        for hook in hooks:
            hook.remove()
    edges = [ended, *(crossed[edge] for edge in range(len(blocks) + 1)), begun]
    return [after - before for after, before in pairwise(edges)]


def _medians(run: Callable[[], list[float]], repeats: int, check: Callable[[], None]) -> list[float]:
    runs = []
    for number in range(repeats + 1):
        check()
        seconds = run()
        if number:
            runs.append(seconds)
    return [1000 * statistics.median(column) for column in zip(*runs, strict=True)]


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
