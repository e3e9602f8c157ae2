"""One pass of a model over a short text, and what was seen in it: inputs of ternary layers, norms, products, logits.

Nothing is concluded here; `alignment` compares what was seen with the published definition.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ternlm.evaluation.untouched import untouched
from ternlm.models import LanguageModel
from ternlm.nn.feed_forward import GatedFeedForward
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.tokenizers import Tokenizer

TEXT = "The old lighthouse keeper wrote 27 letters to his sister, and none of them was ever sent."

_MOST_TOKENS, _KEPT_TOKENS = 48, 16
_RECENT = 4


@dataclass
class Observation:
    """What one pass showed.

    Attributes:
        inputs: First input of each ternary layer by name, (tokens, in_features), a few tokens, in its own dtype.
        normed: Whether the input of each ternary layer is the very output of an RMSNorm, by name.
        norm_error: Largest relative deviation of an RMSNorm from its formula in float64, in units of the last place of
            its output's type; None if there was none.
        gates: Of each gated network its gate, its other half, and their product before any norm.
        last_norm: Output of the last RMSNorm, (tokens, width).
        logits: (tokens, vocabulary).
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    normed: dict[str, bool] = field(default_factory=dict)
    norm_error: float | None = None
    gates: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    last_norm: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def observe(model: LanguageModel, tokenizer: Tokenizer) -> Observation:
    """Let a model read a sentence, in evaluation mode, and write down what passes through its layers.

    Args:
        model: Left as it was.
        tokenizer: Its tokenizer.
    """
    device = next(model.parameters()).device
    length = min(_MOST_TOKENS, getattr(model.settings, "max_position_embeddings", _MOST_TOKENS))
    tokens = torch.tensor([tokenizer.encode(TEXT)[:length]], device=device)
    seen, watcher = Observation(), _Watcher()
    hooks: list[Any] = []
    for name, layer in model.bit_linears().items():
        hooks.append(layer.register_forward_pre_hook(watcher.input_of(seen, name)))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            hooks.append(module.register_forward_hook(watcher.norm(seen)))
        elif isinstance(module, GatedFeedForward):
            hooks += watcher.gates(seen, module)
    try:
        with untouched(model):
            seen.logits = model(tokens).logits.flatten(0, -2)
    finally:
        for hook in hooks:
            hook.remove()
    if watcher.recent:
        seen.last_norm = watcher.recent[-1].flatten(0, -2)
    return seen


class _Watcher:
    """Hooks of one pass.

    Attributes:
        recent: The latest outputs of norms, so that a layer's input can be told to be one of them.
    """

    def __init__(self) -> None:
        self.recent: list[Tensor] = []

    def input_of(self, seen: Observation, name: str) -> Any:
        def look(layer: BitLinear, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            is_normed = any(x is output for output in self.recent)
            seen.normed[name] = seen.normed.get(name, True) and is_normed
            seen.inputs.setdefault(name, x.detach().flatten(0, -2)[:_KEPT_TOKENS].clone())

        return look

    def norm(self, seen: Observation) -> Any:
        def look(norm: RMSNorm, inputs: tuple[Any, ...], output: Tensor) -> None:
            self.recent = [*self.recent[1 - _RECENT :], output]
            wide = inputs[0].double()
            wanted = wide * (wide.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
            largest = wanted.abs().amax().clamp_min(1e-30)
            error = float((output.double() - wanted).abs().amax() / largest) / torch.finfo(output.dtype).eps
            worst = 0.0 if seen.norm_error is None else seen.norm_error
            seen.norm_error = error if not error <= worst else worst  # a comparison with nan is false

        return look

    def gates(self, seen: Observation, network: GatedFeedForward) -> list[Any]:
        halves: list[Tensor] = []

        def split(layer: BitLinear, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
            halves[:] = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)

        def multiply(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if len(halves) == 2:
                seen.gates.append((halves[0].detach(), halves[1].detach(), inputs[0].detach()))

        return [
            network.gate_up.register_forward_hook(split),
            network.ffn_sub_norm.register_forward_pre_hook(multiply),
        ]
