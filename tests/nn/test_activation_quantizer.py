"""One quantized site: how its scale is found, what it keeps, what it leaves alone, and the exact product after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from builders import randn
from ternlm.errors import SettingsError
from ternlm.nn.activation_quantizer import ActivationQuantizer, ActivationSettings
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import FULL_PRECISION, Perturbation, QuantizationMode
from ternlm.ops.noise import noise_key
from ternlm.ops.percentile import magnitude_percentile

FEATURES, HEADS = 10, 3


def site(bits: int = 4, heads: int | None = None, key: int = 1, **settings: Any) -> ActivationQuantizer:
    made = ActivationQuantizer(bits, ActivationSettings(**settings), FEATURES, heads)
    made.noise.fill_(noise_key(key))
    return made


def codes_of(y: Tensor, step: Tensor) -> Tensor:
    codes = (y / step).round()
    torch.testing.assert_close(codes * step, y)
    return codes


def test_m06_the_defaults_and_every_setting_can_be_seen_on_the_site() -> None:
    assert ActivationSettings() == ActivationSettings(
        act_scale="ema_percentile",
        act_percentile=99.7,
        act_ema=0.95,
        stochastic_rounding=True,
        act_granularity="tensor",
    )
    assert site(act_percentile=99.5).settings.act_percentile == 99.5
    for name, value in (("act_percentile", 0), ("act_percentile", 101), ("act_ema", 1.0), ("act_scale", "max")):
        with pytest.raises(SettingsError, match=name):
            ActivationSettings.from_mapping({name: value}, "model")


@pytest.mark.parametrize(
    "changed",
    [
        {"act_percentile": 60.0},
        {"act_ema": 0.1},
        {"stochastic_rounding": False},
        {"act_scale": "absmax_token"},
        {"act_granularity": "channel"},
        {"bits": 6},
    ],
)
def test_m06_every_setting_changes_the_output(changed: dict[str, Any]) -> None:
    outputs = []
    for settings in ({}, changed):
        made = site(**settings)
        for i in range(2):
            y, _ = made(randn(2, 5, FEATURES, seed=i) * (1 + i))
            made.commit()
        outputs.append(y)
    assert not torch.equal(*outputs)


def test_the_first_observation_is_copied_and_later_ones_are_averaged() -> None:
    made, batches = site(act_percentile=80.0, act_ema=0.75), [randn(2, 9, FEATURES, seed=i) * (i + 1) for i in range(3)]
    expected = None
    for i, x in enumerate(batches):
        made(x)
        made.commit()
        now = magnitude_percentile(x, 80.0)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
        torch.testing.assert_close(made.rho, expected)
        assert int(made.observed) == i + 1


def test_a_training_pass_rounds_with_the_new_scale_but_keeps_the_old_one_until_it_is_committed() -> None:
    made, x = site(), randn(2, 9, FEATURES)
    _, step = made(x)
    assert step is not None and float(made.rho) == 0 and int(made.observed) == 0
    torch.testing.assert_close(step, magnitude_percentile(x, 99.7) / 7)
    made.commit()
    torch.testing.assert_close(made.rho, step * 7)
    before = made.rho.clone()
    made.commit()
    assert torch.equal(made.rho, before) and int(made.observed) == 1


def test_t17_a_recomputed_pass_sees_the_same_noise_and_scale_and_observes_once() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.linear = site(), BitLinear(FEATURES, {"y": 4}, QuantizationMode(), rounds_input=False)
            with torch.no_grad():
                self.linear.weight.copy_(randn(4, FEATURES, seed=5))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(*self.site(x))[0]
            return y.square()

    outcomes = []
    for recompute in (False, True):
        block = Block()
        block.site(randn(2, 7, FEATURES, seed=1))
        block.site.commit()
        x = randn(2, 7, FEATURES, seed=2).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.sum().backward()
        block.site.commit()
        outcomes.append((y, x.grad, block.linear.weight.grad, block.site.rho, block.site.observed))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
    assert int(outcomes[1][4]) == 2


def test_e05_evaluation_is_deterministic_rounds_to_nearest_and_changes_nothing() -> None:
    made = site()
    made(randn(4, 9, FEATURES))
    made.commit()
    saved = {name: value.clone() for name, value in made.state_dict().items()}
    made.eval()
    x = randn(2, 9, FEATURES, seed=3) * 2
    first, step = made(x)
    assert step is not None and torch.equal(step, made.rho / 7)
    made.noise.fill_(noise_key(99))
    assert torch.equal(made(x)[0], first)
    assert torch.equal(codes_of(first, step), (x * step.reciprocal()).clamp(-7, 7).round())
    made.commit()
    for name, value in made.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_site_that_has_seen_nothing_goes_by_its_input_in_evaluation() -> None:
    made, x = site().eval(), randn(3, 9, FEATURES)
    _, step = made(x)
    torch.testing.assert_close(step, magnitude_percentile(x, 99.7) / 7)
    assert int(made.observed) == 0


@pytest.mark.parametrize("heads", [None, HEADS])
def test_padding_is_rounded_but_not_observed(heads: int | None) -> None:
    shape = (2, 8, FEATURES) if heads is None else (2, HEADS, 8, FEATURES)
    valid = torch.arange(8) < torch.tensor([[8], [3]])
    x = randn(*shape)
    loud = x.clone()
    (loud if heads is None else loud.transpose(1, 2))[~valid] = 1e4
    quiet, disturbed = site(heads=heads), site(heads=heads)
    y, step = quiet(x, valid)
    z, other = disturbed(loud, valid)
    assert torch.equal(step, other)
    places = valid if heads is None else valid[:, None].expand(2, HEADS, 8)
    assert torch.equal(y[places], z[places]) and float(z.abs().max()) <= 7.001 * float(step.max())
    for made in (quiet, disturbed):
        made.commit()
    assert torch.equal(quiet.rho, disturbed.rho)


def test_a_batch_of_padding_or_of_broken_values_leaves_the_average_alone() -> None:
    made, x = site(), randn(2, 8, FEATURES)
    made(x)
    made.commit()
    before = made.rho.clone()
    made(x * 9, torch.zeros(2, 8, dtype=torch.bool))
    made.commit()
    made(x * torch.nan)
    made.commit()
    assert torch.equal(made.rho, before) and int(made.observed) == 1


def test_each_head_has_a_scale_of_its_own() -> None:
    made = site(heads=HEADS)
    x = randn(4, HEADS, 9, FEATURES) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    y, step = made(x)
    made.commit()
    assert step is not None and step.shape == made.rho.shape == (HEADS, 1, 1)
    for h in range(HEADS):
        torch.testing.assert_close(made.rho[h, 0, 0], magnitude_percentile(x[:, h : h + 1], 99.7, heads=True).squeeze())
        assert 11 <= codes_of(y[:, h], step[h]).unique().numel() <= 15


def test_a_scale_per_channel_is_a_simulation_without_a_grid() -> None:
    for heads in (None, HEADS):
        made = site(heads=heads, act_granularity="channel")
        x = randn(9, *(() if heads is None else (HEADS,)), 30, FEATURES) * torch.logspace(-2, 2, FEATURES)
        y, step = made(x)
        made.commit()
        assert step is None
        assert made.rho.shape == ((FEATURES,) if heads is None else (HEADS, 1, FEATURES))
        assert float(((y - x).abs() / (made.rho / 7)).max()) <= 8 and y[..., 0].unique().numel() <= 15 * (heads or 1)


def test_absmax_finds_a_scale_for_each_token_and_keeps_no_state() -> None:
    made, x = site(act_scale="absmax_token", stochastic_rounding=False), randn(3, 8, FEATURES)
    y, step = made(x)
    made.commit()
    assert step is not None and step.shape == (3, 8, 1) and not made.state_dict()
    torch.testing.assert_close(step, x.abs().amax(dim=-1, keepdim=True) / 7)
    assert torch.equal(codes_of(y, step).abs().amax(dim=-1), torch.full((3, 8), 7.0))
    x.requires_grad_()
    made(x)[0].sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_a_bound_from_the_layer_before_is_the_scale_and_without_one_the_site_observes() -> None:
    made, x = site(act_scale="bound"), randn(2, 8, FEATURES)
    _, step = made(x, bound=torch.tensor(3.5))
    assert step is not None and float(step) == 0.5
    made.commit()
    assert int(made.observed) == 0
    made(x)
    made.commit()
    assert int(made.observed) == 1


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_m07_every_number_of_bits_below_sixteen_rounds(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    y, step = site(bits, act_percentile=95.0)(randn(30, 50, FEATURES))
    assert step is not None
    assert codes_of(y, step).unique().tolist() == list(range(-top, top + 1))


def test_bits_above_eight_round_without_an_int8_grid_and_sixteen_switch_the_site_off() -> None:
    x = randn(30, 50, FEATURES)
    y, step = site(10)(x)
    assert step is None and 256 < y.unique().numel() <= 1023
    assert site(16)(x)[0] is x and site(16).bits is None


def test_the_mode_of_the_block_raises_the_bits_or_switches_the_site_off() -> None:
    made, x = site(4), randn(2, 8, FEATURES)
    made.mode = QuantizationMode(least_bits=8)
    assert made.bits == 8 and made(x)[0].unique().numel() > 31
    for off in (FULL_PRECISION, QuantizationMode(activations="none"), QuantizationMode(weights="none")):
        made.mode = off
        assert made.bits is None and made(x) == (x, None)
    made.mode = QuantizationMode(activations="int8")
    assert made.bits == 4


def test_a_frozen_site_and_one_that_does_not_observe_keep_their_scale() -> None:
    for how in ("frozen", "observing"):
        made = site()
        made(randn(2, 8, FEATURES))
        made.commit()
        before = made.rho.clone()
        if how == "frozen":
            made.frozen.fill_(True)
        else:
            made.observing = False
        _, step = made(randn(2, 8, FEATURES) * 5)
        made.commit()
        assert torch.equal(made.rho, before) and int(made.observed) == 1 and torch.equal(step, before / 7)


def test_a_reset_site_that_is_off_has_observed_nothing() -> None:
    made = site()
    made(randn(2, 8, FEATURES))
    made.commit()
    made.mode = FULL_PRECISION
    made.reset()
    made(randn(2, 8, FEATURES))
    made.commit()
    assert int(made.observed) == 0 and float(made.rho) == 0.0
    made.mode = QuantizationMode()
    made(randn(2, 8, FEATURES))
    made.commit()
    assert torch.equal(made.rho, magnitude_percentile(randn(2, 8, FEATURES), 99.7))


@pytest.mark.parametrize("heads", [None, HEADS])
def test_m02_qdrop_bypasses_tokens_in_training_only(heads: int | None) -> None:
    made = site(heads=heads)
    x = randn(4, *(() if heads is None else (HEADS,)), 25, FEATURES) * 3
    rounded, _ = made(x)
    for drop in (0.0, 0.5, 1.0):
        made.perturb(Perturbation(drop=drop))
        before = torch.get_rng_state()
        y, step = made(x)
        assert torch.equal(before, torch.get_rng_state()) and (step is None) == (drop > 0)
        past = (y == x).all(dim=-1)
        if heads is not None:
            assert torch.equal(past.any(dim=1), past.all(dim=1))  # one draw for all heads of a token
        assert torch.equal(torch.where(past[..., None], rounded, y), rounded)
        assert abs(float(past.float().mean()) - drop) <= 4 * 0.5 / 100**0.5 * (0 < drop < 1)
    made.eval()
    assert not torch.equal(made(x)[0], x) and made(x)[1] is not None


def test_q24_qdrop_passes_the_gradient_where_it_passes_the_value() -> None:
    made = site(stochastic_rounding=False)
    made.perturb(Perturbation(drop=0.5))
    x = (randn(3, 40, FEATURES) * 3).requires_grad_()
    y, _ = made(x)
    y.sum().backward()
    limit = magnitude_percentile(x.detach(), 99.7)
    past = (y == x).all(dim=-1, keepdim=True)
    assert x.grad is not None and torch.equal(x.grad, (past | (x.abs() <= limit)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"act_scale": "absmax_token"}], ids=["one scale", "per token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_q05_a_linear_layer_counts_the_codes_of_a_site_exactly(
    bits: int, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    made = site(bits, **settings)
    linear = BitLinear(FEATURES, {"a": 5, "b": 3}, QuantizationMode(), rounds_input=False)
    with torch.no_grad():
        linear.weight.copy_(randn(8, FEATURES, seed=4))
    x, step = made(randn(3, 7, FEATURES).to(dtype))
    assert step is not None
    x = x.detach().requires_grad_()
    outputs = linear(x, step)
    counts = (x.float() / step).round().long() @ linear.codes.long().t()
    for y, count, scale in zip(outputs, counts.split([5, 3], dim=-1), linear.scale, strict=True):
        torch.testing.assert_close(y, (count * (scale.double() * step.double())).to(dtype))
    grad_y = randn(3, 7, 8, seed=5).to(dtype)
    torch.autograd.backward(outputs, grad_y.split([5, 3], dim=-1))
    exact = (x.float() / step).round() * step
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    expected = grad_y.float().view(-1, 8).t() @ exact.detach().view(-1, FEATURES)
    torch.testing.assert_close(linear.weight.grad, expected, **tolerance)  # type: ignore[arg-type]
    plain = linear(x.detach())
    for y, z in zip(outputs, plain, strict=True):
        torch.testing.assert_close(y, z, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=tolerance["atol"])


def test_half_precision_inputs_have_float32_scales_and_at_most_their_codes() -> None:
    made = site()
    y, step = made(randn(8, 20, FEATURES).bfloat16())
    assert y.dtype == torch.bfloat16 and step is not None and step.dtype == torch.float32
    assert y.unique().numel() <= 15


def test_files_hold_the_observation_and_nothing_of_a_pass() -> None:
    made = site(heads=HEADS)
    assert sorted(made.state_dict()) == ["frozen", "observed", "rho"]
    made(randn(2, HEADS, 5, FEATURES))
    made.commit()
    other = site(heads=HEADS, key=1)
    other.load_state_dict(made.state_dict())
    x = randn(2, HEADS, 5, FEATURES, seed=8)
    assert torch.equal(made(x)[0], other(x)[0])
