"""`hgrn`: a flat byte-level language model without attention, its projections ternary and its memory one vector.

    x = E[bytes]
    x = x + mixer(norm(x)),  x = x + feed_forward(norm(x))        for each block
    logits = W_head norm(x)

Source:
    Zhu et al. 2024, Scalable MatMul-free Language Modeling (arXiv 2406.02528); Qin et al. 2023, HGRN
    (arXiv 2311.04823); the byte-level form, jcv-dev/simplified_slm.
"""

import math
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from ternlm.models.hgrn_block import (
    HGRNBlock,
    HGRNStack,
    RecurrentSettings,
    initialize_stack,
)
from ternlm.models.language_model import Output
from ternlm.models.recurrent_model import RecurrentModel
from ternlm.nn.gated_recurrence import RecurrentState
from ternlm.nn.quantization import QuantizationMode
from ternlm.settings import Count


class HGRNSettings(RecurrentSettings):
    """Shape of an `hgrn` model.

    Attributes:
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
    """

    family: Literal["hgrn"] = "hgrn"
    hidden_size: Count = 512
    num_hidden_layers: Count = 6

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        for name in ("hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.recurrence_width(self.hidden_size) < 1:
            raise ValueError(
                f"model.expand_ratio={self.expand_ratio:g} leaves no memory beside model.hidden_size="
                f"{self.hidden_size}; choose at least {1 / self.hidden_size:g}"
            )
        return self

    @property
    def kept_per_token(self) -> int:
        """Gates, states and products around the scan of each layer: counted, 18 bytes per channel of memory."""
        return 18 * self.num_hidden_layers * self.recurrence_width(self.hidden_size)

    def flops_per_token(self, context: int) -> float:
        """6 (ternary matrices + vocab_size * hidden_size) + 30 channels of memory, in each layer; any context."""
        blocks = self.num_hidden_layers * self.block_flops(self.hidden_size)
        return blocks + 6.0 * (self.vocab_size or 0) * self.hidden_size


class HGRN(RecurrentModel):
    """The flat recurrent model.

    Args:
        settings: Shape; `vocab_size` must be set.
        mode: Rounding of all ternary layers.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.
    """

    settings: HGRNSettings

    def __init__(self, settings: HGRNSettings, mode: QuantizationMode, gradient_checkpointing: bool = False) -> None:
        width = settings.hidden_size
        super().__init__(settings, width, mode)
        layers = [HGRNBlock(settings, width, mode) for _ in range(settings.num_hidden_layers)]
        self.model = HGRNStack(settings, width, layers, gradient_checkpointing)

    def forward(
        self,
        tokens: Tensor,
        state: list[RecurrentState] | None = None,
        lengths: Tensor | None = None,
        scored: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Output:
        """Logits for the token after each given one.

        Args:
            tokens: (batch, time), int64; any number of them, with or without a state.
            state: Memory of each layer from `initial_state` or a previous call; it is not changed.
            lengths: (batch,), how many tokens of each row are real when rows are padded on the right, from 0.
            scored: (batch, time), bool; logits are computed there only and come as (number, vocab_size).
            starts: (batch, time), bool, True at the first token of each sequence where rows are packed.
        """
        self.refresh()
        x, after = self.model(self._embedded(tokens), starts, state, lengths)
        return Output(self._logits(x, scored), after, {})

    def initial_state(self, batch_size: int) -> list[RecurrentState]:
        states: list[RecurrentState] = self.model.initial_state(batch_size, self.embed_tokens.weight.device)
        return states

    def initialize(self, seed: int) -> None:
        settings = self.settings
        output_std = settings.initializer_range / math.sqrt(2 * settings.num_hidden_layers)
        initialize_stack(self.model, settings, output_std, seed, "model")
        self._initialize_ends(settings, output_std, seed)

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.model.layers)
