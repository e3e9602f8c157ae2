"""What stands beside a model's bits per byte: models that know nothing, frequencies, or a few bytes, and compressors.

A model of bytes that is no better than the n-grams has learned spelling and no more. All numbers are bits per raw
UTF-8 byte of the same documents. Baselines of an encoder are left to `masked`.
"""

import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from ternlm.data.corpus import TokenStream
from ternlm.evaluation.ngram import NGram, bits_per_byte, count_grams
from ternlm.tokenizers import Tokenizer

ORDERS = (3, 4, 5)
TRAINING_BYTES = 1 << 25
"""The n-grams are counted on the whole documents within so many bytes of the training text: 32 MiB."""


def text_baselines(
    stream: TokenStream,
    tokenizer: Tokenizer,
    last: int,
    train: TokenStream | None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Bits per byte of simple models and compressors.

    Args:
        stream: The text, scored as whole documents.
        tokenizer: The one that made the streams.
        last: End of the part of the stream that is scored: the end of a document.
        train: The text that the counted models learn from; None if it is not there.
        check: Called now and then; may raise to stop.

    Returns:
        `uniform` (ln V nats per token), `unigram` (add-one counts of tokens), `3-gram` to `5-gram` (over bytes),
        `gzip` (level 9), `xz` (level 9, extreme); None where it cannot be known: without a training text, and where a
        tokenizer that is not lossless hides the bytes. `ngram_training_bytes`: what the n-grams were counted on.
    """
    documents = int(np.searchsorted(stream.document_ends, last, side="right"))
    raw = int(stream.document_bytes[:documents].sum())
    is_text = tokenizer.token_bytes() > 0
    seen = token_counts(stream, tokenizer.vocab_size, last=last) * is_text
    counts = None if train is None else token_counts(train, tokenizer.vocab_size)
    found: dict[str, Any] = {
        "uniform": float(seen.sum()) * math.log2(tokenizer.vocab_size) / raw,
        "unigram": None if counts is None else float(seen @ _unigram_nats(counts, is_text)) / (math.log(2) * raw),
        **{f"{order}-gram": None for order in ORDERS},
        "gzip": None,
        "xz": None,
        "ngram_training_bytes": None,
    }
    if not tokenizer.lossless:
        return found
    if train is not None:
        known = _documents_within(train, TRAINING_BYTES)
        grams = count_grams(document_texts(train, tokenizer, known), max(ORDERS), check)
        scored = count_grams(document_texts(stream, tokenizer, documents), max(ORDERS), check)[max(ORDERS)]
        for order in ORDERS:
            check()
            (found[f"{order}-gram"],) = bits_per_byte([NGram(grams, order)], scored)
        found["ngram_training_bytes"] = int(train.document_bytes[:known].sum())
    compressed = compressed_bytes(document_texts(stream, tokenizer, documents), check)
    return found | {name: 8 * size / raw for name, size in compressed.items()}


def compressed_bytes(documents: Iterator[bytes], check: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Size of the documents one after the other as files of ``gzip -9`` and ``xz -9e``."""
    gzip = zlib.compressobj(9, wbits=31)
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    sizes = {"gzip": 0, "xz": 0}
    while part := b"".join(islice(documents, 256)):
        check()
        sizes["gzip"] += len(gzip.compress(part))
        sizes["xz"] += len(xz.compress(part))
    return {"gzip": sizes["gzip"] + len(gzip.flush()), "xz": sizes["xz"] + len(xz.flush())}


def document_texts(stream: TokenStream, tokenizer: Tokenizer, documents: int) -> Iterator[bytes]:
    """The raw bytes of the first documents; for a lossless tokenizer exactly those that were prepared."""
    pieces, start = tokenizer.pieces(), 0
    for stop in stream.document_ends[:documents].tolist():
        yield b"".join(map(pieces.__getitem__, stream.read(start, stop).tolist()))
        start = stop


def unigram_bpb(stream: TokenStream, counts: np.ndarray, tokenizer: Tokenizer) -> float | None:
    """Bits per byte of a model that knows only how often each token occurs (add-one counts).

    Args:
        stream: The text to score, all of it.
        counts: Occurrences in the training text, (vocab_size,).
        tokenizer: Tells which tokens are text.
    """
    nats = _unigram_nats(counts, tokenizer.token_bytes() > 0)
    seen = token_counts(stream, tokenizer.vocab_size)
    return float((seen * nats).sum() / (math.log(2) * stream.bytes)) if stream.bytes else None


def token_counts(stream: TokenStream, vocab_size: int, chunk: int = 1 << 22, last: int | None = None) -> np.ndarray:
    """Occurrences of each token in a stream, or in its first `last` tokens, int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    stop = len(stream) if last is None else last
    for start in range(0, stop, chunk):
        part = stream.read(start, min(start + chunk, stop))
        counts += np.bincount(part, minlength=vocab_size)
    return counts


def _unigram_nats(counts: np.ndarray, is_text: np.ndarray) -> np.ndarray:
    """-ln p of each token, 0 of those that are no text, (vocab_size,)."""
    smoothed = (counts + 1.0) * is_text
    nats: np.ndarray = -np.log(np.where(is_text, smoothed / smoothed.sum(), 1.0))
    return nats


def _documents_within(stream: TokenStream, size: int) -> int:
    """How many of the first documents have at most so many bytes together, at least one."""
    return max(1, int(np.searchsorted(np.cumsum(stream.document_bytes), size, side="right")))
