"""What stands beside an encoder's masked loss: models that know nothing or only frequencies, and pseudo-likelihood."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED
from ternlm.data.corpus import TokenStream
from ternlm.data.masking import MaskingSettings
from ternlm.data.windows import require_mask_token
from ternlm.evaluation.evaluate import require_fitting
from ternlm.evaluation.protocols import end_of_whole_documents, scored_batches
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.tokenizers import Tokenizer


def masking_of(model: LanguageModel, config: Mapping[str, Any]) -> MaskingSettings | None:
    """How tokens are hidden from the model of a checkpoint: as in its training; None for a causal model.

    Args:
        model: The model.
        config: The settings it was trained with.

    Raises:
        SettingsError: They are malformed.
    """
    if model.is_causal:
        return None
    given = config.get("objective") or {}
    known = {name: given[name] for name in MaskingSettings.model_fields if name in given}
    return MaskingSettings.from_mapping(known, "objective")


def masked_baselines(
    stream: TokenStream,
    counts: np.ndarray | None,
    tokenizer: Tokenizer,
    sequence_length: int,
    masking: MaskingSettings,
    max_tokens: int | None = None,
) -> dict[str, float | None]:
    """Loss and accuracy of models without context, on the very targets that `evaluate` scores.

    The uniform model gives every id 1 / V. The unigram model gives an ordinary token t the probability
    (c_t + 1) / sum of (c + 1) over ordinary tokens; an encoder that is no better has learned nothing from context.

    Args:
        stream: The text that is scored.
        counts: Occurrences in the training text, (vocab_size,); None if they are not known.
        tokenizer: The one that made the stream.
        sequence_length, masking, max_tokens: As `evaluate` was given them.

    Returns:
        `uniform_loss` and `unigram_loss` in nats per target, `uniform_accuracy` and `unigram_accuracy`; None where
        there are no counts.
    """
    size = tokenizer.vocab_size
    last = end_of_whole_documents(stream, max_tokens)
    seen = np.zeros(size, dtype=np.int64)
    for batch in scored_batches(stream, tokenizer, sequence_length, 64, last, masking):
        seen += np.bincount(batch.targets[batch.targets != IGNORED].numpy(), minlength=size)
    found: dict[str, float | None] = {"uniform_loss": math.log(size), "uniform_accuracy": 1 / size}
    if counts is None:
        return found | {"unigram_loss": None, "unigram_accuracy": None}
    is_special = np.isin(np.arange(size), list(tokenizer.special_ids()))
    smoothed = np.where(is_special, 0.0, counts + 1.0)
    nats = -np.log(np.where(is_special, 1.0, smoothed / smoothed.sum()))
    loss = float((seen * nats).sum() / seen.sum())
    return found | {"unigram_loss": loss, "unigram_accuracy": float(seen[smoothed.argmax()] / seen.sum())}


@dataclass(frozen=True)
class PseudoLikelihood:
    """Pseudo-log-likelihood of documents: every token given all others, one at a time.

    Attributes:
        pll: Nats per token: sum of -ln p(token | the rest) / number of tokens. Special tokens are not counted.
        pll_per_byte: The sum in bits per UTF-8 byte of the documents; None if an unknown token hides text. It is no
            code length, since each token is given all others, and does not compare with bits per byte.
        pll_tokens, pll_documents: What was scored.
    """

    pll: float
    pll_per_byte: float | None
    pll_tokens: int
    pll_documents: int

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


@torch.no_grad()
def pseudo_likelihood(
    model: LanguageModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    documents: int,
    batch_size: int = 16,
    check: Callable[[], None] = lambda: None,
) -> PseudoLikelihood:
    """Mask each token of the first documents once, and score it there: as many passes as there are tokens.

    Documents longer than a window are cut into parts that do not see each other.

    Args:
        model: An encoder; used in evaluation mode and put back as it was.
        stream: The tokens.
        tokenizer: The one that made them.
        sequence_length: Most tokens that the model reads at once.
        documents: How many documents of the split, from its beginning.
        batch_size: Rows per forward pass.
        check: Called before each pass; may raise to stop.

    Raises:
        SettingsError: The tokenizer has no mask token.
        TokenizerError: The tokenizer's ids do not fit the model.

    Source:
        Salazar et al. 2019, "Masked Language Model Scoring" (arXiv 1910.14659).
    """
    require_mask_token(tokenizer)
    require_fitting(model, tokenizer)
    device = next(model.parameters()).device
    documents = min(documents, stream.documents)
    special = torch.tensor(sorted(tokenizer.special_ids()))
    was_training = model.training
    model.eval()
    nats, tokens, unknown = 0.0, 0, False
    try:
        for part in _parts(stream, tokenizer, sequence_length, documents):
            unknown = unknown or (tokenizer.unk_id is not None and bool((part == tokenizer.unk_id).any()))
            positions = torch.nonzero(~torch.isin(part, special)).flatten()
            for chosen in positions.split(batch_size):
                check()
                nats += _score(model, part, chosen, tokenizer.mask_id or 0, device)
            tokens += len(positions)
    finally:
        model.train(was_training)
    raw = int(stream.document_bytes[:documents].sum())
    per_byte = None if unknown or not raw else nats / (math.log(2) * raw)
    return PseudoLikelihood(nats / max(tokens, 1), per_byte, tokens, documents)


def _score(model: LanguageModel, part: Tensor, positions: Tensor, mask_id: int, device: torch.device) -> float:
    """Sum of -ln p at the positions, each masked in a copy of its own."""
    rows = torch.arange(len(positions))
    tokens = part.repeat(len(positions), 1)
    targets = torch.full_like(tokens, IGNORED)
    targets[rows, positions] = part[positions]
    tokens[rows, positions] = mask_id
    logits = predict(model, tokens.to(device), targets.to(device)).logits.float()
    wanted = part[positions].to(device)
    return float(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().sum())


def _parts(stream: TokenStream, tokenizer: Tokenizer, sequence_length: int, documents: int) -> Iterator[Tensor]:
    """Documents, or parts of them, each between the tokenizer's markers, int64 (n,)."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    room = sequence_length - len(begin) - len(end)
    start = 0
    for stop in stream.document_ends[:documents].tolist():
        content = stream.read(start, stop).astype(np.int64)[len(begin) : stop - start - len(end)]
        for first in range(0, len(content), room):
            yield torch.tensor([*begin, *content[first : first + room].tolist(), *end])
        start = stop
