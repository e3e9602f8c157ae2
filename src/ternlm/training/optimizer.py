"""The optimizer: AdamW, or Muon for quantizable matrices; decay of these only, rates by kind of parameter, state by
name."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from ternlm.errors import CheckpointError
from ternlm.models import LanguageModel
from ternlm.settings import Float, Settings
from ternlm.training.muon import MATRICES, MuonAdamW


class OptimizerSettings(Settings):
    """Which optimizer, and its rates.

    Attributes:
        name: ``adamw``, or ``muon`` for quantizable matrices and AdamW for all else.
        learning_rate: Peak learning rate. Ternary models want about four to six times the rate of
            their full-precision twins.
        weight_decay: Decoupled decay of quantizable matrices; never of embeddings, norms or scales.
        betas: Decay rates of the two moments of AdamW.
        momentum: Decay rate of the momentum of Muon.
        eps: Added to the root of the second moment.
        embedding_lr_ratio: Learning rate of embeddings and heads as a share of that of quantizable matrices.
        other_lr_ratio: The same for norms, biases and scalars.
        quantizer_lr_ratio: The same for learned scales and thresholds of quantizers.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Float = 2e-3
    weight_decay: Float = 0.1
    betas: tuple[Float, Float] = (0.9, 0.95)
    momentum: Float = 0.95
    eps: Float = 1e-8
    embedding_lr_ratio: Float = 1.0
    other_lr_ratio: Float = 1.0
    quantizer_lr_ratio: Float = 0.1

    @field_validator("learning_rate", "eps", "embedding_lr_ratio", "other_lr_ratio", "quantizer_lr_ratio")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("it must be above 0")
        return value

    @field_validator("weight_decay")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if not value >= 0:
            raise ValueError("it must not be negative")
        return value

    @field_validator("betas", "momentum")
    @classmethod
    def _decay_rates(cls, value: Any) -> Any:
        if not all(0 <= rate < 1 for rate in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("a decay rate must lie in [0, 1)")
        return value


def build_optimizer(model: LanguageModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """The optimizer, with groups ``matrices``, ``embeddings``, ``quantizers``, ``rest``; only matrices decay.

    Every parameter is in exactly one group; tied tensors are one parameter. Each group has a ``ratio``, its learning
    rate as a share of that of the matrices. Parameters for which the model wants another rate
    (`LanguageModel.rate_factors`) are in groups of their own, such as ``matrices x1.5``.
    """
    ratios = {MATRICES: 1.0, "embeddings": settings.embedding_lr_ratio, "quantizers": settings.quantizer_lr_ratio,
              "rest": settings.other_lr_ratio}  # fmt: skip
    matrices = {id(layer.weight): layer.sizes for layer in model.bit_linears().values()}
    factors = model.rate_factors()
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = MATRICES if id(parameter) in matrices else "rest"
        if ".quantizer." in name:
            kind = "quantizers"
        elif kind == "rest" and model.is_embedding(name, parameter):
            kind = "embeddings"
        members.setdefault((kind, factors.get(name, 1.0)), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "name": kind if factor == 1 else f"{kind} x{factor:g}",
            "ratio": ratios[kind] * factor,
            "kind": kind,
            "decays": kind == MATRICES,
        }
        for (kind, factor), parameters in sorted(members.items(), key=lambda item: list(ratios).index(item[0][0]))
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    common: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0, "fused": fused
    }  # fmt: skip
    if settings.name == "muon":
        return MuonAdamW(groups, matrices, settings.momentum, **common)
    return torch.optim.AdamW(groups, **common)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Use these rates in the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>.<quantity>``, independent of the order of parameters."""
    return {
        f"{name}.{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def quantities(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of what an optimizer remembers of a parameter."""
    if isinstance(optimizer, MuonAdamW) and optimizer.is_matrix(parameter):
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def load_optimizer_tensors(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, in place of all state; an optimizer that has never stepped gives nothing.

    Learned scales of quantizers have no state either as long as their layers are not ternary.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    if not tensors:
        optimizer.state.clear()
        return
    for name, parameter in model.named_parameters():
        if ".quantizer." in name and f"{name}.step" not in tensors:
            optimizer.state.pop(parameter, None)
            continue
        state: dict[str, Tensor] = {}
        for quantity in quantities(optimizer, parameter):
            value = tensors.get(f"{name}.{quantity}")
            if value is None or (quantity != "step" and value.shape != parameter.shape):
                raise CheckpointError(
                    f"the optimizer state lacks a fitting '{name}.{quantity}'. Choose another checkpoint."
                )
            state[quantity] = value.to(device=parameter.device, copy=True)
        optimizer.state[parameter] = state
