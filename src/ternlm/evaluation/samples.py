"""Text generated in three fixed modes, and numbers that tell whether it is healthy.

Modes, prompts and seeds are the same at every step, so that rows of one run, and of two runs, differ
by their models alone.
"""

import codecs
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ternlm.evaluation.settings import EvaluationSettings, SampleMode
from ternlm.generation import Request, SamplingSettings, Trace, continue_all, fill, has_mask, row_seed
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

MODES: dict[SampleMode, dict[str, float]] = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "typical": {"temperature": 0.9, "top_k": 0, "top_p": 0.95},
    "stress": {"temperature": 1.5, "top_k": 10, "top_p": 1.0},
}

_AT_A_TIME = 16  # samples decoded together, which bounds the memory of their states


def sample_modes(
    model: LanguageModel, tokenizer: Tokenizer, settings: EvaluationSettings, seed: int
) -> list[dict[str, Any]]:
    """Continue every prompt in every mode; with an encoder, fill the gaps of those that have some.

    Args:
        model: Used in evaluation mode; put back as it was. The global random state is neither read nor changed.
        tokenizer: The model's.
        settings: Prompts, modes and length.
        seed: Decides the draws, with the prompt and the name of the mode (`row_seed`).

    Returns:
        One row per mode and prompt, modes outermost. Shares of nothing are None; entropies are in nats, of
        the model's own distribution, over every position drawn, EOS included. An encoder has the mode `fill` alone,
        with the five likeliest tokens and their probabilities for each mask in `top5`.
    """
    if not model.is_causal:
        return _fills(model, tokenizer, settings.prompts)
    cases = [
        Request(
            prompt,
            SamplingSettings.from_mapping({"max_new_tokens": settings.sample_tokens, **MODES[mode]}),
            row_seed(prompt, mode, seed),
        )
        for mode in settings.sample_modes
        for prompt in settings.prompts
    ]
    rows = []
    for start in range(0, len(cases), _AT_A_TIME):
        rows += _rows(model, tokenizer, cases[start : start + _AT_A_TIME])
    modes = [mode for mode in settings.sample_modes for _ in settings.prompts]
    return [{"mode": mode, **row} for mode, row in zip(modes, rows, strict=True)]


def _rows(model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[dict[str, Any]]:
    trace = Trace()
    samples = continue_all(model, tokenizer, requests, trace)
    rows = []
    for request, sample, entropies, top in zip(requests, samples, trace.entropies(), trace.candidates(), strict=True):
        drawn = len(sample.ids) + sample.finished
        rows.append({
            "prompt": sample.prompt, "seed": request.seed,
            "generated_text": sample.text, "generated_ids": sample.ids, "finished": sample.finished,
            "utf8_valid": is_utf8(b"".join(tokenizer.piece(index) for index in sample.ids)),
            "mean_entropy": _mean(entropies[:drawn]), "mean_entropy_10": _mean(entropies[: min(drawn, 10)]),
            **repetition(sample.ids),
            "logits_first_10": [[(token, round(logit, 4)) for token, logit in position] for position in top[:drawn]],
        })  # fmt: skip
    return rows


def _fills(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "mode": "fill", "prompt": filled.text, "generated_text": filled.filled,
            "mean_entropy": _mean(filled.entropies),
            "top5": [[(each.text, round(each.probability, 6)) for each in mask] for mask in filled.masks],
        }
        for filled in fill(model, tokenizer, [prompt for prompt in prompts if has_mask(prompt)])
    ]  # fmt: skip


def repetition(ids: Sequence[int]) -> dict[str, float | None]:
    """How much a text repeats itself.

    max_repetition is the count of the most frequent token, and repetition_frac its share; distinct_n is
    distinct n-grams / n-grams; seq_rep_4 is 1 - distinct_4; longest_run the most equal tokens in a row.

    Source:
        Welleck et al. 2019, seq-rep-n (arXiv 1908.04319); Li et al. 2015, distinct-n (arXiv 1510.03055).
    """
    most = max(Counter(ids).values(), default=0)
    distinct_4 = _distinct(ids, 4)
    return {
        "total_tokens": len(ids),
        "unique_tokens": len(set(ids)),
        "max_repetition": most,
        "repetition_frac": most / len(ids) if ids else None,
        "distinct_1": _distinct(ids, 1),
        "distinct_2": _distinct(ids, 2),
        "distinct_3": _distinct(ids, 3),
        "seq_rep_4": None if distinct_4 is None else 1 - distinct_4,
        "longest_run": max((len(list(run)) for _, run in groupby(ids)), default=0),
    }


def is_utf8(raw: bytes) -> bool:
    """Whether bytes are UTF-8; the last character may be cut off."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError:
        return False
    return True


def _distinct(ids: Sequence[int], n: int) -> float | None:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
