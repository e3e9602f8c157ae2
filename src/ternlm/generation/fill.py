"""Filling gaps in text with a model that reads both sides: what each mask may stand for."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ternlm.errors import SettingsError
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

SPELLINGS = ("[MASK]", "<mask>", "<|mask|>")
"""How a mask may be written in a text, whatever the tokenizer calls it."""

_AT_A_TIME = 32


class Candidate(NamedTuple):
    """A token that a mask may stand for.

    Attributes:
        text: What it writes, without the space before it.
        id: The token.
        probability: Of all tokens that emit text.
        continues: Whether it continues the word before it.
    """

    text: str
    id: int
    probability: float
    continues: bool


class Filled(NamedTuple):
    """A text with its gaps filled.

    Attributes:
        text: As it was given.
        filled: With the likeliest token in place of each mask.
        masks: Candidates of each mask in the order of the text, the likeliest first.
        entropies: Nats of each mask's distribution.
    """

    text: str
    filled: str
    masks: list[list[Candidate]]
    entropies: list[float]


def fill(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], top: int = 5, mask_text: str | None = None
) -> list[Filled]:
    """The likeliest tokens for every mask. Several masks of a text are predicted at once, not one after another.

    Special tokens are no candidates, and a space right before a mask belongs to the word that is looked for. The
    global random state is neither read nor changed.

    Args:
        model: An encoder; used in evaluation mode and put back as it was.
        tokenizer: The model's.
        texts: Each with at least one mask.
        top: Candidates per mask.
        mask_text: How the mask is written; by default any of `SPELLINGS`.

    Raises:
        SettingsError: The model continues text instead of filling it, the tokenizer has no mask token, a text holds
            no mask, or is longer than the model reads.
    """
    require_encoder(model)
    if tokenizer.mask_id is None:
        raise SettingsError(f"tokenizer '{tokenizer.name}' has no mask token, so there is no gap to fill with it.")
    parts = [split_at_masks(text, mask_text) for text in texts]
    rows = [_encode(tokenizer, part, model.settings.max_position_embeddings) for part in parts]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for chunk in _equally_long(rows):
        for row, probabilities in zip(chunk, _probabilities(model, tokenizer, [rows[i] for i in chunk]), strict=True):
            found[row] = probabilities
    return [_filled(tokenizer, *row, top) for row in zip(texts, parts, found, strict=True)]


def has_mask(text: str) -> bool:
    """Whether a text holds a mask in any of `SPELLINGS`."""
    return any(spelling in text for spelling in SPELLINGS)


def require_encoder(model: LanguageModel) -> None:
    """Refuse a model that sees only what came before.

    Raises:
        SettingsError: It does.
    """
    if model.is_causal:
        raise SettingsError(
            f"a model of family '{model.settings.family}' continues text and cannot fill gaps in it. "
            "Use `ternlm generate`, or a checkpoint of an encoder."
        )


def require_causal(model: LanguageModel) -> None:
    """Refuse a model that cannot continue text.

    Raises:
        SettingsError: It reads both sides.
    """
    if not model.is_causal:
        raise SettingsError(
            f"a model of family '{model.settings.family}' fills gaps in text and cannot continue it. "
            "Use `ternlm fill CHECKPOINT 'text with a [MASK]'`, or a checkpoint of a causal model."
        )


def split_at_masks(text: str, mask_text: str | None = None) -> list[str]:
    """What stands before, between and behind the masks of a text.

    Raises:
        SettingsError: There is none, or `mask_text` is empty.
    """
    if mask_text == "":
        raise SettingsError("an empty text marks no gap. Leave --mask-text out, or give what stands for the mask.")
    spellings = SPELLINGS if mask_text is None else (mask_text,)
    parts = re.split("|".join(map(re.escape, spellings)), text)
    if len(parts) == 1:
        raise SettingsError(f"the text {text[:80]!r} holds no mask. Write {' or '.join(spellings)} where one is.")
    return parts


def _encode(tokenizer: Tokenizer, parts: Sequence[str], most: int) -> list[int]:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in parts[:-1]:
        ids += [*tokenizer.encode(part.removesuffix(" ")), tokenizer.mask_id or 0]
    ids += tokenizer.encode(parts[-1]) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    if len(ids) > most:
        raise SettingsError(
            f"a text of {len(ids):,} tokens is longer than the {most:,} that the model reads. Shorten it around the "
            "mask."
        )
    return ids


def _equally_long(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of rows that go through the model together: of one length each, since an encoder would read padding."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    return [group[i : i + _AT_A_TIME] for group in by_length.values() for i in range(0, len(group), _AT_A_TIME)]


@torch.no_grad()
def _probabilities(model: LanguageModel, tokenizer: Tokenizer, rows: list[list[int]]) -> list[Tensor]:
    """Of each row, (masks, vocab_size) float32 on the CPU; 0 for what emits no text."""
    tokens = torch.tensor(rows, device=next(model.parameters()).device)
    is_mask = tokens.eq(tokenizer.mask_id or 0)
    was_training = model.training
    model.eval()
    try:
        logits = model(tokens, scored=is_mask).logits
    finally:
        model.train(was_training)
    silent = torch.from_numpy(tokenizer.token_bytes() == 0)
    logits = logits[:, : tokenizer.vocab_size].float().cpu().masked_fill(silent, -torch.inf)
    return list(logits.softmax(dim=-1).split(is_mask.sum(dim=1).tolist()))


def _filled(tokenizer: Tokenizer, text: str, parts: Sequence[str], probabilities: Tensor, top: int) -> Filled:
    speaking = int((tokenizer.token_bytes() > 0).sum())
    values, ids = probabilities.topk(min(top, speaking))
    masks = [
        [_candidate(tokenizer, index, value) for index, value in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    written = ""
    for part, candidates in zip(parts, masks, strict=False):
        written += (part.removesuffix(" ") if candidates[0].continues else part) + candidates[0].text
    entropies = torch.special.entr(probabilities.double()).sum(dim=-1).tolist()
    return Filled(text, written + parts[-1], masks, entropies)


def _candidate(tokenizer: Tokenizer, index: int, probability: float) -> Candidate:
    raw = tokenizer.piece(index)
    return Candidate(raw.removeprefix(b" ").decode("utf-8", "replace"), index, probability, not raw[:1].isspace())
