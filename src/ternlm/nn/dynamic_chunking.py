"""The parts between two stages of a hierarchical model: router, de-chunking, skip connection, wider streams.

None of them is ever quantized, and all but the widening compute in float32 whatever the type of activations (float64
where the input is): a router rounded to ternary weights finds no boundaries, and an average over chunks in bfloat16
loses its past.

Source:
    Hwang, Wang and Gu 2025, H-Net (arXiv 2507.07955).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.ops.chunking import Chunks, at_least_float32, boundary_probability, smooth, upsample
from ternlm.ops.recurrence import ScanImplementation


class RouterState(NamedTuple):
    """What a router remembers of each row.

    Attributes:
        last: The last vector seen, (B, D), float32.
        has_seen: Whether there was one, (B,) bool.
    """

    last: Tensor
    has_seen: Tensor


class Routing(NamedTuple):
    """What a router decides at each position; behind the end of a row: no boundary, p = 0, c = 1, no gradient.

    Attributes:
        boundary: b, whether a chunk begins, (B, T) bool.
        probability: p, (B, T), float32.
        confidence: c in the decision taken, (B, T), float32.
    """

    boundary: Tensor
    probability: Tensor
    confidence: Tensor


class Router(nn.Module):
    """Begins a chunk where a vector points elsewhere than the one before it.

        p_t = (1 - cos(W_q h_t, W_k h_{t-1})) / 2, and 1 at the first position of a sequence
        b_t = p_t > 0.5          c_t = p_t where b_t, else 1 - p_t

    Both matrices start as the identity, from which the model-wide initialization must keep away.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = _Matrix(width)
        self.k_proj = _Matrix(width)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Both matrices the identity."""
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.k_proj.weight)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> RouterState:
        """The state before any position."""
        width = self.q_proj.weight.shape[1]
        return RouterState(
            torch.zeros(batch_size, width, device=device), torch.zeros(batch_size, dtype=torch.bool, device=device)
        )

    def forward(
        self,
        h: Tensor,
        starts: Tensor | None = None,
        state: RouterState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Routing, RouterState | None]:
        """Decide at each position of h.

        Args:
            h: (B, T, D), any float dtype.
            starts: (1, T) bool for packed rows.
            state: What came before; None is nothing.
            lengths: (B,) int64 for ragged rows.

        Returns:
            The routing, and the next state if one was given.
        """
        h = at_least_float32(h)
        before = h.new_zeros(h.shape[0], 1, h.shape[2]) if state is None else state.last[:, None].to(h.dtype)
        history = torch.cat((before, h), dim=1)
        first = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device) if starts is None else starts.clone()
        first[:, :1] |= True if state is None else ~state.has_seen[:, None]
        probability = boundary_probability(self.q_proj(h), self.k_proj(history)[:, :-1], first)
        if lengths is not None:
            behind = torch.arange(h.shape[1], device=h.device) >= lengths[:, None]
            probability = probability.masked_fill(behind, 0.0)
        boundary = probability > 0.5
        routing = Routing(boundary, probability, torch.where(boundary, probability, 1 - probability))
        return routing, None if state is None else _next_state(state, history, lengths)


class DeChunk(nn.Module):
    """From one vector per chunk to one per position: smoothed over chunks, then repeated inside each.

    Args:
        width: D.
        scan_impl, scan_chunk: How the recurrence of the smoothing is computed (`ternlm.ops.recurrence.scan`).
    """

    def __init__(self, width: int, scan_impl: ScanImplementation = "auto", scan_chunk: int = 32) -> None:
        super().__init__()
        self.width, self.scan_impl, self.scan_chunk = width, scan_impl, scan_chunk

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> Tensor:
        """The smoothed vector before any chunk, (B, D) of zeros."""
        return torch.zeros(batch_size, self.width, device=device)

    def forward(
        self, z: Tensor, probability: Tensor, chunks: Chunks, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Smooth and up-sample.

        Args:
            z: Output of the inner stage, (B, M, D), any float dtype; M may be 0.
            probability: p of the router at all positions, (B, T).
            chunks: Where chunks begin.
            state: The last smoothed vector of each row, (B, D).

        Returns:
            (B, T, D) in float32, and the next state if one was given.
        """
        at_boundaries = probability.gather(1, chunks.positions)
        smoothed, last = smooth(z, at_boundaries, state, chunks.starts, chunks.lengths, self.scan_impl, self.scan_chunk)
        return upsample(smoothed, chunks, state), None if state is None else last

    def extra_repr(self) -> str:
        return f"{self.width}, scan_impl={self.scan_impl}"


class ResidualProjection(nn.Module):
    """r = W h from the encoder of a stage to its decoder, past all inner stages; W starts as zero.

    Full precision: the mean magnitude of a zero matrix would be a ternary scale of zero.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    @torch.no_grad()
    def initialize(self) -> None:
        """All zero."""
        self.weight.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) of any float dtype -> (..., D) in float32."""
        return _full_precision(h, self.weight)


class Widening(nn.Module):
    """Appends one learned vector, the same at each position, to fill a wider stream; it starts as zero.

    Args:
        narrow, wide: Width before and after; where they are equal nothing is learned and nothing happens.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(wide - narrow)) if wide > narrow else None

    @torch.no_grad()
    def initialize(self) -> None:
        """The vector zero."""
        if self.vector is not None:
            self.vector.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., narrow) -> (..., wide), in the dtype of x."""
        if self.vector is None:
            return x
        return torch.cat((x, self.vector.to(x.dtype).expand(*x.shape[:-1], -1)), dim=-1)


class _Matrix(nn.Module):
    """A square projection in float32, and no `nn.Linear`, which a model-wide initialization would draw anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return _full_precision(x, self.weight)


def _full_precision(x: Tensor, weight: Tensor) -> Tensor:
    x = at_least_float32(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype))


def _next_state(state: RouterState, history: Tensor, lengths: Tensor | None) -> RouterState:
    """`history` holds the vector of the state in front of those of the rows, (B, 1 + T, D)."""
    if lengths is None:
        return RouterState(history[:, -1], state.has_seen | (history.shape[1] > 1))
    rows = torch.arange(len(lengths), device=lengths.device)
    return RouterState(history[rows, lengths], state.has_seen | (lengths > 0))
