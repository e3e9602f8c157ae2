"""The stages of an `hnet` model: an outer one finds chunks and hands them inwards, the innermost is a plain stack.

A stage takes positions of the stage around it, bytes or chunks, and gives back as many of the same width. How
chunks are found, gathered and spread out again is left to `ternlm.nn.dynamic_chunking`; embedding, head and the
weights of losses to `ternlm.models.hnet`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ternlm.models.hgrn_block import HGRNBlock, HGRNStack, initialize_stack
from ternlm.models.hnet_settings import HNetSettings
from ternlm.models.windowed_attention_block import WindowedAttentionBlock
from ternlm.nn.dynamic_chunking import DeChunk, ResidualProjection, Router, RouterState, Routing, Widening
from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.chunking import (
    Chunks,
    RatioLoss,
    cap_boundaries,
    locate,
    ratio_loss,
    select,
    straight_through,
)


class StageState(NamedTuple):
    """What an outer stage remembers of each row; rows are dimension 0 of every tensor.

    Attributes:
        encoder, decoder: Memory of each block.
        router: The last position, to compare the next one with.
        inner: Memory of the stage inside, which moves on only at chunks.
        smoothed: The chunk that positions are in, as it comes back from inside, (batch, width) float32.
    """

    encoder: list[Any]
    router: RouterState
    inner: Any
    smoothed: Tensor
    decoder: list[Any]


class StageOutput(NamedTuple):
    """What a stage returns.

    Attributes:
        x: (batch, time, width of the stage around it).
        state: The memory after these positions if one was given, else None.
        ratios: Ratio loss of each chunking from this stage inwards; empty with a state.
    """

    x: Tensor
    state: Any
    ratios: tuple[RatioLoss, ...]


class InnermostStage(nn.Module):
    """A stack of blocks between a wider and a narrower end.

    Args:
        settings: Shape.
        outer_width: Width of what comes in and goes out.
        mode: Rounding of the ternary layers.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.
    """

    def __init__(
        self, settings: HNetSettings, outer_width: int, mode: QuantizationMode, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        width, heads, window = settings.d_model[-1], settings.attention_heads, settings.attention_window_size
        self.outer_width = outer_width
        self.widen = Widening(outer_width, width)
        layers = [
            HGRNBlock(settings, width, mode)
            if kind == "x"
            else WindowedAttentionBlock(settings, width, heads, window, mode)
            for kind in settings.innermost_layers
        ]
        self.stack = HGRNStack(settings, width, layers, gradient_checkpointing)

    def forward(
        self, x: Tensor, starts: Tensor | None = None, state: Any = None, lengths: Tensor | None = None
    ) -> StageOutput:
        """As `OuterStage.forward`."""
        x, state = self.stack(self.widen(x), starts, state, lengths)
        return StageOutput(x[..., : self.outer_width], state, ())

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> list[Any]:
        """Empty memory for `batch_size` rows."""
        return self.stack.initial_state(batch_size, device)

    def blocks(self) -> Iterator[nn.Module]:
        """Its blocks in order."""
        yield from self.stack.layers

    def initialize(self, settings: HNetSettings, depth: int, seed: int, name: str) -> None:
        """As `OuterStage.initialize`."""
        self.widen.initialize()
        initialize_stack(self.stack, settings, _output_std(settings, depth), seed, f"{name}.stack")


class OuterStage(nn.Module):
    """Encode positions, let the stage inside see one of each chunk, spread what comes back, and decode.

        h = encoder(widen(x))                        b, p, c = router(h)
        z = inner(h where b)                         zu = dechunk(z, p)
        y = decoder(straight_through(zu, c) + W_r h)

    Everything between encoder and decoder is computed in float32; only W_r h and the chunks connect the two.

    Args:
        settings: Shape.
        depth: Number of the stage, 0 the outermost.
        mode: Rounding of the ternary layers; router and residual projection have none.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.

    Source:
        Hwang et al. 2025, H-Net (arXiv 2507.07955), sections 2.1 and 2.2.
    """

    inner: "OuterStage | InnermostStage"

    def __init__(
        self, settings: HNetSettings, depth: int, mode: QuantizationMode, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        width = settings.d_model[depth]
        encoders, _, decoders = settings.num_blocks[depth]
        self.outer_width = settings.d_model[max(depth - 1, 0)]
        self.target, self.max_fraction = settings.targets[depth], settings.max_chunk_fraction

        def stack(blocks: int) -> HGRNStack:
            layers = [HGRNBlock(settings, width, mode) for _ in range(blocks)]
            return HGRNStack(settings, width, layers, gradient_checkpointing)

        self.widen = Widening(self.outer_width, width)
        self.encoder = stack(encoders)
        self.router = Router(width)
        self.residual = ResidualProjection(width)
        if depth + 2 == settings.num_stages:
            self.inner = InnermostStage(settings, width, mode, gradient_checkpointing)
        else:
            self.inner = OuterStage(settings, depth + 1, mode, gradient_checkpointing)
        self.dechunk = DeChunk(width, settings.scan_impl, settings.scan_chunk)
        self.decoder = stack(decoders)

    def forward(
        self,
        x: Tensor,
        starts: Tensor | None = None,
        state: StageState | None = None,
        lengths: Tensor | None = None,
    ) -> StageOutput:
        """Compute the stage.

        Args:
            x: (batch, time, width of the stage around it).
            starts: (batch, time), bool, True at the first position of each sequence of a packed row.
            state: Memory of earlier positions; None begins with an empty one.
            lengths: (batch,), how many positions of each row are real when rows are padded on the right.
        """
        before = state or StageState(*(None,) * 5)  # type: ignore[arg-type]
        h, encoder = self.encoder(self.widen(x), starts, before.encoder, lengths)
        routing, router = self.router(h, starts, before.router, lengths)
        chunks = locate(self._kept(routing.boundary, starts, lengths), starts)
        z, inner, ratios = self._inside(h, chunks, before.inner, state is not None)
        spread, smoothed = self.dechunk(z, routing.probability, chunks, before.smoothed)
        y = straight_through(spread, routing.confidence) + self.residual(h)
        y, decoder = self.decoder(y.to(h.dtype), starts, before.decoder, lengths)
        y = y[..., : self.outer_width]
        if state is not None:
            return StageOutput(y, StageState(encoder, router, inner, smoothed, decoder), ())
        ratio = ratio_loss(routing.boundary, routing.probability, self.target, lengths)
        return StageOutput(y, None, (ratio, *ratios))

    def route(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Routing]:
        """What the encoder makes of positions, (batch, time, width), and where chunks begin among them."""
        h, _ = self.encoder(self.widen(x), None, None, lengths)
        routing, _ = self.router(h, None, None, lengths)
        return h, routing

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> StageState:
        """Empty memory for `batch_size` rows."""
        return StageState(
            self.encoder.initial_state(batch_size, device),
            self.router.initial_state(batch_size, device),
            self.inner.initial_state(batch_size, device),
            self.dechunk.initial_state(batch_size, device),
            self.decoder.initial_state(batch_size, device),
        )

    def blocks(self) -> Iterator[nn.Module]:
        """Blocks from here inwards and back, in the order of computation."""
        yield from self.encoder.layers
        yield from self.inner.blocks()
        yield from self.decoder.layers

    def initialize(self, settings: HNetSettings, depth: int, seed: int, name: str) -> None:
        """Draw all parameters from here inwards afresh.

        Args:
            settings: Standard deviations; output projections also shrink with the residual additions around them.
            depth: Number of this stage.
            seed: Every draw is a pure function of it and the full name of the parameter.
            name: Name of this stage in the model.
        """
        deviation = _output_std(settings, depth)
        initialize_stack(self.encoder, settings, deviation, seed, f"{name}.encoder")
        initialize_stack(self.decoder, settings, deviation, seed, f"{name}.decoder")
        for part in (self.widen, self.router, self.residual):
            part.initialize()
        self.inner.initialize(settings, depth + 1, seed, f"{name}.inner")

    def _kept(self, boundary: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Boundaries below the cap, which needs the length of a row and so exists in training only."""
        if self.max_fraction is None or not self.training:
            return boundary
        return cap_boundaries(boundary, self.max_fraction, starts, lengths)

    def _inside(self, h: Tensor, chunks: Chunks, state: Any, has_state: bool) -> StageOutput:
        """The stage inside on the first position of each chunk; of a step, only on rows that begin one."""
        first = select(h, chunks)
        lengths = chunks.lengths
        if not has_state:
            return self._call_inner(first, chunks.starts, None, lengths)
        if first.shape[1] == 0:
            return StageOutput(first, state, ())
        if lengths is None:
            return self._call_inner(first, None, state, None)
        rows = (lengths > 0).nonzero()[:, 0]
        if rows.numel() == lengths.numel():
            return self._call_inner(first, None, state, lengths)
        some = self._call_inner(first[rows], None, take_rows(state, rows), lengths[rows])
        z = torch.zeros_like(first).index_copy(0, rows, some.x)
        return StageOutput(z, put_rows(state, rows, some.state), ())

    def _call_inner(self, x: Tensor, starts: Tensor | None, state: Any, lengths: Tensor | None) -> StageOutput:
        output: StageOutput = self.inner(x, starts, state, lengths)
        return output


def take_rows(state: Any, rows: Tensor) -> Any:
    """A state with these rows of a state of tensors nested in tuples and lists, (n,) int64."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    return _like(state, [take_rows(part, rows) for part in state])


def put_rows(state: Any, rows: Tensor, some: Any) -> Any:
    """A copy of a state in which these rows are those of `some`."""
    if isinstance(state, Tensor):
        return state.to(some.dtype).index_copy(0, rows, some)
    return _like(state, [put_rows(part, rows, other) for part, other in zip(state, some, strict=True)])


def _like(state: Any, parts: list[Any]) -> Any:
    if isinstance(state, list):
        return parts
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _output_std(settings: HNetSettings, depth: int) -> float:
    return settings.initializer_range / float(settings.residual_additions[depth]) ** 0.5
