"""The divergence of two distributions, block by block, is the one its formula says, in value and in gradient."""

import math

import pytest
import torch

from builders import randn
from ternlm.ops import divergence as module
from ternlm.ops.divergence import divergence, plain_divergence


def logits(rows: int = 23, vocab: int = 37, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = (randn(rows, vocab, seed=seed).mul(3).to(dtype) for seed in (1, 2))
    return student.requires_grad_(), teacher


def some(rows: int = 23) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(5)) < 0.6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("scored", [None, some()], ids=["all", "some"])
def test_it_equals_the_formula_in_value_and_gradient(
    temperature: float, scored: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "row_blocks", lambda matrix: [slice(i, i + 5) for i in range(0, len(matrix), 5)])
    student, teacher = logits()
    fast, plain = divergence(student, teacher, scored, temperature), plain_divergence(*logits(), scored, temperature)
    assert fast.item() == pytest.approx(plain.item(), rel=1e-5)
    (got,) = torch.autograd.grad(3 * fast, student)
    again = logits()[0]
    (wanted,) = torch.autograd.grad(3 * plain_divergence(again, teacher, scored, temperature), again)
    assert wanted.abs().max() > 0.01
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    def value(x: torch.Tensor) -> torch.Tensor:
        return plain_divergence(x, teacher, None, 2.0)

    student, teacher = logits(3, 5)
    (gradient,) = torch.autograd.grad(divergence(student, teacher, None, 2.0), student)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        step = torch.zeros_like(student)
        step[row, column] = 0.05
        slope = (value(student.detach() + step) - value(student.detach() - step)).item() / 0.1
        assert gradient[row, column].item() == pytest.approx(slope, abs=2e-3)


def test_a_value_by_hand() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(student, teacher, None, 2.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert divergence(teacher, teacher, None, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_m18_rows_that_are_not_scored_have_no_effect_whatever_stands_in_them() -> None:
    scored = some()
    results = []
    for rubbish in (0.0, 1e4, math.nan):
        student, teacher = logits()
        student = student.detach().masked_fill(~scored[:, None], rubbish).requires_grad_()
        value = divergence(student, teacher.masked_fill(~scored[:, None], rubbish), scored, 2.0)
        results.append((value, torch.autograd.grad(value, student)[0]))
    for value, gradient in results:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])
        assert not gradient[~scored].any() and gradient[scored].any()


def test_the_gradient_has_the_dtype_of_the_logits_and_the_value_is_float32() -> None:
    student, teacher = logits(dtype=torch.bfloat16)
    value = divergence(student, teacher, None, 2.0)
    (gradient,) = torch.autograd.grad(value, student)
    exact = plain_divergence(student.detach(), teacher, None, 2.0)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)


def test_only_the_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the intermediates, none has more rows than a block."""
    seen: list[int] = []
    real = torch.nn.functional.log_softmax
    monkeypatch.setattr(module.F, "log_softmax", lambda x, dim: (seen.append(len(x)), real(x, dim=dim))[1])
    student, teacher = logits(4000, 97)
    divergence(student, teacher, None, 2.0)
    assert max(seen) == (1 << 17) // 97 and sum(seen) == 2 * 4000
