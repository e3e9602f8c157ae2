"""Generating text: prefill the prompts, then one token at a time through the model's state."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternlm.errors import SettingsError
from ternlm.generation.sampling import SamplingSettings, row_seed, sample_next
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer


class Sample(NamedTuple):
    """One generated continuation.

    Attributes:
        prompt: The text that was continued.
        text: The continuation alone.
        ids: Its tokens, without the final EOS.
        finished: Whether the model ended it with EOS.
    """

    prompt: str
    text: str
    ids: list[int]
    finished: bool


def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings
) -> list[Sample]:
    """Continue prompts of any lengths together; the result of each does not depend on the others.

    Equal prompts get different draws, numbered by their occurrence. The global random state is
    neither read nor changed.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    occurrence = [list(prompts[:i]).count(prompt) for i, prompt in enumerate(prompts)]
    generators = [
        torch.Generator().manual_seed(row_seed(prompt, n, settings.seed))
        for prompt, n in zip(prompts, occurrence, strict=True)
    ]
    outputs: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for tokens in _decode(model, encoded, settings, generators):
        for row, token in enumerate(tokens.tolist()):
            if finished[row]:
                continue
            if token == tokenizer.eos_id:
                finished[row] = True
            else:
                outputs[row].append(token)
        if all(finished):
            break
    return [
        Sample(prompt, _continuation(tokenizer, prompt_ids, ids), ids, done)
        for prompt, prompt_ids, ids, done in zip(prompts, encoded, outputs, finished, strict=True)
    ]


def stream(
    model: LanguageModel, tokenizer: Tokenizer, prompt_ids: Sequence[int], settings: SamplingSettings
) -> Iterator[int]:
    """Tokens of one continuation as they are drawn, up to but without EOS."""
    generator = torch.Generator().manual_seed(row_seed(str(list(prompt_ids)), 0, settings.seed))
    for tokens in _decode(model, [list(prompt_ids)], settings, [generator]):
        token = int(tokens[0])
        if token == tokenizer.eos_id:
            return
        yield token


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[BOS] and the prompt's tokens; a tokenizer without BOS starts an empty prompt from EOS.

    Raises:
        SettingsError: The prompt is empty and there is no token to start from.
    """
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]
    if not ids:
        raise SettingsError(f"an empty prompt cannot start '{tokenizer.name}', which has no BOS. Give a prompt.")
    return ids


@torch.no_grad()
def _decode(
    model: LanguageModel,
    prompts: list[list[int]],
    settings: SamplingSettings,
    generators: list[torch.Generator],
) -> Iterator[Tensor]:
    """(batch,) tokens per step. When the context of a row is full, its later half is read again."""
    device = next(model.parameters()).device
    capacity = model.settings.max_position_embeddings
    vocab_size = model.settings.vocab_size or 0
    windows = [list(prompt[-(capacity - 1) :]) for prompt in prompts]
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    was_training = model.training
    model.eval()
    try:
        logits, state = _prefill(model, windows, device)
        for remaining in range(settings.max_new_tokens - 1, -1, -1):
            tokens = sample_next(logits, seen, settings, generators)
            seen[torch.arange(len(prompts), device=device), tokens] = True
            for ids, token in zip(windows, tokens.tolist(), strict=True):
                ids.append(token)
            yield tokens
            if not remaining:
                return
            if any(len(ids) > capacity for ids in windows):
                windows = [ids[-(capacity // 2) :] if len(ids) > capacity else ids for ids in windows]
                logits, state = _prefill(model, windows, device)
            else:
                output = model(tokens[:, None], state)
                logits, state = output.logits[:, -1], output.state
    finally:
        model.train(was_training)


def _prefill(model: LanguageModel, prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Any]:
    """Logits after each prompt, and the state."""
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)
    for row, ids in enumerate(prompts):
        padded[row, : len(ids)] = torch.tensor(ids, device=device)
    output = model(padded, model.initial_state(len(prompts)), lengths)
    return output.logits[torch.arange(len(prompts), device=device), lengths - 1], output.state


def _continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    decoder = tokenizer.stream(prompt_ids)
    return "".join(decoder.feed(index) for index in ids) + decoder.finish()
