"""RMSNorm against its formula in float64, and its gradient by finite differences."""

import pytest
import torch

from builders import randn
from ternlm.nn.norm import RMSNorm


def formula(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * gain.double()


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_q09_the_norm_equals_its_formula_at_every_scale(size: float, eps: float) -> None:
    norm = RMSNorm(13, eps)
    with torch.no_grad():
        norm.weight.copy_(randn(13, seed=1))
    x = randn(2, 5, 13) * size
    torch.testing.assert_close(norm(x).double(), formula(x, norm.weight, eps), rtol=1e-5, atol=1e-6)


def test_q09_the_two_usual_eps_differ_on_small_inputs() -> None:
    x = randn(3, 13) * 1e-4
    assert not torch.allclose(RMSNorm(13, 1e-5)(x), RMSNorm(13, 1e-6)(x), rtol=0.1)


def test_statistics_are_float32_and_the_result_has_the_dtype_of_the_input() -> None:
    norm, x = RMSNorm(64), (randn(3, 64) * 300).half()  # the sum of squares overflows float16
    y = norm(x)
    assert y.dtype == torch.float16 and bool(torch.isfinite(y).all())
    torch.testing.assert_close(y.double(), formula(x, norm.weight, norm.eps), rtol=2e-3, atol=1e-3)
    assert norm.weight.dtype == torch.float32


def test_a_zero_vector_stays_zero_with_finite_gradient() -> None:
    x = torch.zeros(2, 7, requires_grad=True)
    y = RMSNorm(7)(x)
    y.sum().backward()
    assert not y.any() and x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_the_gradient_equals_finite_differences() -> None:
    norm, x, direction = RMSNorm(9), randn(2, 9, seed=2).requires_grad_(), randn(2, 9, seed=3)
    upstream = randn(2, 9, seed=4)
    (norm(x) * upstream).sum().backward()
    assert x.grad is not None
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (
            (formula(x + sign * step * direction.double(), norm.weight, norm.eps) * upstream).sum() for sign in (1, -1)
        )
    numeric = (ahead - behind) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum().double(), numeric, rtol=1e-4, atol=1e-5)
