"""Calls that take turns: the order, what counts, and the numbers made of it."""

from functools import partial

import pytest

from ternlm.benchmark.turns import Timing, interleave, ratios, spread


def test_every_round_makes_each_call_once_in_an_order_of_its_own() -> None:
    made: list[str] = []
    calls = {name: (lambda name=name: made.append(name)) for name in "abc"}
    timings = interleave(calls, warmup=2, repeats=20)
    assert made[:6] == list("aabbcc")
    rounds = [tuple(made[start : start + 3]) for start in range(6, len(made), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 2
    counts = {name: (len(each.warmup_s), len(each.cpu_s), len(each.wall_s)) for name, each in timings.items()}
    assert counts == dict.fromkeys("abc", (2, 20, 20))


def test_the_order_follows_the_seed() -> None:
    orders = []
    for seed in (3, 3, 4):
        made: list[str] = []
        interleave({name: partial(made.append, name) for name in "abcd"}, 0, 9, seed=seed)
        orders.append(made)
    assert orders[0] == orders[1] != orders[2]


def test_a_check_that_raises_stops_before_the_next_call() -> None:
    made: list[int] = []

    def check() -> None:
        if len(made) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": lambda: made.append(1)}, 1, 50, check)
    assert len(made) == 3


def test_one_round_has_no_quartiles() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        interleave({"a": lambda: None}, 0, 1)


def test_ratios_are_taken_round_by_round() -> None:
    slow, base = Timing(cpu_s=[2.0, 9.0, 4.0]), Timing(cpu_s=[1.0, 3.0, 2.0])
    assert ratios(slow, base, "cpu") == [2.0, 3.0, 2.0]
    assert spread([2.0, 3.0, 2.0], 10) == {"median": 20.0, "low": 20.0, "high": 25.0}
