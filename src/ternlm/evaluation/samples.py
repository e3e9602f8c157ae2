"""Text generated in three fixed modes while a model trains.

Modes, prompts and seeds are the same at every step, so that rows of one run, and of two runs, differ
by their models alone.
"""

from collections.abc import Sequence
from typing import Any

from ternlm.evaluation.chunks import has_chunks, with_separators
from ternlm.evaluation.generations import AT_A_TIME, generate_measured
from ternlm.evaluation.settings import EvaluationSettings, SampleMode
from ternlm.generation import Request, Sample, SamplingSettings, fill, has_mask, row_seed
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

MODES: dict[SampleMode, dict[str, float]] = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "typical": {"temperature": 0.9, "top_k": 0, "top_p": 0.95},
    "stress": {"temperature": 1.5, "top_k": 10, "top_p": 1.0},
}


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
        with the five likeliest tokens and their probabilities for each mask in `top5`. Of a model with chunks,
        `chunked_text` is prompt and continuation with its cuts (`with_separators`).
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
    modes = (mode for mode in settings.sample_modes for _ in settings.prompts)
    return [
        {
            "mode": mode, "prompt": sample.prompt, "seed": request.seed,
            "generated_text": sample.text, "generated_ids": sample.ids, "finished": sample.finished, **metrics,
            **_chunks(model, tokenizer, sample),
            "logits_first_10": [[(token, round(logit, 4)) for token, logit in position] for position in top],
        }
        for mode, request, (sample, metrics, top) in zip(
            modes, cases, generate_measured(model, tokenizer, cases, AT_A_TIME), strict=True
        )
    ]  # fmt: skip


def _chunks(model: LanguageModel, tokenizer: Tokenizer, sample: Sample) -> dict[str, str]:
    if not has_chunks(model):
        return {}
    return {"chunked_text": with_separators(model, tokenizer, sample.prompt, sample.ids)}


def _fills(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "mode": "fill", "prompt": filled.text, "generated_text": filled.filled,
            "mean_entropy": round(sum(filled.entropies) / len(filled.entropies), 6),
            "top5": [[(each.text, round(each.probability, 6)) for each in mask] for mask in filled.masks],
        }
        for filled in fill(model, tokenizer, [prompt for prompt in prompts if has_mask(prompt)])
    ]  # fmt: skip
