"""From layers to one mapping: precedence, provenance, other spellings, and names that do not exist."""

from pathlib import Path

import pytest

from ternlm.errors import SettingsError
from ternlm.settings.resolve import Layer, Names, environment_overrides, parse_overrides, read_mapping, resolve

NAMES = Names(
    sections={
        "model": {"hidden_size", "num_layers", "width"},
        "optimizer": {"learning_rate", "name"},
        "schedule": {"name", "warmup_steps"},
        "training": {"seed", "compile"},
    },
    aliases={"lr": "optimizer.learning_rate", "d_model": "model.hidden_size"},
    section_aliases={"optim": "optimizer", "train": "training"},
)


def one(values: dict[str, object]) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    resolved = resolve([Layer("file", values)], NAMES)
    return resolved.values, resolved.origins


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.learning_rate",
        "optim.learning_rate",
        "learning_rate",
        "learning-rate",
        "lr",
        "optimizer.lr",
        "optim.lr",
        "optimizer.learning-rate",
    ],
)
def test_every_spelling_of_a_setting_is_the_same_setting(name: str) -> None:
    assert one({name: 3}) == ({"optimizer": {"learning_rate": 3}}, {"optimizer.learning_rate": "file"})


def test_sections_may_be_nested_or_dotted_or_renamed() -> None:
    nested = one({"optim": {"lr": 3}, "train": {"seed": 1}})
    dotted = one({"optimizer.learning_rate": 3, "training.seed": 1})
    assert nested == dotted


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rte", "optimizer.learning_rate"),
        ("optimzer.learning_rate", "optimizer.learning_rate"),
        ("model.hiden_size", "model.hidden_size"),
        ("training.sed", "training.seed"),
        ("d_modle", "model.hidden_size"),
        ("schedule.warmup", "schedule.warmup_steps"),
        ("warmup-step", "schedule.warmup_steps"),
    ],
)
def test_t12_an_unknown_name_is_an_error_with_the_nearest_one(name: str, suggestion: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting") as caught:
        one({name: 1})
    assert f"Did you mean '{suggestion}'?" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", ".", "..", "zzzzqq", "model.", ".seed", "nosuch.thing", "a.b.c.d"])
def test_t12_a_name_like_no_other_is_still_one_sentence(name: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting"):
        one({name: 1})


def test_a_bare_name_of_two_sections_is_refused_with_both() -> None:
    with pytest.raises(SettingsError, match=r"optimizer\.name or schedule\.name"):
        one({"name": "x"})


def test_an_alias_belongs_to_its_own_section_only() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'training\.lr'"):
        one({"training.lr": 1})


def test_t13_later_layers_win_and_every_value_knows_where_it_came_from() -> None:
    layers = [
        Layer("recipe demo", {"training": {"seed": 1, "compile": True}, "optimizer": {"learning_rate": 1.0}}),
        Layer("environment", {"training.seed": 2}),
        Layer("command line", {"lr": 3.0}),
        Layer("command line", {}),
    ]
    resolved = resolve(layers, NAMES)
    assert resolved.values == {
        "training": {"seed": 2, "compile": True},
        "optimizer": {"learning_rate": 3.0},
    }
    assert resolved.origins == {
        "training.seed": "environment",
        "training.compile": "recipe demo",
        "optimizer.learning_rate": "command line",
    }


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_t13_the_precedence_of_booleans_does_not_depend_on_their_value(order: tuple[bool, bool]) -> None:
    low, high = order
    resolved = resolve([Layer("file", {"compile": low}), Layer("command line", {"compile": high})], NAMES)
    assert resolved.values["training"]["compile"] is high
    assert resolve([Layer("file", {"compile": low})], NAMES).values["training"]["compile"] is low


def test_a_null_in_a_later_layer_replaces_a_value() -> None:
    resolved = resolve([Layer("file", {"seed": 3}), Layer("command line", {"seed": None})], NAMES)
    assert resolved.values["training"]["seed"] is None
    assert resolved.origins["training.seed"] == "command line"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a.b=1", {"a.b": 1}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a=none", {"a": "none"}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a=true", {"a": True}),
        ("a=1e6", {"a": "1e6"}),
        ("a=x=y", {"a": "x=y"}),
        ("a='1'", {"a": "1"}),
        ("a={b: 2}", {"a": {"b": 2}}),
        ("a=hf:x/y", {"a": "hf:x/y"}),
    ],
)
def test_assignments_are_read_as_yaml(word: str, expected: dict[str, object]) -> None:
    assert parse_overrides([word]) == expected


@pytest.mark.parametrize("word", ["seed", "=3", "a=[1", "a={", "a=!!python/name:os.system"])
def test_a_malformed_assignment_is_one_sentence(word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_overrides([word])
    assert "\n" not in str(caught.value)


def test_the_environment_names_settings_with_double_underscores() -> None:
    environment = {"TERNLM__training__seed": "5", "TERNLM__lr": "3e-4", "TERNLM_RUNS_DIR": "/x", "PATH": "/bin"}
    assert environment_overrides(environment) == {"training.seed": 5, "lr": "3e-4"}
    assert environment_overrides({}) == {}


def test_a_file_may_hold_unicode_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {source: 'é.txt'}", encoding="utf-8")
    assert read_mapping(tmp_path / "a.yaml") == {"data": {"source": "é.txt"}}
    with pytest.raises(SettingsError, match=r"nothing\.yaml"):
        read_mapping(tmp_path / "nothing.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_mapping(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: &a [*a, *a]\nb: *c", "{", "\x00", "a: b: c", "a: !!int x", "a: !!bool x", "a: !!timestamp x",
     "a: 2001-99-99", "a: " + "9" * 5000, "a: " + "x" * 2**20],
)  # fmt: skip
def test_hostile_settings_files_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("a.yaml", "a.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(SettingsError):
            read_mapping(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "training:\n  seed: 1\n  seed: 2"), ("a.json", '{"a":1,"a":2}')])
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match="occurs twice"):
        read_mapping(tmp_path / name)


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a [1, 2]\n" + "\n".join(f"b{n}: [*a, *a]" for n in range(20)))
    with pytest.raises(SettingsError, match="write the value out"):
        read_mapping(tmp_path / "a.yaml")


def test_messages_about_endless_names_and_values_are_short() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([Layer("file", {"x" * 10**6 + "\n": 1})], NAMES)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        parse_overrides(["a\n" * 10**5])
    assert len(str(caught.value)) < 400
