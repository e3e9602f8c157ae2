"""Rotary positions against complex multiplication."""

import pytest
import torch

from builders import randn
from ternlm.ops.rotary import rotary_table, rotate


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_a_rotation_is_a_complex_multiplication(theta: float) -> None:
    x, length, head_dim = randn(2, 3, 11, 10), 11, 10
    cos, sin = rotary_table(length, head_dim, theta).unbind()
    angles = torch.arange(length)[:, None] * theta ** -(torch.arange(head_dim // 2).double() * 2 / head_dim)
    turned = torch.complex(x[..., :5].double(), x[..., 5:].double()) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert torch.allclose(rotate(x, cos, sin).double(), expected, atol=1e-5)


def test_products_depend_on_the_distance_of_positions_alone() -> None:
    table = rotary_table(40, 6, 10_000.0)
    q, k = randn(1, 1, 1, 6, seed=1), randn(1, 1, 1, 6, seed=2)
    at = [table[:, [p]].unbind() for p in (0, 5, 13, 18, 30, 35)]
    products = [(rotate(q, *at[i + 1]) * rotate(k, *at[i])).sum() for i in (0, 2, 4)]
    assert torch.allclose(products[0], products[1], atol=1e-5) and torch.allclose(products[0], products[2], atol=1e-5)
    assert not torch.allclose((rotate(q, *at[0]) * rotate(k, *at[1])).sum(), products[0], atol=1e-3)


def test_position_zero_is_left_alone_and_the_table_is_float32() -> None:
    table = rotary_table(3, 4, 10_000.0)
    x = randn(1, 1, 1, 4)
    assert table.dtype == torch.float32 and table.shape == (2, 3, 4)
    assert torch.equal(rotate(x, *table[:, :1].unbind()), x)


def test_a_rotation_keeps_the_dtype_of_its_input() -> None:
    assert rotate(randn(1, 1, 3, 4).bfloat16(), *rotary_table(3, 4, 10_000.0).unbind()).dtype == torch.bfloat16
