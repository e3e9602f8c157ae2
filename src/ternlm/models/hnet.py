"""`hnet`: a hierarchical byte-level language model that learns where to cut its text into chunks.

    x = E[bytes]
    x = stage_0(x)                 encoder, router, stage_1 on one position per chunk, de-chunking, decoder
    logits = W_head x              each stage ends with a norm of its own

The stages are in `ternlm.models.hnet_stage`, their blocks those of `hgrn`. Ternary are the projections of the
blocks; embedding, head, routers, residual projections and the vectors that widen the stream stay in full precision.

Source:
    Hwang et al. 2025, H-Net (arXiv 2507.07955); the combination with ternary recurrent blocks, jcv-dev/hnet_bit.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ternlm.models.hnet_settings import HNetSettings
from ternlm.models.hnet_stage import InnermostStage, OuterStage, StageState
from ternlm.models.language_model import Output
from ternlm.models.recurrent_model import RecurrentModel
from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.chunking import Chunks, RatioLoss, lift, locate, select


class StageChunks(NamedTuple):
    """Where one chunking cuts, on the positions of bytes.

    Attributes:
        boundary: (batch, time) bool, True where a chunk begins; of an inner chunking, at the byte at which the first
            of its chunks begins.
        probability: (batch, time) float32, that of the router; NaN where this chunking has no position.
    """

    boundary: Tensor
    probability: Tensor


class HNet(RecurrentModel):
    """The hierarchical model.

    Args:
        settings: Shape; `vocab_size` must be set.
        mode: Rounding of all ternary layers.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.
    """

    settings: HNetSettings

    def __init__(self, settings: HNetSettings, mode: QuantizationMode, gradient_checkpointing: bool = False) -> None:
        super().__init__(settings, settings.d_model[0], mode)
        self.model = OuterStage(settings, 0, mode, gradient_checkpointing)

    def forward(
        self,
        tokens: Tensor,
        state: StageState | None = None,
        lengths: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Output:
        """Logits for the token after each given one; without a state also the ratio loss and what the routers did.

        Args:
            tokens: (batch, time), int64; any number of them, with or without a state.
            state: Memory from `initial_state` or a previous call; it is not changed.
            lengths: (batch,), how many tokens of each row are real when rows are padded on the right, from 0.
            scored: (batch, time), bool; logits are computed there only and come as (number, vocab_size).
        """
        self.refresh()
        batch, time = tokens.shape
        starts = None
        if state is None and lengths is None and batch > 1 and self.settings.chunk_layout == "packed":
            starts = (torch.arange(batch * time, device=tokens.device) % time == 0)[None]
            tokens = tokens.reshape(1, batch * time)
        output = self.model(self._embedded(tokens), starts, state, lengths)
        logits = self._logits(output.x.reshape(batch, time, -1), scored)
        return Output(logits, output.state, self._auxiliary(output.ratios), _telemetry(output.ratios))

    @torch.no_grad()
    def chunkings(self, tokens: Tensor, lengths: Tensor | None = None) -> list[StageChunks]:
        """Where the model cuts a text, outermost chunking first; only what that takes is computed.

        Args:
            tokens: (batch, time), int64.
            lengths: (batch,), how many tokens of each row are real, at least 1; None is all.
        """
        self.refresh()
        x = self._embedded(tokens)
        stage: OuterStage | InnermostStage = self.model
        around: list[Chunks] = []
        found = []
        while isinstance(stage, OuterStage):
            h, routing = stage.route(x, lengths)
            boundary, probability = routing.boundary, routing.probability
            if lengths is not None:
                behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
                probability = probability.masked_fill(behind, math.nan)
            for chunks in reversed(around):
                boundary, probability = lift(boundary, chunks, False), lift(probability, chunks, math.nan)
            found.append(StageChunks(boundary, probability))
            around.append(locate(routing.boundary))
            x, lengths, stage = select(h, around[-1]), around[-1].lengths, stage.inner
        return found

    def initial_state(self, batch_size: int) -> StageState:
        return self.model.initial_state(batch_size, self.embed_tokens.weight.device)

    def initialize(self, seed: int) -> None:
        settings = self.settings
        self.model.initialize(settings, 0, seed, "model")
        self._initialize_ends(settings, settings.initializer_range, seed)

    def blocks(self) -> Iterator[nn.Module]:
        return self.model.blocks()

    def rate_factors(self) -> dict[str, float]:
        """Those of `lr_multipliers`, by the stage of a parameter; embedding and head belong to the outermost."""
        factors = dict.fromkeys((name for name, _ in self.named_parameters()), self.settings.multipliers[0])
        for stage, factor in enumerate(self.settings.multipliers[1:], start=1):
            inside = "model." + "inner." * stage
            factors |= {name: factor for name in factors if name.startswith(inside)}
        return factors

    def _auxiliary(self, ratios: Sequence[RatioLoss]) -> dict[str, Tensor]:
        weight = self.settings.ratio_loss_weight
        return {"ratio_loss": weight * torch.stack([ratio.loss for ratio in ratios]).sum()} if ratios and weight else {}


def _telemetry(ratios: Sequence[RatioLoss]) -> dict[str, Tensor]:
    """What the routers did, by the names of the log; the bytes of a chunk count through all stages around it."""
    values: dict[str, Tensor] = {}
    bytes_per_chunk = torch.ones(())
    for stage, ratio in enumerate(ratios):
        bytes_per_chunk = bytes_per_chunk.to(ratio.boundary_rate.device) / ratio.boundary_rate
        values |= {
            f"hnet/stage{stage}/boundary_rate": ratio.boundary_rate,
            f"hnet/stage{stage}/boundary_probability": ratio.mean_probability,
            f"hnet/stage{stage}/ratio_loss": ratio.loss.detach(),
            f"hnet/stage{stage}/bytes_per_chunk": bytes_per_chunk,
        }
    return values
