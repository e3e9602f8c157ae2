"""Mixers: orthogonal, drawn from a seed, kept in files; what helps 4-bit rounding and what only seems to."""

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.nn.mixer import Mixer, MixerOrder

SHAPES = [(64, 64), (64, 128), (96, 64), (6, 64), (7, 64), (768, 64), (2304, 128), (200, 1), (64, 1)]
ORDERS: list[MixerOrder] = ["permutation_first", "hadamard_first"]


def mixer(width: int, block: int, order: MixerOrder = "permutation_first", site: str = "here") -> Mixer:
    made = Mixer(width, block, order)
    made.draw(3, 1, site)
    return made


def definition(made: Mixer, x: Tensor) -> Tensor:
    """H D2 P D1 x, or D2 P D1 H x, by matrices in float64."""
    width = made.width
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < made.block:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5, block)
    h = torch.block_diag(*[block] * (width // made.block))
    p = torch.eye(width, dtype=torch.float64)[made.permutation]
    dpd = made.second_signs.double().diag() @ p @ made.first_signs.double().diag()
    rotation = h @ dpd if made.order == "permutation_first" else dpd @ h
    return x.double() @ rotation.t()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_a_mixer_equals_its_definition_in_value_and_gradient(width: int, block: int, order: MixerOrder) -> None:
    made, x = mixer(width, block, order), randn(3, 5, width).requires_grad_()
    y = made(x)
    torch.testing.assert_close(y.double(), definition(made, x.detach()), rtol=1e-5, atol=1e-5)
    upstream = randn(3, 5, width, seed=1)
    y.backward(upstream)
    plain = x.detach().double().requires_grad_()
    definition(made, plain).backward(upstream.double())
    assert x.grad is not None and plain.grad is not None
    torch.testing.assert_close(x.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_a_mixer_is_orthogonal(width: int, block: int, order: MixerOrder) -> None:
    rotation = mixer(width, block, order)(torch.eye(width))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(width), rtol=0, atol=1e-5)
    assert not torch.equal(rotation, torch.eye(width))


@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 64), (768, 64)])
def test_m14_one_mixer_for_q_and_k_keeps_their_products_and_two_do_not(width: int, block: int) -> None:
    q, k = randn(2, 3, 11, width).double(), randn(2, 3, 11, width, seed=1).double()
    shared, other = mixer(width, block), mixer(width, block, site="elsewhere")
    before = q @ k.transpose(-1, -2)
    torch.testing.assert_close(shared(q) @ shared(k).transpose(-1, -2), before, rtol=1e-6, atol=1e-4)
    assert not torch.allclose(shared(q) @ other(k).transpose(-1, -2), before, atol=1.0)


def test_mixing_v_equals_mixing_what_attention_makes_of_it() -> None:
    v, weights, made = randn(2, 3, 11, 64).double(), randn(2, 3, 11, 11, seed=1).double().softmax(-1), mixer(64, 64)
    torch.testing.assert_close(weights @ made(v), made(weights @ v), rtol=1e-6, atol=1e-6)


def int4_error(x: Tensor) -> float:
    """Relative error of rounding to 4 bits with one scale."""
    step = x.abs().max() / 7
    return ((x / step).round() * step - x).double().norm().item() / x.double().norm().item()


def test_m12_a_signed_permutation_lowers_no_rounding_error_and_the_transform_does() -> None:
    x = randn(512, 256)
    x[:, [17, 180]] += 40
    plain = int4_error(x)
    assert int4_error(mixer(256, 1)(x)) == pytest.approx(plain, rel=1e-6)
    for order in ORDERS:
        assert int4_error(mixer(256, 64, order)(x)) < 0.5 * plain


def test_a_draw_is_a_function_of_seed_layer_and_site_alone() -> None:
    state = torch.get_rng_state()
    first, again = mixer(200, 64), mixer(200, 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    for seed, layer, site in ((4, 1, "here"), (3, 2, "here"), (3, 1, "there")):
        other = Mixer(200, 64)
        other.draw(seed, layer, site)
        assert not torch.equal(other.permutation, first.permutation)
        assert not torch.equal(other.first_signs, first.first_signs)


@pytest.mark.parametrize("width", [64, 768])
def test_a_loaded_mixer_mixes_as_the_saved_one(width: int) -> None:
    saved, loaded, x = mixer(width, 64), Mixer(width, 64), randn(3, width)
    assert not torch.equal(loaded(x), saved(x))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))
    assert set(saved.state_dict()) == {"first_signs", "permutation", "second_signs"}


@pytest.mark.parametrize("width", [64, 768])
def test_half_precision_stays_near(width: int) -> None:
    made, x = mixer(width, 64), randn(9, width)
    y = made(x.bfloat16())
    assert y.dtype == torch.bfloat16 and (y.float() - made(x)).norm() < 0.01 * x.norm()
