"""Dynamic chunking: where a sequence is cut into chunks, one vector per chunk, and back to one per position.

A boundary marks the first position of a chunk. The functions serve three layouts alike: packed rows (1, T) with
`starts`, ragged rows (B, T) with `lengths`, and steps that continue after a state. Positions behind the end of a row
never carry a boundary. All arithmetic is float32, or float64 where the input is.

Source:
    Hwang, Wang and Gu 2025, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling" (arXiv 2507.07955).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.ops.recurrence import ScanImplementation, freeze, reset, scan

SMALLEST = 1e-4
"""The least weight that the smoothing gives to a chunk, and to the chunks before it."""

_SHORTEST = 1e-8


class Chunks(NamedTuple):
    """Where the chunks of the rows of a stage lie; M is the largest number of chunks in a row.

    Attributes:
        positions: (B, M) int64, the position at which each chunk begins; 0 behind the last chunk of a row.
        of_position: (B, T) int64, how many chunks have begun up to and including each position: 0 in a chunk that
            began before the row.
        starts: (1, M) bool, the first chunk of each packed sequence; None where rows are not packed.
        lengths: (B,) int64, how many chunks each row has; None for a single row.
    """

    positions: Tensor
    of_position: Tensor
    starts: Tensor | None
    lengths: Tensor | None


class RatioLoss(NamedTuple):
    """The loss of `ratio_loss` and what it is made of.

    Attributes:
        loss: (), with gradient.
        boundary_rate: F, the share of positions that begin a chunk, (), without gradient.
        mean_probability: G, (), without gradient.
    """

    loss: Tensor
    boundary_rate: Tensor
    mean_probability: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def boundary_probability(q: Tensor, k_before: Tensor, first: Tensor) -> Tensor:
    """p_t = clip((1 - cos(q_t, k_{t-1})) / 2, 0, 1), and 1 at the first position of a sequence.

    A vector shorter than 1e-8 counts as one of length 1: the cosine of a zero vector is 0 and its gradient finite.

    Args:
        q: Query of each position, (B, T, D).
        k_before: Key of the position before, (B, T, D).
        first: (B, T) bool.

    Returns:
        (B, T).
    """
    q, k_before = at_least_float32(q), at_least_float32(k_before)
    with torch.autocast(q.device.type, enabled=False):
        cosine = torch.linalg.vecdot(q, k_before) * _inverse_norm(q) * _inverse_norm(k_before)
    return ((1 - cosine) / 2).clamp(0, 1).masked_fill(first, 1.0)


def boundary_probability_reference(q: Tensor, k_before: Tensor, first: Tensor) -> Tensor:
    """The definition of `boundary_probability`."""
    cosine = F.cosine_similarity(at_least_float32(q), at_least_float32(k_before), dim=-1)
    return torch.where(first, 1.0, ((1 - cosine) / 2).clamp(0, 1))


def cap_boundaries(
    boundary: Tensor, fraction: float, starts: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """The boundaries without those beyond max(1, ceil(fraction * length)) in a row or packed sequence.

    What they would have begun becomes part of the last chunk that is kept. A cap bounds the time and memory of the
    inner stage; it depends on the length, which a step does not know, so it belongs in training only.

    Args:
        boundary: (B, T) bool.
        fraction: Largest number of chunks per position.
        starts: (1, T) bool for packed rows, the first of which is True.
        lengths: (B,) int64 for ragged rows.
    """
    rank = boundary.cumsum(dim=1)
    if starts is not None:
        sequence = starts.cumsum(dim=1) - 1
        before = (rank - boundary.long())[starts]
        rank = rank - before[sequence]
        length = torch.bincount(sequence[0])[sequence]
    elif lengths is not None:
        length = lengths[:, None]
    else:
        length = torch.full_like(rank, boundary.shape[1])
    # 0.1 * 30 is a little more than 3 in floating point
    capacity = (fraction * length.double() - 1e-9).ceil().clamp_min(1)
    return boundary & (rank <= capacity)


def locate(boundary: Tensor, starts: Tensor | None = None) -> Chunks:
    """The chunks that begin at the boundaries of each row.

    Args:
        boundary: (B, T) bool, False behind the end of a row.
        starts: (1, T) bool for packed rows, the first position of each sequence, which must be a boundary.
    """
    of_position = boundary.cumsum(dim=1)
    rows, time = boundary.shape
    if rows == 1:
        positions = boundary[0].nonzero().flatten()[None]
        return Chunks(positions, of_position, None if starts is None else starts[:, positions[0]], None)
    lengths = boundary.sum(dim=1)
    most = int(lengths.max())
    # One place more than chunks: it takes every position that begins none.
    target = torch.where(boundary, of_position - 1, most)
    places = torch.zeros(rows, most + 1, dtype=torch.int64, device=boundary.device)
    places.scatter_(1, target, torch.arange(time, device=boundary.device).expand(rows, -1))
    return Chunks(places[:, :most], of_position, None, lengths)


def select(h: Tensor, chunks: Chunks) -> Tensor:
    """The vectors at which chunks begin, (B, T, D) -> (B, M, D); zero behind the last chunk of a row."""
    return _clear(_take(h, chunks.positions), chunks.lengths)


def smooth(
    z: Tensor,
    probability: Tensor,
    previous: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    impl: ScanImplementation = "auto",
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Exponential moving average over chunks: s_k = P_k z_k + (1 - P_k) s_{k-1}, P_k = clip(p_k, 1e-4, 1 - 1e-4).

    Args:
        z: Output of the inner stage for each chunk, (B, M, D).
        probability: p of the position at which the chunk begins, (B, M).
        previous: s_0, (B, D), float32; None is zero.
        starts: (1, M) bool for packed rows: s_{k-1} counts as zero there.
        lengths: (B,) int64 for ragged rows.
        impl, chunk: How the recurrence is computed (`scan`).

    Returns:
        s, (B, M, D), and the last s of each row, (B, D): `previous` where a row has no chunk.
    """
    z = at_least_float32(z)
    if not z.shape[1]:
        return z, z.new_zeros(z.shape[0], z.shape[2]) if previous is None else previous
    weight = probability.to(z.dtype).clamp(SMALLEST, 1 - SMALLEST)[..., None]
    kept, added = (1 - weight).expand_as(z), weight * z
    if starts is not None:
        kept = reset(kept, starts)
    if lengths is not None:
        kept, added = freeze(kept, added, lengths)
    return scan(kept, added, None if previous is None else previous.to(z.dtype), impl, chunk)


def upsample(smoothed: Tensor, chunks: Chunks, previous: Tensor | None = None) -> Tensor:
    """The value of its chunk at each position, constant inside a chunk: (B, M, D) -> (B, T, D).

    Args:
        smoothed: One vector per chunk.
        chunks: Where they lie.
        previous: (B, D), the chunk that began before the row; without it every row begins with a chunk, and an empty
            row is filled with anything finite.
    """
    if previous is not None:
        return _take(torch.cat((previous[:, None].to(smoothed.dtype), smoothed), dim=1), chunks.of_position)
    if not smoothed.shape[1]:
        return smoothed.new_zeros(*chunks.of_position.shape, smoothed.shape[2])
    return _take(smoothed, (chunks.of_position - 1).clamp_min(0))


def dechunk_reference(z: Tensor, probability: Tensor, boundary: Tensor, previous: Tensor | None = None) -> Tensor:
    """The definition of `smooth` and `upsample` for rows without packing, one position after the other.

    Args:
        z: (B, M, D).
        probability: (B, T), at all positions.
        boundary: (B, T) bool.
        previous: (B, D).
    """
    z = at_least_float32(z)
    weight = probability.to(z.dtype).clamp(SMALLEST, 1 - SMALLEST)
    rows = []
    for row in range(z.shape[0]):
        s = torch.zeros_like(z[row, 0]) if previous is None else previous[row]
        k, values = 0, []
        for t in range(boundary.shape[1]):
            if boundary[row, t]:
                s = weight[row, t] * z[row, k] + (1 - weight[row, t]) * s
                k += 1
            values.append(s)
        rows.append(torch.stack(values))
    return torch.stack(rows)


def straight_through(x: Tensor, confidence: Tensor) -> Tensor:
    """x, exactly, with the gradient of x * c: <dL/dx, x> flows into the confidence c.

    Args:
        x: (B, T, D).
        confidence: (B, T): how sure the router was of what it decided at each position, boundary or not.
    """
    y: Tensor = _StraightThrough.apply(x, confidence)
    return y


def straight_through_reference(x: Tensor, confidence: Tensor) -> Tensor:
    """The definition of `straight_through`: x * (c + sg(1 - c))."""
    return x * (confidence + (1 - confidence).detach())[..., None]


def ratio_loss(boundary: Tensor, probability: Tensor, target: float, lengths: Tensor | None = None) -> RatioLoss:
    """N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)): least where one position in N begins a chunk.

    F is the share of boundaries and G the mean probability, over all positions within rows. Only G has a gradient,
    N / (N - 1) * (N F - 1). Both at 1 / N give 1; the value can be lower where they differ.

    Args:
        boundary: (B, T) bool, False behind the end of a row.
        probability: (B, T).
        target: N, the wanted number of positions per chunk, above 1.
        lengths: (B,) int64 for ragged rows.
    """
    probability = at_least_float32(probability)
    if lengths is None:
        rate, mean = boundary.to(probability.dtype).mean(), probability.mean()
    else:
        valid = torch.arange(boundary.shape[1], device=boundary.device) < lengths[:, None]
        count = valid.sum().clamp_min(1)
        rate = (boundary & valid).sum() / count
        mean = probability.masked_fill(~valid, 0.0).sum() / count
    loss = target / (target - 1) * ((target - 1) * rate * mean + (1 - rate) * (1 - mean))
    return RatioLoss(loss, rate.detach(), mean.detach())


def lift(values: Tensor, chunks: Chunks, fill: Any) -> Tensor:
    """Values of chunks at the positions where they begin, (B, M) -> (B, T), and `fill` at all others."""
    begins = chunks.of_position.diff(dim=1, prepend=torch.zeros_like(chunks.of_position[:, :1])) > 0
    if not values.shape[1]:
        return torch.full(begins.shape, fill, dtype=values.dtype, device=values.device)
    spread = values.gather(1, (chunks.of_position - 1).clamp_min(0))
    return spread.masked_fill(~begins, fill)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, confidence: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = confidence.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grads[0], (grads[0] * x).sum(dim=-1).to(ctx.dtype)


def _inverse_norm(x: Tensor) -> Tensor:
    square = torch.linalg.vecdot(x, x)
    return square.masked_fill(square < _SHORTEST**2, 1.0).rsqrt()


def _take(values: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) at (B, K) -> (B, K, D). Whole rows of a matrix are three times as fast as `gather`, backward too."""
    rows, places, width = values.shape
    if rows > 1:
        index = index + torch.arange(rows, device=index.device)[:, None] * places
    return values.reshape(rows * places, width).index_select(0, index.flatten()).view(*index.shape, width)


def _clear(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero behind the end of each row."""
    if lengths is None:
        return x
    behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(behind[..., None], 0.0)
