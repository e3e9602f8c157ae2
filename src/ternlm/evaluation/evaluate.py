"""Loss, perplexity, bits per byte and accuracies of a model on held-out text.

Of a causal model every target of the text is scored exactly once: in consecutive windows (protocol `block`), with
its memory carried through each document (`stream`), or in windows that overlap (`sliding:k`). Of an encoder every token
lies in exactly one window, and those are scored that its mask hides (protocol `masked`), which is a pure function of
the text. Sums are float64 and weighted by tokens, so the result depends neither on the batch size nor on its order. The
weights are the quantized ones, which are the model. How a text is read is left to `protocols` and `sliding`, what is
added up to `sums`.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.corpus import TokenStream
from ternlm.data.masking import KINDS, MaskingSettings
from ternlm.errors import SettingsError, TokenizerError
from ternlm.evaluation.protocols import Protocol, Reading, end_of_whole_documents, readings, require_streamable
from ternlm.evaluation.sliding import require_sliding, sliding_readings
from ternlm.evaluation.sums import Sums
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class DocumentScores:
    """What single documents cost, in the order of the text.

    Attributes:
        nats: Of the targets that emit text, float64 (documents,).
        bytes: Raw UTF-8 bytes, int64 (documents,).
        text_id: Identity of the documents and their order: equal for every tokenizer.
        all_nats, targets: Of all targets, the ends of documents included, and how many these are; (documents,).
    """

    nats: np.ndarray
    bytes: np.ndarray
    text_id: str
    all_nats: np.ndarray | None = None
    targets: np.ndarray | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation measured.

    Attributes:
        loss: Nats per target: sum of -ln p over all targets / number of targets. EOS is a target of a causal model;
            those of an encoder are the hidden tokens.
        perplexity: exp(loss), per token of this tokenizer (`perplexity_unit`). Of an encoder it compares with
            nothing but other encoders with the same tokenizer and masking.
        bpb: Bits per UTF-8 byte of the raw text, over targets that emit text; None where bytes cannot
            be attributed (an unknown token hides text), and of an encoder, whose losses are no code of the text:
            most tokens are given, not coded.
        bpb_all: As bpb, with the nats of EOS targets added.
        accuracy, top5_accuracy, top10_accuracy: Share of targets among the 1, 5, 10 largest logits.
        n_targets, n_bytes: Targets scored, and raw bytes of the text they encode.
        tokens_per_sec: Targets per second of this evaluation; of an encoder, tokens read.
        eval_id: Identity of the scored text: prepared split and number of tokens.
        split, protocol, sequence_length, weights, dtype: How it was measured.
        wall_s: Seconds it took.
        mask_id: Of an encoder, hash of every window as the model reads it, with the kind of each position: equal
            exactly if text, windows and masks are. None of a causal model.
        mask_accuracy, random_accuracy, kept_accuracy: Of an encoder, accuracy at the targets where it reads the
            mask token, a random token, the target itself; None where there are none.
        documents: Of a causal model, what single documents cost; no part of the record.
    """

    loss: float
    perplexity: float
    perplexity_unit: str
    bpb: float | None
    bpb_all: float | None
    accuracy: float
    top5_accuracy: float
    top10_accuracy: float
    n_targets: int
    n_bytes: int | None
    tokens_per_sec: float
    eval_id: str
    split: str
    protocol: str
    sequence_length: int
    weights: str
    dtype: str
    wall_s: float
    mask_id: str | None = None
    mask_accuracy: float | None = None
    random_accuracy: float | None = None
    kept_accuracy: float | None = None
    documents: DocumentScores | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values; what only an encoder has is left out for other models."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "documents"}
        if self.mask_id is None:
            for name in ("mask_id", *(f"{kind}_accuracy" for kind in KINDS)):
                del values[name]
        return values


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int = 16,
    max_tokens: int | None = None,
    check: Callable[[], None] = lambda: None,
    masking: MaskingSettings | None = None,
    protocol: Protocol = "block",
    stride: int | None = None,
) -> EvaluationResult:
    """Score a split.

    Args:
        model: Used in evaluation mode; put back as it was.
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Tokens that the model reads per window.
        batch_size: Windows per forward pass, or documents side by side; has no effect on the result.
        max_tokens: Score only the whole documents within the first so many tokens (at least one).
        check: Called before each batch; may raise to stop.
        masking: How tokens are hidden from an encoder; None for a causal model.
        protocol: ``block``, or ``stream`` for a model whose memory holds the documents.
        stride: Instead of blocks, windows that are moved by so many targets: protocol ``sliding:k``.

    Raises:
        TokenizerError: The tokenizer's ids do not fit the model.
        SettingsError: It has no mask token, and the model is an encoder; or the model or the tokenizer does not suit
            the protocol.
        DataError: The split holds nothing to score.
    """
    if model.is_causal != (masking is None):
        raise ValueError("an encoder is scored on hidden tokens, and a causal model is not")
    require_fitting(model, tokenizer)
    if stride is not None:
        _require_sliding(model, tokenizer, protocol, sequence_length, stride)
    device = next(model.parameters()).device
    last = end_of_whole_documents(stream, max_tokens)
    if protocol == "stream":
        require_streamable(model, stream, tokenizer, last)
    scored_documents = int(np.searchsorted(stream.document_ends, last, side="right"))
    sums, masks = Sums(tokenizer, device, scored_documents), MaskDigest()
    memory: Any = None
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        passes = (
            readings(stream, tokenizer, sequence_length, batch_size, last, protocol, masking)
            if stride is None
            else sliding_readings(stream, tokenizer, sequence_length, batch_size, last, stride)
        )
        for reading in passes:
            check()
            masks.add(reading.batch)
            placed = reading.batch.to(device)
            logits, memory = _read(model, placed, reading, memory, stride is not None)
            sums.add(logits, placed, reading.documents)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    loss = sums.nll / sums.targets
    n_bytes = _text_bytes(stream, tokenizer, sums, protocol == "block" and stride is None) if masking is None else None
    bpb = sums.text_nll / (math.log(2) * n_bytes) if n_bytes else None
    return EvaluationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        perplexity_unit="masked token" if masking else "byte" if tokenizer.name == "byte" else "token",
        bpb=bpb,
        bpb_all=sums.nll / (math.log(2) * n_bytes) if n_bytes else None,
        accuracy=sums.hits[0] / sums.targets,
        top5_accuracy=sums.hits[1] / sums.targets,
        top10_accuracy=sums.hits[2] / sums.targets,
        n_targets=sums.targets,
        n_bytes=n_bytes,
        tokens_per_sec=sums.tokens / max(seconds, 1e-9),
        eval_id=hashlib.sha256(f"{stream.eval_id}|{last}".encode()).hexdigest()[:16],
        split=stream.name,
        protocol="masked" if masking is not None else protocol if stride is None else f"sliding:{stride}",
        sequence_length=sequence_length,
        weights=weights_of(model),
        dtype=str(model.compute_dtype).removeprefix("torch."),
        wall_s=seconds,
        mask_id=None if masking is None else masks.hexdigest(),
        documents=_document_scores(stream, sums) if masking is None else None,
        **(sums.accuracy_by_kind() if masking is not None else {}),
    )


class MaskDigest:
    """A hash over masked windows that does not depend on how they are batched."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, batch: Batch) -> None:
        """Count the rows of a batch in; of a causal one nothing."""
        if batch.kinds is None:
            return
        for tokens, kinds in zip(batch.tokens.numpy().astype("<i8"), batch.kinds.numpy(), strict=True):
            self._digest.update(tokens.tobytes())
            self._digest.update(kinds.tobytes())

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]


def require_fitting(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with more ids than the model knows.

    Raises:
        TokenizerError: It has.
    """
    size = model.settings.vocab_size or 0
    if tokenizer.vocab_size > size:
        raise TokenizerError(
            f"tokenizer '{tokenizer.name}' has {tokenizer.vocab_size:,} ids, the model knows {size:,}. "
            "Use the tokenizer that the model was trained with."
        )


def weights_of(model: LanguageModel) -> str:
    """What is measured: ``quantized`` weights if any layer rounds its own, else ``full``."""
    return "quantized" if any(layer.mode.weights != "none" for layer in model.bit_linears().values()) else "full"


def text_id(stream: TokenStream, documents: int) -> str:
    """Identity of the first documents of a stream: equal exactly if their bytes and their order are."""
    return hashlib.sha256(stream.document_hashes[:documents].tobytes()).hexdigest()[:16]


def _require_sliding(
    model: LanguageModel, tokenizer: Tokenizer, protocol: Protocol, sequence_length: int, stride: int
) -> None:
    if not model.is_causal:
        raise SettingsError(
            f"a stride moves windows through text that is predicted from left to right, and an encoder "
            f"('{model.settings.family}') is not. Leave --stride out."
        )
    if protocol == "stream":
        raise SettingsError(
            f"--stride {stride} moves windows, and protocol 'stream' carries its memory through whole documents "
            "instead. Leave one of them out."
        )
    require_sliding(tokenizer, sequence_length, stride)


def _read(model: LanguageModel, batch: Batch, reading: Reading, memory: Any, is_sparse: bool) -> tuple[Tensor, Any]:
    """Logits of a pass, and what the model remembers after it; of a sparse pass only those of its targets."""
    if is_sparse:
        return model(batch.tokens, scored=batch.targets != IGNORED).logits, None
    if reading.lengths is None:
        return predict(model, batch.tokens, batch.targets).logits, None
    if reading.is_first:
        memory = model.initial_state(len(batch.tokens))
    output = model(batch.tokens, memory, reading.lengths.to(batch.tokens.device))
    return output.logits, output.state


def _text_bytes(stream: TokenStream, tokenizer: Tokenizer, sums: Sums, is_block: bool) -> int | None:
    """Raw bytes of the scored text: from the tokens where they tell, else from whole documents."""
    if sums.unknown:
        return None
    if tokenizer.lossless:
        return sums.text_bytes
    whole = int(stream.document_bytes[: len(sums.by_document)].sum())
    if tokenizer.bos_id is not None or not is_block:
        return whole
    first = int(stream.read(0, 1)[0])  # without BOS the first token of a block is context only
    return whole - int(tokenizer.token_bytes()[first]) + tokenizer.prefix_bytes


def _document_scores(stream: TokenStream, sums: Sums) -> DocumentScores:
    count = len(sums.by_document)
    identity, per_document = text_id(stream, count), (sums.all_by_document, sums.targets_by_document)
    return DocumentScores(sums.by_document, stream.document_bytes[:count], identity, *per_document)
