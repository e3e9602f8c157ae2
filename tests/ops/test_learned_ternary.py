"""Learned ternary quantizers: where they start, and what each parameter receives, against formulas and differences."""

import math

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.ops.learned_ternary import (
    RowQuantizer,
    fit_lsq,
    fit_ttq,
    gradient_port,
    inverse_positive,
    positive,
    scaled_gradient,
)
from ternlm.ops.quantize import (
    EPS,
    absmean,
    dequantize_weight,
    kept_mean,
    quantize_rows,
    twn_threshold,
    write_ternary_codes,
    write_threshold_codes,
)

ROWS, COLUMNS = 5, 37


def codes_like(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.int8)


def relative_error(weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    return float((dequantize_weight(codes, scale) - weight).square().sum() / weight.square().sum())


def test_softplus_and_its_inverse_undo_each_other_down_to_tiny_scales() -> None:
    values = torch.logspace(-7, 1, 50)
    torch.testing.assert_close(positive(inverse_positive(values)), values, rtol=1e-5, atol=0)


def test_m17_scales_stay_positive_wherever_their_parameters_go() -> None:
    assert bool((positive(torch.tensor([-1e4, -200.0, 0.0, 50.0])) > 0).all())


def test_q12_ttq_starts_near_35_30_35_with_a_small_error() -> None:
    weight = randn(64, 512, seed=1) * 0.03
    scale, threshold = fit_ttq(weight, 30.0)
    codes = write_threshold_codes(weight, threshold[:, None], codes_like(weight))
    shares = [float((codes == code).float().mean()) for code in (-1, 0, 1)]
    assert shares == pytest.approx([0.35, 0.30, 0.35], abs=0.01)
    assert relative_error(weight, codes, scale[:, None]) == pytest.approx(0.216, abs=0.01)
    assert bool(((codes == 0).sum(dim=1) == math.ceil(0.3 * 512)).all())


def test_q12_lsq_and_twn_start_with_the_errors_of_the_table() -> None:
    weight = randn(64, 512, seed=2) * 0.03
    scale = fit_lsq(weight)[:, None]
    codes = write_ternary_codes(weight, scale, codes_like(weight))
    assert float((codes == 0).float().mean()) == pytest.approx(0.46, abs=0.01)
    assert relative_error(weight, codes, scale) == pytest.approx(0.190, abs=0.01)
    threshold = twn_threshold(weight, "row")
    codes = write_threshold_codes(weight, threshold, codes)
    assert float((codes == 0).float().mean()) == pytest.approx(0.42, abs=0.01)
    assert relative_error(weight, codes, kept_mean(weight, threshold)) == pytest.approx(0.191, abs=0.01)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_q18_twn_keeps_what_exceeds_seven_tenths_of_the_mean(granularity: str) -> None:
    weight = randn(6, 50, seed=3) * torch.logspace(-2, 0, 6)[:, None]
    threshold = twn_threshold(weight, granularity)  # type: ignore[arg-type]
    scale = kept_mean(weight, threshold)
    assert threshold.shape == scale.shape == (() if granularity == "tensor" else (6, 1))
    torch.testing.assert_close(threshold, 0.7 * absmean(weight, granularity))  # type: ignore[arg-type]
    kept = weight.abs() > threshold
    expected = weight.abs()[kept].mean() if granularity == "tensor" else torch.stack(
        [row[keep].mean() for row, keep in zip(weight.abs(), kept, strict=True)]
    )[:, None]  # fmt: skip
    torch.testing.assert_close(scale, expected)
    assert torch.equal(write_threshold_codes(weight, threshold, codes_like(weight)), (weight.sign() * kept).char())


def test_q10_rows_of_zeros_are_finite_with_zero_codes() -> None:
    zeros = torch.zeros(3, 8)
    for scale, threshold in (
        (*fit_ttq(zeros, 30.0),),
        (kept_mean(zeros, EPS * torch.ones(3, 1))[:, 0], fit_lsq(zeros)),
    ):
        assert bool((scale == EPS).all()) and bool(threshold.isfinite().all())
        assert not write_threshold_codes(zeros, threshold[:, None], codes_like(zeros)).any()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_m01_integer_rows_use_at_most_their_levels(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    weight = randn(7, 1001, seed=4)
    codes, scale = quantize_rows(weight, bits)
    assert int(codes.abs().max()) == top and codes.unique().numel() <= 2 * top + 1
    torch.testing.assert_close(scale, weight.abs().amax(dim=1, keepdim=True) / top)


class Case:
    """Latent weights, row parameters and an arriving gradient, away from every threshold of the formulas."""

    def __init__(self, kind: str, clips: bool = False) -> None:
        self.weight = (randn(ROWS, COLUMNS, seed=5) * 0.7).requires_grad_()
        self.grad = randn(ROWS, COLUMNS, seed=6)
        self.raw_scale = inverse_positive(torch.linspace(0.5, 1.1, ROWS)).requires_grad_()
        self.raw_threshold = (
            inverse_positive(torch.linspace(0.2, 0.5, ROWS)).requires_grad_() if kind == "ttq" else None
        )
        self.scale = positive(self.raw_scale.detach())[:, None]
        self.threshold = None if self.raw_threshold is None else positive(self.raw_threshold.detach())[:, None]
        weight, codes = self.weight.detach(), codes_like(self.weight)
        if self.threshold is None:
            self.codes = write_ternary_codes(weight, self.scale, codes)
        else:
            self.codes = write_threshold_codes(weight, self.threshold, codes)
        self.quantizer = RowQuantizer(self.codes, self.scale, self.threshold, clips)

    def backward(self, *factors: Tensor) -> None:
        port = gradient_port(self.weight, self.raw_scale, self.raw_threshold, self.quantizer, *factors)
        assert torch.equal(port, self.weight)
        port.backward(self.grad)


def test_q11_the_scale_of_ttq_receives_the_sum_of_gradient_times_code() -> None:
    case = Case("ttq")
    case.backward()
    sums = [sum(g * q for g, q in zip(case.grad[i].tolist(), case.codes[i].tolist(), strict=True)) for i in range(ROWS)]
    by_hand = torch.tensor(sums) / COLUMNS**0.5
    assert case.raw_scale.grad is not None
    torch.testing.assert_close(case.raw_scale.grad, by_hand * case.raw_scale.detach().sigmoid())
    assert torch.equal(case.weight.grad, case.grad)  # type: ignore[arg-type]


def test_the_scale_of_ttq_agrees_with_finite_differences() -> None:
    case = Case("ttq")
    case.backward()
    h = 1e-3
    for i in range(ROWS):
        losses = []
        for sign in (1, -1):
            raw = case.raw_scale.detach().double().clone()
            raw[i] += sign * h
            losses.append((case.grad.double() * torch.nn.functional.softplus(raw)[:, None] * case.codes).sum())
        slope = float(losses[0] - losses[1]) / (2 * h) / COLUMNS**0.5
        assert case.raw_scale.grad is not None
        assert float(case.raw_scale.grad[i]) == pytest.approx(slope, rel=1e-4)


def test_q11_the_threshold_of_ttq_receives_the_rectangular_surrogate() -> None:
    case = Case("ttq")
    case.backward()
    assert case.raw_threshold is not None and case.raw_threshold.grad is not None and case.threshold is not None
    for i in range(ROWS):
        delta, s = float(case.threshold[i]), float(case.scale[i])
        total, met = 0.0, 0
        for g, w in zip(case.grad[i].tolist(), case.weight[i].tolist(), strict=True):
            if abs(abs(w) - delta) < delta / 2:
                total, met = total + g * -s * math.copysign(1, w) / delta, met + 1
        slope = float(case.raw_threshold[i].detach().sigmoid())
        assert met > 3
        assert float(case.raw_threshold.grad[i]) == pytest.approx(total / COLUMNS**0.5 * slope, rel=1e-4)


def test_the_scale_of_lsq_receives_the_rounding_error_inside_and_the_code_outside() -> None:
    case = Case("lsq")
    case.backward()
    ratio = case.weight.detach() / case.scale
    by_hand = (case.grad * torch.where(ratio.abs() <= 1, case.codes - ratio, case.codes.float())).sum(dim=1)
    assert bool((ratio.abs() > 1).any()) and case.raw_scale.grad is not None
    torch.testing.assert_close(case.raw_scale.grad, by_hand / COLUMNS**0.5 * case.raw_scale.detach().sigmoid())


@pytest.mark.parametrize("kind", ["ttq", "lsq"])
def test_q13_the_latent_gradient_is_masked_only_under_clip(kind: str) -> None:
    plain, clipped = Case(kind), Case(kind, clips=True)
    plain.backward()
    clipped.backward()
    inside = clipped.weight.detach().abs() <= clipped.scale
    assert torch.equal(plain.weight.grad, plain.grad)  # type: ignore[arg-type]
    assert torch.equal(clipped.weight.grad, clipped.grad * inside)  # type: ignore[arg-type]
    assert bool(inside.any()) and not bool(inside.all())
    assert torch.equal(plain.raw_scale.grad, clipped.raw_scale.grad)  # type: ignore[arg-type]


def test_only_the_share_that_went_through_the_quantizer_reaches_its_parameters() -> None:
    whole, part = Case("ttq", clips=True), Case("ttq", clips=True)
    share = torch.full((ROWS, COLUMNS), 0.25)
    share[1] = 0
    whole.backward()
    part.backward(share, 1 - share)
    factor = share[:, 0]
    torch.testing.assert_close(part.raw_scale.grad, whole.raw_scale.grad * factor)  # type: ignore[operator]
    torch.testing.assert_close(part.raw_threshold.grad, whole.raw_threshold.grad * factor)  # type: ignore[union-attr, operator]
    expected = part.grad * (share * (part.weight.detach().abs() <= part.scale) + 1 - share)
    torch.testing.assert_close(part.weight.grad, expected)


def test_a_scaled_gradient_leaves_the_value_alone() -> None:
    weight = randn(3, 4).requires_grad_()
    factor = randn(3, 4, seed=1)
    scaled = scaled_gradient(weight, factor)
    scaled.sum().backward()
    assert torch.equal(scaled, weight) and torch.equal(weight.grad, factor)  # type: ignore[arg-type]


def test_rows_are_handled_in_blocks_as_they_are_at_once() -> None:
    weight = (randn(700, 401, seed=7) * 0.03).requires_grad_()
    scale, threshold = fit_ttq(weight.detach(), 30.0)
    raw_scale, raw_threshold = (inverse_positive(v).requires_grad_() for v in (scale, threshold))
    codes = write_threshold_codes(weight.detach(), threshold[:, None], codes_like(weight))
    port = gradient_port(
        weight, raw_scale, raw_threshold, RowQuantizer(codes, scale[:, None], threshold[:, None], True)
    )
    grad = randn(700, 401, seed=8)
    port.backward(grad)
    torch.testing.assert_close(raw_scale.grad, (grad * codes).sum(dim=1) / 401**0.5 * raw_scale.detach().sigmoid())
    assert torch.equal(weight.grad, grad * (weight.detach().abs() <= scale[:, None]))  # type: ignore[arg-type]
