"""Where a hierarchical model cuts text: the chunks of one text, and statistics of chunks over held-out text.

Plain data in both cases; `report` draws them.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ternlm.data.batch import Batch
from ternlm.errors import SettingsError
from ternlm.evaluation.histogram import Histogram
from ternlm.evaluation.untouched import untouched
from ternlm.generation.decode import encode_prompt
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

NEAR = 0.05
"""Distance from 0.5 below which a decision is called undecided."""

_BINS = 20

Row = dict[str, Any]


class Chunking(Protocol):
    """Where one chunking cuts, on the positions of tokens; (batch, time) each.

    Attributes:
        boundary: bool, True where a chunk begins.
        probability: float32, that of the router; NaN where this chunking has no position.
    """

    @property
    def boundary(self) -> Tensor: ...

    @property
    def probability(self) -> Tensor: ...


def require_chunks(model: LanguageModel) -> None:
    """Refuse a model that does not cut text into chunks.

    Raises:
        SettingsError: It does not.
    """
    if not has_chunks(model):
        raise SettingsError(
            f"a model of family '{model.settings.family}' does not cut text into chunks. Use a checkpoint of family "
            "'hnet', or leave --chunks out."
        )


def has_chunks(model: LanguageModel) -> bool:
    """Whether the model cuts text into chunks that it learns."""
    return hasattr(model, "chunkings")


def find_chunks(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Row:
    """The chunks of one text.

    The text is read as a prompt is, behind BOS where the tokenizer has one. BOS belongs to the first chunk and is
    neither shown nor counted.

    Args:
        model: Put back exactly as it was.
        tokenizer: The model's.
        text: At least one character.

    Returns:
        `text`, its number of `bytes`, these in `hex`, and `stages`, outermost first: for each its number `stage`,
        `chunks` with `start`, `end` (bytes), `text` (bytes of no whole character as ``\\xNN``) and the `probability`
        of the boundary at their start (None where the first one began before the text), `probability` of each byte
        (None where the stage has no position), and the statistics of `ChunkCounts.as_dict`.

    Raises:
        SettingsError: The model has no chunks, or the text is empty.
    """
    require_chunks(model)
    if not text:
        raise SettingsError("an empty text has no chunks. Give --chunks at least one character.")
    ids = encode_prompt(tokenizer, text)
    return _found(model, tokenizer, ids, len(ids) - len(tokenizer.encode(text)))


def with_separators(model: LanguageModel, tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> str:
    """A prompt and what was generated behind it, with ``│`` where a chunk begins, ``║`` where one of every stage does.

    Args:
        model: One with chunks; put back exactly as it was.
        tokenizer: The model's.
        prompt: The text that was continued.
        ids: The continuation.
    """
    read = encode_prompt(tokenizer, prompt)
    if not any(tokenizer.piece(index) for index in [*read, *ids]):
        return ""
    stages = _found(model, tokenizer, [*read, *ids], len(read) - len(tokenizer.encode(prompt)))["stages"]
    deepest = {chunk["start"] for chunk in stages[-1]["chunks"]} if len(stages) > 1 else set()
    first, *others = stages[0]["chunks"]
    return first["text"] + "".join(("║" if chunk["start"] in deepest else "│") + chunk["text"] for chunk in others)


def _found(model: LanguageModel, tokenizer: Tokenizer, ids: list[int], skipped: int) -> Row:
    """`find_chunks` of tokens of which the first few are no text."""
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with untouched(model), torch.no_grad():
        stages = _chunkings(model, tokens)
    pieces = [tokenizer.piece(index) for index in ids[skipped:]]
    rows = []
    for number, stage in enumerate(stages):
        counts = ChunkCounts(tokenizer)
        counts.add(tokens.cpu()[:, skipped:], stage.boundary.cpu()[:, skipped:], stage.probability.cpu()[:, skipped:])
        chunks = _chunks(pieces, stage.boundary[0, skipped:].tolist(), stage.probability[0, skipped:].tolist())
        rows.append({"stage": number, **chunks, **counts.as_dict()})
    raw = b"".join(pieces)
    return {"text": raw.decode("utf-8", "replace"), "bytes": len(raw), "hex": raw.hex(), "stages": rows}


@torch.no_grad()
def measure_chunks(model: LanguageModel, batches: Iterable[Batch], tokenizer: Tokenizer) -> list[Row]:
    """Statistics of the chunks of each stage, outermost first, over windows without padding.

    Args:
        model: One with chunks; put back exactly as it was.
        batches: Held-out text.
        tokenizer: The model's.

    Returns:
        For each stage its number `stage` and `ChunkCounts.as_dict`.
    """
    counts: list[ChunkCounts] = []
    with untouched(model):
        for batch in batches:
            for number, stage in enumerate(_chunkings(model, batch.tokens)):
                if number == len(counts):
                    counts.append(ChunkCounts(tokenizer))
                counts[number].add(batch.tokens.cpu(), stage.boundary.cpu(), stage.probability.cpu())
    return [{"stage": number, **each.as_dict()} for number, each in enumerate(counts)]


def chunk_statistics(model: LanguageModel, batches: Iterable[Batch], tokenizer: Tokenizer) -> dict[str, float | None]:
    """`measure_chunks` as flat numbers for a log, ``hnet/stage0/length_p50`` and so on; of a model without chunks {}.

    Args:
        model: Any; one with chunks is put back exactly as it was.
        batches: Held-out text, windows without padding.
        tokenizer: The model's.
    """
    if not has_chunks(model):
        return {}
    return {
        f"hnet/stage{row['stage']}/{name}": row[name] for row in measure_chunks(model, batches, tokenizer)
        for name in SCALARS
    }  # fmt: skip


SCALARS = (
    "bytes_per_chunk", "length_p50", "length_p90", "length_max", "whitespace_agreement", "whitespace_recall",
    "word_agreement", "word_recall",
    "near_half",
)  # fmt: skip
"""The numbers among the statistics of a stage."""


class ChunkCounts:
    """Running counts of the chunks of one stage.

    The first position of a row always begins a chunk, and says nothing of what was learned: it counts as the start
    of a chunk, but in no share. The last chunk of a row ends with it.

    Args:
        tokenizer: Tells which tokens are text, and which end in whitespace.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.pieces()
        self._is_text = torch.tensor([bool(piece) for piece in pieces])
        self._is_space = torch.tensor([piece[-1:].isspace() for piece in pieces])
        self._sizes = torch.tensor([len(piece) for piece in pieces])
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._histogram = Histogram(0.0, 1.0, _BINS)
        self._bytes = self._cuts = self._after_space = self._agreeing = self._near = self._probabilities = 0
        self._at_edges = self._words = self._found_words = 0
        self._sum = 0.0

    def add(self, tokens: Tensor, boundary: Tensor, probability: Tensor) -> None:
        """Count rows.

        Args:
            tokens: (batch, time), int64, without padding; all on the CPU.
            boundary: (batch, time), bool.
            probability: (batch, time), NaN where there is none.
        """
        starts = boundary.clone()
        starts[:, 0] = True
        chunk = starts.flatten().cumsum(0) - 1
        sizes = torch.zeros(int(chunk[-1]) + 1, dtype=torch.int64).index_add_(0, chunk, self._sizes[tokens].flatten())
        counts = torch.bincount(sizes[sizes > 0], minlength=len(self._lengths))
        counts[: len(self._lengths)] += self._lengths
        self._lengths = counts
        self._bytes += int(sizes.sum())
        self._add_places(tokens[:, :-1], tokens[:, 1:], boundary)
        p = probability[:, 1:]
        p = p[~p.isnan()]
        self._near += int(((p - 0.5).abs() < NEAR).sum())
        self._probabilities += p.numel()
        self._sum += float(p.sum(dtype=torch.float64))
        self._histogram.add(p)

    def _add_places(self, before: Tensor, here: Tensor, boundary: Tensor) -> None:
        """Count boundaries, all but the first positions', by the tokens on both sides of them."""
        cut = boundary[:, 1:] & self._is_text[before] & self._is_text[here]
        space_before, space_here = self._is_space[before], self._is_space[here]
        after_space = space_before & self._is_text[here]
        begins_word = after_space & ~space_here
        self._cuts += int(cut.sum())
        self._after_space += int(after_space.sum())
        self._agreeing += int((cut & after_space).sum())
        self._at_edges += int((cut & (space_before != space_here)).sum())
        self._words += int(begins_word.sum())
        self._found_words += int((begins_word & (boundary[:, 1:] | boundary[:, :-1])).sum())

    def as_dict(self) -> Row:
        """The statistics as JSON values; a share of nothing is None.

        `number` of chunks, `bytes_per_chunk`, `length_p50`, `length_p90` and `length_max` (bytes; the smallest length
        that so many chunks do not exceed), `lengths` (how many chunks have 0, 1, 2 ... bytes),
        `whitespace_agreement` (boundaries between two bytes of text whose first is whitespace / all of them),
        `whitespace_recall` (the same / all bytes of text behind whitespace), `word_agreement` (boundaries between
        whitespace and a word, in either order, / all of them), `word_recall` (words behind whitespace that have a
        boundary at their first byte or at the whitespace in front of it / all such words), `near_half` (share of
        probabilities within 0.05 of 0.5), `mean_probability`, and their `histogram`.
        """
        number = int(self._lengths.sum())
        return {
            "number": number,
            "bytes_per_chunk": _ratio(self._bytes, number),
            "length_p50": self._quantile(0.5), "length_p90": self._quantile(0.9), "length_max": self._quantile(1.0),
            "lengths": self._lengths.tolist(),
            "whitespace_agreement": _ratio(self._agreeing, self._cuts),
            "whitespace_recall": _ratio(self._agreeing, self._after_space),
            "word_agreement": _ratio(self._at_edges, self._cuts),
            "word_recall": _ratio(self._found_words, self._words),
            "near_half": _ratio(self._near, self._probabilities),
            "mean_probability": _ratio(self._sum, self._probabilities),
            "histogram": self._histogram.as_dict(),
        }  # fmt: skip

    def _quantile(self, share: float) -> int | None:
        cumulative = self._lengths.cumsum(0)
        if not int(self._lengths.sum()):
            return None
        wanted = math.ceil(share * int(cumulative[-1]))
        return int((cumulative < wanted).sum())


def _chunkings(model: LanguageModel, tokens: Tensor) -> Sequence[Chunking]:
    found: Sequence[Chunking] = model.chunkings(tokens)  # type: ignore[operator]
    return found


def _chunks(pieces: Sequence[bytes], boundary: Sequence[bool], probability: Sequence[float]) -> Row:
    """`chunks` and `probability` of `find_chunks`, from the pieces of text and what stands at each."""
    offsets, raw = [0], b"".join(pieces)
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    of_byte: list[float | None] = [None] * len(raw)
    for start, piece, p in zip(offsets, pieces, probability, strict=False):
        if piece and not math.isnan(p):
            of_byte[start] = round(p, 6)
    starts = sorted({0, *(offset for offset, cut in zip(offsets, boundary, strict=False) if cut and offset < len(raw))})
    chunks = [
        {
            "start": start, "end": end, "text": raw[start:end].decode("utf-8", "backslashreplace"),
            "probability": of_byte[start] if start or boundary[0] else None,
        }
        for start, end in pairwise([*starts, len(raw)])
    ]  # fmt: skip
    return {"chunks": chunks, "probability": of_byte}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
