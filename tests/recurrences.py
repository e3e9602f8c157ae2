"""Gates that break the usual shortcuts of a scan, and what a scan gives on them: states and gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from builders import randn

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda r: r,
    "zero or one": lambda r: r.round(),
    "almost zero": lambda r: 1e-8 * (0.05 / 1e-8) ** r,
    "almost one": lambda r: 0.99 + 0.00999 * r,
    "mixed": lambda r: torch.where(r < 0.3, 0.0, torch.where(r > 0.7, 1.0, r)),
}
"""From uniform numbers to gates."""


def gates(kind: str, *shape: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return GATES[kind](uniform).float()


def results(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | None) -> list[Tensor]:
    """States, last state, and the gradient of every input for fixed gradients of both."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    h, last = function(*leaves)
    weights = randn(*h.shape, seed=7).to(h.dtype), randn(*last.shape, seed=8).to(h.dtype)
    ((h * weights[0]).sum() + (last * weights[1]).sum()).backward()
    grads = [x.grad for x in leaves if x is not None]
    assert all(grad is not None for grad in grads)
    return [h.detach(), last.detach(), *[grad for grad in grads if grad is not None]]


def assert_same(fast: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for x, y in zip(fast, plain, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance)
