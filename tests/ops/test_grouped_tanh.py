"""The fused centering, clip and tanh against its definition, in value and gradient, and against finite differences."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.ops.grouped_tanh import grouped_tanh, grouped_tanh_reference

CASES = list(product((0, 1, 3), (None, 1e-5), (None, 1.2)))


def arguments(dtype: torch.dtype = torch.float32, clip: float | None = 1.2) -> list[Tensor | None]:
    values = [
        2 * randn(3, 4001, 12),
        1 + 0.3 * randn(12, seed=1),
        0.3 * randn(12, seed=2),
        torch.tensor(0.7),
        None if clip is None else torch.tensor(clip),
    ]
    return [None if value is None else value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize(("groups", "eps", "clip"), CASES)
def test_the_fast_path_equals_the_definition_in_value_and_gradient(
    groups: int, eps: float | None, clip: float | None
) -> None:
    results: list[list[Tensor]] = []
    functions: tuple[Callable[..., Tensor], ...] = (grouped_tanh, grouped_tanh_reference)
    for function in functions:
        given = arguments(clip=clip)
        y = function(*given, groups, eps)
        y.backward(randn(3, 4001, 12, seed=3))
        results.append([y.detach(), *(a.grad for a in given if a is not None and a.grad is not None)])
    assert len(results[0]) == (5 if clip is None else 6)
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("groups", "eps", "clip"), CASES)
def test_gradients_agree_with_finite_differences_clipped_elements_included(
    groups: int, eps: float | None, clip: float | None
) -> None:
    x, *rest = arguments(torch.float64, clip)
    assert x is not None
    x = x.detach()[0, :4].clone().requires_grad_()
    if clip is not None and eps is None and not groups:
        assert 0.2 < (x.abs() > clip).double().mean() < 0.8
    assert torch.autograd.gradcheck(lambda *given: grouped_tanh(*given, groups, eps), (x, *rest))


def test_a_clipped_element_passes_no_gradient_and_the_clip_gets_its_sign() -> None:
    x = torch.tensor([[5.0, -5.0, 0.5, -0.5]], requires_grad=True)
    gain, bias, slope = torch.ones(4), torch.zeros(4), torch.tensor(1.0)
    clip = torch.tensor(2.0, requires_grad=True)
    upstream = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    grouped_tanh(x, gain, bias, slope, clip, 0).backward(upstream)
    flatness = 1 - torch.tanh(torch.tensor(2.0)) ** 2
    assert x.grad is not None and clip.grad is not None
    assert x.grad[0, :2].tolist() == [0, 0] and bool((x.grad[0, 2:] > 0.5).all())
    assert clip.grad.item() == pytest.approx(2 * flatness.item(), rel=1e-5)


def test_a_shift_of_a_group_changes_nothing_and_no_gradient_shifts_one() -> None:
    given = arguments()
    x = given[0]
    assert x is not None
    shift = torch.tensor([3.0, -1.0, 0.5]).repeat_interleave(4)
    torch.testing.assert_close(grouped_tanh(*given, 3), grouped_tanh(x + shift, *given[1:], 3), rtol=0, atol=1e-5)
    grouped_tanh(*given, 3).backward(randn(3, 4001, 12))
    assert x.grad is not None and x.grad.unflatten(-1, (3, 4)).sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    given = [a if a is None else a.detach() for a in arguments()]
    x = given[0]
    assert x is not None
    x = x.to(dtype)
    y = grouped_tanh(x, *given[1:], 3)
    assert y.dtype == dtype
    assert torch.equal(y, grouped_tanh(x.float(), *given[1:], 3).to(dtype))


def test_only_the_input_is_kept_for_backward() -> None:
    kept: list[Tensor] = []
    given = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_tanh(*given, 3)
    assert sum(t.numel() for t in kept) == 3 * 4001 * 12 + 12 + 1 + 1
