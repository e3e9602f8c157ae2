"""Rules for anomalies: each cause raises its event and no other, just below the threshold nothing is said."""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ternlm.errors import SettingsError
from ternlm.training.anomaly import Detector, Event, Verdict
from ternlm.training.anomaly_settings import AnomalySettings

NAN, INF = math.nan, math.inf
SPREAD = 1.4826 * 0.1
"""Spread of `calm`, in nats for the loss and in units of the norm."""


def calm(steps: int, middle: float = 3.0, deviation: float = 0.1) -> list[float]:
    """Values on both sides of their median, all at the same distance."""
    return [middle + deviation * (-1) ** step for step in range(steps)]


def make(boundaries: Sequence[int] = (), vocab_size: int = 256, **changes: Any) -> Detector:
    return Detector(AnomalySettings.from_mapping(changes, "anomaly"), vocab_size, boundaries)


def drive(
    detector: Detector, losses: Iterable[float], norms: Iterable[float] = repeat(1.0), start: int = 0
) -> list[Verdict]:
    """Verdicts about steps `start`, `start + 1` and so on."""
    pairs = zip(losses, norms, strict=False)
    return [detector.judge(step, loss, norm) for step, (loss, norm) in enumerate(pairs, start)]


def settled(boundaries: Sequence[int] = (), steps: int = 128, **changes: Any) -> Detector:
    """A detector that has seen calm steps and said nothing."""
    detector = make(boundaries, **changes)
    assert not events(drive(detector, calm(steps), calm(steps, 1.0)))
    return detector


def events(verdicts: Iterable[Verdict]) -> list[tuple[str, int, str]]:
    return [(event.name, event.step, event.action) for verdict in verdicts for event in verdict.events]


def names(found: Iterable[Event]) -> list[str]:
    return [event.name for event in found]


# Numbers that are not finite


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_l04_a_loss_that_is_not_finite_skips_the_update(value: float) -> None:
    verdict = settled().judge(128, value, NAN)
    assert verdict.action == "skip"
    assert events([verdict]) == [("nan_inf_loss", 128, "skip")]
    assert "skipped" in verdict.events[0].message


@pytest.mark.parametrize("value", [NAN, INF])
def test_l04_a_gradient_that_is_not_finite_skips_the_update(value: float) -> None:
    assert events([settled().judge(128, 3.0, value)]) == [("nan_inf_grad", 128, "skip")]


def test_non_finite_numbers_are_seen_from_the_first_step_and_huge_finite_ones_are_none() -> None:
    assert make().judge(0, NAN, 1.0).action == "skip"
    assert make().judge(0, 1e30, 1e30) == Verdict("update", [])


def test_the_third_non_finite_step_in_a_row_rolls_back_and_two_in_a_row_do_not() -> None:
    detector = settled()
    actions = [verdict.action for verdict in drive(detector, [NAN, NAN, 3.0, NAN, NAN, 3.0], start=128)]
    assert actions == ["skip", "skip", "update"] * 2
    assert events(drive(detector, [NAN, NAN, NAN], start=134))[-1] == ("nan_inf_loss", 136, "roll_back")


@pytest.mark.parametrize(("distance", "expected"), [(110, "roll_back"), (112, "skip")])
def test_the_tenth_non_finite_step_within_a_thousand_rolls_back(distance: int, expected: str) -> None:
    detector = make()
    steps = 9 * distance + 1
    verdicts = drive(detector, [NAN if step % distance == 0 else 3.0 for step in range(steps)])
    bad = [verdict.action for verdict in verdicts[::distance]]
    assert bad == ["skip"] * 9 + [expected]


# Spikes


@pytest.mark.parametrize(("scales", "expected"), [(5.0, []), (5.9, []), (6.1, ["loss_spike"])])
def test_a_loss_six_spreads_above_the_median_is_a_spike_and_the_step_is_kept(
    scales: float, expected: list[str]
) -> None:
    verdict = settled().judge(128, 3.0 + scales * SPREAD, 1.0)
    assert names(verdict.events) == expected
    assert verdict.action == "update"


@pytest.mark.parametrize(("loss", "expected"), [(5.7, []), (6.3, ["loss_spike"])])
def test_a_loss_above_twice_its_average_is_a_spike_however_wide_the_spread(loss: float, expected: list[str]) -> None:
    detector = make()
    drive(detector, calm(128, 3.0, 2.0))
    assert names(detector.judge(128, loss, 1.0).events) == expected


@pytest.mark.parametrize(("scales", "expected"), [(5.0, "update"), (5.9, "update"), (6.1, "skip")])
def test_a_gradient_norm_six_spreads_above_the_median_skips_the_update(scales: float, expected: str) -> None:
    verdict = settled().judge(128, 3.0, 1.0 + scales * SPREAD)
    assert verdict.action == expected
    assert events([verdict]) == ([("grad_spike", 128, "skip")] if expected == "skip" else [])


def test_a_gradient_spike_is_reported_but_not_skipped_where_the_settings_say_so() -> None:
    verdict = settled(grad_spike="keep").judge(128, 3.0, 9.0)
    assert verdict.action == "update"
    assert events([verdict]) == [("grad_spike", 128, "update")]


def test_a_spike_of_loss_and_gradient_is_two_events_and_the_stronger_decision() -> None:
    verdict = settled().judge(128, 4.5, 9.0)
    assert events([verdict]) == [("loss_spike", 128, "update"), ("grad_spike", 128, "skip")]
    assert verdict.action == "skip"


def test_the_statistics_are_silent_below_64_values() -> None:
    assert not names(settled(steps=63).judge(63, 5.5, 9.0).events)
    assert names(settled(steps=64).judge(64, 5.5, 9.0).events) == ["loss_spike", "grad_spike"]


@pytest.mark.parametrize("growth", [lambda step: 0.01 * (step + 1), lambda step: 0.01 * 1.011**step])
def test_a_gradient_norm_that_grows_while_the_rate_warms_up_is_no_spike(growth: Any) -> None:
    assert not events(drive(make(), calm(600), (growth(step) for step in range(600))))


def test_a_flat_loss_does_not_alarm_at_a_percent() -> None:
    detector = make()
    drive(detector, [2.0] * 128)
    assert not names(detector.judge(128, 2.05, 1.0).events)
    assert names(detector.judge(129, 2.07, 1.0).events) == ["loss_spike"]


def test_a_falling_loss_and_a_rising_one_within_the_noise_are_silent() -> None:
    falling = [5.5 * 0.995**step + 1.5 + 0.1 * (-1) ** step for step in range(1000)]
    assert not events(drive(make(), falling))
    assert not events(drive(make(), [3.0 + 0.0003 * step + 0.05 * (-1) ** step for step in range(1000)]))


def test_l05_a_spike_right_after_nan_or_after_a_spike_is_still_seen() -> None:
    detector = settled(cooldown_steps=1)
    found = events(drive(detector, [NAN, 5.0, NAN, NAN, 5.0, 5.0], start=128))
    assert [(name, step) for name, step, _ in found] == [
        ("nan_inf_loss", 128), ("loss_spike", 129), ("nan_inf_loss", 130), ("nan_inf_loss", 131),
        ("loss_spike", 132), ("loss_spike", 133),
    ]  # fmt: skip


def test_l05_neither_spikes_nor_non_finite_values_enter_the_statistics() -> None:
    detector = settled()
    before = detector.state_dict()["books"]
    drive(detector, [NAN, 5.0, 3.0, INF, 50.0], [1.0, 9.0, NAN, INF, 1e9], start=128)
    after = detector.state_dict()["books"]
    for level in ("loss", "grad_norm"):
        assert (after[level]["values"], after[level]["average"]) == (before[level]["values"], before[level]["average"])


def test_a_gradient_norm_that_rises_for_good_is_skipped_ten_times_and_then_becomes_normal() -> None:
    detector = settled()
    verdicts = drive(detector, calm(300), calm(300, 5.0), start=128)
    assert [verdict.action for verdict in verdicts[:11]] == ["skip"] * 10 + ["update"]
    assert not [verdict for verdict in verdicts[11:] if verdict.action == "skip"]
    assert not events(verdicts[150:])
    assert names(detector.judge(428, 3.0, 9.0).events) == ["grad_spike"], "against the new level"


def test_ten_spikes_are_allowed_per_window_and_not_per_run() -> None:
    detector = settled()
    norms = [9.0 if step % 100 == 0 else 1.0 for step in range(3000)]
    verdicts = drive(detector, calm(3000), norms, start=128)
    assert [verdict.action for verdict in verdicts].count("skip") == 30


def test_gradient_spikes_in_a_third_of_all_steps_do_not_stop_training() -> None:
    detector = settled()
    norms = [9.0 if step % 3 == 0 else 1.0 for step in range(3000)]
    skipped = [verdict.action for verdict in drive(detector, calm(3000), norms, start=128)].count("skip")
    assert 10 <= skipped <= 300


# Divergence


def noisy(steps: int, middle: float) -> list[float]:
    """A loss whose spikes lie above 0.5 nats from its median, so that only divergence can speak."""
    return calm(steps, middle, 0.1)


def test_a_loss_half_a_nat_above_its_median_for_fifty_steps_has_diverged() -> None:
    detector = settled()
    verdicts = drive(detector, noisy(50, 3.65), start=128)
    assert events(verdicts) == [("divergence", 177, "roll_back")]
    assert verdicts[-1].action == "roll_back"


def test_forty_nine_steps_and_a_pause_have_not_diverged() -> None:
    detector = settled()
    assert not events(drive(detector, [*noisy(49, 3.65), 3.0, *noisy(49, 3.65)], start=128))


def test_harder_data_are_no_divergence() -> None:
    assert not events(drive(settled(), noisy(500, 3.3), start=128))


def test_a_jump_of_several_nats_is_a_spike_first_and_divergence_after_fifty_steps() -> None:
    found = events(drive(settled(), calm(50, 8.0), start=128))
    assert found == [("loss_spike", 128, "update"), ("divergence", 177, "roll_back")]


def test_a_slow_climb_is_compared_with_the_median_from_before_it() -> None:
    detector = settled()
    verdicts = drive(detector, [3.0 + 0.012 * step for step in range(101)], start=128)
    assert [name for name, _, _ in events(verdicts)] == ["divergence"]


def test_non_finite_steps_neither_count_for_divergence_nor_end_it() -> None:
    detector = settled(non_finite_in_a_row=99)
    losses = [*noisy(25, 3.65), NAN, NAN, *noisy(25, 3.65)]
    assert events(drive(detector, losses, start=128))[-1] == ("divergence", 179, "roll_back")


# Stages


def test_the_jump_at_a_stage_boundary_is_silent_and_the_same_jump_elsewhere_is_not() -> None:
    losses, norms = calm(250, 5.5), calm(250, 4.0)
    assert not events(drive(settled([128]), losses, norms, start=128))
    assert {name for name, _, _ in events(drive(settled(), losses, norms, start=128))} > {"grad_spike", "loss_spike"}


def test_after_the_grace_of_a_stage_the_rules_are_back_with_its_own_statistics() -> None:
    detector = settled([128])
    drive(detector, calm(199, 5.5), calm(199, 4.0), start=128)
    assert not names(detector.judge(327, 9.0, 9.0).events)
    assert names(detector.judge(328, 9.0, 9.0).events) == ["loss_spike", "grad_spike"]
    assert names(detector.judge(329, NAN, 4.0).events) == ["nan_inf_loss"]


def test_non_finite_numbers_have_no_grace() -> None:
    assert names(settled([128]).judge(128, NAN, 1.0).events) == ["nan_inf_loss"]


# Cool-down and dumps


def test_l06_a_run_of_nan_asks_for_one_dump_per_cool_down_and_reports_every_decision() -> None:
    detector = make(non_finite_in_a_row=10**6, non_finite_in_1000=10**6)
    found = [event for verdict in drive(detector, [NAN] * 250) for event in verdict.events]
    assert [event.step for event in found if event.dump] == [0, 100, 200]
    assert len(found) == 250
    assert {event.action for event in found} == {"skip"}


def test_l06_what_decides_nothing_is_reported_once_per_cool_down() -> None:
    detector = settled(steps=400, divergence_nats=100, window=2000)
    found = events(drive(detector, calm(210, 5.0), start=400))
    assert found == [("loss_spike", step, "update") for step in (400, 500, 600)]


def test_l06_one_event_cools_down_without_hushing_another() -> None:
    detector = settled()
    found = [verdict.events for verdict in drive(detector, [5.0, NAN, 3.0], [1.0, 1.0, 9.0], start=128)]
    assert [(event.name, event.dump) for group in found for event in group] == [
        ("loss_spike", True), ("nan_inf_loss", True), ("grad_spike", True),
    ]  # fmt: skip


def test_a_run_asks_for_no_more_dumps_than_allowed() -> None:
    detector = make(cooldown_steps=1, max_dumps=5, non_finite_in_a_row=10**6, non_finite_in_1000=10**6)
    found = [event.dump for verdict in drive(detector, [NAN] * 30) for event in verdict.events]
    assert found == [True] * 5 + [False] * 25
    assert detector.dumps == 5


# Roll-back


def give_up(detector: Detector, start: int) -> Verdict:
    return drive(detector, [NAN] * 3, start=start)[-1]


def test_after_three_roll_backs_in_ten_thousand_steps_the_run_stops() -> None:
    detector = make()
    for start in (1000, 3000, 9000):
        assert give_up(detector, start).action == "roll_back"
        detector.rolled_back(start - 100)
    last = give_up(detector, 10_900)
    assert last.action == "stop"
    assert "max_roll_backs=3" in last.events[0].message
    assert last.events[0].severity == "error"


def test_roll_backs_long_ago_do_not_count() -> None:
    detector = make()
    for start in (1000, 3000, 9000):
        give_up(detector, start)
        detector.rolled_back(start - 100)
    assert give_up(detector, 11_003).action == "roll_back"


def test_divergence_uses_up_the_same_allowance() -> None:
    detector = settled(max_roll_backs=0)
    assert events(drive(detector, noisy(50, 3.65), start=128)) == [("divergence", 177, "stop")]


def test_the_settings_can_ask_to_stop_at_once() -> None:
    verdict = give_up(make(action="stop"), 0)
    assert verdict.action == "stop"
    assert "anomaly.action=stop" in verdict.events[0].message


def test_a_roll_back_forgets_counts_and_cool_downs_and_keeps_the_dumps() -> None:
    detector = settled()
    give_up(detector, 128)
    detector.rolled_back(28)
    first = detector.judge(28, NAN, 1.0)
    assert first.action == "skip"
    assert first.events[0].dump
    assert (detector.dumps, detector.roll_backs) == (2, [130])


def test_a_roll_back_takes_the_statistics_of_the_step_it_goes_to() -> None:
    detector = settled()
    saved = json.loads(json.dumps(detector.state_dict(), allow_nan=False))
    drive(detector, calm(200, 4.0), start=128)
    give_up(detector, 328)
    without = make()
    without.load_state_dict(detector.state_dict())
    detector.rolled_back(128, saved)
    without.rolled_back(128)
    assert names(detector.judge(128, 4.1, 1.0).events) == ["loss_spike"]
    assert not names(without.judge(128, 4.1, 1.0).events), "silent until there is a median"


def test_counts_of_the_step_gone_back_to_are_forgotten_as_well() -> None:
    detector = settled()
    drive(detector, [NAN, NAN], start=128)
    saved = detector.state_dict()
    detector.judge(130, NAN, 1.0)
    detector.rolled_back(130, saved)
    assert [verdict.action for verdict in drive(detector, [NAN, NAN, NAN], start=130)] == ["skip", "skip", "roll_back"]


def test_a_roll_back_behind_a_boundary_crosses_it_again() -> None:
    detector = settled([128])
    saved = detector.state_dict()
    drive(detector, calm(10, 6.0), start=128)
    for then in (saved, None):
        detector.rolled_back(128, then)
        assert not events(drive(detector, calm(150, 6.0), calm(150, 4.0), start=128))
        assert detector.state_dict()["books"]["quiet_until"] == 328


# State


SMALL = {
    "window": 16, "min_values": 8, "grace_steps": 4, "cooldown_steps": 5, "divergence_steps": 4, "max_dumps": 3,
    "max_roll_backs": 2,
}  # fmt: skip

STEP = st.tuples(
    st.sampled_from([2.9, 3.0, 3.1, 3.05, 2.95, 3.3, 3.8, 9.0, NAN, INF]),
    st.sampled_from([0.9, 1.0, 1.1, 1.05, 1.4, 5.0, NAN]),
    st.sampled_from([None, None, 0.0, 0.01, 0.02, 0.5]),
)


def follow(
    detector: Detector, steps: Sequence[tuple[float, float, float | None]], first: int, saved: dict[str, Any]
) -> list[str]:
    """Everything a run with these measurements is told; after a roll-back it goes on from `saved`."""
    told = []
    for step, (loss, norm, flips) in enumerate(steps, first):
        verdict = detector.judge(step, loss, norm)
        found = list(verdict.events)
        if flips is not None:
            row = {"ternary/a/frac_zero": 1 - flips, "ternary/a/flip_rate": flips}
            found += detector.judge_ternary(step, row, 1e-3)
            sample = {"mode": "typical", "mean_entropy": flips, "repetition_frac": flips, "total_tokens": 50}
            found += detector.judge_samples(step, [sample])
        told.append(f"{verdict.action} {found}")
        if verdict.action in ("roll_back", "stop"):
            detector.rolled_back(step + 1, saved)
    return told


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(steps=st.lists(STEP, min_size=20, max_size=120), cut=st.integers(0, 119), boundary=st.integers(0, 100))
def test_a_detector_restored_anywhere_says_what_one_that_never_stopped_says(
    steps: list[tuple[float, float, float | None]], cut: int, boundary: int
) -> None:
    whole = make([boundary], **SMALL)
    saved = whole.state_dict()
    first, second = make([boundary], **SMALL), make([boundary], **SMALL)
    told = follow(first, steps[:cut], 0, saved)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    told += follow(second, steps[cut:], cut, saved)
    assert told == follow(whole, steps, 0, saved)
    assert second.state_dict() == whole.state_dict()


def test_the_state_is_a_copy_and_a_damaged_one_is_refused() -> None:
    detector = settled()
    state = detector.state_dict()
    before = json.dumps(state)
    drive(detector, calm(50, 4.0), start=128)
    assert json.dumps(state) == before
    for damaged in ({}, state | {"books": {}}, state | {"books": state["books"] | {"unknown": 1}}):
        with pytest.raises((KeyError, TypeError)):
            make().load_state_dict(damaged)


# Samples


def sample(mode: str = "typical", entropy: float = 2.0, repeated: float = 0.1, tokens: int = 50) -> dict[str, Any]:
    return {"mode": mode, "mean_entropy": entropy, "repetition_frac": repeated, "total_tokens": tokens}


def after(steps: int = 300, **changes: Any) -> Detector:
    return settled(steps=steps, **changes)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (sample(entropy=0.32), ["entropy_collapse"]),
        (sample(entropy=0.34), []),
        (sample(repeated=0.41), ["repetition_surge"]),
        (sample(repeated=0.40), []),
        (sample("greedy", 0.01, 0.9), []),
        (sample("stress", 0.01, 0.9), []),
        (sample(entropy=0.0, repeated=1.0, tokens=3), []),
    ],
)
def test_constant_or_repeated_text_is_reported_by_its_own_rule(row: dict[str, Any], expected: list[str]) -> None:
    found = after().judge_samples(300, [row, sample("greedy", 0.01, 0.9)])
    assert names(found) == expected
    assert all(event.action == "warn" and not event.dump for event in found)


def test_entropy_that_is_too_low_depends_on_the_vocabulary() -> None:
    limit = 0.1 * math.log(32_000)
    for entropy, expected in ((limit + 0.01, []), (limit - 0.01, ["entropy_collapse"])):
        assert names(after(vocab_size=32_000).judge_samples(300, [sample(entropy=entropy)])) == expected


def test_a_model_that_is_certain_because_it_knows_its_text_has_not_collapsed() -> None:
    detector = make()
    drive(detector, calm(300, 0.3, 0.01))
    assert not detector.judge_samples(300, [sample(entropy=0.2)])
    assert names(detector.judge_samples(300, [sample(entropy=0.1)])) == ["entropy_collapse"]


def test_one_odd_prompt_among_three_is_no_anomaly_and_two_are() -> None:
    odd, fine = sample(entropy=0.1, repeated=0.9), sample()
    assert not after().judge_samples(300, [odd, fine, fine])
    assert names(after().judge_samples(300, [odd, odd, fine])) == ["entropy_collapse", "repetition_surge"]


def test_samples_of_a_young_run_or_stage_are_not_judged() -> None:
    odd = [sample(entropy=0.0, repeated=1.0)]
    assert not make().judge_samples(0, odd)
    assert not after(199).judge_samples(199, odd)
    assert after(201).judge_samples(201, odd)
    detector = after(300, boundaries=[300])
    drive(detector, calm(199), start=300)
    assert not detector.judge_samples(499, odd)


# Codes


def ternary(zero: float = 0.4, flips: float | None = 0.01, matrix: str = "layers.0.mlp.down_proj") -> dict[str, Any]:
    others = {f"ternary/layers.1.{i}/frac_zero": 0.3 for i in range(3)}
    others |= {f"ternary/layers.1.{i}/flip_rate": 0.01 for i in range(3)}
    everywhere = {"ternary/all/frac_zero": 0.99, "ternary/all/flip_rate": 0.0, "ternary/all/scale": 0.0}
    return {
        f"ternary/{matrix}/frac_zero": zero,
        f"ternary/{matrix}/flip_rate": flips,
        "step": 1,
        **others,
        **everywhere,
    }


@pytest.mark.parametrize(("zero", "expected"), [(0.949, 0), (0.951, 1), (0.051, 0), (0.049, 1)])
def test_a_matrix_of_nearly_all_or_no_zeros_is_reported_once_until_it_recovers(zero: float, expected: int) -> None:
    detector = make()
    found = detector.judge_ternary(0, ternary(zero), 1e-3)
    assert names(found) == ["zero_fraction_drift"] * expected
    assert all(event.action == "warn" and "layers.0.mlp.down_proj" in event.message for event in found)
    assert not detector.judge_ternary(1000, ternary(zero), 1e-3)
    assert not detector.judge_ternary(2000, ternary(0.3), 1e-3)
    assert len(detector.judge_ternary(3000, ternary(zero), 1e-3)) == expected


def test_a_matrix_without_a_flip_for_a_thousand_steps_is_frozen() -> None:
    detector = make()
    for step in range(500, 1500, 100):
        assert not detector.judge_ternary(step, ternary(flips=0.0), 1e-3)
    assert names(detector.judge_ternary(1500, ternary(flips=0.0), 1e-3)) == ["flip_freeze"]


@pytest.mark.parametrize("interruption", [{"flips": 1e-6, "rate": 1e-3}, {"flips": 0.0, "rate": 0.0}])
def test_one_flip_or_a_learning_rate_of_zero_starts_the_thousand_again(interruption: dict[str, float]) -> None:
    detector = make()
    for step in range(0, 1900, 100):
        odd = step == 900
        flips, rate = (interruption["flips"], interruption["rate"]) if odd else (0.0, 1e-3)
        assert not detector.judge_ternary(step, ternary(flips=flips), rate)


def test_a_row_without_flips_in_between_does_not_start_the_thousand_again() -> None:
    detector = make()
    for step, flips in ((0, 0.0), (500, None), (900, 0.0)):
        assert not detector.judge_ternary(step, ternary(flips=flips), 1e-3)
    assert names(detector.judge_ternary(1000, ternary(flips=0.0), 1e-3)) == ["flip_freeze"]


@pytest.mark.parametrize(("times", "expected"), [(4.9, []), (5.1, ["flip_storm"])])
def test_five_times_the_usual_flips_are_a_storm(times: float, expected: list[str]) -> None:
    detector = make()
    for step in range(0, 2000, 100):
        assert not detector.judge_ternary(step, ternary(flips=0.01), 1e-3)
    assert names(detector.judge_ternary(2000, ternary(flips=0.01 * times), 1e-3)) == expected


def test_flips_that_grow_while_the_rate_warms_up_are_no_storm() -> None:
    detector = make()
    for step in range(60):
        assert not detector.judge_ternary(step * 100, ternary(flips=1e-4 * (step + 1) ** 1.5), 1e-4 * (step + 1))


def test_what_is_not_measured_is_not_judged() -> None:
    assert not make().judge_ternary(0, {"step": 0, "ternary/a/flip_rate": None, "ternary/a/scale": 0.1}, 1e-3)


def test_dead_codes_stop_the_run_only_if_the_loss_is_flat_and_half_of_the_matrices_are_dead() -> None:
    one, all_dead = ternary(0.99), {name: 0.99 if "zero" in name else 0.01 for name in ternary()}
    assert [event.action for event in make().judge_ternary(0, one, 1e-3, loss_is_flat=True)] == ["warn"]
    assert [event.action for event in make().judge_ternary(0, all_dead, 1e-3)] == ["warn"]
    detector = make()
    detector.judge_ternary(0, all_dead, 1e-3)
    found = detector.judge_ternary(10, all_dead, 1e-3, loss_is_flat=True)
    assert [(event.action, event.severity) for event in found] == [("stop", "error")], "cool-down or not"


# Throughput


def rates(detector: Detector, values: Iterable[float], seconds: float = 60.0, start: int = 0) -> list[Event]:
    found = []
    for number, value in enumerate(values, start):
        found += detector.judge_throughput(10 * number, value, seconds)
    return found


def test_half_the_usual_speed_for_five_minutes_is_reported_and_less_is_not() -> None:
    detector = make()
    assert not rates(detector, [1000.0] * 20)
    assert not rates(detector, [490.0] * 5, start=20), "the first interval counts from its end"
    assert names(rates(detector, [490.0], start=25)) == ["slow"]
    for values in ([510.0] * 30, [490.0, 490.0, 490.0, 490.0, 490.0, 900.0] * 3):
        detector = make()
        rates(detector, [1000.0] * 20)
        assert not rates(detector, values, start=20)


def test_slow_steps_do_not_become_usual_at_once() -> None:
    detector = make()
    rates(detector, [1000.0] * 20)
    found = rates(detector, [400.0] * 30, start=20)
    assert [event.step for event in found] == [250, 350, 450]


def test_a_long_evaluation_is_not_slow_training() -> None:
    detector = make()
    rates(detector, [1000.0] * 20)
    assert not detector.judge_throughput(200, 990.0, 3600.0)
    assert not detector.judge_throughput(210, 400.0, 3600.0)
    assert not detector.judge_throughput(220, 990.0, 10.0)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 7}, r"anomaly\.window=7"),
        ({"min_values": 200}, r"anomaly\.min_values=200 exceeds anomaly\.window=128"),
        ({"spike_scale": 0}, r"anomaly\.spike_scale=0"),
        ({"ema": 1.0}, r"anomaly\.ema=1"),
        ({"grad_spike": "ignore"}, r"anomaly\.grad_spike='ignore'"),
        ({"action": "skip"}, r"anomaly\.action='skip'"),
        ({"max_roll_backs": -1}, r"anomaly\.max_roll_backs=-1"),
        ({"slow_for": "soon"}, r"anomaly\.slow_for='soon'"),
        ({"spike_scal": 1}, r"anomaly\.spike_scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make(**changes)


def test_an_event_row_holds_what_trackers_show() -> None:
    event = settled().judge(128, NAN, 1.0).events[0]
    assert event.row() == {
        "event": "nan_inf_loss", "severity": "warning", "message": event.message, "action": "skip",
    }  # fmt: skip
