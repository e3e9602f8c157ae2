"""Loss, perplexity, bits per byte and accuracies of a model on held-out text.

Of a causal model every target of the text is scored exactly once, in consecutive windows (protocol `block`). Of an
encoder every token lies in exactly one window, and those are scored that its mask hides (protocol `masked`), which
is a pure function of the text. Sums are float64 and weighted by tokens, so the result depends neither on the batch
size nor on its order. The weights are the quantized ones, which are the model.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.corpus import TokenStream
from ternlm.data.loader import evaluation_batches
from ternlm.data.masking import KINDS, MaskingSettings
from ternlm.data.windows import build_windows
from ternlm.errors import DataError, TokenizerError
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.tokenizers import Tokenizer


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

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values; what only an encoder has is left out for other models."""
        values = asdict(self)
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
) -> EvaluationResult:
    """Score a split.

    Args:
        model: Used in evaluation mode; put back as it was.
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Tokens that the model reads per window.
        batch_size: Windows per forward pass; has no effect on the result.
        max_tokens: Score only the whole documents within the first so many tokens (at least one).
        check: Called before each batch; may raise to stop.
        masking: How tokens are hidden from an encoder; None for a causal model.

    Raises:
        TokenizerError: The tokenizer's ids do not fit the model.
        SettingsError: It has no mask token, and the model is an encoder.
        DataError: The split holds nothing to score.
    """
    if model.is_causal != (masking is None):
        raise ValueError("an encoder is scored on hidden tokens, and a causal model is not")
    require_fitting(model, tokenizer)
    device = next(model.parameters()).device
    last = end_of_whole_documents(stream, max_tokens)
    sums, masks = _Sums(tokenizer, device), MaskDigest()
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        for batch in scored_batches(stream, tokenizer, sequence_length, batch_size, last, masking):
            check()
            masks.add(batch)
            placed = batch.to(device)
            sums.add(predict(model, placed.tokens, placed.targets).logits, placed)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    loss = sums.nll / sums.targets
    n_bytes = _text_bytes(stream, tokenizer, last, sums) if masking is None else None
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
        protocol="block" if masking is None else "masked",
        sequence_length=sequence_length,
        weights="quantized" if any(layer.mode.weights != "none" for layer in model.bit_linears().values()) else "full",
        dtype=str(model.compute_dtype).removeprefix("torch."),
        wall_s=seconds,
        mask_id=None if masking is None else masks.hexdigest(),
        **(sums.accuracy_by_kind() if masking is not None else {}),
    )


def scored_batches(
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    last: int,
    masking: MaskingSettings | None = None,
) -> Iterator[Batch]:
    """The batches of an evaluation, on the CPU; what is hidden in a window follows from the text's identity.

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


def unigram_bpb(stream: TokenStream, counts: np.ndarray, tokenizer: Tokenizer) -> float | None:
    """Bits per byte of a model that knows only how often each token occurs (add-one counts).

    Args:
        stream: The text to score, all of it.
        counts: Occurrences in the training text, (vocab_size,).
        tokenizer: Tells which tokens are text.
    """
    is_text = tokenizer.token_bytes() > 0
    smoothed = (counts + 1.0) * is_text
    nats = -np.log(np.where(is_text, smoothed / smoothed.sum(), 1.0))
    seen = token_counts(stream, tokenizer.vocab_size)
    return float((seen * nats).sum() / (math.log(2) * stream.bytes)) if stream.bytes else None


def token_counts(stream: TokenStream, vocab_size: int, chunk: int = 1 << 22) -> np.ndarray:
    """Occurrences of each token in a stream, int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), chunk):
        part = stream.read(start, min(start + chunk, len(stream)))
        counts += np.bincount(part, minlength=vocab_size)
    return counts


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


class _Sums:
    """Running sums over targets, in float64 on the device until they are read."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
        self._unk = tokenizer.unk_id
        self.nll = self.text_nll = 0.0
        self.targets = self.tokens = self.text_bytes = self.unknown = 0
        self.hits = [0, 0, 0]
        self.by_kind = {name: [0, 0] for name in KINDS}  # right, all

    def add(self, logits: Tensor, batch: Batch) -> None:
        scored = batch.targets != IGNORED
        wanted, logits = batch.targets[scored], (logits[scored] if logits.dim() == 3 else logits).float()
        nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
        lengths = self._token_bytes[wanted]
        # Ties count for the lowest id, as argmax does.
        own = logits.gather(1, wanted[:, None])
        ids = torch.arange(logits.shape[1], device=logits.device)
        ahead = ((logits > own) | ((logits == own) & (ids < wanted[:, None]))).sum(dim=1)
        self.nll += nll.sum().item()
        self.text_nll += nll[lengths > 0].sum().item()
        self.text_bytes += int(lengths.sum())
        self.unknown += int((wanted == self._unk).sum()) if self._unk is not None else 0
        self.targets += wanted.numel()
        self.tokens += batch.num_tokens
        if batch.kinds is not None:
            for name, kind in KINDS.items():
                of_kind = batch.kinds[scored] == kind
                self.by_kind[name][0] += int((ahead[of_kind] == 0).sum())
                self.by_kind[name][1] += int(of_kind.sum())
        self.hits = [hit + int((ahead < k).sum()) for hit, k in zip(self.hits, (1, 5, 10), strict=True)]

    def accuracy_by_kind(self) -> dict[str, float | None]:
        return {f"{name}_accuracy": right / count if count else None for name, (right, count) in self.by_kind.items()}


def end_of_whole_documents(stream: TokenStream, max_tokens: int | None) -> int:
    """One past the last token of the documents that end within so many tokens, of the first if none does."""
    if max_tokens is None or max_tokens >= len(stream):
        return len(stream)
    ends = stream.document_ends
    fitting = ends[ends <= max_tokens]
    return int(fitting[-1] if len(fitting) else ends[0])


def _text_bytes(stream: TokenStream, tokenizer: Tokenizer, last: int, sums: _Sums) -> int | None:
    """Raw bytes of the scored text: from the tokens where they tell, else from whole documents."""
    if sums.unknown:
        return None
    if tokenizer.lossless:
        return sums.text_bytes
    documents = int(np.searchsorted(stream.document_ends, last, side="right"))
    whole = int(stream.document_bytes[:documents].sum())
    if tokenizer.bos_id is not None:
        return whole
    first = int(stream.read(0, 1)[0])  # without BOS the first token is context only
    return whole - int(tokenizer.token_bytes()[first]) + tokenizer.prefix_bytes
