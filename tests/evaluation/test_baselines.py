"""n-grams against a plain reference, compressors against the library, and all of them on a small corpus."""

import gzip
import lzma
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import TRAIN, VALIDATION, tiny_corpus
from encoders import wordpiece
from ternlm.evaluation import ngram
from ternlm.evaluation.baselines import ORDERS, compressed_bytes, document_texts, text_baselines
from ternlm.evaluation.ngram import BEGIN, END, NGram, bits_per_byte, count_grams
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings

SYMBOLS = [*range(BEGIN), END]
TEXTS = [text.encode() for text in TRAIN]


class PlainNGram:
    """The same model with dictionaries, straight from the formulas of Chen & Goodman."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        raw: dict[int, Counter[tuple[int, ...]]] = {length: Counter() for length in range(2, order + 1)}
        for document in documents:
            symbols = [BEGIN] * (order - 1) + [*document, END]
            for length, counter in raw.items():
                for end in range(order - 1, len(symbols)):
                    counter[tuple(symbols[end - length + 1 : end + 1])] += 1
        self.order = order
        self.levels = []
        for length in range(1, order + 1):
            continuations = Counter(gram[1:] for gram in raw[length + 1]) if length < order else raw[order]
            self.levels.append((continuations, self._discounts(continuations), defaultdict(Counter)))
            for gram, count in continuations.items():
                self.levels[-1][2][gram[:-1]][gram[-1]] = count

    @staticmethod
    def _discounts(counts: Counter[tuple[int, ...]]) -> list[float]:
        n = [sum(value == k for value in counts.values()) for k in (1, 2, 3, 4)]
        if not all(n):
            return [0.5] * 3
        y = n[0] / (n[0] + 2 * n[1])
        return [min(max(k - (k + 1) * y * n[k] / n[k - 1], 0.05), k) for k in (1, 2, 3)]

    def probability(self, symbol: int, history: tuple[int, ...]) -> float:
        p = 1 / len(SYMBOLS)
        for length, (_, discounts, contexts) in enumerate(self.levels, start=1):
            seen: Counter[int] = contexts.get(history[len(history) - length + 1 :], Counter())
            if seen:
                freed = sum(discounts[min(count, 3) - 1] for count in seen.values())
                count = seen[symbol]
                p = (count - (discounts[min(count, 3) - 1] if count else 0) + freed * p) / sum(seen.values())
        return p


def code(symbols: tuple[int, ...]) -> int:
    return sum(symbol << 8 * age for age, symbol in enumerate(reversed(symbols)))


@pytest.mark.parametrize("order", [2, 3, 5])
def test_n_grams_are_those_of_a_plain_implementation(order: int) -> None:
    model, plain = NGram(count_grams(TEXTS, order), order), PlainNGram(TEXTS, order)
    nats, count = 0.0, 0
    for document in (text.encode() for text in VALIDATION):
        symbols = (BEGIN,) * (order - 1) + tuple(document)
        for end in range(order - 1, len(symbols)):
            history = symbols[end - order + 1 : end]
            expected = plain.probability(symbols[end], history)
            found = model.probabilities(np.array([code((*history, symbols[end]))], dtype=np.uint64))
            assert found[0] == pytest.approx(expected, rel=1e-9)
            nats, count = nats - math.log2(expected), count + 1
    scored = count_grams((text.encode() for text in VALIDATION), order)[order]
    assert bits_per_byte([model], scored) == [pytest.approx(nats / count, rel=1e-9)]


@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_probabilities_after_any_context_sum_to_one(order: int) -> None:
    model = NGram(count_grams(TEXTS, order), order)
    for context in (b"Story ", b"ed fox m", b"\x00\x01\x02\x03", b"zzq the ", bytes([BEGIN]) * 7):
        history = tuple((b"........" + context)[-(order - 1) :])
        codes = np.array([code((*history, symbol)) for symbol in SYMBOLS], dtype=np.uint64)
        found = model.probabilities(codes)
        assert found.min() > 0
        assert found.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_tiny_text_leaves_everything_possible() -> None:
    model = NGram(count_grams([b"a"], 3), 3)
    codes = np.array([code((97, 97, symbol)) for symbol in SYMBOLS], dtype=np.uint64)
    assert model.probabilities(codes).min() > 0
    assert model.probabilities(codes).sum() == pytest.approx(1.0)


def test_counting_in_parts_gives_the_same_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_grams(TEXTS, 4)
    monkeypatch.setattr(ngram, "_CHUNK", 50)
    parts = count_grams(iter(TEXTS), 4)
    for length in (2, 3, 4):
        assert np.array_equal(whole[length].codes, parts[length].codes)
        assert np.array_equal(whole[length].counts, parts[length].counts)
    assert whole[2].counts.sum() == sum(len(text) + 1 for text in TEXTS)


def test_compressors_are_those_of_the_command_line() -> None:
    raw = b"".join(TEXTS)
    sizes = compressed_bytes(iter(TEXTS))
    assert sizes == {"gzip": len(gzip.compress(raw, 9)), "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))}


def test_the_uniform_model_of_bytes_needs_exactly_eight_bits_and_longer_contexts_fewer(tmp_path: Path) -> None:
    alike = [f"Story {number}: the red fox met {number % 5} hens. And ran." for number in range(71, 78)]
    prepared = tiny_corpus(tmp_path, validation=alike)
    stream, train = prepared.corpus.split("validation"), prepared.corpus.split("train")
    found = text_baselines(stream, prepared.tokenizer, len(stream), train)
    assert found["uniform"] == 8.0
    assert 8.0 > found["unigram"] > found["3-gram"] > max(found["4-gram"], found["5-gram"])
    assert found["ngram_training_bytes"] == train.bytes == sum(map(len, TEXTS))
    model = NGram(count_grams(TEXTS, 4), 4)
    assert [found["4-gram"]] == bits_per_byte([model], count_grams([text.encode() for text in alike], 4)[4])


def test_a_limit_is_a_text_of_its_own(tmp_path: Path) -> None:
    prepared = tiny_corpus(tmp_path)
    stream, train = prepared.corpus.split("validation"), prepared.corpus.split("train")
    short = text_baselines(stream, prepared.tokenizer, int(stream.document_ends[0]), train)
    alone = tiny_corpus(tmp_path / "alone", validation=VALIDATION[:1])
    single = alone.corpus.split("validation")
    assert short == text_baselines(single, alone.tokenizer, len(single), train)


def test_without_the_training_text_only_what_needs_none_is_known(tmp_path: Path) -> None:
    prepared = tiny_corpus(tmp_path)
    stream = prepared.corpus.split("validation")
    found = text_baselines(stream, prepared.tokenizer, len(stream), None)
    assert {name for name, bits in found.items() if bits is not None} == {"uniform", "gzip", "xz"}
    assert set(found) == {"uniform", "unigram", *(f"{n}-gram" for n in ORDERS), "gzip", "xz", "ngram_training_bytes"}


def test_d11_a_tokenizer_that_hides_bytes_has_no_baselines_of_bytes(tmp_path: Path) -> None:
    wordpiece(tmp_path / "tokenizer")
    prepared = tiny_corpus(tmp_path, tokenizer=TokenizerSettings(name=str(tmp_path / "tokenizer")))
    stream, train = prepared.corpus.split("validation"), prepared.corpus.split("train")
    found: dict[str, Any] = text_baselines(stream, prepared.tokenizer, len(stream), train)
    assert found["gzip"] is found["xz"] is found["5-gram"] is None
    assert found["uniform"] > 0


@pytest.mark.parametrize("kind", ["byte", "train"])
def test_the_raw_bytes_of_documents_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    settings = TokenizerSettings(name=kind, **({"vocab_size": 300} if kind == "train" else {}))  # type: ignore[arg-type]
    prepared = tiny_corpus(tmp_path, tokenizer=settings)
    stream = prepared.corpus.split("validation")
    assert prepared.tokenizer.lossless
    assert list(document_texts(stream, prepared.tokenizer, 3)) == [text.encode() for text in VALIDATION]
    assert list(document_texts(stream, ByteTokenizer(), 0)) == []
