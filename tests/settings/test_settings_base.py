"""The base of settings: frozen, strict about names, and one sentence per mistake that names the dotted path."""

from typing import Literal

import pytest
from pydantic import ValidationError

from ternlm.errors import SettingsError
from ternlm.settings import Count, Settings


class Inner(Settings):
    size: Count = 3
    kind: Literal["a", "b"] = "a"


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    flag: bool = False


def message(values: dict[str, object], path: str = "") -> str:
    with pytest.raises(SettingsError) as caught:
        Outer.from_mapping(values, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_arrive_and_defaults_fill_the_rest() -> None:
    outer = Outer.from_mapping({"name": "x", "inner": {"size": "2k"}})
    assert (outer.name, outer.inner.size, outer.inner.kind, outer.flag) == ("x", 2000, "a", False)


def test_settings_cannot_be_changed_afterwards() -> None:
    outer = Outer.from_mapping({"name": "x"})
    with pytest.raises(ValidationError):
        outer.name = "y"
    with pytest.raises(ValidationError):
        outer.inner.size = 4


def test_t12_an_unknown_name_is_refused_with_the_nearest_at_its_own_depth() -> None:
    assert "Did you mean 'nam'" not in message({"nam": 1})
    assert message({"name": "x", "flg": True}) == "unknown setting 'flg'. Did you mean 'flag'?"
    text = message({"name": "x", "inner": {"siz": 1}}, "run")
    assert text == "unknown setting 'run.inner.siz'. Did you mean 'run.inner.size'?"


def test_t12_a_name_like_no_other_lists_what_exists() -> None:
    assert message({"name": "x", "inner": {"qqqq": 1}}) == "unknown setting 'inner.qqqq'. Known here: kind, size."


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, ["name", "required"]),
        ({"name": "x", "inner": {"kind": "c"}}, ["inner.kind='c'", "'a' or 'b'"]),
        ({"name": "x", "inner": {"size": "1.5"}}, ["inner.size='1.5'", "whole number"]),
        ({"name": 3}, ["name=3", "string"]),
        ({"name": "x", "inner": 5}, ["inner=5"]),
        ({"name": "x", "flag": "perhaps"}, ["flag='perhaps'", "boolean"]),
    ],
)
def test_a_refused_value_is_shown_with_its_rule(values: dict[str, object], parts: list[str]) -> None:
    text = message(values)
    assert all(part in text for part in parts), text


def test_none_empties_an_optional_setting_and_stays_a_choice_where_it_is_one() -> None:
    class Example(Settings):
        limit: Count | None = 3
        weights: Literal["ternary", "none"] = "ternary"

    example = Example.from_mapping({"limit": "none", "weights": "none"})
    assert example.limit is None
    assert example.weights == "none"
