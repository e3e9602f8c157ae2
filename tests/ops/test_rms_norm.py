"""The root-mean-square norm with its hand-written gradient against its definition."""

import pytest
import torch

from builders import randn
from ternlm.ops import row_blocks
from ternlm.ops.rms_norm import rms_norm, rms_norm_reference


def run(function: object, x: torch.Tensor, gain: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    x, gain = x.clone().requires_grad_(), gain.clone().requires_grad_()
    y = function(x, gain, eps)  # type: ignore[operator]
    y.backward(randn(*y.shape, seed=9).to(y.dtype))
    assert x.grad is not None and gain.grad is not None
    return y.detach(), x.grad, gain.grad


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("elements", [1, 30, 1 << 16])
@pytest.mark.parametrize("shape", [(13,), (4, 13), (2, 5, 13)])
def test_q09_the_fast_path_equals_its_reference_in_value_and_gradient(
    shape: tuple[int, ...], elements: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "ELEMENTS", elements)
    x, gain = randn(*shape) * size, randn(13, seed=1)
    fast, plain = (run(function, x, gain, 1e-5) for function in (rms_norm, rms_norm_reference))
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fast[1] * size, plain[1] * size, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast[2], plain[2], rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_value_is_that_of_the_reference_and_the_gradients_are_near_the_float32_ones() -> None:
    x, gain = randn(6, 64).bfloat16(), randn(64, seed=1)
    fast, plain = run(rms_norm, x, gain, 1e-5), run(rms_norm_reference, x.float(), gain, 1e-5)
    assert [t.dtype for t in fast] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(fast[0], rms_norm_reference(x, gain, 1e-5))
    for a, b in zip(fast, plain, strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert run(rms_norm, torch.zeros(0, 7), torch.ones(7), 1e-5)[0].shape == (0, 7)


def test_the_blocks_of_a_matrix_cover_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "ELEMENTS", 20)
    for rows, columns in [(0, 3), (1, 100), (7, 3), (12, 5), (5, 1)]:
        covered = [i for block in row_blocks.row_blocks(torch.empty(rows, columns)) for i in range(rows)[block]]
        assert covered == list(range(rows))
