"""Which writing systems a corpus is written in: shares of letters, from a sample of its training text."""

import unicodedata
from collections import Counter

from ternlm.data.corpus import TokenStream
from ternlm.tokenizers.interface import Tokenizer

SAMPLED_TOKENS = 2**20
_PIECES = 16  # places of the split that a sample is taken from
_NAMES = {"CJK": "Han", "MICRO": "Greek", "FULLWIDTH": "Latin", "HALFWIDTH": "Katakana", "MODIFIER": "modifier letters"}


def script_mix(stream: TokenStream, tokenizer: Tokenizer, sampled_tokens: int = SAMPLED_TOKENS) -> dict[str, float]:
    """Shares of the writing systems among the letters and pictures of a text, largest first.

    A letter belongs to the script that its Unicode name begins with (``GREEK SMALL LETTER ALPHA``; CJK ideographs
    are Han); symbols that stand for something, emoji among them, count as ``symbols``. Digits, punctuation and
    spaces belong to no script and are not counted.

    Args:
        stream: A split.
        tokenizer: The one that made its tokens.
        sampled_tokens: Longer splits are judged by so many tokens, in pieces spread evenly over them.
    """
    counts: Counter[str] = Counter()
    for text in _sample(stream, tokenizer, sampled_tokens):
        counts.update(text)
    scripts: Counter[str] = Counter()
    for character, number in counts.items():
        script = script_of(character)
        if script is not None:
            scripts[script] += number
    total = sum(scripts.values())
    return {script: number / total for script, number in scripts.most_common()}


def script_of(character: str) -> str | None:
    """The script of a letter, ``symbols`` for pictures, None for what belongs to no script."""
    if character == "\ufffd":  # a cut-off or unreadable character is no symbol
        return None
    category = unicodedata.category(character)
    if category == "So":
        return "symbols"
    if not category.startswith("L"):
        return None
    word = unicodedata.name(character, "OTHER").partition(" ")[0].partition("-")[0]
    return _NAMES.get(word, word.capitalize())


def _sample(stream: TokenStream, tokenizer: Tokenizer, tokens: int) -> list[str]:
    if len(stream) <= tokens:
        spans = [(0, len(stream))]
    else:
        length = tokens // _PIECES
        spans = [(place * (len(stream) - length) // (_PIECES - 1), length) for place in range(_PIECES)]
    return [tokenizer.decode([int(t) for t in stream.read(start, start + length)]) for start, length in spans]
