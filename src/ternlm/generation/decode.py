"""Generating text: prefill the prompts, then one token at a time through the model's state."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternlm.errors import SettingsError
from ternlm.generation.sampling import SamplingSettings, row_seed, sample_each
from ternlm.generation.trace import Trace
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer


class Request(NamedTuple):
    """What to continue, and how.

    Attributes:
        prompt: The text.
        settings: How tokens are chosen; `seed` below stands in for theirs.
        seed: Decides the draws.
    """

    prompt: str
    settings: SamplingSettings
    seed: int


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
    occurrence = [list(prompts[:i]).count(prompt) for i, prompt in enumerate(prompts)]
    seeds = [row_seed(prompt, n, settings.seed) for prompt, n in zip(prompts, occurrence, strict=True)]
    requests = [Request(prompt, settings, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return continue_all(model, tokenizer, requests)


def continue_all(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], trace: Trace | None = None
) -> list[Sample]:
    """As `generate`, where every prompt has settings and a seed of its own.

    Args:
        model: Used in evaluation mode; put back as it was.
        tokenizer: The model's.
        requests: Decoded together.
        trace: Notes every position that is drawn. Those of a row are its ids and, if it finished, EOS.
    """
    encoded = [encode_prompt(tokenizer, request.prompt) for request in requests]
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    finished = [False] * len(requests)
    settings = [request.settings for request in requests]
    for tokens in _decode(model, tokenizer, encoded, settings, generators, trace):
        for row, token in enumerate(tokens.tolist()):
            if finished[row] or len(outputs[row]) == requests[row].settings.max_new_tokens:
                continue
            if token == tokenizer.eos_id:
                finished[row] = True
            else:
                outputs[row].append(token)
        if all(finished):
            break
    return [
        Sample(request.prompt, _continuation(tokenizer, prompt_ids, ids), ids, done)
        for request, prompt_ids, ids, done in zip(requests, encoded, outputs, finished, strict=True)
    ]


def stream(
    model: LanguageModel, tokenizer: Tokenizer, prompt_ids: Sequence[int], settings: SamplingSettings
) -> Iterator[int]:
    """Tokens of one continuation as they are drawn, up to but without EOS."""
    generator = torch.Generator().manual_seed(row_seed(str(list(prompt_ids)), 0, settings.seed))
    for tokens in _decode(model, tokenizer, [list(prompt_ids)], [settings], [generator]):
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
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    settings: list[SamplingSettings],
    generators: list[torch.Generator],
    trace: Trace | None = None,
) -> Iterator[Tensor]:
    """(batch,) tokens per step. When the context of a row is full, its later half is read again."""
    device = next(model.parameters()).device
    capacity = model.settings.max_position_embeddings
    vocab_size = tokenizer.vocab_size  # a model may know more ids, which no text has
    windows = [list(prompt[-(capacity - 1) :]) for prompt in prompts]
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    was_training = model.training
    model.eval()
    try:
        logits, state = _prefill(model, windows, device)
        for remaining in range(max(each.max_new_tokens for each in settings) - 1, -1, -1):
            if trace is not None:
                trace.add(logits)
            tokens = sample_each(logits[:, :vocab_size], seen, settings, generators)
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
