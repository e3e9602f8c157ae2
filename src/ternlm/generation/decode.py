"""Generating text: the prompts are read, then one token at a time is drawn and read in turn."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ternlm.errors import SettingsError
from ternlm.generation.reader import Reader, evaluating
from ternlm.generation.sampling import SamplingSettings, row_seed, sample_each, sample_next
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
    return continue_all(model, tokenizer, list(numbered(prompts, settings)))


def numbered(prompts: Iterable[str], settings: SamplingSettings) -> Iterator[Request]:
    """A request for each prompt; its seed follows from the prompt and from how often it has occurred before."""
    occurrences: Counter[str] = Counter()
    for prompt in prompts:
        yield Request(prompt, settings, row_seed(prompt, occurrences[prompt], settings.seed))
        occurrences[prompt] += 1


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
    if not requests:
        return []
    encoded = [encode_prompt(tokenizer, request.prompt) for request in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    finished = [False] * len(requests)
    for tokens in _decode(model, tokenizer, encoded, requests, trace):
        for row, token in enumerate(tokens):
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


def stream(model: LanguageModel, tokenizer: Tokenizer, request: Request) -> Iterator[int]:
    """Tokens of one continuation as they are drawn, up to but without EOS: those that `continue_all` returns."""
    text = GrowingText(model, tokenizer)
    text.add(encode_prompt(tokenizer, request.prompt))
    yield from text.draw(request.settings, request.seed)


class GrowingText:
    """One text that its reader and the model write in turns; nothing is read twice that still fits into the memory.

    Args:
        model: Used in evaluation mode while it draws.
        tokenizer: The model's.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._reader = Reader(model, tokenizer.vocab_size, 1)
        self._unread: list[int] = []

    def add(self, ids: Sequence[int]) -> None:
        """Put tokens behind what is there."""
        self._unread.extend(ids)

    @torch.no_grad()
    def draw(self, settings: SamplingSettings, seed: int) -> Iterator[int]:
        """Tokens that the model puts behind what is there, up to but without EOS; one may stop at any of them.

        Where the model has ended the text with EOS, there are none until something is added.

        Args:
            settings: How tokens are chosen; `seed` stands in for theirs.
            seed: Decides the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        with evaluating(self._model):
            for _ in range(settings.max_new_tokens if self._unread else 0):
                logits = self._reader.read([self._unread])[:, : self._tokenizer.vocab_size]
                self._unread = []
                token = int(sample_next(logits, self._reader.seen, settings, [generator]))
                if token == self._tokenizer.eos_id:
                    return
                self._unread = [token]
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
    requests: Sequence[Request],
    trace: Trace | None,
) -> Iterator[list[int]]:
    """The next token of each row, step by step."""
    settings = [request.settings for request in requests]
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    reader, rows = Reader(model, tokenizer.vocab_size, len(prompts)), prompts
    with evaluating(model):
        for _ in range(max(each.max_new_tokens for each in settings)):
            logits = reader.read(rows)
            if trace is not None:
                trace.add(logits)
            tokens = sample_each(logits[:, : tokenizer.vocab_size], reader.seen, settings, generators).tolist()
            yield tokens
            rows = [[token] for token in tokens]


def _continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    decoder = tokenizer.stream(prompt_ids)
    return "".join(decoder.feed(index) for index in ids) + decoder.finish()
