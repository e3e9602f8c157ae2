"""Block Hadamard transforms and signed permutations: against their definitions, orthogonal, exact in any dtype."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builders import randn
from ternlm.ops.hadamard import (
    hadamard,
    hadamard_matrix,
    hadamard_reference,
    is_power_of_two,
    largest_block,
    signed_permutation,
)

BLOCKS = [1, 2, 4, 8, 64, 128]


def test_the_matrix_of_order_four_is_sylvesters() -> None:
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(hadamard_matrix(4), expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_product_equals_the_passes_in_value_and_gradient(block: int) -> None:
    results = []
    for function in (lambda x: hadamard(x, hadamard_matrix(block)), lambda x: hadamard_reference(x, block)):
        x = randn(3, 5, 3 * block).requires_grad_()
        y = function(x)
        y.backward(randn(3, 5, 3 * block, seed=1))
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_transform_is_its_own_inverse_and_its_own_backward(block: int) -> None:
    x, matrix, upstream = randn(4, 2 * block).double(), hadamard_matrix(block).double(), randn(4, 2 * block, seed=1)
    torch.testing.assert_close(hadamard(hadamard(x, matrix), matrix), x, rtol=1e-6, atol=1e-6)
    x.requires_grad_()
    hadamard(x, matrix).backward(upstream.double())
    assert x.grad is not None and torch.equal(x.grad, hadamard(upstream.double(), matrix))


def test_one_large_channel_is_spread_evenly_over_its_block_and_no_further() -> None:
    x = torch.zeros(1, 16)
    x[0, 5] = 8.0
    y = hadamard(x, hadamard_matrix(8))
    assert torch.equal(y[0, :8].abs(), torch.full((8,), 8 / 8**0.5)) and not bool(y[0, 8:].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    x = randn(7, 128)
    y = hadamard(x.to(dtype), hadamard_matrix(64))
    assert y.dtype == dtype
    assert (y.float() - hadamard(x, hadamard_matrix(64))).norm() < 0.01 * x.norm()


def test_orders_that_are_no_powers_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="48 is not a power of two"):
        hadamard_matrix(48)
    assert [n for n in range(-1, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("width", "most", "expected"), [(64, 128, 64), (768, 64, 64), (2304, 512, 256), (6, 64, 2), (7, 64, 1), (40, 8, 8)]
)
def test_m13_the_block_is_reduced_to_what_divides_the_width(width: int, most: int, expected: int) -> None:
    assert largest_block(width, most) == expected


def permuted(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))
    signs = randn(x.shape[-1], seed=2).sign()
    return signed_permutation(x, source, signs, source.argsort()), source, signs, source.argsort()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_signed_permutation_moves_values_exactly_and_its_gradient_moves_back(dtype: torch.dtype) -> None:
    x = randn(3, 400, 37).to(dtype).requires_grad_()
    y, source, signs, _ = permuted(x)
    assert y.dtype == dtype and torch.equal(y, x[..., source] * signs.to(dtype))
    upstream = randn(3, 400, 37, seed=3).to(dtype)
    y.backward(upstream)
    plain = x.detach().clone().requires_grad_()
    (plain[..., source] * signs.to(dtype)).backward(upstream)
    assert x.grad is not None and plain.grad is not None and torch.equal(x.grad, plain.grad)


def test_m19_the_number_of_operations_does_not_grow_with_the_width() -> None:
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operations += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for width in (64, 1024):
        x, matrix = randn(5, width), hadamard_matrix(64)
        with Count() as count:
            hadamard(permuted(x)[0], matrix)
        counts.append(count.operations)
    assert counts[0] == counts[1] < 40
