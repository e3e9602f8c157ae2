"""What the rounding of each layer costs: the loss with that layer in full precision, and with all of them.

A layer in full precision computes with its latent weights as they are. A fall of the loss is what its
rounding costs. A rise is possible and common: the model was trained with rounded weights, and other layers
have adapted to them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.data.batch import IGNORED, Batch
from ternlm.evaluation.placement import places
from ternlm.evaluation.untouched import untouched
from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode
from ternlm.models.prediction import predict
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.linear import BitLinear


@torch.no_grad()
def measure_sensitivity(
    model: LanguageModel,
    batches: Sequence[Batch],
    check: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loss as it is, and with everything, all activations, one block or one layer in full precision.

    Args:
        model: Used in evaluation mode; put back as it was, also if `check` raises.
        batches: What is scored, the same for every pass.
        check: Called before each batch; may raise to stop.
        report: Called with what is about to be measured.

    Returns:
        `targets` and `loss` (nats per target); `full_precision` (everything) and `activations` (only they are in
        full precision), `blocks` and `layers`: rows with a place, `loss`, `change` (loss - the loss as it is) and
        `error`, the standard error of the change, of differences target by target. Without anything rounded the
        first two are None and the lists empty.
    """
    result: dict[str, Any] = {"full_precision": None, "activations": None, "blocks": [], "layers": []}
    with untouched(model):
        report("as it is")
        losses = target_losses(model, batches, check)
        result |= {"targets": losses.numel(), "loss": float(losses.mean())}
        for kind, place, modes in _experiments(model):
            report(place["name"])
            with rounding(modes):
                changes = target_losses(model, batches, check) - losses
            row = place | _change(changes, float(losses.mean()))
            if isinstance(result[kind], list):
                result[kind].append(row)
            else:
                result[kind] = row
    return result


def _experiments(model: LanguageModel) -> Iterator[tuple[str, dict[str, Any], dict[nn.Module, QuantizationMode]]]:
    """What is measured: under which key, the place in its row, and the mode of each module concerned."""
    where = places(model)
    rounds = [module for module in model.modules() if _rounds(module)]
    if not rounds:
        return
    yield "full_precision", _everywhere("everything"), dict.fromkeys(rounds, FULL_PRECISION)
    yield "activations", _everywhere("activations"), {module: _exact_activations(module) for module in rounds}
    for number, block in enumerate(model.blocks()):
        inside = [module for module in block.modules() if _rounds(module)]
        if inside:
            place: dict[str, Any] = {"name": where[block].name, "block": number, "part": "whole block"}
            yield "blocks", place, dict.fromkeys(inside, FULL_PRECISION)
    for layer in rounds:
        if isinstance(layer, BitLinear):
            yield "layers", where[layer].as_dict(), {layer: FULL_PRECISION}


def _rounds(module: nn.Module) -> bool:
    if isinstance(module, ActivationQuantizer):
        return module.bits is not None
    return isinstance(module, BitLinear) and module.mode.weights != "none"


def _exact_activations(module: nn.Module) -> QuantizationMode:
    """Full precision of a site; of a layer, its own rounding of weights."""
    return module.mode.model_copy(update={"activations": "none"}) if isinstance(module, BitLinear) else FULL_PRECISION


def _everywhere(name: str) -> dict[str, Any]:
    return {"name": name, "block": None, "part": name}


def target_losses(model: LanguageModel, batches: Iterable[Batch], check: Callable[[], None]) -> Tensor:
    """-ln p of every target, in order, float64 (targets,), on the CPU."""
    parts = []
    for batch in batches:
        check()
        scored = batch.targets != IGNORED
        logits = predict(model, batch.tokens, batch.targets).logits
        scored_logits = logits if logits.dim() == 2 else logits[scored]
        parts.append(F.cross_entropy(scored_logits.float(), batch.targets[scored], reduction="none").double().cpu())
    return torch.cat(parts)


@contextmanager
def rounding(modes: Mapping[Any, QuantizationMode]) -> Iterator[None]:
    """Let modules round in other modes; afterwards each rounds as before, however the block ends."""
    before = {module: module.mode for module in modes}
    try:
        for module, mode in modes.items():
            module.mode = mode
        yield
    finally:
        for module, mode in before.items():
            module.mode = mode


def _change(changes: Tensor, loss: float) -> dict[str, float]:
    error = float(changes.std(correction=0)) / math.sqrt(changes.numel())
    change = float(changes.mean())
    return {"loss": loss + change, "change": change, "error": error}
