"""QDrop, dither, ternary dropout and blended transitions of BitLinear, each against what it is defined to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from builders import randn
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import FULL_PRECISION, DropBy, Perturbation, QuantizationMode
from ternlm.ops.noise import noise_key
from ternlm.ops.quantize import dequantize_weight
from ternlm.ops.quantized_linear import per_row

OUT = {"a": 5, "b": 3}
INT8 = QuantizationMode(weights="int8")
MODES = {
    "absmean": QuantizationMode(),
    "groups": QuantizationMode(granularity="group", group_size=8),
    "twn": QuantizationMode(quantizer="twn"),
    "twn rows": QuantizationMode(quantizer="twn", granularity="row", activations="none"),
    "ttq": QuantizationMode(quantizer="ttq", activations="int4"),
    "lsq": QuantizationMode(quantizer="lsq", ste="clip"),
    "int6": QuantizationMode(weights="int6", activations="int6"),
}
WHOLE: list[DropBy] = ["token_row", "batch", "element"]


def layer(mode: QuantizationMode, perturbation: Perturbation | None = None, key: int = 1) -> BitLinear:
    made = BitLinear(24, OUT, mode)
    with torch.no_grad():
        made.weight.copy_(randn(8, 24, seed=1) * 0.05)
    made.fit()
    made.perturb(perturbation or Perturbation())
    made.noise.fill_(noise_key(key))
    return made


def results(made: BitLinear, seed: int = 0) -> list[Tensor]:
    """Outputs and all gradients of one pass."""
    made.zero_grad()
    x = randn(3, 7, 24, seed=seed).requires_grad_()
    outputs = made(x)
    sum((y * randn(*y.shape, seed=9)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    grads = [p.grad for _, p in sorted(made.named_parameters()) if p.grad is not None]
    return [*outputs, x.grad, *grads]


@pytest.mark.parametrize("by", WHOLE)
@pytest.mark.parametrize("name", MODES)
def test_m02_qdrop_at_one_is_the_layer_without_rounding(name: str, by: DropBy) -> None:
    plain = layer(FULL_PRECISION)
    dropped = layer(MODES[name], Perturbation(drop=1.0, drop_by=by))
    before = torch.get_rng_state()
    y = results(dropped)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(y[:3], results(plain)[:3], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(dropped.weight.grad, plain.weight.grad)
    if dropped.quantizer is not None:
        assert not dropped.quantizer.raw_scale.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODES)
def test_m02_the_simulation_with_nothing_to_do_is_the_exact_layer(name: str) -> None:
    exact, simulated = layer(MODES[name]), layer(MODES[name])
    simulated._drops = True  # with a probability of zero
    for a, b in zip(results(exact), results(simulated), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", WHOLE)
def test_m02_qdrop_mixes_whole_rows_and_tokens(by: DropBy) -> None:
    made = layer(QuantizationMode(activations="none"), Perturbation(drop=0.5, drop_by=by))
    made.weight.requires_grad_(False)
    used = torch.cat(made(torch.eye(24)), dim=1).t()
    rounded = dequantize_weight(made.codes, per_row(made.scale, made.sizes))
    past = torch.isclose(used, made.weight, rtol=0, atol=1e-7)
    assert bool((past | torch.isclose(used, rounded, rtol=0, atol=1e-7)).all())
    rows = past.all(dim=1)
    if by == "token_row":
        assert rows.any() and not rows.all() and torch.equal(rows, past.any(dim=1))
    elif by == "batch":
        assert bool(rows.all()) or not bool(past.any())
    else:
        assert not rows.any() and 0.3 < past.float().mean() < 0.7


def test_qdrop_changes_with_the_key_repeats_with_it_and_stops_in_evaluation() -> None:
    made, x = layer(QuantizationMode(), Perturbation(drop=0.5)), randn(4, 24)
    first = made(x)[0].detach()
    assert torch.equal(made(x)[0], first) and made.quantizations == 1
    made.noise.fill_(noise_key(2))
    assert not torch.equal(made(x)[0], first)
    assert torch.equal(made.eval()(x)[0], layer(QuantizationMode())(x)[0])


@pytest.mark.parametrize("name", ["absmean", "groups", "twn", "ttq", "lsq"])
def test_m15_dither_moves_codes_near_thresholds_and_no_parameter(name: str) -> None:
    made, x = layer(MODES[name], Perturbation(dither=1.0)), torch.eye(24)
    parameters = {key: value.clone() for key, value in made.state_dict().items()}
    made.refresh()
    scale = per_row(made.scale, made.sizes)
    codes = []
    for i in range(200):
        made.noise.fill_(noise_key(i))
        with torch.no_grad():
            spread = scale.repeat_interleave(24 // scale.shape[1], dim=1)
            codes.append((made._perturbed_weight() / spread).round())
    assert all(torch.equal(value, parameters[key]) for key, value in made.state_dict().items())
    moved = torch.stack([code != made.codes for code in codes]).float().mean(dim=0)
    threshold = torch.cat([t.reshape(-1, 1).expand(size, 1) if t.dim() < 2 else t
                           for t, size in zip(made.thresholds().values(), made.sizes, strict=True)])  # fmt: skip
    distance = (
        made.weight.detach().abs() - threshold.repeat_interleave(24 // threshold.shape[1], dim=1)
    ).abs() / spread
    assert not moved[distance > 0.51].any() and bool((moved[distance < 0.3] > 0).all())
    assert not torch.equal(made(x)[0], layer(MODES[name])(x)[0])


@pytest.mark.parametrize("name", ["absmean", "ttq"])
def test_m15_ternary_dropout_zeroes_codes_at_its_rate_and_scales_the_rest(name: str) -> None:
    chance, made = 0.25, layer(MODES[name], Perturbation(zeroed=0.25))
    made.refresh()
    scale, nonzero = per_row(made.scale, made.sizes), made.codes != 0
    zeroed, total = 0, 0
    for i in range(60):
        made.noise.fill_(noise_key(i))
        used = made._perturbed_weight().detach()
        torch.testing.assert_close(
            used[used != 0], (made.codes * scale / (1 - chance))[used != 0], rtol=1e-5, atol=1e-8
        )
        assert not used[~nonzero].any()
        zeroed, total = zeroed + int((used[nonzero] == 0).sum()), total + int(nonzero.sum())
    assert abs(zeroed / total - chance) < 4 * (chance * (1 - chance) / total) ** 0.5
    assert torch.equal(made.eval()(randn(2, 24))[0], layer(MODES[name]).eval()(randn(2, 24))[0])


def test_m15_ternary_dropout_masks_the_latent_gradient_with_the_same_factor() -> None:
    made = layer(QuantizationMode(activations="none"), Perturbation(zeroed=0.4))
    made.refresh()
    used = made._perturbed_weight().detach()
    x = randn(6, 24)
    outputs = torch.cat(made(x), dim=1)
    direction = randn(6, 8, seed=4)
    (outputs * direction).sum().backward()
    factor = torch.where(made.codes == 0, 1.0, torch.where(used == 0, 0.0, 1 / 0.6))
    torch.testing.assert_close(made.weight.grad, direction.t() @ x * factor)


@pytest.mark.parametrize("training", [True, False])
def test_a_blended_transition_mixes_the_old_and_the_new_rounding_in_evaluation_too(training: bool) -> None:
    new, old = QuantizationMode(activations="none"), QuantizationMode(weights="int8", activations="none")
    x = randn(4, 24)
    made = layer(new, Perturbation(blend=0.25, previous=old)).train(training)
    expected = torch.lerp(layer(old)(x)[0], layer(new)(x)[0], 0.25)
    torch.testing.assert_close(made(x)[0], expected)
    made.perturb(Perturbation(blend=0.75, previous=FULL_PRECISION))
    torch.testing.assert_close(made(x)[0], torch.lerp(F.linear(x, made.weight[:5]), layer(new)(x)[0], 0.75))
    made.perturb(Perturbation(blend=1.0, previous=old))
    assert torch.equal(made(x)[0], layer(new)(x)[0])


def test_a_blend_follows_an_optimizer_step_in_both_of_its_parts() -> None:
    new, x = QuantizationMode(activations="none"), randn(4, 24)
    old = QuantizationMode(weights="int8", activations="none")
    made = layer(new, Perturbation(blend=0.5, previous=old))
    made(x)
    other = layer(new, Perturbation(blend=0.5, previous=old))
    with torch.no_grad():
        made.weight.mul_(-2)
        other.weight.mul_(-2)
    assert torch.equal(made(x)[0], other(x)[0])


def test_an_amount_that_changes_leaves_the_codes_in_force() -> None:
    made = layer(QuantizationMode(), Perturbation(drop=0.5))
    for drop in (0.4, 0.3, 0.0, 0.2):
        made.perturb(Perturbation(drop=drop))
        made(randn(2, 24))
    assert made.quantizations == 1 and float(made._drop) == pytest.approx(0.2)
    assert list(made.state_dict()) == ["weight"]


def test_all_at_once_every_parameter_has_a_finite_gradient() -> None:
    made = layer(
        QuantizationMode(quantizer="ttq", ste="clip"),
        Perturbation(0.3, "element", dither=0.5, zeroed=0.1, blend=0.5, previous=INT8),
    )
    results(made)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.any() for p in made.parameters())
