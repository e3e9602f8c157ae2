"""The block of the byte-level families, gated recurrence and gated feed-forward network, and stacks of it.

`hgrn` is one stack between an embedding and a head; `hnet` nests several. What both share is here: the settings,
the block, the stack with its bounds and its final norm, the head, and initial values.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternlm.models.language_model import ModelSettings
from ternlm.nn.feed_forward import GatedFeedForward
from ternlm.nn.gated_recurrence import GatedRecurrence, RecurrenceSettings, RecurrentState
from ternlm.nn.initialization import normal_
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.pointwise_norm import Derf, DyT
from ternlm.nn.quantization import QuantizationMode
from ternlm.nn.windowed_attention import WindowedAttention
from ternlm.settings import Count, Float

_FEED_FORWARD_MULTIPLE = 256


class RecurrentSettings(ModelSettings, RecurrenceSettings):
    """What the byte-level families have in common, named as in published configurations where they have a name.

    Attributes:
        max_position_embeddings: Length of the windows that one would train on; the model itself has no limit.
        use_lower_bound: Forget gates have a least value that is learned and grows from layer to layer.
        hidden_ratio: Width of the feed-forward network before the usual factor 2/3 of gated ones, as a multiple.
        intermediate_size: That width itself; None makes it from `hidden_ratio`, rounded up to a multiple of 256.
        tie_word_embeddings: The head reuses the embedding.
        initializer_range: Standard deviation of the input projections; output projections are scaled by
            1 / sqrt(number of residual additions), and an unrounded head always starts with 0.02.
        embedding_init_std: Standard deviation of the embedding.
        norm_type: Norms of a block: ``rms``, ``dyt`` or ``derf``. The norm of the output gate and the last one of
            a stack stay root-mean-square norms.
        quantize_lm_head: Round the head as the last block is.
    """

    max_position_embeddings: Count = 2048
    use_lower_bound: bool = True
    hidden_ratio: Float = Field(default=4.0, gt=0)
    intermediate_size: Count | None = None
    tie_word_embeddings: bool = False
    initializer_range: Float = Field(default=0.02, gt=0)
    embedding_init_std: Float = Field(default=0.02, gt=0)
    norm_type: Literal["rms", "dyt", "derf"] = "rms"
    quantize_lm_head: bool = False

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        for name in ("max_position_embeddings", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1")
        if self.quantize_lm_head and self.tie_word_embeddings:
            raise ValueError(
                "model.quantize_lm_head=true cannot hold with model.tie_word_embeddings=true: the embedding is not "
                "rounded. Set one of them to false"
            )
        return self

    def feed_forward_width(self, width: int) -> int:
        """Width of the feed-forward network beside a residual stream of `width` channels."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        wanted = int(width * self.hidden_ratio * 2 / 3)
        return -(-wanted // _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE

    def block_flops(self, width: int) -> float:
        """Floating-point operations of one block for one training token, forward and backward."""
        memory, inner = self.recurrence_width(width), self.feed_forward_width(width)
        return 6.0 * (4 * width * memory + 3 * width * inner) + 30.0 * memory


class HGRNBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)), the mixer a gated recurrence.

    Args:
        settings: Shape and ingredients.
        width: Width of the residual stream.
        mode: Rounding of the projections.
    """

    is_recurrent = True

    def __init__(self, settings: RecurrentSettings, width: int, mode: QuantizationMode) -> None:
        super().__init__()
        self.attn_norm = block_norm(settings, width)
        self.attn = GatedRecurrence(settings, width, mode)
        self.mlp_norm = block_norm(settings, width)
        self.mlp = feed_forward(settings, width, mode)

    def forward(
        self,
        x: Tensor,
        bound: Tensor | None,
        starts: Tensor | None = None,
        state: RecurrentState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """As `GatedRecurrence.forward`, with the residual stream, (batch, time, width), as x."""
        y, state = self.attn(self.attn_norm(x), bound, starts, state, lengths)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> RecurrentState:
        """Empty memory for `batch_size` rows."""
        return self.attn.initial_state(batch_size, device)


class HGRNStack(nn.Module):
    """Blocks one after the other, with the bounds of their forget gates, and a norm behind the last.

    With P = softmax(lower_bounds) over the layers, layer l keeps at least P_1 + ... + P_l of its memory: nothing in
    layer 0, at first l / L in layer l, always less than everything, and never less than the layer before.

    Args:
        settings: Shape and ingredients.
        width: Width of the residual stream.
        layers: Blocks; any module with the `forward` and `initial_state` of `HGRNBlock` and an attribute
            `is_recurrent`, which says whether it has a forget gate.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.

    Source:
        Qin et al. 2023, HGRN, section 3.2 (arXiv 2311.04823).
    """

    lower_bounds: nn.Parameter | None

    def __init__(
        self,
        settings: RecurrentSettings,
        width: int,
        layers: Sequence[nn.Module],
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(layers)
        recurrent = sum(bool(layer.is_recurrent) for layer in layers)
        bounds = None
        if settings.use_lower_bound and recurrent:
            bounds = nn.Parameter(torch.zeros(recurrent, settings.recurrence_width(width)))
        self.register_parameter("lower_bounds", bounds)
        self.norm = RMSNorm(width, settings.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        starts: Tensor | None = None,
        states: Sequence[Any] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[Any] | None]:
        """Compute the stack.

        Args:
            x: (batch, time, width).
            starts: (batch, time), bool, True at the first position of each sequence of a packed row.
            states: Memory of each layer; None begins with an empty one.
            lengths: (batch,), how many positions of each row are real when rows are padded on the right.

        Returns:
            (batch, time, width) behind the norm, and the memory of each layer if one was given.
        """
        after: list[Any] = []
        bounds = iter(self.bounds())
        for place, layer in enumerate(self.layers):
            bound = next(bounds) if layer.is_recurrent else None
            if states is None and self.gradient_checkpointing and self.training:
                x, _ = checkpoint(layer, x, bound, starts, None, lengths, use_reentrant=False)
            else:
                x, state = layer(x, bound, starts, None if states is None else states[place], lengths)
                after.append(state)
        return self.norm(x), None if states is None else after

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> list[Any]:
        """Empty memory of each layer for `batch_size` rows."""
        return [layer.initial_state(batch_size, device) for layer in self.layers]  # type: ignore[operator]

    def bounds(self) -> list[Tensor | None]:
        """The least forget gate of each recurrent layer, (recurrence width,) float32 each; None is 0."""
        if self.lower_bounds is None:
            return [None for layer in self.layers if layer.is_recurrent]
        shares = torch.softmax(self.lower_bounds, dim=0)
        values: list[Tensor | None] = list((shares.cumsum(dim=0) - shares[0]).unbind())
        if len(values) > 1:
            values[0] = None  # a zero that costs nothing; a single layer keeps it, so that there is a gradient
        return values


def initialize_stack(stack: nn.Module, settings: RecurrentSettings, output_std: float, seed: int, name: str) -> None:
    """Draw the parameters of a stack or of any part of it afresh.

    Args:
        stack: What to draw.
        settings: The deviations of all matrices but the output projections.
        output_std: Standard deviation of the output projections of mixers and feed-forward networks.
        seed: Every draw is a pure function of it and the full name of the parameter.
        name: Name of `stack` in the model.
    """
    for path, part in stack.named_modules(prefix=name):
        if isinstance(part, BitLinear):
            is_output = path.endswith((".o", ".down"))
            normal_(part.weight, output_std if is_output else settings.initializer_range, seed, path)
            part.fit()
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)
        elif isinstance(part, (DyT, Derf)):
            part.initialize()
        elif isinstance(part, HGRNStack) and part.lower_bounds is not None:
            nn.init.zeros_(part.lower_bounds)
        elif isinstance(part, GatedRecurrence):
            part.initialize_convolutions(seed, path)
        elif isinstance(part, WindowedAttention):
            part.initialize(settings.initializer_range, output_std, seed, path)


def block_norm(settings: RecurrentSettings, width: int) -> nn.Module:
    """A norm in front of a part of a block."""
    if settings.norm_type == "rms":
        return RMSNorm(width, settings.rms_norm_eps)
    return DyT(width) if settings.norm_type == "dyt" else Derf(width)


def feed_forward(settings: RecurrentSettings, width: int, mode: QuantizationMode) -> GatedFeedForward:
    """The gated feed-forward network of a block, with a norm in front where each ternary layer has one."""
    eps = settings.inner_eps
    return GatedFeedForward(
        width,
        settings.feed_forward_width(width),
        "silu",
        mode,
        sub_norm_eps=None if settings.bitlinear_norm == "none" else eps,
        one_matrix=True,
        input_norm_eps=eps if settings.bitlinear_norm == "rms" else None,
    )
