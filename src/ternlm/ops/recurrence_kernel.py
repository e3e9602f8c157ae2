"""The scan of `ternlm.ops.recurrence` in Triton: chunks summarized, summaries joined, chunks replayed.

Each program owns a block of channels and keeps their state in registers, so that a step of time costs two reads and
one write. Time runs against the clock in the backward pass: position p of the scan is t = T - 1 - p, its gate is
a_{t+1} (1 behind the end) and its first state the gradient of the last state. Triton is imported here and nowhere
else; with TRITON_INTERPRET=1 the same code runs on a CPU, slowly, for tests.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternlm.errors import EnvironmentFault

CHANNELS = 128
"""Channels per program: one float32 for each thread of four warps."""


def states(a: Tensor, u: Tensor, h0: Tensor | None, chunk: int) -> Tensor:
    """All states of h_t = a_t h_{t-1} + u_t, (B, T, C).

    Args:
        a: Gates, (B, T, C).
        u: Inputs, (B, T, C).
        h0: First state, (B, C), or None for zero.
        chunk: Positions per chunk.

    Raises:
        EnvironmentFault: If the tensors are not on a CUDA device.
    """
    a, u = a.contiguous(), u.contiguous()
    h = torch.empty_like(u)
    _launch(a, u, h0, h, h, h, chunk, backward=False)
    return h


def gradients(
    a: Tensor, h: Tensor, h0: Tensor | None, grad_h: Tensor, grad_last: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gradients of gates and of inputs, each (B, T, C), from those of the states and of the last state."""
    a, grad_h = a.contiguous(), grad_h.contiguous()
    grad_a, grad_u = torch.empty_like(a), torch.empty_like(a)
    _launch(a, grad_h, grad_last, grad_u, h, grad_a, chunk, backward=True)
    grad_a[:, 0] = 0.0 if h0 is None else grad_u[:, 0] * h0
    return grad_a, grad_u


def _launch(
    a: Tensor, values: Tensor, first: Tensor | None, out: Tensor, h: Tensor, grad_a: Tensor, chunk: int, backward: bool
) -> None:
    """The three passes; one chunk alone needs the last only."""
    if not a.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise EnvironmentFault(
            f"the scan kernel needs tensors on a CUDA device, these are on {a.device}; choose 'auto'"
        )
    rows, length, width = a.shape
    chunk = min(chunk, length)
    chunks = triton.cdiv(length, chunk)
    state = a.new_zeros(rows, width) if first is None else first.contiguous()
    blocks = triton.cdiv(width, CHANNELS)
    sizes = {"chunk": chunk, "BACKWARD": backward, "BLOCK": CHANNELS}
    with torch.cuda.device_of(a):
        entries = state
        if chunks > 1:
            product, end, entries = (a.new_empty(rows, chunks, width) for _ in range(3))
            _summarize[(rows * chunks, blocks)](a, values, product, end, length, width, chunks, **sizes)
            _join[(rows, blocks)](product, end, state, entries, width, chunks, BLOCK=CHANNELS)
        _replay[(rows * chunks, blocks)](a, values, entries, out, h, grad_a, length, width, chunks, **sizes)


@triton.jit  # type: ignore[untyped-decorator]
def _step(a, values, base, position, length, width, channel, BACKWARD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gate and input of one position of the scan, and its time; gate 1 and input 0 behind the end."""
    present = tl.where(position < length, width, 0)  # a position that does not exist has no channels
    if BACKWARD:
        time = length - 1 - position
        gate_place = base + (time + 1) * width
        has_gate = channel < tl.where(position > 0, present, 0)
    else:
        time = position
        gate_place = base + time * width
        has_gate = channel < present
    gate = tl.load(a + gate_place + channel, mask=has_gate, other=1.0)
    value = tl.load(values + base + time * width + channel, mask=channel < present, other=0.0)
    return gate, value, time


@triton.jit  # type: ignore[untyped-decorator]
def _summarize(  # type: ignore[no-untyped-def]
    a, values, product_out, end_out, length, width, chunks,
    chunk: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each chunk does to its first state H: product * H + end."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < width
    base = (program // chunks) * length * width
    product = tl.full((BLOCK,), 1.0, a.dtype.element_ty)
    end = tl.full((BLOCK,), 0.0, a.dtype.element_ty)
    for offset in range(chunk):
        position = (program % chunks) * chunk + offset
        gate, value, _ = _step(a, values, base, position, length, width, channel, BACKWARD)
        product *= gate
        end = gate * end + value
    tl.store(product_out + program * width + channel, product, mask=is_channel)
    tl.store(end_out + program * width + channel, end, mask=is_channel)


@triton.jit  # type: ignore[untyped-decorator]
def _join(product, end, state_in, entries, width, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The state in which each chunk begins, one chunk after the other."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < width
    state = tl.load(state_in + row * width + channel, mask=is_channel, other=0.0)
    for chunk in range(chunks):
        place = (row * chunks + chunk) * width + channel
        tl.store(entries + place, state, mask=is_channel)
        factor = tl.load(product + place, mask=is_channel, other=1.0)
        state = factor * state + tl.load(end + place, mask=is_channel, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _replay(  # type: ignore[no-untyped-def]
    a, values, entries, out, h, grad_a, length, width, chunks,
    chunk: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All states of each chunk from its first one; backward, also dL/da_t = dh_t * h_{t-1} for t > 0."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < width
    base = (program // chunks) * length * width
    state = tl.load(entries + program * width + channel, mask=is_channel, other=0.0)
    for offset in range(chunk):
        position = (program % chunks) * chunk + offset
        gate, value, time = _step(a, values, base, position, length, width, channel, BACKWARD)
        state = gate * state + value
        place = base + time * width + channel
        present = tl.where(position < length, width, 0)
        tl.store(out + place, state, mask=channel < present)
        if BACKWARD:
            has_past = channel < tl.where(time > 0, present, 0)
            past = tl.load(h + place - width, mask=has_past, other=0.0)
            tl.store(grad_a + place, state * past, mask=has_past)
