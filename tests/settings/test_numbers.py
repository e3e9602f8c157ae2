"""Numbers as people write them mean the same from YAML, JSON and the command line, and nonsense is refused."""

from collections.abc import Callable

import pytest
import yaml

from ternlm.errors import SettingsError
from ternlm.settings import Bytes, Count, Float, Seconds, Settings
from ternlm.settings.numbers import parse_bytes, parse_count, parse_duration, parse_float


class Numbers(Settings):
    count: Count = 1
    share: Float = 1.0
    size: Bytes = 1
    time: Seconds = 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2B", 2_000_000_000),
        ("1e6", 1_000_000),
        ("10_000", 10_000),
        ("300M", 300_000_000),
        ("1.5k", 1500),
        ("2.5e3", 2500),
        ("7", 7),
        ("1T", 10**12),
        ("3 M", 3_000_000),
        ("+4", 4),
        ("1E3", 1000),
    ],
)
def test_counts(text: str, value: int) -> None:
    parsed = parse_count(text)
    assert parsed == value
    assert type(parsed) is int
    assert parse_count(yaml.safe_load(text)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("25%", 0.25), (".5", 0.5), ("-2.", -2.0), ("1_0.5", 10.5), ("6.0e-3", 6e-3), ("2k", 2000.0)],
)
def test_floats(text: str, value: float) -> None:
    assert parse_float(text) == value
    assert parse_float(yaml.safe_load(text)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1e9", 10**9), ("3 kb", 3000), ("7", 7), ("1.5KiB", 1536)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("45s", 45), ("2h30m", 9000), ("1d", 86400), ("1.5h", 5400), ("1h 2m 3s", 3723), ("0.5", 0.5)],
)
def test_durations(text: str, value: float) -> None:
    assert parse_duration(text) == value


@pytest.mark.parametrize("value", ["1.5", "0.0001k", 2.5, "25%"])
def test_a_count_that_is_not_whole_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="whole"):
        parse_count(value)


@pytest.mark.parametrize("name", ["count", "share", "size", "time"])
@pytest.mark.parametrize(
    "value",
    ["", "x", "1x", "1e", "1e999", "--1", "nan", "inf", float("nan"), float("inf"), float("-inf"), True, [1], {}, None,
     "nan%", "inf%", "9" * 400, "1" * 10**5, 10**400],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused_in_one_sentence(name: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        Numbers.from_mapping({name: value}, "section")
    assert f"section.{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_numbers_already_pass_unchanged() -> None:
    numbers = Numbers.from_mapping({"count": 5, "share": 0.25, "size": 3.0, "time": 7})
    assert (numbers.count, numbers.share, numbers.size, numbers.time) == (5, 0.25, 3, 7.0)


def test_an_unknown_suffix_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="use k, M, B or T"):
        parse_float("3x")
    with pytest.raises(ValueError, match="GiB"):
        parse_bytes("3 bananas")


@pytest.mark.parametrize("parse", [parse_float, parse_count, parse_bytes])
def test_a_suffix_that_leads_beyond_all_numbers_is_refused(parse: Callable[[object], object]) -> None:
    with pytest.raises(ValueError):
        parse("9e307T" if parse is not parse_bytes else "9e307TB")


def test_what_64_bits_do_not_hold_is_no_count() -> None:
    assert parse_count(2**63 - 1) == 2**63 - 1
    for value in (2**63, "1e300", 10**5000):
        with pytest.raises(ValueError, match="2\\^63"):
            parse_count(value)
