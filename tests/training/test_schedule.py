"""Learning rate and weight decay are pure functions of the update index: tables, edges, and an exact oracle."""

import inspect
import math
from fractions import Fraction
from itertools import pairwise

import pytest

from ternlm.errors import SettingsError
from ternlm.training import schedule as module
from ternlm.training.schedule import Schedule, ScheduleSettings

NAMES = ["constant", "linear", "cosine", "wsd", "two_stage", "two_stage_continuous"]


def make(name: str, total: int = 97, peak: float = 3e-3, decay: float = 0.1, **values: object) -> Schedule:
    return Schedule(ScheduleSettings.from_mapping({"name": name, **values}), peak, decay, total)


SEED_RUN = {"total": 400_000, "peak": 1.5e-3, "warmup_steps": 375, "second_peak_ratio": 2 / 3}
STEPS = [0, 374, 100_000, 199_999, 200_000, 300_000, 399_999]


@pytest.mark.parametrize(
    ("name", "final_ratio", "table"),
    [
        (
            "two_stage_continuous",
            0.01,
            [4.0e-6, 1.5e-3, 1.2505e-3, 1.0000e-3, 1.0000e-3, 5.075e-4, 1.5005e-5],
        ),
        ("two_stage", 0.02, [4.0e-6, 1.5e-3, 1.1335e-3, 7.6569e-4, 5.1546e-4, 2.7273e-4, 3.0002e-5]),
    ],
)
def test_t19_the_two_stage_curves_have_the_rates_of_the_table(
    name: str, final_ratio: float, table: list[float]
) -> None:
    schedule = make(name, min_lr_ratio=final_ratio, **SEED_RUN)  # type: ignore[arg-type]
    assert [float(f"{schedule.learning_rate(k):.4e}") for k in STEPS] == pytest.approx(table, rel=1e-12)
    assert schedule.boundary == 200_000
    assert [schedule.weight_decay(k) for k in (0, 199_999, 200_000, 399_999)] == [0.1, 0.1, 0.0, 0.0]
    assert [schedule.stage(k) for k in (0, 199_999, 200_000, 399_999)] == [1, 1, 2, 2]


def exact(name: str, k: int, total: int, warmup: int, peak: Fraction, second: Fraction, final: Fraction) -> float:
    """The documented formula in exact arithmetic, with the boundary at floor(N / 2) and a decay over N / 5."""
    n, w, b, d = total, warmup, total // 2, max(round(0.2 * total), 1)
    if k < w:
        return float(peak * (k + 1) / w)
    if name == "cosine":
        return float(final) + float(peak - final) * (1 + math.cos(math.pi * (k - w) / (n - w))) / 2
    if name == "constant":
        value = peak
    elif name == "linear":
        value = final + (peak - final) * Fraction(n - k, n - w)
    elif name == "wsd":
        value = peak if k < n - d else final + (peak - final) * Fraction(n - k, d)
    elif name == "two_stage":
        value = final + ((peak if k < b else second) - final) * Fraction(n - k, n - w)
    elif k < b:
        value = peak + (second - peak) * Fraction(k - w, b - w)
    else:
        value = second + (final - second) * Fraction(k - b, n - b)
    return float(value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("total", "warmup"), [(97, 5), (100, 0), (64, 1), (11, 4)])
def test_every_rate_of_every_curve_equals_the_formula(name: str, total: int, warmup: int) -> None:
    schedule = make(name, total, warmup_steps=warmup, min_lr_ratio=0.25, second_peak_ratio=0.5)
    peak = Fraction(3e-3)
    for k in range(total):
        wanted = exact(name, k, total, warmup, peak, peak / 2, peak / 4)
        assert schedule.learning_rate(k) == pytest.approx(wanted, rel=1e-12), k


@pytest.mark.parametrize("name", NAMES)
def test_t01_the_first_update_is_neither_zero_nor_the_peak_and_warm_up_ends_at_the_peak(name: str) -> None:
    schedule = make(name, warmup_steps=8)
    rates = [schedule.learning_rate(k) for k in range(8)]
    assert rates == pytest.approx([3e-3 * (k + 1) / 8 for k in range(8)])
    assert 0 < rates[0] < 3e-3
    assert rates[-1] == 3e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_t02_the_last_update_is_one_step_above_the_final_rate(name: str) -> None:
    schedule = make(name, total=1000, warmup_steps=10, min_lr_ratio=0.02)
    last, before = schedule.learning_rate(999), schedule.learning_rate(998)
    assert schedule.final == pytest.approx(0.02 * 3e-3)
    assert schedule.final < last < before
    assert last - schedule.final <= 3e-3 / 150


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_positive_finite_and_never_above_the_peak(name: str) -> None:
    for total in (1, 2, 3, 7, 50):
        for warmup in (0, 1, 3, 50, 80):
            schedule = make(name, total, warmup_steps=warmup)
            rates = [schedule.learning_rate(k) for k in range(total)]
            assert all(math.isfinite(rate) and 0 < rate <= 3e-3 * (1 + 1e-12) for rate in rates)


@pytest.mark.parametrize("name", NAMES)
def test_l01_rates_depend_on_the_step_alone_whatever_was_asked_before(name: str) -> None:
    first, second = make(name, warmup_steps=6), make(name, warmup_steps=6)
    forward = [(first.learning_rate(k), first.weight_decay(k), first.stage(k)) for k in range(97)]
    backward = [(second.learning_rate(k), second.weight_decay(k), second.stage(k)) for k in reversed(range(97))]
    assert forward == backward[::-1]
    state = dict(vars(first))
    first.learning_rate(50)
    assert vars(first) == state


def test_schedules_need_no_torch() -> None:
    assert "torch" not in inspect.getsource(module)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant"])
def test_weight_decay_ends_after_two_thirds_where_there_are_no_stages(name: str) -> None:
    schedule = make(name, total=99)
    assert [schedule.weight_decay(k) for k in (0, 65, 66, 98)] == [0.1, 0.1, 0.0, 0.0]
    assert schedule.boundaries() == []
    assert {schedule.stage(k) for k in range(99)} == {1}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_weight_decay_ends_where_it_is_told_to(share: float) -> None:
    for name in ("linear", "two_stage"):
        schedule = make(name, total=40, weight_decay_until=share)
        assert sum(schedule.weight_decay(k) > 0 for k in range(40)) == 40 * share


@pytest.mark.parametrize("total", [2, 3, 10, 11, 101])
def test_t19_the_boundary_is_the_floor_of_its_share(total: int) -> None:
    schedule = make("two_stage", total, warmup_steps=0)
    assert schedule.boundary == total // 2
    assert schedule.boundaries() == [total // 2]
    assert [schedule.stage(k) for k in range(total)] == [1] * (total // 2) + [2] * (total - total // 2)


def test_t04_the_published_curve_jumps_once_and_the_continuous_one_never() -> None:
    for name, jumps in (("two_stage", 1), ("two_stage_continuous", 0)):
        schedule = make(name, total=2000, warmup_steps=20, min_lr_ratio=0.02)
        rates = [schedule.learning_rate(k) for k in range(20, 2000)]
        drops = [k for k, (a, b) in enumerate(pairwise(rates), 20) if a - b > 0.05 * 3e-3]
        assert len(drops) == jumps
        assert all(a >= b for a, b in pairwise(rates))


def test_a_boundary_at_either_end_makes_no_stage_checkpoint() -> None:
    for share in (0.0, 1.0):
        assert make("two_stage", stage_boundary=share).boundaries() == []


def test_warm_up_is_a_share_of_the_run_unless_it_is_given_in_steps() -> None:
    assert make("linear", total=1000).warmup_steps == 20
    assert make("linear", total=1000, warmup_fraction="10%").warmup_steps == 100
    assert make("linear", total=1000, warmup_steps=7).warmup_steps == 7
    assert make("linear", total=5, warmup_steps=70).warmup_steps == 5


@pytest.mark.parametrize(
    "values",
    [
        {"name": "exponential"},
        {"warmup_steps": -1},
        {"warmup_fraction": 1.5},
        {"min_lr_ratio": -0.1},
        {"second_peak_ratio": -1},
        {"decay_fraction": 2},
        {"stage_boundary": 1.01},
        {"weight_decay_until": -0.5},
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        ScheduleSettings.from_mapping(values, "schedule")
