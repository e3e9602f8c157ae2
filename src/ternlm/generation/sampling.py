"""Choosing the next token from logits: greedy, temperature, top-k, top-p, repetition penalty."""

import hashlib
from collections.abc import Sequence

import torch
from pydantic import field_validator
from torch import Tensor

from ternlm.settings import Count, Float, Settings


class SamplingSettings(Settings):
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose mass reaches p; 1 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen before; 1 is off.
        seed: Decides the draws.
    """

    max_new_tokens: Count = 200
    temperature: Float = 0.8
    top_k: Count = 0
    top_p: Float = 0.95
    repetition_penalty: Float = 1.0
    seed: Count = 0

    @field_validator("max_new_tokens")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError("it must be at least 1")
        return value

    @field_validator("temperature", "top_k")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if value < 0:
            raise ValueError("it must not be negative")
        return value

    @field_validator("top_p")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("it must lie in (0, 1]")
        return value

    @field_validator("repetition_penalty")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("it must be above 0")
        return value


def sample_next(logits: Tensor, seen: Tensor, settings: SamplingSettings, generators: list[torch.Generator]) -> Tensor:
    """One token per row.

    Args:
        logits: (batch, vocab_size).
        seen: (batch, vocab_size) bool, tokens that occurred in the row so far.
        settings: How to choose.
        generators: One per row, so that a row's draws do not depend on its neighbours.

    Returns:
        (batch,), int64; the lowest id among equals when greedy.
    """
    logits = logits.float()
    if settings.repetition_penalty != 1:
        factor = torch.where(logits > 0, 1 / settings.repetition_penalty, settings.repetition_penalty)
        logits = torch.where(seen, logits * factor, logits)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = nucleus(torch.softmax(logits / settings.temperature, dim=-1), settings.top_k, settings.top_p)
    rows = zip(probabilities.cpu(), generators, strict=True)
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in rows]
    return torch.cat(drawn).to(logits.device)


def sample_each(
    logits: Tensor, seen: Tensor, settings: Sequence[SamplingSettings], generators: Sequence[torch.Generator]
) -> Tensor:
    """As `sample_next`, with settings of its own for each row."""
    rows_of: dict[SamplingSettings, list[int]] = {}
    for row, each in enumerate(settings):
        rows_of.setdefault(each, []).append(row)
    tokens = torch.empty(len(settings), dtype=torch.int64, device=logits.device)
    for each, rows in rows_of.items():
        tokens[rows] = sample_next(logits[rows], seen[rows], each, [generators[row] for row in rows])
    return tokens


def nucleus(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the top_k likeliest tokens, then of those the smallest prefix whose mass reaches top_p.

    The token that crosses p is kept. The result is renormalized.

    Args:
        probabilities: (batch, vocab_size).

    Source:
        Holtzman et al. 2019, nucleus sampling (arXiv 1904.09751).
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < ordered.shape[-1]:
        ordered[:, top_k:] = 0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    if top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered
        ordered = torch.where(before < top_p, ordered, 0.0)
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def row_seed(prompt: str, which: int | str, seed: int) -> int:
    """The first 8 bytes of sha256("prompt|which|seed"), less one bit so that an int64 holds it.

    The same in every process, on every device.

    Args:
        prompt: The text to continue.
        which: What tells samples of one prompt apart: a number, or the name of a mode.
        seed: The run's.
    """
    digest = hashlib.sha256(f"{prompt}|{which}|{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
