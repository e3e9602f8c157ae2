"""How a text is read when it is scored: which tokens stand in which pass, and what the model remembers between passes.

`block`: consecutive windows, each without memory of the one before. `stream`: one row per document, the model's memory
carried from window to window through the whole of it. In both, every target of a document is scored exactly once.
Windows that overlap are left to `sliding`.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.corpus import TokenStream
from ternlm.data.loader import evaluation_batches
from ternlm.data.masking import MaskingSettings
from ternlm.data.windows import build_windows
from ternlm.errors import DataError, SettingsError
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

Protocol = Literal["block", "stream"]


class Reading(NamedTuple):
    """What one forward pass reads, on the CPU.

    Attributes:
        batch: Tokens and targets, (rows, time).
        documents: (rows, time) int64, the document that each target belongs to; None of masked windows.
        lengths: (rows,) int64, valid tokens of each row, for passes with a memory; None for passes without one.
        is_first: Whether the memory of all rows starts afresh.
    """

    batch: Batch
    documents: Tensor | None
    lengths: Tensor | None = None
    is_first: bool = True


def readings(
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    last: int,
    protocol: Protocol = "block",
    masking: MaskingSettings | None = None,
) -> Iterator[Reading]:
    """All passes of an evaluation.

    Args:
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Tokens that the model reads per row and pass.
        batch_size: Rows per pass; for ``stream`` that many documents side by side.
        last: End of the part of the stream that is scored; for ``stream`` the end of a document.
        protocol: How the text is read; of an encoder always in masked windows.
        masking: How tokens are hidden from an encoder; None for a causal model.

    Raises:
        SettingsError: The tokenizer does not suit the objective or the protocol.
        DataError: There is nothing to score.
    """
    if protocol == "stream":
        yield from _streamed(stream, tokenizer, sequence_length, batch_size, last)
        return
    ends, position = stream.document_ends, 1
    for batch in scored_batches(stream, tokenizer, sequence_length, batch_size, last, masking):
        if masking is not None:
            yield Reading(batch, None)
            continue
        places = np.arange(position, position + batch.targets.numel())  # of each target in the stream
        position += len(places)
        documents = np.searchsorted(ends, places, side="right").reshape(batch.targets.shape)
        yield Reading(batch, torch.from_numpy(documents))


def scored_batches(
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    last: int,
    masking: MaskingSettings | None = None,
) -> Iterator[Batch]:
    """The batches of an evaluation in windows, on the CPU; what is hidden in one follows from the text's identity.

    Args:
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Tokens that the model reads per window.
        batch_size: Windows per batch.
        last: End of the part of the stream that is scored.
        masking: How tokens are hidden; None for targets of a causal model.

    Raises:
        SettingsError: The tokenizer has no mask token.
        DataError: There is nothing to score.
    """
    windows = build_windows(masking, tokenizer, sequence_length, stream.eval_id)
    targets = 0
    for batch in evaluation_batches(stream, batch_size, windows, last - windows.overlap):
        targets += batch.num_targets
        if batch.num_targets:  # the last window may hold nothing but markers
            yield batch
    if not targets:
        raise DataError(f"the {stream.name} split holds only special tokens: nothing to score. Give other text.")


def end_of_whole_documents(stream: TokenStream, max_tokens: int | None) -> int:
    """One past the last token of the documents that end within so many tokens, of the first if none does."""
    if max_tokens is None or max_tokens >= len(stream):
        return len(stream)
    ends = stream.document_ends
    fitting = ends[ends <= max_tokens]
    return int(fitting[-1] if len(fitting) else ends[0])


def require_streamable(model: LanguageModel, stream: TokenStream, tokenizer: Tokenizer, last: int) -> None:
    """Refuse a model whose memory cannot hold the longest document.

    Args:
        model: Carries its memory through each document.
        stream, tokenizer: The text, and the tokenizer that made it.
        last: End of the part of the stream that is scored.

    Raises:
        SettingsError: It cannot, or it is an encoder, which has no memory.
    """
    if not model.is_causal:
        raise SettingsError(
            f"protocol 'stream' carries a memory through each document, and an encoder ('{model.settings.family}') has "
            "none. Leave --protocol out."
        )
    starts, ends = documents_within(stream, last)
    longest = int((ends - starts).max()) - (tokenizer.bos_id is not None)
    capacity = model.settings.max_position_embeddings
    if not model.is_recurrent and longest > capacity:
        raise SettingsError(
            f"protocol 'stream' reads each document as one; the longest has {longest:,} tokens and a "
            f"'{model.settings.family}' model of max_position_embeddings={capacity:,} remembers no more than these. "
            "Use --protocol block, or a recurrent family."
        )


def _streamed(
    stream: TokenStream, tokenizer: Tokenizer, sequence_length: int, batch_size: int, last: int
) -> Iterator[Reading]:
    """Documents of similar lengths side by side, the longest first; a row that has ended reads nothing more."""
    context = tokenizer.eos_id if tokenizer.bos_id is None else None
    if context is None and tokenizer.bos_id is None:
        raise SettingsError(
            f"protocol 'stream' starts each document from a marker, and tokenizer '{tokenizer.name}' has neither BOS "
            "nor EOS. Use --protocol block."
        )
    starts, ends = documents_within(stream, last)
    for rows in _groups(ends - starts, sequence_length, batch_size):
        texts = [stream.read(int(starts[row]), int(ends[row])).astype(np.int64) for row in rows]
        if context is not None:
            texts = [np.concatenate([[context], text]) for text in texts]
        yield from _side_by_side(texts, rows, sequence_length, tokenizer.bos_id)


def _side_by_side(texts: list[np.ndarray], rows: np.ndarray, width: int, bos_id: int | None) -> Iterator[Reading]:
    """Windows of `width` targets through all texts; each text begins with what is context only."""
    remaining = np.array([len(text) - 1 for text in texts])
    for start in range(0, int(remaining.max()), width):
        lengths = np.clip(remaining - start, 0, width)
        spans = torch.zeros(len(texts), int(lengths.max()) + 1, dtype=torch.int64)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            if length:
                spans[row, : length + 1] = torch.from_numpy(text[start : start + length + 1])
        valid = torch.from_numpy(lengths)
        batch = Batch.from_windows(spans, bos_id)
        targets = batch.targets.masked_fill(torch.arange(spans.shape[1] - 1) >= valid[:, None], IGNORED)
        documents = torch.from_numpy(rows)[:, None].expand_as(targets)
        yield Reading(Batch(batch.tokens, targets), documents, valid, is_first=start == 0)


def _groups(lengths: np.ndarray, sequence_length: int, batch_size: int) -> Iterator[np.ndarray]:
    """Documents that are read side by side, int64 (at most batch_size,): none needs less than half of the passes."""
    order = np.argsort(-lengths, kind="stable")
    passes = -(-lengths[order] // sequence_length)
    first = 0
    while first < len(order):
        alike = passes[first : first + batch_size] * 2 >= passes[first]
        stop = first + int(alike.sum())  # passes never rise, so these are the next ones
        yield order[first:stop]
        first = stop


def documents_within(stream: TokenStream, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each document within the part that is scored, int64 (documents,)."""
    ends = stream.document_ends
    ends = ends[ends <= last]
    return np.concatenate([[0], ends[:-1]]), ends
