"""Alarms of routers: each fires on the sequence of boundary rates it is for, on no other, once until it is over."""

import json
import math
from collections.abc import Iterable, Sequence

import pytest

from ternlm.training.anomaly import Detector, Event
from ternlm.training.anomaly_settings import AnomalySettings

TARGET = 6.0


def run(rates: Iterable[float], detector: Detector | None = None, start: int = 1) -> list[Event]:
    """What is said about these rates of one stage, step by step."""
    detector = detector or Detector(AnomalySettings(), 256, (), (TARGET,))
    found = []
    for step, rate in enumerate(rates, start):
        detector.judge(step - 1, 2.0, 1.0)
        found += detector.judge_chunks(step, {"hnet/stage0/boundary_rate": rate, "hnet/stage0/ratio_loss": 1.0})
    return found


def names(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(event.name, event.step) for event in events]


def test_n11_a_router_that_stops_cutting_is_reported_after_fifty_steps() -> None:
    events = run([0.4] * 10 + [0.019] * 60)
    assert names(events) == [("router_collapse", 60)]
    assert "1.90% of all positions" in events[0].message and events[0].action == "warn"
    assert not run([0.4] * 10 + [0.021] * 60)


def test_n11_a_router_that_cuts_everywhere_is_reported_after_fifty_steps() -> None:
    assert names(run([0.5] * 5 + [0.95] * 60)) == [("router_no_compression", 55)]
    assert not run([0.5] * 5 + [0.95] * 49 + [0.9] + [0.95] * 49)


@pytest.mark.parametrize(("rate", "is_odd"), [(0.29, True), (0.31, False), (0.69, False), (0.71, True)])
def test_n11_a_first_step_far_from_one_half_is_reported(rate: float, is_odd: bool) -> None:
    assert names(run([rate, 0.5])) == ([("router_start", 1)] if is_odd else [])


def test_n11_rates_that_swing_are_reported_after_warm_up() -> None:
    swinging = [0.2 + 0.15 * (-1) ** step for step in range(450)]
    assert [name for name, _ in names(run([0.5, *swinging]))] == ["router_oscillation"]
    assert not run([0.5, *(0.2 + 0.09 * (-1) ** step for step in range(450))])
    assert not run([0.5, *swinging[:150]])


def test_n11_a_router_that_stays_far_from_its_target_is_reported() -> None:
    assert names(run([0.5] * 1200)) == [("router_stuck", 1000)]
    falling = [0.5 - 0.0001 * step for step in range(1200)]
    assert not run(falling)  # far from 1/6 still, and on its way
    assert not run([0.3] * 1200)  # N F = 1.8: not so far


def test_a_recovered_router_may_be_reported_again_and_what_is_not_finite_says_nothing() -> None:
    rates = [0.4, *[0.01] * 60, *[0.2] * 60, *[0.01] * 60]
    assert [name for name, _ in names(run(rates))] == ["router_collapse", "router_collapse"]
    assert not run([math.nan] * 60)


def test_what_the_rules_remember_is_json_and_goes_on_after_loading() -> None:
    rates = [0.4, *[0.01] * 30]
    detector = Detector(AnomalySettings(), 256, (), (TARGET,))
    assert not run(rates, detector)
    again = Detector(AnomalySettings(), 256, (), (TARGET,))
    again.load_state_dict(json.loads(json.dumps(detector.state_dict(), allow_nan=False)))
    assert names(run([0.01] * 25, again, start=32)) == names(run([0.01] * 25, detector, start=32))
    assert names(run([0.4, *[0.01] * 60]))[-1] == ("router_collapse", 51)


def test_a_new_stage_of_training_does_not_make_the_rules_forget() -> None:
    detector = Detector(AnomalySettings(), 256, (30,), (TARGET,))
    assert names(run([0.4, *[0.01] * 60], detector)) == [("router_collapse", 51)]


def test_a_new_stage_of_training_does_not_report_the_same_router_again() -> None:
    detector = Detector(AnomalySettings(), 256, (400,), (TARGET,))
    assert names(run([0.4, *[0.01] * 600], detector)) == [("router_collapse", 51)]


def test_n11_a_second_router_that_fails_while_the_first_alarm_cools_down_is_reported_afterwards() -> None:
    detector = Detector(AnomalySettings(cooldown_steps=100), 256, (), (TARGET, TARGET))
    found = []
    for step in range(1, 300):
        detector.judge(step - 1, 2.0, 1.0)
        rates = {"hnet/stage0/boundary_rate": 0.4 if step == 1 else 0.01,
                 "hnet/stage1/boundary_rate": 0.4 if step == 1 else 0.1 if step < 20 else 0.01}  # fmt: skip
        found += detector.judge_chunks(step, rates)
    assert [(event.step, event.message.split(":")[0]) for event in found] == [(51, "stage0"), (151, "stage1")]
