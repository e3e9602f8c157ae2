"""Windows that overlap, so that most tokens are predicted from a long context: the protocol `sliding:k`.

Each document is read on its own, from its BOS (or EOS where the tokenizer has no BOS). The first window scores all of
its targets; each further one is moved by k, and scores the last k; the last one ends where the text ends, so that it
scores what is left with a full window before it. EOS is scored by a window of its own that ends there, or by the first
one if that has room, so that the windows of the text are those of a text without EOS: with k = T they are those of
lm-evaluation-harness.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.corpus import TokenStream
from ternlm.errors import SettingsError
from ternlm.evaluation.protocols import Reading, documents_within
from ternlm.tokenizers import Tokenizer


class Window(NamedTuple):
    """A part of a text: targets [start, stop) are predicted, each from what is before it from `start` on.

    Attributes:
        start, stop: Targets of the window.
        scored: How many count, the last ones.
    """

    start: int
    stop: int
    scored: int


def sliding_windows(length: int, width: int, stride: int) -> Iterator[Window]:
    """Windows in which each of `length` targets is scored exactly once.

    Args:
        length: Targets of the text.
        width: Most targets of a window, T.
        stride: Targets from the end of one window to the end of the next, k, at most T.
    """
    stop = 0
    while stop < length:
        scored = min(stride if stop else width, length - stop)
        stop += scored
        yield Window(max(0, stop - width), stop, scored)


def sliding_readings(
    stream: TokenStream, tokenizer: Tokenizer, sequence_length: int, batch_size: int, last: int, stride: int
) -> Iterator[Reading]:
    """All passes of an evaluation in sliding windows.

    Args:
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Tokens that the model reads per window, T.
        batch_size: Windows per pass.
        last: End of the part of the stream that is scored, the end of a document.
        stride: k.

    Raises:
        SettingsError: The tokenizer has no marker to start a document from, or the stride is longer than a window.
    """
    require_sliding(tokenizer, sequence_length, stride)
    windows = _windows(stream, tokenizer, sequence_length, last, stride)
    while rows := list(islice(windows, batch_size)):
        width = max(len(ids) for _, ids, _ in rows) - 1
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        documents = torch.tensor([document for document, _, _ in rows])[:, None].expand(-1, width)
        for row, (_, ids, scored) in enumerate(rows):
            read = torch.from_numpy(ids)
            tokens[row, : len(read) - 1] = read[:-1]
            targets[row, len(read) - 1 - scored : len(read) - 1] = read[len(read) - scored :]
        yield Reading(Batch(tokens, targets), documents)


def require_sliding(tokenizer: Tokenizer, sequence_length: int, stride: int) -> None:
    """Refuse a stride that leaves targets out, and a tokenizer without a marker to start a document from.

    Raises:
        SettingsError: It is, or has none.
    """
    if not 1 <= stride <= sequence_length:
        raise SettingsError(
            f"a stride of {stride:,} does not fit windows of {sequence_length:,} tokens: targets would be left out. "
            f"Give 1 to {sequence_length:,}."
        )
    start_of(tokenizer)


def start_of(tokenizer: Tokenizer) -> int:
    """The token that a text is predicted from: BOS, or EOS where there is no BOS.

    Raises:
        SettingsError: The tokenizer has neither.
    """
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None:
        raise SettingsError(
            f"sliding windows start each document from a marker, and tokenizer '{tokenizer.name}' has neither BOS nor "
            "EOS. Use --protocol block."
        )
    return start


def _windows(
    stream: TokenStream, tokenizer: Tokenizer, width: int, last: int, stride: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Of each window its document, its tokens with the one before its first target, and how many it scores."""
    starts, ends = documents_within(stream, last)
    for document, (first, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        ids = stream.read(first, end).astype(np.int64)
        if tokenizer.bos_id is None:
            ids = np.concatenate([[start_of(tokenizer)], ids])
        length = len(ids) - 1 - (tokenizer.eos_id is not None)
        windows = list(sliding_windows(length, width, stride))
        if tokenizer.eos_id is not None and length < width:
            windows = [Window(0, length + 1, length + 1)]
        elif tokenizer.eos_id is not None:
            windows.append(Window(length + 1 - width, length + 1, 1))
        for window in windows:
            yield document, ids[window.start : window.stop + 1], window.scored
