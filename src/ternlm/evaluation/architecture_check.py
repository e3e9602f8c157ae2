"""What a model is made of, besides its quantizers, against the definition of BitNet b1.58.

Each function judges one part by what a pass over a short text showed, or by the parameters themselves.

Source:
    Ma et al. 2024 (arXiv 2402.17764): the parts of Llama, without biases; norms before output projections, 2B4T
    (arXiv 2504.12285).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.checkpoint import Loaded
from ternlm.evaluation.probe import Observation, observe
from ternlm.models import LanguageModel
from ternlm.nn.linear import BitLinear

Verdict = Literal["same", "differs", "unknown"]
Judged = tuple[str, Verdict]
"""What the model does, in words, and whether that is as defined."""

_NORM_ERROR = 4.0
_FEWEST_VALUES = 64


def ternary_layers(model: LanguageModel) -> dict[str, BitLinear]:
    """Layers that round their weights to ternary codes, by name."""
    return {name: layer for name, layer in model.bit_linears().items() if layer.mode.weights == "ternary"}


def coverage(model: LanguageModel) -> Judged:
    """Whether every linear layer of the blocks is ternary."""
    ternary = ternary_layers(model)
    plain = [module for block in model.blocks() for module in block.modules() if isinstance(module, nn.Linear)]
    others = len(model.bit_linears()) - len(ternary) + len(plain)
    words = f"{len(ternary)} layers are ternary, {others} {'is' if others == 1 else 'are'} not"
    return words, "differs" if others or not ternary else "same"


def ends(model: LanguageModel, seen: Observation) -> Judged:
    """The head multiplies the last norm by a matrix of many values, and the embedding holds such a matrix."""
    tables = [
        module.weight for module in model.modules() if isinstance(module, nn.Embedding) and len(module.weight) > 2
    ]
    dense = [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" in name
    ]
    if seen.last_norm is None or seen.logits is None or not tables:
        return "no norm or no table of embeddings was found before the head", "unknown"
    values = min(table[:_FEWEST_VALUES].unique().numel() for table in tables)
    if values < _FEWEST_VALUES:
        return f"an embedding has only {values} different values", "differs"
    x = seen.last_norm
    for weight in [*dense, *tables]:
        if weight.shape[1] == x.shape[1] and weight.shape[0] == seen.logits.shape[1]:
            wanted = F.linear(x, weight.to(x.dtype)).double()
            error = (seen.logits.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
            if error <= 2 * torch.finfo(x.dtype).eps:
                tied = "tied to" if any(weight is table for table in tables) else "not tied to"
                return f"{type_name(weight.dtype)}, not rounded; the head is {tied} the embedding", "same"
    words = "the logits are not the product of the last norm and a matrix in full precision"
    return words, "differs" if model.is_causal else "unknown"  # the head of an encoder may have more parts


def computation(model: LanguageModel, seen: Observation) -> Judged:
    """Type of the activations, and whether norms are as exact as float32 statistics make them."""
    types = types_seen(seen) or type_name(model.compute_dtype)
    words = f"inputs of ternary layers in {types}"
    if seen.norm_error is None:
        return f"{words}; no RMSNorm", "differs"
    is_fine = seen.norm_error <= _NORM_ERROR
    words += f"; norms off by {seen.norm_error:.1f} units in the last place"
    return words, "same" if types == "bfloat16" and is_fine else "differs"


def norms(seen: Observation) -> Judged:
    """Whether the input of every ternary layer is the output of an RMSNorm."""
    if not seen.normed:
        return "no ternary layer was reached", "unknown"
    normed = sum(seen.normed.values())
    missing = sorted({name.rpartition(".")[2] for name, is_normed in seen.normed.items() if not is_normed})
    words = f"before {normed} of {len(seen.normed)} layers" + (f", not before {', '.join(missing)}" if missing else "")
    if seen.norm_error is not None and not seen.norm_error <= _NORM_ERROR:
        return f"{words}; what they return is off by {seen.norm_error:.1f} units in the last place", "differs"
    return words, "same" if normed == len(seen.normed) else "differs"


def gate(seen: Observation) -> Judged:
    """What gates the feed-forward networks."""
    if not seen.gates:
        return "there is no gated feed-forward network of this kind", "differs"
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "SiLU": F.silu,
        "squared ReLU": lambda gate: F.relu(gate).square(),
    }
    found = {name: all(_is_gated(form, *parts) for parts in seen.gates) for name, form in forms.items()}
    name = next((name for name, fits in found.items() if fits), None)
    words = f"gated by {name or 'something else'} in {len(seen.gates)} blocks"
    return words, "same" if name == "SiLU" else "differs"


@torch.no_grad()
def rotary(loaded: Loaded) -> Judged:
    """The table holds the angles, and logits change where every position is turned by none."""
    model = loaded.model
    table, theta = getattr(model, "rotary", None), getattr(model.settings, "rope_theta", None)
    if not isinstance(table, Tensor) or theta is None:
        return "there is no table of rotary positions", "differs"
    width = table.shape[-1]
    rates = float(theta) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(table.shape[1], dtype=torch.float64), rates).repeat(1, 2)
    wanted = torch.stack((angles.cos(), angles.sin())).to(table.device)
    # a float32 angle of a thousand is known to its last place, 6e-5
    if not (table.double() - wanted).abs().max() <= 1e-6 + 1e-6 * table.shape[1]:
        return f"the table differs from base {theta:g}", "differs"
    turned = observe(model, loaded.tokenizer).logits
    kept = table.clone()
    try:
        table[0], table[1] = 1.0, 0.0
        still = observe(model, loaded.tokenizer).logits
    finally:
        table.copy_(kept)
    if turned is None or still is None or torch.equal(turned, still):
        return "there is a table, but it changes nothing", "differs"
    return f"base {theta:g}, and the logits depend on it", "same"


def biases(model: LanguageModel) -> Judged:
    """Whether any parameter is a bias."""
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")]
    return (f"{len(names)}, such as {names[0]}", "differs") if names else ("none", "same")


def types_seen(seen: Observation) -> str:
    """Types of the inputs of ternary layers."""
    return ", ".join(sorted({type_name(x.dtype) for x in seen.inputs.values()}))


def type_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _is_gated(form: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, product: Tensor) -> bool:
    wanted = form(gate.double()) * up.double()
    error = (product.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return bool(error <= 2 * torch.finfo(product.dtype).eps)
