"""The built-in corpus: the same everywhere, split without overlap, well written, as random as it says."""

import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from random import Random
from typing import NamedTuple

import pytest

from ternlm.data.stories import (
    DEFAULT_COUNTS,
    entropy_floor,
    split_of,
    stories,
    story,
    story_grammar,
    tellings,
)
from ternlm.data.story_grammar import Grammar, Reference, Rule, Slot, Telling
from ternlm.data.story_words import DESCRIPTIONS, FIELDS, WORDS
from ternlm.errors import DataError

FRESH_PROCESS = (
    "import hashlib, ternlm.data.stories as s;"
    "print(hashlib.sha256(''.join(s.stories('validation', 40)).encode()).hexdigest())"
)


class State(NamedTuple):
    """What a parse has done so far: place in the text, alternatives used, words remembered, choices made."""

    position: int
    used: Mapping[str, frozenset[int]]
    remembered: Mapping[str, tuple[Rule, int]]
    last: tuple[Rule, int] | None
    choices: tuple[int, ...]


def parses(rule: Rule, text: str, state: State) -> Iterator[State]:
    """Every way to read the text at a position as a telling of the rule."""
    used = state.used.get(rule.name, frozenset())
    for index, alternative in enumerate(rule.alternatives):
        if index in used:
            continue
        open_index = index - sum(earlier < index for earlier in used)
        taken = {**state.used, rule.name: used | {index}} if rule.once else state.used
        begun = [state._replace(used=taken, last=(rule, index), choices=(*state.choices, open_index))]
        for part in (alternative,) if isinstance(alternative, str) else alternative:
            begun = [after for before in begun for after in _read(part, text, before)]
        yield from begun


def _read(part: str | Slot | Reference, text: str, state: State) -> Iterator[State]:
    if isinstance(part, Slot):
        for after in parses(part.rule, text, state):
            assert after.last is not None
            new = {part.variable: after.last} if part.variable else {}
            yield after._replace(remembered={**after.remembered, **new})
        return
    if isinstance(part, Reference):
        rule, index = state.remembered[part.variable]
        part = rule.fields[part.field] if part.field else rule.sources[index]
    if text.startswith(part, state.position):
        yield state._replace(position=state.position + len(part))


def derivations(rule: Rule, text: str) -> list[tuple[int, ...]]:
    """The sequences of choices that tell exactly this text."""
    states = parses(rule, text, State(0, {}, {}, None, ()))
    return [state.choices for state in states if state.position == len(text)]


@pytest.fixture(scope="module")
def told() -> list[Telling]:
    """The first 20,000 tellings of the train split, in order."""
    return list(tellings("train", 20_000))


@pytest.fixture(scope="module")
def texts(told: list[Telling]) -> list[str]:
    return [telling.text for telling in told]


def test_stories_are_the_same_in_every_process_whatever_the_hash_seed() -> None:
    here = hashlib.sha256("".join(stories("validation", 40)).encode()).hexdigest()
    for seed in ("0", "1234"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        there = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here


def test_a_story_is_a_function_of_its_index() -> None:
    assert [story(index) for index in (3, 1, 3)] == [story(index) for index in (3, 1, 3)]
    assert story(1) != story(3)


def test_splits_are_disjoint_and_every_story_is_in_the_split_of_its_hash() -> None:
    parts = {split: list(stories(split, 1_500 if split == "train" else 300)) for split in DEFAULT_COUNTS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 1_500,
        "validation": 300,
        "test": 300,
    }
    assert all(split_of(text) == split for split, part in parts.items() for text in part)
    sets = [set(part) for part in parts.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_splits_get_their_share_of_the_stories() -> None:
    splits = [split_of(str(number)) for number in range(20_000)]
    shares = {split: splits.count(split) / len(splits) for split in DEFAULT_COUNTS}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)


def test_different_choices_give_different_texts_and_twenty_thousand_differ(told: list[Telling]) -> None:
    assert DEFAULT_COUNTS["train"] >= len(told) == 20_000
    assert len({tuple(telling.choices) for telling in told}) == 20_000
    assert len({telling.text for telling in told}) == 20_000


def test_a_shorter_count_is_a_prefix_of_a_longer_one() -> None:
    assert list(stories("test", 9)) == list(stories("test", 30))[:9]
    assert list(stories("test", 0)) == []


def test_an_unknown_split_or_a_negative_count_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        stories("dev")
    with pytest.raises(DataError, match="-1 stories"):
        stories("train", -1)
    with pytest.raises(DataError, match="at least one"):
        entropy_floor(count=0)


def test_the_floor_is_high_enough_and_the_same_in_every_split() -> None:
    floor = entropy_floor("validation", 500)
    assert floor.stories == 500
    assert floor.bytes == sum(len(text.encode()) for text in stories("validation", 500))
    assert 0.6 <= floor.bits_per_byte <= 0.95
    assert entropy_floor("test", 500).bits_per_byte == pytest.approx(floor.bits_per_byte, rel=0.01)


TINY = Grammar(
    words={"pet": ("cat", "ox", "emu")},
    phrases={"end": (".", "!"), "size": ("big", "old")},
    sentences={"tale": ("[A pet] and [a size] [pet:p][end]", "No [pet:p], [size] {p}.")},
    fields={},
)


def _scripted(choices: tuple[float, ...]) -> Telling:
    return Telling(TINY.rule("tale"), iter(choices).__next__)


def test_bits_are_the_sum_of_the_choice_entropies_of_a_small_grammar() -> None:
    # tale 1 of 2, pet 1 of 3, size 1 of 2, pet 1 of the 2 left, end 1 of 2; then the second tale.
    first = _scripted((0.0, 0.9, 0.5, 0.5, 0.99))
    assert (first.text, first.choices) == ("An emu and an old ox!", [0, 2, 1, 1, 1])
    assert first.bits == pytest.approx(1 + math.log2(3) + 1 + 1 + 1)
    second = _scripted((0.5, 0.0, 0.0))
    assert second.text == "No cat, big cat."
    assert second.bits == pytest.approx(1 + math.log2(3) + 1)


def test_the_probabilities_of_all_texts_of_a_small_grammar_sum_to_one() -> None:
    grid = [index / 6 + 1 / 12 for index in range(6)]
    seen: dict[str, float] = {}
    for choices in product(grid, repeat=5):
        telling = _scripted(choices)
        assert seen.setdefault(telling.text, telling.bits) == telling.bits
    assert len(seen) == 3 * 2 * 2 * 2 + 3 * 2
    assert sum(2.0**-bits for bits in seen.values()) == pytest.approx(1.0)


def test_a_word_is_not_used_twice_in_a_telling_and_an_exhausted_list_is_not_silent() -> None:
    grammar = Grammar({"w": ("x", "y")}, {}, {"two": ("[w][w]",), "three": ("[w][w][w]",)})
    assert {Telling(grammar.rule("two"), Random(seed).random).text for seed in range(30)} == {"xy", "yx"}
    with pytest.raises(IndexError):
        Telling(grammar.rule("three"), Random(0).random)


def test_a_grammar_with_invisible_choices_or_missing_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats an alternative"):
        Grammar({"w": ("x", "x")}, {}, {})
    with pytest.raises(ValueError, match="share a name"):
        Grammar({"w": ("x",)}, {"w": ("y",)}, {})
    with pytest.raises(KeyError):
        Grammar({}, {}, {"s": ("[nobody]",)})


def test_the_parser_of_these_tests_finds_both_readings_of_an_ambiguous_text() -> None:
    grammar = Grammar({}, {"a": ("", "x"), "b": ("x", "xx")}, {"s": ("[a][b]",)})
    assert sorted(derivations(grammar.rule("s"), "xx")) == [(0, 0, 1), (0, 1, 0)]


def test_every_story_can_be_read_in_one_way_only(told: list[Telling]) -> None:
    rule = story_grammar().rule("story")
    for telling in told[:150]:
        assert derivations(rule, telling.text) == [tuple(telling.choices)]


def test_no_alternative_of_a_rule_begins_another_word_of_the_same_list() -> None:
    for name, words in {**WORDS, **DESCRIPTIONS}.items():
        prefixes = [(a, b) for a in words for b in words if a != b and f"{b} ".startswith(f"{a} ")]
        assert not prefixes, name


def test_stories_are_ascii_of_the_promised_size_and_shape(texts: list[str]) -> None:
    for text in texts[:2_000]:
        assert text.isascii() and text.endswith("\n") and not text.endswith("\n\n")
        assert 300 <= len(text) <= 1_000
        assert 2 <= text.count("\n\n") + 1 <= 4
        assert text.count('"') % 2 == 0
        assert len(re.findall(r"[.!?]", text)) >= 5


def test_stories_have_no_stray_marks_or_spaces(texts: list[str]) -> None:
    stray = re.compile(r"  | \n|\n |\n\n\n|[\[\]{}|~_^]| [.,!?]|[.,!?][.,!?]|,\w|[a-z]\.[A-Za-z]")
    for text in texts[:2_000]:
        assert not stray.search(text), text


def test_articles_fit_the_next_word(texts: list[str]) -> None:
    wrong = re.compile(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]")
    for text in texts[:2_000]:
        assert not wrong.search(text), text
    # The grammar goes by the letter, so no word may sound otherwise.
    for words in {**WORDS, **DESCRIPTIONS}.values():
        assert not [word for word in words if re.match(r"(uni|use|usu|eu|one|hour|honest|heir)", word)]


def test_sentences_begin_with_a_capital_and_only_names_have_one_inside(texts: list[str]) -> None:
    names = {*WORDS["girl"], *WORDS["boy"], "I"}
    for text in texts[:2_000]:
        assert not re.search(r'(?:^|\n|[.!?] )"?[^A-Z"\n]', text), text
        inside = re.findall(r"(?<=[a-z0-9,] )[A-Z]\w*", text)
        assert set(inside) <= names, set(inside) - names


def test_the_hero_keeps_one_name_and_one_pronoun(texts: list[str]) -> None:
    for text in texts[:1_000]:
        opening, _, rest = text.partition("\n\n")
        names = set(re.findall(r"\w+", opening)) & {*WORDS["girl"], *WORDS["boy"]}
        assert len(names) == 1, text
        (hero,) = names
        assert re.search(rf"\b{hero}\b", rest), text
        other = FIELDS["boy" if hero in WORDS["girl"] else "girl"]
        assert not set(re.findall(r"\w+", opening)) & {other["he"], other["He"], other["child"]}, text
