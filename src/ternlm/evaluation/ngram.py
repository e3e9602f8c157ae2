"""Models that know the last few bytes and nothing else: n-grams over bytes with interpolated Kneser-Ney smoothing.

They are what a language model of bytes has to beat to have learned more than spelling. Symbols are the bytes of UTF-8
and an end marker; before a document stand begin markers, so no context reaches across documents. The last n symbols are
packed into one unsigned 64-bit number, the newest in the lowest byte, so that counting is sorting.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

LONGEST_ORDER = 8
BEGIN, END = 0xFE, 0xFF  # no byte of UTF-8 text
_SYMBOLS = 255  # 254 bytes and END; BEGIN is never predicted
_CHUNK = 1 << 20
_SMALLEST_DISCOUNT = 0.05  # with none, what a context has never seen would be impossible


class Grams(NamedTuple):
    """Distinct grams of one order, ascending, and how often each occurs; both (grams,)."""

    codes: np.ndarray
    counts: np.ndarray


class _Table(NamedTuple):
    """Counts of one order, discounted.

    Attributes:
        grams: Codes of distinct grams, ascending.
        kept: Count of each less its discount.
        contexts: Distinct codes of all but the newest symbol, ascending.
        totals: Sum of counts in each context.
        freed: Sum of discounts in each context.
    """

    grams: np.ndarray
    kept: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    freed: np.ndarray


class NGram:
    """p_n(s | h) = kept(h s) / total(h) + freed(h) / total(h) * p_{n-1}(s | h without its oldest symbol).

    p_0 is uniform. `kept` is the count less one of three discounts, for counts of 1, 2, and 3 or more; counts of
    lower orders are numbers of distinct symbols that come before. Probabilities after any context sum to 1.

    Args:
        grams: Of every order from 2 to n, from `count_grams`.
        order: n, at least 2.

    Source:
        Kneser & Ney 1995; the three discounts, Chen & Goodman 1999, "An empirical study of smoothing techniques".
    """

    def __init__(self, grams: Mapping[int, Grams], order: int) -> None:
        lower = [_distinct(grams[length + 1].codes & _mask(length)) for length in range(1, order)]
        self.order = order
        self._tables = [_discounted(each) for each in (*lower, grams[order])]

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """p of the newest symbol of each gram given the n - 1 before it; codes of `order` or more symbols."""
        found = np.full(len(codes), 1 / _SYMBOLS)
        for length, table in enumerate(self._tables, start=1):
            known, context = _look_up(table.contexts, (codes & _mask(length)) >> np.uint64(8))
            seen, gram = _look_up(table.grams, codes & _mask(length))
            kept = np.where(seen, table.kept[gram], 0.0)
            mixed = (kept + table.freed[context] * found) / table.totals[context]
            found = np.where(known, mixed, found)
        return found


def count_grams(documents: Iterable[bytes], order: int, check: Callable[[], None] = lambda: None) -> dict[int, Grams]:
    """Grams of all orders from 2 to `order` that end in a byte or an end marker.

    Args:
        documents: UTF-8 texts.
        order: Symbols of the longest grams, 2 to `LONGEST_ORDER`.
        check: Called between parts of the text; may raise to stop.
    """
    parts = []
    for text in _parts(documents, order):
        check()
        parts.append(_distinct(_codes(text, order)))
    grams = {order: _merged(parts)}
    for length in range(order - 1, 1, -1):
        longer = grams[length + 1]
        grams[length] = _merged([Grams(longer.codes & _mask(length), longer.counts)])
    return grams


def bits_per_byte(models: Sequence[NGram], grams: Grams) -> list[float]:
    """What each model needs for the bytes of a text; end markers are no part of it.

    Args:
        models: Of orders up to that of `grams`.
        grams: The text, counted.
    """
    is_byte = (grams.codes & np.uint64(0xFF)) != END
    codes, counts = grams.codes[is_byte], grams.counts[is_byte]
    totals = [0.0] * len(models)
    for start in range(0, len(codes), _CHUNK):
        part = slice(start, start + _CHUNK)
        for number, model in enumerate(models):
            totals[number] -= float(counts[part] @ np.log2(model.probabilities(codes[part])))
    return [total / float(counts.sum()) for total in totals]


def _parts(documents: Iterable[bytes], order: int) -> Iterable[np.ndarray]:
    """Symbols of the documents, each between its markers, in parts of about 4 MB."""
    gathered, size, begin = [], 0, bytes([BEGIN]) * (order - 1)
    for document in documents:
        gathered.append(begin + document + bytes([END]))
        size += len(gathered[-1])
        if size >= 4 * _CHUNK:
            yield np.frombuffer(b"".join(gathered), dtype=np.uint8)
            gathered, size = [], 0
    if gathered:
        yield np.frombuffer(b"".join(gathered), dtype=np.uint8)


def _codes(symbols: np.ndarray, order: int) -> np.ndarray:
    """The gram that ends at each symbol but begin markers, uint64."""
    ends = np.flatnonzero(symbols != BEGIN)
    older = (symbols[ends - age].astype(np.uint64) << np.uint64(8 * age) for age in range(order))
    return reduce(np.bitwise_or, older)


def _distinct(codes: np.ndarray) -> Grams:
    found, counts = np.unique(codes, return_counts=True)
    return Grams(found, counts.astype(np.float64))


def _merged(parts: Sequence[Grams]) -> Grams:
    if not parts:
        return Grams(np.empty(0, np.uint64), np.empty(0))
    codes, where = np.unique(np.concatenate([part.codes for part in parts]), return_inverse=True)
    return Grams(codes, np.bincount(where, np.concatenate([part.counts for part in parts])))


def _discounted(grams: Grams) -> _Table:
    codes, counts = grams
    contexts, first = np.unique(codes >> np.uint64(8), return_index=True)
    discounts = _discounts(counts)[np.minimum(counts, 3).astype(np.int64) - 1]
    totals, freed = np.add.reduceat(counts, first), np.add.reduceat(discounts, first)
    return _Table(codes, counts - discounts, contexts, totals, freed)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts of 1, 2, and 3 or more, (3,): k - (k + 1) Y n_{k+1} / n_k with Y = n_1 / (n_1 + 2 n_2).

    Where a text is so small that some n_k is zero, half of 1.
    """
    n = [float((counts == k).sum()) for k in (1, 2, 3, 4)]
    if not all(n):
        return np.full(3, 0.5)
    y = n[0] / (n[0] + 2 * n[1])
    best = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
    return np.array([min(max(value, _SMALLEST_DISCOUNT), k) for k, value in enumerate(best, start=1)])


def _look_up(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value stands in an ascending table, and where (0 if not)."""
    places = np.searchsorted(table, wanted)
    places[places == len(table)] = 0
    found = table[places] == wanted
    return found, np.where(found, places, 0)


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << 8 * length) - 1)
