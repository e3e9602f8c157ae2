"""Generating many continuations in batches, and numbers that tell whether generated text is healthy.

Of one continuation: how sure the model was, how much it repeats itself, whether its bytes are text. Of many: means
and shares, which is what two models are compared by.
"""

import codecs
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

from ternlm.generation import Request, Sample, Trace, continue_all
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

AT_A_TIME = 16
"""Continuations decoded together, which bounds the memory of their states."""

_MEANS = ("mean_entropy", "mean_entropy_10", "unique_tokens", "max_repetition", "repetition_frac", "distinct_1",
          "distinct_2", "distinct_3", "seq_rep_4", "longest_run")  # fmt: skip


class Measured(NamedTuple):
    """One continuation, and what is known of it.

    Attributes:
        sample: The continuation.
        metrics: Its `mean_entropy` and `mean_entropy_10` (nats of the model's own distribution, over every position
            drawn, EOS included, and over the first ten), `repetition` and `byte_counts`.
        candidates: (id, logit) of the five largest logits at the first ten positions.
    """

    sample: Sample
    metrics: dict[str, Any]
    candidates: list[list[tuple[int, float]]]


def generate_measured(
    model: LanguageModel, tokenizer: Tokenizer, requests: Iterable[Request], batch_size: int = AT_A_TIME
) -> Iterator[Measured]:
    """Continue any number of prompts, some at a time, in their order.

    Args:
        model: Used in evaluation mode; put back as it was. The global random state is neither read nor changed.
        tokenizer: The model's.
        requests: Read as they are needed.
        batch_size: Continuations decoded together; has no effect on what is drawn.
    """
    waiting = iter(requests)
    while batch := list(islice(waiting, batch_size)):
        trace = Trace()
        samples = continue_all(model, tokenizer, batch, trace)
        for sample, entropies, top in zip(samples, trace.entropies(), trace.candidates(), strict=True):
            drawn = len(sample.ids) + sample.finished
            raw = b"".join(tokenizer.piece(index) for index in sample.ids)
            metrics = {
                "mean_entropy": _mean(entropies[:drawn]), "mean_entropy_10": _mean(entropies[: min(drawn, 10)]),
                **repetition(sample.ids), **byte_counts(raw),
            }  # fmt: skip
            yield Measured(sample, metrics, top[:drawn])


class Summary:
    """Means and shares over continuations, and how fast they came; nothing of the texts is kept."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._known: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()

    def add(self, finished: bool, metrics: Mapping[str, Any]) -> None:
        """Count one continuation.

        Args:
            finished: Whether the model ended it with EOS.
            metrics: As `Measured` has them.
        """
        for name in _MEANS:
            if metrics[name] is not None:
                self._sums[name] = self._sums.get(name, 0.0) + metrics[name]
                self._known[name] += 1
        self._totals.update({
            "samples": 1, "finished": int(finished), "tokens": metrics["total_tokens"],
            "bytes": metrics["total_bytes"], "invalid_bytes": metrics["invalid_bytes"],
            "utf8_valid": int(metrics["utf8_valid"]), "utf8_strict": int(metrics["utf8_strict"]),
        })  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values; a mean or a share of nothing is None.

        `samples`, `tokens`, `bytes`, `finished` (share that ended with EOS), `avg_generation_length` (tokens until
        EOS or the limit), `utf8_validity` (share whose bytes are UTF-8, where the last character may be cut off),
        `utf8_strict` (share where it is not), `invalid_byte_rate` (bytes of no character / bytes), the means of
        `repetition` and of the entropies over continuations that have them, `seconds` since the summary was begun,
        `tokens_per_sec` and `bytes_per_sec` (new text alone; the time includes the reading of prompts).
        """
        totals, seconds = self._totals, time.perf_counter() - self._begun
        samples, tokens, size = totals["samples"], totals["tokens"], totals["bytes"]
        return {
            "samples": samples, "tokens": tokens, "bytes": size,
            "finished": _ratio(totals["finished"], samples), "avg_generation_length": _ratio(tokens, samples),
            "utf8_validity": _ratio(totals["utf8_valid"], samples),
            "utf8_strict": _ratio(totals["utf8_strict"], samples),
            "invalid_byte_rate": _ratio(totals["invalid_bytes"], size),
            **{name: _ratio(self._sums.get(name, 0.0), self._known[name]) for name in _MEANS},
            "seconds": seconds, "tokens_per_sec": tokens / max(seconds, 1e-9),
            "bytes_per_sec": size / max(seconds, 1e-9),
        }  # fmt: skip


def repetition(ids: Sequence[int]) -> dict[str, float | None]:
    """How much a text repeats itself.

    max_repetition is the count of the most frequent token, and repetition_frac its share; distinct_n is
    distinct n-grams / n-grams; seq_rep_4 is 1 - distinct_4; longest_run the most equal tokens in a row.

    Source:
        Welleck et al. 2019, seq-rep-n (arXiv 1908.04319); Li et al. 2015, distinct-n (arXiv 1510.03055).
    """
    most = max(Counter(ids).values(), default=0)
    distinct_4 = _distinct(ids, 4)
    return {
        "total_tokens": len(ids),
        "unique_tokens": len(set(ids)),
        "max_repetition": most,
        "repetition_frac": most / len(ids) if ids else None,
        "distinct_1": _distinct(ids, 1),
        "distinct_2": _distinct(ids, 2),
        "distinct_3": _distinct(ids, 3),
        "seq_rep_4": None if distinct_4 is None else 1 - distinct_4,
        "longest_run": max((len(list(run)) for _, run in groupby(ids)), default=0),
    }


def byte_counts(raw: bytes) -> dict[str, Any]:
    """Whether bytes are UTF-8, and how many are none.

    utf8_valid allows the last character to be cut off, as a limit on the length does it; utf8_strict does not.
    invalid_bytes are those of no character, a last one that is cut off not among them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    known = len(decoder.decode(raw).encode())
    unfinished = len(decoder.getstate()[0])
    invalid = len(raw) - known - unfinished
    return {
        "total_bytes": len(raw), "utf8_valid": invalid == 0, "utf8_strict": invalid == 0 and unfinished == 0,
        "invalid_bytes": invalid,
    }  # fmt: skip


def _distinct(ids: Sequence[int], n: int) -> float | None:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
