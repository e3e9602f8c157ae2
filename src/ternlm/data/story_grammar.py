"""A small text grammar: rules with slots, told choice by choice, with the exact bits each choice costs.

A rule is a list of alternatives, all equally likely. An alternative is text with slots:

    [thing]        tell the rule `thing` here            [^thing]   the same, with a capital letter
    [a thing]      the same, after "a" or "an"           [A thing]  the same, after "A" or "An"
    [thing:t]      tell it and remember the word as `t`
    {t}            the remembered word again             {h.she}    one of the fields of its word list

There are three kinds of rules. A word list and a sentence bank never give the same alternative twice in one
telling; a phrase rule may. What the rules say is left to the grammar's author.
"""

import math
import re
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

Alternatives = Mapping[str, Sequence[str]]


class Reference(NamedTuple):
    """A place in an alternative where a remembered word, or one of its fields, stands again."""

    variable: str
    field: str


class Slot(NamedTuple):
    """A place in an alternative where another rule is told; a named variable remembers its word."""

    rule: "Rule"
    variable: str


class Rule(NamedTuple):
    """A compiled rule under one mark; the forms of a rule share its name, and so share what was used already.

    Attributes:
        name: Name of the rule in the grammar.
        sources: The alternatives as written, without the mark.
        alternatives: The alternatives compiled under the mark, in the same order.
        once: Whether an alternative is used at most once in a telling.
        fields: What `{variable.field}` gives after a word of this rule was remembered.
    """

    name: str
    sources: Sequence[str]
    alternatives: Sequence[str | tuple[str | Slot | Reference, ...]]
    once: bool
    fields: Mapping[str, str]


@final
class Grammar:
    """A compiled grammar.

    Args:
        words: Word lists by name; every alternative is plain text.
        phrases: Rules whose alternatives may be drawn again and again in one telling.
        sentences: Rules whose alternatives are used at most once in a telling.
        fields: Fields of the words of a list, by the name of the list.

    Raises:
        ValueError: A rule is empty, repeats an alternative, or shares its name; a mark cannot be applied.
        KeyError: A slot names no rule.
    """

    def __init__(
        self,
        words: Alternatives,
        phrases: Alternatives,
        sentences: Alternatives,
        fields: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.sources: dict[str, Sequence[str]] = {**words, **phrases, **sentences}
        if len(self.sources) != len(words) + len(phrases) + len(sentences):
            raise ValueError("two rules of the grammar share a name. Rename one of them.")
        self._phrases = frozenset(phrases)
        self._fields = fields or {}
        self._compiled: dict[tuple[str, str], Rule] = {}
        for name in self.sources:
            self.rule(name)

    def rule(self, name: str, mark: str = "") -> Rule:
        """The rule of that name, compiled under a mark: "", "^", "a" or "A"."""
        if (name, mark) not in self._compiled:
            sources = self.sources[name]
            if not sources or len(set(sources)) != len(sources):
                raise ValueError(f"rule '{name}' is empty or repeats an alternative. Make its choices differ.")
            alternatives = [self._compile(source, mark) for source in sources]
            once = name not in self._phrases
            self._compiled[name, mark] = Rule(name, sources, alternatives, once, self._fields.get(name, {}))
        return self._compiled[name, mark]

    def _compile(self, source: str, mark: str) -> str | tuple[str | Slot | Reference, ...]:
        parts: list[str | Slot | Reference] = []
        for piece in filter(None, _PIECES.split(source)):
            outer = mark if not parts else ""
            if slot := _SLOT.fullmatch(piece):
                if outer and slot["mark"]:
                    raise ValueError(f"'{source}' begins with a marked slot and is told with a mark. Drop one.")
                inner = self.rule(slot["rule"], slot["mark"].strip() or outer)
                parts.append(Slot(inner, slot["variable"] or ""))
            elif reference := _REFERENCE.fullmatch(piece):
                if outer:
                    raise ValueError(f"'{source}' begins with a reference, which takes no mark. Use a field.")
                parts.append(Reference(reference["variable"], reference["field"] or ""))
            else:
                parts.append(_marked(piece, outer))
        if not parts:
            return ""
        return parts[0] if len(parts) == 1 and isinstance(parts[0], str) else tuple(parts)


@final
class Telling:
    """One text told by a grammar.

    Args:
        rule: The rule to tell.
        random: Source of uniform numbers in [0, 1).

    Attributes:
        text: The text.
        bits: Sum over all choices of log2(number of alternatives that were open), that is -log2 of the
            probability of this sequence of choices.
        choices: The sequence of choices, each one the index among the alternatives that were open.
    """

    def __init__(self, rule: Rule, random: Callable[[], float]) -> None:
        self.bits = 0.0
        self.choices: list[int] = []
        self._random = random
        self._used: dict[str, list[int]] = {}
        self._remembered: dict[str, tuple[Rule, int]] = {}
        self._parts: list[str] = []
        self._tell(rule)
        self.text = "".join(self._parts)

    def choose(self, rule: Rule) -> int:
        """Choose an alternative of a rule uniformly among those open; every random decision is made here."""
        left = len(rule.alternatives)
        if not rule.once:
            choice = int(self._random() * left)
            self.bits += _LOG2[left]
            self.choices.append(choice)
            return choice
        used = self._used.setdefault(rule.name, [])
        left -= len(used)
        choice = int(self._random() * left)
        self.bits += _LOG2[left]
        self.choices.append(choice)
        for index in used:
            if index <= choice:
                choice += 1
        insort(used, choice)
        return choice

    def _tell(self, rule: Rule) -> tuple[Rule, int]:
        index = self.choose(rule)
        alternative = rule.alternatives[index]
        word = (rule, index)
        if isinstance(alternative, str):
            self._parts.append(alternative)
            return word
        for part in alternative:
            if isinstance(part, str):
                self._parts.append(part)
            elif isinstance(part, Slot):
                word = self._tell(part.rule)
                if part.variable:
                    self._remembered[part.variable] = word
            else:
                source, position = self._remembered[part.variable]
                self._parts.append(source.fields[part.field] if part.field else source.sources[position])
        return word


_LOG2 = [0.0, *(math.log2(count) for count in range(1, 1025))]
_PIECES = re.compile(r"(\[[^]]*\]|\{[^}]*\})")
_SLOT = re.compile(r"\[(?P<mark>\^|a |A |)(?P<rule>\w+)(?::(?P<variable>\w+))?\]")
_REFERENCE = re.compile(r"\{(?P<variable>\w+)(?:\.(?P<field>\w+))?\}")


def _marked(text: str, mark: str) -> str:
    """Text under a mark; the grammar's words spell "an" exactly before a vowel letter."""
    if mark == "^":
        return text[:1].upper() + text[1:]
    if mark:
        return f"{mark}n {text}" if text[:1] in "aeiou" else f"{mark} {text}"
    return text
