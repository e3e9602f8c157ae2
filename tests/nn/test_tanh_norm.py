"""The QDyT norm: its equation, its ramp as a function of the step, one behavior in training and evaluation."""

from itertools import pairwise

import pytest
import torch

from builders import randn
from ternlm.nn.tanh_norm import QDyT


def norm(features: int = 24, groups: int = 4, **options: object) -> QDyT:
    made = QDyT(features, groups, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight.add_(0.2 * randn(features))
        made.bias.add_(0.2 * randn(features, seed=1))
    return made


def test_the_norm_equals_its_equation() -> None:
    made, x = norm(), 3 * randn(2, 5, 24)
    made.set_step(500)
    u = x - x.unflatten(-1, (4, 6)).mean(-1, keepdim=True).expand(-1, -1, -1, 6).flatten(-2)
    bound = torch.nn.functional.softplus(torch.tensor(3.0))
    v = u.clamp(-bound, bound)
    ramp = 0.1 + 0.9 * 500 / 2000
    expected = made.weight * torch.tanh(0.5 * ramp * v) + made.bias
    torch.testing.assert_close(made(x), expected)
    assert bound.item() == pytest.approx(3.0486, abs=1e-4) and bool((u.abs() > bound).any())


def test_m03_alpha_has_a_gradient_at_step_zero_and_its_slope_is_continuous() -> None:
    made, x = QDyT(24, 4), 3 * randn(7, 24)
    made.set_step(0)
    made(x).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    slopes = []
    for step in range(2300):
        made.set_step(step)
        slopes.append(made.slope().item())
    assert slopes[0] == pytest.approx(0.05) and slopes[2000] == slopes[-1] == pytest.approx(0.5)
    changes = [b / a - 1 for a, b in pairwise(slopes[100:])]
    assert min(changes) >= 0 and max(changes) < 1e-2


def test_m03_the_output_does_not_jump_where_the_ramp_ends() -> None:
    made, x = QDyT(24, 4, warmup_steps=300), 2 * randn(50, 24)
    deviations = []
    for step in (299, 300, 301):
        made.set_step(step)
        deviations.append(made(x).std().item())
    assert max(deviations) / min(deviations) < 1.02


def test_m04_the_ramp_counts_optimizer_steps_and_is_saved() -> None:
    made = norm()
    made.set_step(700)
    before = made.slope().item()
    for _ in range(5):
        made(randn(3, 24))
    assert made.slope().item() == before
    other = norm()
    other.load_state_dict(made.state_dict())
    assert other.slope().item() == before != norm().slope().item()


def test_m09_training_and_evaluation_are_the_same_function() -> None:
    made, x = norm(), 3 * randn(2, 5, 24)
    made.set_step(123)
    trained = made.train()(x)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    assert torch.equal(made.eval()(x), trained)
    assert torch.equal(made.eval()(x[:1]), trained[:1])
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"clips": False}, {"rms_eps": 1e-5}])
def test_no_output_is_larger_than_the_bound(options: dict[str, object]) -> None:
    made = norm(**options)
    made.set_step(5000)
    largest = made(1000 * randn(50, 24)).abs().max()
    assert 0.9 * made.bound() < largest <= made.bound() * (1 + 1e-6)


def test_the_ingredients_switch_off_one_by_one() -> None:
    x = 3 * randn(2, 24) + 1
    assert norm(clips=False).raw_clip is None
    plain = QDyT(24, center="none", clips=False, warmup_steps=0)
    torch.testing.assert_close(plain(x), torch.tanh(0.5 * x))
    centered = QDyT(24, center="token", clips=False, warmup_steps=0)
    torch.testing.assert_close(centered(x), torch.tanh(0.5 * (x - x.mean(-1, keepdim=True))))
    divided = QDyT(24, center="none", clips=False, warmup_steps=0, rms_eps=1e-5)
    torch.testing.assert_close(divided(1000 * x), divided(x), rtol=1e-4, atol=1e-4)


def test_m11_a_constant_input_of_100_is_saturated_and_clipped_everywhere() -> None:
    made = QDyT(24, center="none")
    made.set_step(2000)
    readings = made.readings(torch.full((3, 24), 100.0))
    assert readings["saturation"] == 1 and readings["clip_rate"] == 1
    assert readings["alpha"] == 0.5 and readings["clip"].item() == pytest.approx(3.0486, abs=1e-4)
    small = made.readings(0.01 * randn(3, 24))
    assert small["saturation"] == 0 and small["clip_rate"] == 0 and small["std"].item() == pytest.approx(0.01, rel=0.3)


def test_m11_a_flat_tanh_is_saturated_without_a_clip() -> None:
    made = QDyT(24, center="none", clips=False)
    made.set_step(2000)
    readings = made.readings(torch.full((3, 24), 100.0))
    assert readings["saturation"] == 1 and readings["clip_rate"] == 0
