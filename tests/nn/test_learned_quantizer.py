"""Learned ternary layers: fitted once, followed by the codes, trained by true gradients, never started afresh."""

import pytest
import torch

from builders import randn
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import FULL_PRECISION, QuantizationMode
from ternlm.ops.learned_ternary import fit_lsq, fit_ttq, positive

OUT = {"a": 5, "b": 3}
TTQ, LSQ = QuantizationMode(quantizer="ttq"), QuantizationMode(quantizer="lsq")


def layer(mode: QuantizationMode = TTQ, seed: int = 1, fitted: bool = True) -> BitLinear:
    made = BitLinear(24, OUT, mode)
    with torch.no_grad():
        made.weight.copy_(randn(8, 24, seed=seed) * torch.logspace(-2, 0, 8)[:, None])
    if fitted:
        made.fit()
    return made


def descend(made: BitLinear, steps: int = 1, rate: float = 0.05) -> None:
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    for i in range(steps):
        a, b = made(randn(6, 24, seed=50 + i))
        (a.square().sum() - b.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", [TTQ, LSQ], ids=["ttq", "lsq"])
def test_the_number_of_parameters_is_that_of_the_quantizer(mode: QuantizationMode) -> None:
    names = {name: tuple(p.shape) for name, p in layer(mode).named_parameters()}
    expected = {"weight": (8, 24), "quantizer.raw_scale": (8,)}
    assert names == (expected | {"quantizer.raw_threshold": (8,)} if mode is TTQ else expected)
    for fixed in (QuantizationMode(), QuantizationMode(weights="int8", quantizer="ttq"), FULL_PRECISION):
        assert [name for name, _ in BitLinear(24, OUT, fixed).named_parameters()] == ["weight"]


def test_a_layer_without_scales_to_learn_refuses_a_mode_that_learns_them() -> None:
    with pytest.raises(ValueError, match="cannot be set to quantizer=ttq; make the model with that mode"):
        layer(QuantizationMode()).mode = TTQ


def test_the_codes_and_scales_are_those_of_the_fit() -> None:
    made = layer()
    scale, threshold = fit_ttq(made.weight.detach(), 30.0)
    made.refresh()
    torch.testing.assert_close(made.scale, scale[:, None], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat(list(made.thresholds().values())), threshold[:, None], rtol=1e-5, atol=0)
    for part, (codes, _) in zip(made.weight.split(made.sizes), made.matrices().values(), strict=True):
        assert codes.unique().tolist() == [-1, 0, 1] and codes.shape == part.shape
    lsq = layer(LSQ)
    lsq.refresh()
    torch.testing.assert_close(lsq.scale, fit_lsq(lsq.weight.detach())[:, None], rtol=1e-5, atol=0)


def test_m06_the_percentile_decides_the_share_of_zeros() -> None:
    for percentile in (25.0, 50.0):
        made = layer(QuantizationMode(quantizer="ttq", ttq_percentile=percentile))
        made.refresh()
        assert float((made.codes == 0).float().mean()) == percentile / 100


def test_an_unfitted_layer_is_fitted_when_it_first_needs_ternary_codes() -> None:
    made, fitted = layer(fitted=False), layer()
    x = randn(3, 24)
    assert not bool(made.quantizer.fitted)  # type: ignore[union-attr]
    assert torch.equal(made(x)[0], fitted(x)[0]) and bool(made.quantizer.fitted)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [TTQ, LSQ], ids=["ttq", "lsq"])
def test_q11_every_parameter_receives_a_gradient_and_the_output_moves_with_it(mode: QuantizationMode) -> None:
    made, x = layer(mode), randn(6, 24)
    before = made(x)[0].detach()
    sum(y.square().sum() for y in made(x)).backward()  # type: ignore[union-attr]
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    with torch.no_grad():
        made.quantizer.raw_scale.add_(0.5)  # type: ignore[union-attr]
    after = made(x)[0].detach()
    assert made.quantizations == 2 and not torch.equal(before, after)


def test_a_scale_gradient_is_that_of_the_whole_layer() -> None:
    made, x, direction = layer(), randn(6, 24), randn(6, 5, seed=3)
    (made(x)[0] * direction).sum().backward()
    h, raw = 1e-2, made.quantizer.raw_scale  # type: ignore[union-attr]
    for i in range(5):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                raw[i] += sign * h
                losses.append(float((made(x)[0] * direction).sum()))
                raw[i] -= sign * h
        slope = (losses[0] - losses[1]) / (2 * h) / 24**0.5
        assert float(raw.grad[i]) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_row_gradients_are_clamped_before_the_slope_of_softplus() -> None:
    for mode in (TTQ, LSQ):
        made = layer(mode.model_copy(update={"lsq_grad_clip": 0.25}))
        (made(randn(6, 24))[0] * randn(6, 5, seed=3)).sum().backward()
        assert made.quantizer is not None
        free = {name: (raw.grad / raw.sigmoid()).detach() for name, raw in made.quantizer.named_parameters()}  # type: ignore[operator]
        made.quantizer.clamp_gradients()
        for name, raw in made.quantizer.named_parameters():
            torch.testing.assert_close(raw.grad / raw.sigmoid(), free[name].clamp(-0.25, 0.25))  # type: ignore[operator]
            assert bool((free[name].abs() > 0.25).any()) and bool((free[name].abs() < 0.25).any())


def test_m05_loading_a_trained_layer_never_starts_its_quantizer_afresh() -> None:
    trained = layer()
    descend(trained, 5)
    saved = {name: value.clone() for name, value in trained.state_dict().items()}
    assert set(saved) == {"weight", "quantizer.raw_scale", "quantizer.raw_threshold", "quantizer.fitted"}
    for other in (layer(seed=9), layer(seed=9, fitted=False)):
        other.refresh()
        other.load_state_dict(saved)
        for _ in range(2):
            other(randn(2, 24))
        for name, value in other.state_dict().items():
            assert torch.equal(value, saved[name]), name
        assert torch.equal(other(randn(4, 24))[0], trained(randn(4, 24))[0])


def test_scales_are_fitted_anew_when_integer_weights_become_ternary() -> None:
    made = layer()
    first = made.quantizer.raw_scale.detach().clone()  # type: ignore[union-attr]
    made.mode = QuantizationMode(quantizer="ttq", weights="int8")
    made(randn(2, 24))
    assert torch.equal(made.quantizer.raw_scale, first)  # type: ignore[union-attr]
    with torch.no_grad():
        made.weight.mul_(3)
    made.mode = TTQ
    made(randn(2, 24))
    torch.testing.assert_close(positive(made.quantizer.raw_scale), 3 * positive(first), rtol=1e-4, atol=0)  # type: ignore[union-attr]
    assert bool(made.quantizer.fitted)  # type: ignore[union-attr]


def test_a_look_at_the_twin_does_not_touch_learned_scales() -> None:
    made = layer()
    descend(made, 3)
    before = made.quantizer.raw_scale.detach().clone()  # type: ignore[union-attr]
    for mode in (FULL_PRECISION, TTQ):
        made.mode = mode
        made(randn(2, 24))
    assert torch.equal(made.quantizer.raw_scale, before)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [TTQ, LSQ], ids=["ttq", "lsq"])
def test_m17_scales_and_thresholds_stay_positive_and_finite_over_a_thousand_steps(mode: QuantizationMode) -> None:
    made = layer(mode)
    descend(made, 1000)
    made.refresh()
    for value in (made.scale, *made.thresholds().values()):
        assert bool((value > 0).all()) and bool(value.isfinite().all())


def test_q22_micro_batches_share_the_codes_and_a_step_renews_them() -> None:
    made = layer()
    for i in range(3):
        made(randn(2, 24, seed=i))
    assert made.quantizations == 1
    descend(made)
    made.refresh()
    assert made.quantizations == 2


def test_q04_parameters_and_scales_are_float32_under_half_precision_inputs() -> None:
    made = layer()
    y = made(randn(4, 24).bfloat16())[0]
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and made.scale.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is not None for p in made.parameters())
