"""How a layer rounds, and what a training step does to it besides rounding: two values, no computation.

`QuantizationMode` is the dial that schedules turn; `nn/linear.py` and `nn/activation_quantizer.py` obey it.
"""

from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ternlm.ops.quantize import Granularity
from ternlm.settings import Count, Float, Settings

Weights = Literal["ternary", "int8", "int6", "int4", "none"]
DropBy = Literal["token_row", "batch", "element"]

_BITS: dict[str, int] = {"int8": 8, "int6": 6, "int4": 4}
_LEARNED = ("ttq", "lsq")


class QuantizationMode(Settings):
    """How one layer rounds: the dial that schedules turn, and the `quantization` section of a run.

    Attributes:
        weights: ``ternary``, ``int8``, ``int6`` or ``int4`` (absmax per row), or ``none``.
        activations: ``int8``, ``int6``, ``int4`` (absmax per token) or ``none``; ignored when weights are ``none``.
            Sites with bits of their own (`ActivationQuantizer`) are switched off by ``none`` and keep theirs otherwise.
        granularity: What shares a ternary scale: the whole matrix, a row, or a group of columns.
        group_size: Columns per group.
        quantizer: What finds the scale and the threshold of ternary weights: ``absmean``, ``twn``, or parameters
            of each row, ``ttq`` (both) and ``lsq`` (the scale).
        ste: Gradient of a latent weight under ``ttq`` and ``lsq``: ``identity``, or ``clip``, zero beyond the scale.
        ttq_percentile: Share of a row's weights, in percent, that start in the dead zone of ``ttq``.
        lsq_grad_clip: Bound on the gradient of each row's scale and threshold.
        least_bits: Integer weights and activations have at least so many bits.
    """

    weights: Weights = "ternary"
    activations: Literal["int8", "int6", "int4", "none"] = "int8"
    granularity: Granularity = "tensor"
    group_size: Count = Field(default=128, ge=1)
    quantizer: Literal["absmean", "twn", "ttq", "lsq"] = "absmean"
    ste: Literal["identity", "clip"] = "identity"
    ttq_percentile: Float = Field(default=30.0, gt=0, lt=100)
    lsq_grad_clip: Float = Field(default=1.0, gt=0)
    least_bits: Count = Field(default=0, ge=0, le=8)

    @model_validator(mode="before")
    @classmethod
    def _learned_scales_belong_to_rows(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("quantizer") in _LEARNED and "granularity" not in values:
            return values | {"granularity": "row"}
        return values

    @model_validator(mode="after")
    def _quantizer_fits(self) -> Self:
        if self.quantizer in _LEARNED and self.granularity != "row":
            raise ValueError(
                f"quantizer={self.quantizer} learns a scale for each row, so granularity={self.granularity} "
                "cannot hold; choose granularity=row"
            )
        if self.quantizer == "twn" and self.granularity == "group":
            raise ValueError("quantizer=twn knows no groups of columns; choose granularity=row or quantizer=absmean")
        if self.ste == "clip" and self.quantizer not in _LEARNED:
            raise ValueError(f"ste=clip needs a learned scale, not quantizer={self.quantizer}; choose ste=identity")
        return self

    @property
    def activation_bits(self) -> int | None:
        """Bits of an activation that is rounded per token; None when activations are not rounded."""
        return max(_BITS[self.activations], self.least_bits) if self.activations in _BITS else None

    @property
    def weight_bits(self) -> int | None:
        """Bits of integer weights; None when they are ternary or not rounded."""
        return max(_BITS[self.weights], self.least_bits) if self.weights in _BITS else None

    @property
    def is_learned(self) -> bool:
        """Whether ternary scales are parameters."""
        return self.weights == "ternary" and self.quantizer in _LEARNED


FULL_PRECISION = QuantizationMode(weights="none", activations="none")


class Perturbation(NamedTuple):
    """What a training step does to a quantized layer besides rounding; by default nothing.

    Attributes:
        drop: QDrop, the probability that a quantizer is bypassed: out = m Q(z) + (1 - m) z, m ~ Bernoulli(1 - drop).
        drop_by: What shares a draw of m: a token of activations and an output row of weights, the whole tensor in
            one pass, or nothing (each element has its own).
        dither: Amplitude a of noise a * s * U(-1/2, 1/2) on ternary latent weights, in the forward pass only.
        zeroed: Ternary dropout, the probability that a code other than zero becomes zero.
        blend: Share of the rounding in force; the rest of a weight is rounded as `previous` says.
        previous: The rounding that is being left.

    `drop`, `dither` and `zeroed` act in training only, `blend` in evaluation as well.

    Source:
        Wei et al. 2022, QDrop (arXiv 2203.05740); Fan et al. 2020, quantization noise (arXiv 2004.07320).
    """

    drop: float = 0.0
    drop_by: DropBy = "token_row"
    dither: float = 0.0
    zeroed: float = 0.0
    blend: float = 1.0
    previous: QuantizationMode | None = None
