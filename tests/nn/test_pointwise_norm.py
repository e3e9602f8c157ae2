"""DyT and Derf against their formulas, in value and in gradient."""

import pytest
import torch

from builders import randn
from ternlm.nn.pointwise_norm import Derf, DyT


def dyt_formula(norm: DyT, x: torch.Tensor) -> torch.Tensor:
    return norm.weight.double() * torch.tanh(norm.alpha.double() * x.double()) + norm.bias.double()


def derf_formula(norm: Derf, x: torch.Tensor) -> torch.Tensor:
    inner = norm.alpha.double() * x.double() + norm.shift.double()
    return norm.weight.double() * torch.erf(inner) + norm.bias.double()


NORMS = {"dyt": (DyT, dyt_formula), "derf": (Derf, derf_formula)}
every_norm = pytest.mark.parametrize("kind", NORMS)


def shaken(kind: str) -> torch.nn.Module:
    norm = NORMS[kind][0](13)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=i))
    return norm


@every_norm
def test_the_norm_equals_its_formula_in_value_and_gradient(kind: str) -> None:
    norm, formula = shaken(kind), NORMS[kind][1]
    x = (2 * randn(3, 5, 13)).requires_grad_()
    upstream, leaves = randn(3, 5, 13, seed=9), [x, *norm.parameters()]
    y, expected = norm(x), formula(norm, x)  # type: ignore[operator]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((y * upstream).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_norm
def test_the_norm_is_computed_in_float32_and_returned_in_the_type_of_its_input(kind: str) -> None:
    norm, x = shaken(kind), (40 * randn(7, 13)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16 and norm.weight.dtype == torch.float32
    torch.testing.assert_close(y.double(), NORMS[kind][1](norm, x), rtol=1e-2, atol=1e-2)  # type: ignore[operator]


@every_norm
def test_the_norm_is_bounded_however_large_its_input(kind: str) -> None:
    y = NORMS[kind][0](13)(1e6 * randn(5, 13))
    assert float(y.abs().max()) == 1.0


@every_norm
def test_initialize_restores_the_documented_values(kind: str) -> None:
    norm = shaken(kind)
    norm.initialize()  # type: ignore[operator]
    fresh = NORMS[kind][0](13)
    assert all(torch.equal(a, b) for a, b in zip(norm.parameters(), fresh.parameters(), strict=True))
    assert float(fresh.alpha.detach()) == {"dyt": 1.0, "derf": 0.5}[kind]
