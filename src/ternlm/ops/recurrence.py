"""The linear recurrence h_t = a_t h_{t-1} + u_t over time, one gate per channel, and its plain reference.

`scan` is the fast path, `scan_reference` its definition. Sequences that share a row are kept apart by `reset`,
and rows of different lengths by `freeze`: both only edit the gates and inputs, the scan itself knows neither.
The device kernel lives in `ternlm.ops.recurrence_kernel` and is imported when it is first needed.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ternlm.errors import EnvironmentFault

ScanImplementation = Literal["auto", "chunk", "reference", "kernel"]

STRAIGHT_WIDTH = 4096
"""Numbers per position (batch times channels) from which a CPU runs straight through time: the work of one position
then outweighs the cost of starting it, and each gate and input is read once instead of twice."""

SUMMARY_ELEMENTS = 1 << 16
"""Largest summary of all chunks on a CPU, 256 kB: longer rows get longer chunks, and the summaries stay in the cache
while gates and inputs stream past."""

_POSITIONS_AT_A_TIME = 512
"""Views of single positions held at a time: more of them cost more each than they did to begin with."""


def scan(
    a: Tensor, u: Tensor, h0: Tensor | None = None, impl: ScanImplementation = "auto", chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """All states of h_t = a_t h_{t-1} + u_t, with h_0 given.

    Backward is the same recurrence on reversed time, with the gates shifted by one:

        dh_t = dL/dh_t + a_{t+1} dh_{t+1}          dh_T also receives the gradient of the last state
        dL/du_t = dh_t          dL/da_t = dh_t * h_{t-1}          dL/dh_0 = a_1 dh_1

    so only a and h are kept. There is no division, no logarithm and no exponential: gates of exactly 0 and 1, and
    gates whose products underflow, are as good as any other. The result does not depend on `impl` or `chunk`
    beyond float32 rounding. Double backward is not supported.

    Args:
        a: Gates, (B, T, C), in [0, 1], float32 (or float64). Narrower types lose digits and are refused.
        u: Inputs, (B, T, C), dtype of a.
        h0: State before the first position, (B, C), dtype of a; None is zero.
        impl: "chunk": every chunk of each row is summarized at once, the summaries are joined one after the other,
            and every chunk is replayed from its true state. "reference": one position after the other, by automatic
            differentiation. "kernel": the same as "chunk" in Triton, for CUDA. "auto": the kernel on CUDA if
            Triton is installed, else straight through time where one time step is wide enough to
            fill the processor, else "chunk".
        chunk: Positions per chunk, at least 1; with "auto" on a CPU the least that a chunk has.

    Returns:
        h, (B, T, C), and the last state h_T, (B, C), both in the dtype of a. For T = 0 the last state is h0.

    Raises:
        TypeError: If the tensors are not all float32 or all float64.
        ValueError: If shapes do not fit, chunk is too small, or impl is unknown.
        EnvironmentFault: If "kernel" is asked for and Triton is not installed, or off CUDA.

    Source:
        Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network" (arXiv 2311.04823), eq. 3; chunks as in
        Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets" (arXiv 1709.04057).
    """
    _check(a, u, h0, impl, chunk)
    if impl == "reference" or a.shape[1] == 0:
        return scan_reference(a, u, h0)
    if a.shape[1] == 1:
        before = torch.zeros_like(u) if h0 is None else h0.unsqueeze(1)
        h = torch.addcmul(u, a, before)
        return h, h.squeeze(1)
    h, last = _Scan.apply(a, u, h0, impl == "kernel" or (impl == "auto" and _has_kernel(a)), _chunk(a, impl, chunk))
    return h, last


def scan_reference(a: Tensor, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `scan`: one position after the other, by automatic differentiation."""
    h = u.new_zeros(u.shape[0], u.shape[2]) if h0 is None else h0
    states = []
    for gate, value in zip(a.unbind(1), u.unbind(1), strict=True):
        h = gate * h + value
        states.append(h)
    return torch.stack(states, dim=1) if states else torch.zeros_like(u), h


def reset(a: Tensor, starts: Tensor) -> Tensor:
    """Gates that forget everything before a start: a = 0 where a sequence starts, so that the state there is u.

    No gradient flows into a gate that was replaced.

    Args:
        a: Gates, (B, T, C).
        starts: (B, T) bool, True at the first position of each sequence.
    """
    return a.masked_fill(starts.unsqueeze(-1), 0.0)


def freeze(a: Tensor, u: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and inputs that keep the state as it is behind the end of a row: a = 1 and u = 0 there.

    The state after the last position is then that after the last valid one (h0 for an empty row), and no gradient
    flows into what was replaced.

    Args:
        a: Gates, (B, T, C).
        u: Inputs, (B, T, C).
        lengths: Valid positions of each row, (B,) int64, from 0 to T.
    """
    behind = torch.arange(a.shape[1], device=a.device) >= lengths.unsqueeze(1)
    behind = behind.unsqueeze(-1)
    return a.masked_fill(behind, 1.0), u.masked_fill(behind, 0.0)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, u: Tensor, h0: Tensor | None, use_kernel: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        h = _operator(_states)(a, u, h0, use_kernel, chunk)
        ctx.save_for_backward(a, h, h0)
        ctx.use_kernel, ctx.chunk = use_kernel, chunk
        ctx.set_materialize_grads(False)
        return h, h[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, h, h0 = ctx.saved_tensors
        grad_h, grad_last = grads
        if grad_h is None and grad_last is None:
            return None, None, None, None, None
        grad_a, grad_u = _operator(_gradients)(a, h, h0, grad_h, grad_last, ctx.use_kernel, ctx.chunk)
        grad_h0 = a[:, 0] * grad_u[:, 0] if ctx.needs_input_grad[2] else None
        return grad_a, grad_u, grad_h0, None, None


def _states(a: Tensor, u: Tensor, h0: Tensor | None, use_kernel: bool, chunk: int) -> Tensor:
    """All states, (B, T, C)."""
    if use_kernel:
        from ternlm.ops.recurrence_kernel import states

        return states(a, u, h0, chunk)
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    _run(h, a, u, h0, chunk)
    return h


def _gradients(
    a: Tensor, h: Tensor, h0: Tensor | None, grad_h: Tensor | None, grad_last: Tensor | None, use_kernel: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of gates and of inputs, each (B, T, C)."""
    if grad_h is None:
        grad_h = torch.zeros_like(h)
    if use_kernel:
        from ternlm.ops.recurrence_kernel import gradients

        return gradients(a, h, h0, grad_h, grad_last, chunk)
    grad_u = torch.empty_like(h)
    last = grad_h[:, -1] if grad_last is None else grad_h[:, -1] + grad_last
    grad_u[:, -1] = last
    _run(grad_u[:, :-1], a[:, 1:], grad_h[:, :-1], last, chunk, backward=True)
    grad_a = torch.empty_like(h)
    torch.mul(grad_u[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    if h0 is None:
        grad_a[:, 0] = 0.0
    else:
        torch.mul(grad_u[:, 0], h0, out=grad_a[:, 0])
    return grad_a, grad_u


def _run(h: Tensor, a: Tensor, u: Tensor, h0: Tensor | None, chunk: int, backward: bool = False) -> None:
    """Write the states into h, in the order of time or against it: whole chunks all at once, then the rest."""
    length = a.shape[1]
    state = a.new_zeros(a.shape[0], a.shape[2]) if h0 is None else h0
    chunks = length // chunk
    done = chunks * chunk if chunks > 1 else 0
    if done:
        whole = slice(length - done, length) if backward else slice(0, done)
        split = [x[:, whole].unflatten(1, (chunks, chunk)) for x in (a, u, h)]
        gates, inputs, states = (_in_order(x, 2, backward) for x in split)
        ends = _steps(states, gates, inputs, _entries(gates, inputs, state, backward))
        state = ends[:, 0 if backward else -1]
    for first in range(done, length, _POSITIONS_AT_A_TIME):
        last = min(first + _POSITIONS_AT_A_TIME, length)
        block = slice(length - last, length - first) if backward else slice(first, last)
        gates, inputs, states = (_in_order(x[:, block], 1, backward) for x in (a, u, h))
        state = _steps(states, gates, inputs, state)


def _entries(gates: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor, backward: bool) -> Tensor:
    """The state in which each chunk begins, (B, chunks, C), from one pass that keeps only the ends of the chunks.

    A chunk maps its first state H to `product` * H + `end`.
    """
    product = gates[0].clone(memory_format=torch.contiguous_format)
    end = inputs[0].clone(memory_format=torch.contiguous_format)
    for gate, value in zip(gates[1:], inputs[1:], strict=True):
        product.mul_(gate)
        torch.addcmul(value, gate, end, out=end)
    entries = torch.empty_like(product)
    products, ends, begins = (_in_order(x, 1, backward) for x in (product, end, entries))
    begins[0].copy_(state)
    _steps(begins[1:], products[:-1], ends[:-1], state)
    return entries


def _steps(states: Sequence[Tensor], gates: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor) -> Tensor:
    """state = gate * state + input, written into each of `states`; returns the last."""
    addcmul = torch.addcmul
    for out, gate, value in zip(states, gates, inputs, strict=True):
        state = addcmul(value, gate, state, out=out)
    return state


def _in_order(x: Tensor, dim: int, backward: bool) -> Sequence[Tensor]:
    return x.unbind(dim)[::-1] if backward else x.unbind(dim)


_OPERATORS: dict[Any, Any] = {}
"""The functions as operators that a compiler takes as they are, instead of unrolling their loops over time."""


def _operator(function: Any) -> Any:
    return _OPERATORS[function] if torch.compiler.is_compiling() else function


_OPERATORS[_states] = torch.library.custom_op("ternlm::scan_states", _states, mutates_args=())
_OPERATORS[_gradients] = torch.library.custom_op("ternlm::scan_gradients", _gradients, mutates_args=())
_OPERATORS[_states].register_fake(
    lambda a, u, h0, use_kernel, chunk: torch.empty_like(a, memory_format=torch.contiguous_format)
)
_OPERATORS[_gradients].register_fake(
    lambda a, h, h0, grad_h, grad_last, use_kernel, chunk: (torch.empty_like(h), torch.empty_like(h))
)


def _check(a: Tensor, u: Tensor, h0: Tensor | None, impl: str, chunk: int) -> None:
    if a.dim() != 3 or a.shape != u.shape or (h0 is not None and h0.shape != (a.shape[0], a.shape[2])):
        state = "none" if h0 is None else tuple(h0.shape)
        raise ValueError(
            f"gates {tuple(a.shape)}, inputs {tuple(u.shape)} and first state {state} do not fit: "
            "a scan takes (B, T, C), (B, T, C) and (B, C)"
        )
    if a.dtype not in (torch.float32, torch.float64) or a.dtype != u.dtype or (h0 is not None and h0.dtype != a.dtype):
        raise TypeError(
            f"a scan of {a.dtype} gates, {u.dtype} inputs{f' and a {h0.dtype} state' if h0 is not None else ''}: "
            "all must be float32, or all float64, because narrower types lose digits with every step"
        )
    if impl not in ("auto", "chunk", "reference", "kernel"):
        raise ValueError(f"scan implementation '{impl}' is unknown; choose auto, chunk, reference or kernel")
    if impl == "kernel" and not _triton_is_installed():
        raise EnvironmentFault(
            "scan implementation 'kernel' needs the package 'triton', which is not installed; choose 'auto' or 'chunk'"
        )
    if chunk < 1:
        raise ValueError(f"a scan chunk of {chunk} positions is too small; it must be at least 1")


def _chunk(a: Tensor, impl: str, chunk: int) -> int:
    """Positions per chunk. Where "auto" may choose, a CPU takes a row of wide positions as a single chunk."""
    if impl != "auto" or a.device.type != "cpu":
        return chunk
    is_wide = a.shape[0] * a.shape[2] >= STRAIGHT_WIDTH
    return a.shape[1] if is_wide else max(chunk, a.numel() // SUMMARY_ELEMENTS)


def _has_kernel(a: Tensor) -> bool:
    return a.is_cuda and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
