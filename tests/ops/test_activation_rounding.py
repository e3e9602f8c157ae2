"""Rounding to a grid: the fast path against its definition, in value and gradient, and what noise may do."""

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.ops.activation_rounding import round_activation, round_activation_reference
from ternlm.ops.noise import NoiseRows, noise_key

KEY = torch.tensor(noise_key(3))


def noise_of(x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    return NoiseRows(KEY, rows, x.shape[-1]).odd(slice(0, rows)).view(x.shape)


STEPS = {
    "one": lambda x: torch.tensor(0.3),
    "per token": lambda x: x.detach().float().abs().amax(dim=-1, keepdim=True) / 9,
    "per head": lambda x: torch.linspace(0.1, 0.5, x.shape[1])[:, None, None],
    "per channel": lambda x: torch.linspace(0.1, 0.5, x.shape[-1]),
    "per head and channel": lambda x: randn(x.shape[1], 1, x.shape[-1], seed=9).abs() + 0.1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", STEPS)
def test_it_equals_its_definition_in_value_and_gradient(kind: str, stochastic: bool, dtype: torch.dtype) -> None:
    results = []
    for fast in (True, False):
        x = randn(2, 3, 17, 5).to(dtype).requires_grad_()
        step = STEPS[kind](x)
        if fast:
            y = round_activation(x, step, 4, KEY if stochastic else None)
        else:
            y = round_activation_reference(x, step, 4, noise_of(x) if stochastic else None)
        (y.float() * randn(2, 3, 17, 5, seed=1)).sum().backward()
        results.append((y, x.grad))
    (y, grad), (plain, plain_grad) = results
    assert y.dtype == dtype and grad is not None and grad.dtype == dtype
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(grad, plain_grad)
    assert 0 < int((grad == 0).sum()) < grad.numel() / 2


def test_a_pass_without_gradients_has_the_same_values() -> None:
    x, step = randn(7, 9), torch.tensor(0.2)
    with_gradient = round_activation(x.clone().requires_grad_(), step, 4, KEY)
    assert torch.equal(round_activation(x, step, 4, KEY), with_gradient)
    with torch.no_grad():
        assert torch.equal(round_activation(x.clone().requires_grad_(), step, 4, KEY), with_gradient)


def test_rounding_in_blocks_equals_rounding_at_once() -> None:
    x = randn(900, 301).requires_grad_()  # two blocks and a part of one
    y = round_activation(x, torch.tensor(0.2), 4, KEY)
    plain = round_activation_reference(x, torch.tensor(0.2), 4, noise_of(x))
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-6)


def test_q01_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5]])
    assert round_activation(x, torch.tensor(1.0), 4).tolist() == [[-2, -2, 0, 0, 2, 2, 6]]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_m07_there_are_at_most_two_l_plus_one_codes_and_the_ends_are_reached(bits: int, stochastic: bool) -> None:
    top = 2 ** (bits - 1) - 1
    x = randn(200, 301) * 3
    codes = round_activation(x, torch.tensor(1 / top), bits, KEY if stochastic else None) * top
    assert bool((codes - codes.round()).abs().max() < 1e-4)
    assert codes.round().unique().tolist() == list(range(-top, top + 1))


def test_q24_the_gradient_is_one_on_the_grid_its_ends_included_and_zero_beyond() -> None:
    x = torch.tensor([[0.0, 3.4, -7.0, 7.0, 7.0001, -7.0001, 100.0, -100.0]]).requires_grad_()
    for key in (None, KEY):
        x.grad = None
        round_activation(x, torch.tensor(1.0), 4, key).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_without_clipping_the_gradient_passes_unchanged() -> None:
    x = randn(4, 6).requires_grad_()
    step = x.detach().abs().amax(dim=-1, keepdim=True) / 7
    weight = randn(4, 6, seed=2)
    (round_activation(x, step, 4, KEY, clips=False) * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


def test_stochastic_rounding_is_right_on_average_inside_the_grid() -> None:
    values = torch.linspace(-6.9, 6.9, 47)
    n = 20_000
    codes = round_activation(values.expand(n, 47), torch.tensor(1.0), 4, KEY)
    fraction = values - values.floor()
    sigma = (fraction * (1 - fraction) / n).sqrt()
    assert bool(((codes.mean(dim=0) - values).abs() <= 4 * sigma + 2**-15).all())
    assert bool(((codes - values).abs() < 1).all())


def test_stochastic_rounding_leaves_the_grid_where_it_is_and_stops_at_its_ends() -> None:
    x = torch.arange(-7.0, 8.0).expand(5000, 15)
    assert torch.equal(round_activation(x, torch.tensor(1.0), 4, KEY), x)
    assert torch.equal(round_activation(x * 50, torch.tensor(1.0), 4, KEY), (x * 50).clamp(-7, 7))


def test_a_broken_value_stays_visible_and_spoils_no_other() -> None:
    x = randn(3, 4)
    broken = x.clone()
    broken[1, 2] = torch.nan
    y, clean = round_activation(broken, torch.tensor(0.1), 4), round_activation(x, torch.tensor(0.1), 4)
    assert y[1, 2].isnan() and int(y.isnan().sum()) == 1
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])
