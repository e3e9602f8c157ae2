"""Loss, perplexity, bits per byte and accuracies of a causal model on held-out text.

Every target of the text is scored exactly once, in consecutive windows (protocol `block`); sums are
float64 and weighted by tokens, so the result depends neither on the batch size nor on its order.
The weights are the quantized ones, which are the model.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.data.corpus import TokenStream
from ternlm.data.loader import evaluation_batches
from ternlm.errors import TokenizerError
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation measured.

    Attributes:
        loss: Nats per target: sum of -ln p over all targets / number of targets. EOS is a target.
        perplexity: exp(loss), per token of this tokenizer (`perplexity_unit`).
        bpb: Bits per UTF-8 byte of the raw text, over targets that emit text; None where bytes cannot
            be attributed (an unknown token hides text).
        bpb_all: As bpb, with the nats of EOS targets added.
        accuracy, top5_accuracy, top10_accuracy: Share of targets among the 1, 5, 10 largest logits.
        n_targets, n_bytes: Targets scored, and raw bytes of the text they encode.
        tokens_per_sec: Targets per second of this evaluation.
        eval_id: Identity of the scored text: prepared split and number of tokens.
        split, protocol, sequence_length, weights, dtype: How it was measured.
        wall_s: Seconds it took.
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

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int = 16,
    max_tokens: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> EvaluationResult:
    """Score a split.

    Args:
        model: Used in evaluation mode; put back as it was.
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Targets per window.
        batch_size: Windows per forward pass; has no effect on the result.
        max_tokens: Score only the whole documents within the first so many tokens (at least one).
        check: Called before each batch; may raise to stop.

    Raises:
        TokenizerError: The tokenizer's ids do not fit the model.
    """
    require_fitting(model, tokenizer)
    device = next(model.parameters()).device
    last = _end_of_whole_documents(stream, max_tokens)
    sums = _Sums(tokenizer, device)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        for batch in evaluation_batches(stream, batch_size, sequence_length, tokenizer.bos_id, last - 1, device):
            check()
            sums.add(model(batch.tokens).logits, batch.targets)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    loss = sums.nll / sums.targets
    n_bytes = _text_bytes(stream, tokenizer, last, sums)
    bpb = sums.text_nll / (math.log(2) * n_bytes) if n_bytes else None
    return EvaluationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        perplexity_unit="byte" if tokenizer.name == "byte" else "token",
        bpb=bpb,
        bpb_all=sums.nll / (math.log(2) * n_bytes) if n_bytes else None,
        accuracy=sums.hits[0] / sums.targets,
        top5_accuracy=sums.hits[1] / sums.targets,
        top10_accuracy=sums.hits[2] / sums.targets,
        n_targets=sums.targets,
        n_bytes=n_bytes,
        tokens_per_sec=sums.targets / max(seconds, 1e-9),
        eval_id=hashlib.sha256(f"{stream.eval_id}|{last}".encode()).hexdigest()[:16],
        split=stream.name,
        protocol="block",
        sequence_length=sequence_length,
        weights="quantized" if any(layer.mode.weights != "none" for layer in model.bit_linears().values()) else "full",
        dtype=str(model.compute_dtype).removeprefix("torch."),
        wall_s=seconds,
    )


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
        self.targets = self.text_bytes = self.unknown = 0
        self.hits = [0, 0, 0]

    def add(self, logits: Tensor, targets: Tensor) -> None:
        scored = targets != -100
        wanted, logits = targets[scored], logits[scored].float()
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
        self.hits = [hit + int((ahead < k).sum()) for hit, k in zip(self.hits, (1, 5, 10), strict=True)]


def _end_of_whole_documents(stream: TokenStream, max_tokens: int | None) -> int:
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
