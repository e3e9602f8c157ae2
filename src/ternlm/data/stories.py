"""The built-in corpus `stories`: short English children's stories, so a first training needs no download.

Story number `index` is a pure function of its index: a seeded telling of the grammar in `story_plots` and
`story_words`. Because the grammar makes the text, the true entropy of the corpus is known exactly: see
`entropy_floor`, the bits per byte that no model can beat. The telling itself is left to `story_grammar`.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import count as count_up
from itertools import islice
from random import Random
from typing import NamedTuple

from ternlm.data.story_grammar import Grammar, Rule, Telling
from ternlm.data.story_plots import PHRASES, SENTENCES
from ternlm.data.story_words import DESCRIPTIONS, FIELDS, WORDS
from ternlm.errors import DataError

DEFAULT_COUNTS = {"train": 40_000, "validation": 1_000, "test": 1_000}
"""Stories in each split when no count is asked for."""


class EntropyFloor(NamedTuple):
    """The entropy of a split of the corpus.

    Attributes:
        bits_per_byte: Bits of choice per byte of text.
        stories: Number of stories measured.
        bytes: Their total size in bytes.
    """

    bits_per_byte: float
    stories: int
    bytes: int


def stories(split: str, count: int | None = None) -> Iterator[str]:
    """The stories of a split, in the order of their index.

    Args:
        split: "train", "validation" or "test". The splits never share a text, see `split_of`.
        count: Number of stories; by default that of `DEFAULT_COUNTS`.

    Raises:
        DataError: No such split, or a negative count.
    """
    return (telling.text for telling in tellings(split, count))


def tellings(split: str, count: int | None) -> Iterator[Telling]:
    """The stories of a split with the choices behind them and their exact bits; see `stories`."""
    if split not in DEFAULT_COUNTS:
        raise DataError(f"stories have no split '{split}'; choose one of {', '.join(DEFAULT_COUNTS)}.")
    count = DEFAULT_COUNTS[split] if count is None else count
    if count < 0:
        raise DataError(f"{count} stories cannot be told; the count is zero or more.")
    return islice((told for told in map(_telling, count_up()) if split_of(told.text) == split), count)


def story(index: int) -> str:
    """Story number `index`: ASCII, three short paragraphs, about 510 bytes, ending with a newline."""
    return _telling(index).text


def split_of(text: str) -> str:
    """The split a story belongs to, by the sha256 of its text, so that equal texts always share a split.

    One story in ten is a test story, one in ten a validation story.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "test" if bucket < 0.1 else "validation" if bucket < 0.2 else "train"


def entropy_floor(split: str = "validation", count: int | None = None) -> EntropyFloor:
    """The entropy of the corpus in bits per byte: the loss of a model that knows the generator exactly.

    floor = sum over stories and choices of -log2 p(choice) / total bytes, where each choice is uniform among
    n open alternatives and costs log2(n). Where a story ends is one of the choices. This is the entropy of
    the text, and not only of the choices, because the grammar is unambiguous: different choices give
    different texts. So no model beats the floor in expectation; on a finite sample it may by the fluctuation
    of the choices, below 1 % for a thousand stories.

    Args:
        split: The split measured.
        count: Number of stories; by default that of `DEFAULT_COUNTS`.

    Raises:
        DataError: No such split, or a count below one.
    """
    bits, total, size = 0.0, 0, 0
    for telling in tellings(split, count):
        bits, total, size = bits + telling.bits, total + 1, size + len(telling.text.encode())
    if not total:
        raise DataError(f"the entropy floor of {count} stories is undefined; ask for at least one.")
    return EntropyFloor(bits / size, total, size)


def _telling(index: int) -> Telling:
    # A string seed and random() alone are the parts of Random that stay the same across Python versions.
    return Telling(_story_rule(), Random(f"ternlm stories {index}").random)


@cache
def _story_rule() -> Rule:
    return story_grammar().rule("story")


@cache
def story_grammar() -> Grammar:
    """The grammar of the corpus."""
    return Grammar(WORDS, {**DESCRIPTIONS, **PHRASES}, SENTENCES, FIELDS)
