"""The quantizers: hand-made tables, ties, degenerate inputs, scales and their granularity.

Scales in the tables are powers of two, so that every quotient is exact and a tie is a tie.
"""

import pytest
import torch

from builders import randn
from ternlm.ops.quantize import (
    EPS,
    absmean,
    dequantize_weight,
    quantize_activation,
    quantize_rows,
    ternarize,
    write_ternary_codes,
)


def test_q01_ties_of_weights_round_to_even() -> None:
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-2.0, 2.0, -0.0, 0.0]])  # mean |W| = 1
    codes, scale = ternarize(weight)
    assert scale.item() == 1.0
    assert codes.tolist() == [[-1, 0, 0, 1], [-1, 1, 0, 0]]


@pytest.mark.parametrize("gamma", [2.0**-9, 0.25, 1.0, 8.0])
def test_q01_a_weight_just_above_the_tie_becomes_one(gamma: float) -> None:
    half = torch.tensor(0.5)
    above, below = (torch.nextafter(half, torch.tensor(limit)) for limit in (1.0, 0.0))
    weight = torch.stack([half, above, below, -half, -above, -below])[None] * gamma
    codes = write_ternary_codes(weight, torch.tensor(gamma), torch.empty(1, 6, dtype=torch.int8))
    assert codes[0].tolist() == [0, 1, 0, 0, -1, 0]


def test_q01_ties_of_activations_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, s = quantize_activation(x)
    assert s.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_q01_ties_of_four_bit_activations_round_to_even() -> None:
    codes, s = quantize_activation(torch.tensor([[-7.0, 0.5, 1.5, -2.5, 6.5]]), bits=4)
    assert s.item() == 1.0
    assert codes.tolist() == [[-7, 0, 2, -2, 6]]


def test_q02_absmean_of_dequantized_weights_shrinks_the_scale_but_keeps_the_codes() -> None:
    codes, scale = ternarize(randn(33, 65))
    again, shrunk = ternarize(dequantize_weight(codes, scale))
    nonzero = codes.abs().float().mean()
    assert torch.equal(again, codes)
    assert shrunk.item() == pytest.approx((nonzero * scale).item(), rel=1e-6)
    assert shrunk < 0.75 * scale


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_q03_scales_are_the_same_float32_inside_and_outside_autocast(granularity: str) -> None:
    weight, x = randn(7, 48) * 0.02, randn(5, 48)
    codes, scale = ternarize(weight, granularity, 16)
    x_codes, s = quantize_activation(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes_autocast, scale_autocast = ternarize(weight, granularity, 16)
        x_codes_autocast, s_autocast = quantize_activation(x)
    assert scale.dtype == scale_autocast.dtype == s.dtype == s_autocast.dtype == torch.float32
    assert torch.equal(scale, scale_autocast) and torch.equal(codes, codes_autocast)
    assert torch.equal(s, s_autocast) and torch.equal(x_codes, x_codes_autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q03_half_precision_inputs_are_read_as_float32(dtype: torch.dtype) -> None:
    x, weight = randn(9, 31, seed=1).to(dtype), (randn(6, 31, seed=2) * 0.02).to(dtype)
    for fast, wide in (
        (quantize_activation(x), quantize_activation(x.float())),
        (ternarize(weight), ternarize(weight.float())),
    ):
        assert fast[1].dtype == torch.float32
        assert torch.equal(fast[0], wide[0]) and torch.equal(fast[1], wide[1])


def test_the_weight_scale_is_the_mean_magnitude_summed_in_float64() -> None:
    weight = randn(129, 257, seed=3) * 0.02
    exact = weight.double().abs().mean().float()
    assert torch.equal(absmean(weight), exact)
    # A float32 sum in order is off, which is what the wide accumulator is for.
    sequential = weight.abs().flatten().cumsum(0)[-1] / weight.numel()
    assert not torch.equal(sequential, exact)


def test_the_codes_multiply_by_the_reciprocal_of_the_scale() -> None:
    weight = randn(64, 64, seed=4)
    scale = absmean(weight)
    codes, _ = ternarize(weight)
    assert torch.equal(codes, (weight * (1 / scale)).round().clamp(-1, 1).to(torch.int8))


@pytest.mark.parametrize("bits", [8, 4])
def test_q07_the_largest_element_gets_the_top_code_and_signs_are_symmetric(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    x = randn(200, 33, seed=5) * torch.logspace(-4, 4, 200)[:, None]
    codes, _ = quantize_activation(x, bits)
    negated, _ = quantize_activation(-x, bits)
    assert torch.equal(codes.abs().amax(dim=1), torch.full((200,), top, dtype=torch.int8))
    assert int(codes.min()) >= -top
    assert torch.equal(negated, -codes)
    largest = x.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(codes.gather(1, largest).abs(), torch.full((200, 1), top, dtype=torch.int8))


def test_an_activation_is_its_code_over_the_multiplier_within_half_a_step() -> None:
    x = randn(3, 5, 17, seed=6)
    codes, s = quantize_activation(x)
    assert codes.shape == x.shape and codes.dtype == torch.int8 and s.shape == (3, 5, 1)
    assert bool(((codes / s - x).abs() <= 0.5001 / s).all())


def test_q10_an_all_zero_weight_is_finite_with_zero_codes() -> None:
    for granularity in ("tensor", "row", "group"):
        codes, scale = ternarize(torch.zeros(3, 8), granularity, 4)
        assert not codes.any()
        assert torch.equal(scale, torch.full_like(scale, EPS))


def test_q10_a_one_hot_weight_keeps_its_one_element() -> None:
    weight = torch.zeros(4, 6)
    weight[2, 3] = -0.3
    codes, scale = ternarize(weight)
    assert codes[2, 3] == -1 and int(codes.abs().sum()) == 1
    assert scale.item() == pytest.approx(0.3 / 24)


def test_q10_the_smallest_scale_clamps_and_is_not_added() -> None:
    assert absmean(torch.full((2, 2), 1e-7)).item() == pytest.approx(EPS)
    assert absmean(torch.full((2, 2), 0.25)).item() == 0.25
    codes, _ = ternarize(torch.full((2, 2), 1e-7))
    assert not codes.any()


def test_q10_zero_and_tiny_tokens_are_finite() -> None:
    x = torch.stack([torch.zeros(4), torch.tensor([1e-7, -1e-7, 0.0, 5e-8]), torch.tensor([1.0, 0.0, 0.0, 0.0])])
    codes, s = quantize_activation(x)
    assert bool(torch.isfinite(s).all())
    assert codes.tolist() == [[0, 0, 0, 0], [1, -1, 0, 1], [127, 0, 0, 0]]  # 1e-7 * 127 / 1e-5 = 1.27
    assert torch.allclose(s[:2], torch.full((2, 1), 127 / EPS))


def test_a_non_finite_token_keeps_a_non_finite_multiplier_and_spoils_no_other() -> None:
    x = randn(4, 9, seed=7)
    clean_codes, clean_s = quantize_activation(x)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[1, 4] = value
        codes, s = quantize_activation(broken)
        assert not torch.isfinite(s[1].reciprocal()).all()
        others = [0, 2, 3]
        assert torch.equal(codes[others], clean_codes[others]) and torch.equal(s[others], clean_s[others])


def test_q12_gaussian_weights_are_balanced_and_close_to_their_codes() -> None:
    weight = randn(256, 256, seed=8) * 0.02
    codes, scale = ternarize(weight)
    for code in (-1, 0, 1):
        assert 0.2 < (codes == code).float().mean() < 0.5
    error = (dequantize_weight(codes, scale) - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(0.263, abs=0.01)
    assert (codes == 0).float().mean().item() == pytest.approx(0.31, abs=0.01)


def test_q17_codes_are_ternary_and_zero_is_used() -> None:
    codes, _ = ternarize(randn(40, 40, seed=9))
    assert codes.unique().tolist() == [-1, 0, 1]


def test_q18_each_granularity_has_its_own_number_of_scales_and_its_own_means() -> None:
    weight = randn(6, 24, seed=10) * torch.logspace(-3, 0, 6)[:, None]
    magnitude = weight.double().abs()
    expected = {
        "tensor": magnitude.mean(),
        "row": magnitude.mean(dim=1, keepdim=True),
        "group": magnitude.view(6, 3, 8).mean(dim=2),
    }
    shapes = {"tensor": (), "row": (6, 1), "group": (6, 3)}
    for granularity, mean in expected.items():
        codes, scale = ternarize(weight, granularity, 8)
        assert scale.shape == shapes[granularity]
        assert torch.allclose(scale.double(), mean.clamp_min(EPS), rtol=1e-6)
        per_element = scale if granularity != "group" else scale.repeat_interleave(8, dim=1)
        assert torch.equal(codes, (weight * per_element.reciprocal()).round().clamp(-1, 1).to(torch.int8))
        assert torch.equal(dequantize_weight(codes, scale), codes * per_element)


def test_a_group_that_does_not_divide_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size 7 does not divide in_features 24"):
        ternarize(randn(2, 24), "group", 7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1100, 301), (2, 300_000)])
def test_rounding_in_chunks_equals_rounding_at_once(shape: tuple[int, int]) -> None:
    weight = randn(*shape, seed=11)
    codes, scale = ternarize(weight)
    assert torch.equal(codes, (weight * scale.reciprocal()).round().clamp(-1, 1).to(torch.int8))


def test_rows_of_255_levels_use_their_own_absolute_maximum() -> None:
    weight = randn(5, 17, seed=12) * torch.logspace(-2, 2, 5)[:, None]
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8 and scale.shape == (5, 1) and scale.dtype == torch.float32
    assert torch.allclose(scale, weight.abs().amax(dim=1, keepdim=True) / 127)
    assert bool(((codes * scale - weight).abs() <= 0.5001 * scale).all())
