"""What a causal model says of given texts: how likely they are, how likely they continue others, and how it goes on.

All in batches, in windows of T tokens; a text that is longer is read in windows side by side, of which the last one is
full (`sliding_windows` with stride T). What is asked, and what becomes of the answers, is left to `harness`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ternlm.data.batch import IGNORED
from ternlm.errors import SettingsError
from ternlm.evaluation.evaluate import require_fitting
from ternlm.evaluation.sliding import sliding_windows, start_of
from ternlm.generation import Request, SamplingSettings, continue_all, row_seed
from ternlm.generation.reader import evaluating
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_LONGEST = 256


class Likelihood(NamedTuple):
    """Of some tokens after others.

    Attributes:
        nats: Sum of ln p, never positive.
        is_greedy: Whether each of them is the likeliest one (ties: the lowest id).
    """

    nats: float
    is_greedy: bool


class Scorer:
    """Answers about texts from one model.

    Every text begins with BOS; where the tokenizer has none, a text that is predicted from its first token on begins
    with EOS, and others with nothing.

    Args:
        model: Causal; used in evaluation mode and put back as it was.
        tokenizer: The model's.
        sequence_length: Tokens that the model reads per window, T.
        batch_size: Windows per forward pass; no effect on the result.
        check: Called before each pass; may raise to stop.
        progress: Called after each pass with how many answers are known, and how many will be.

    Raises:
        SettingsError: The model is an encoder, or the tokenizer has neither BOS nor EOS.
        TokenizerError: The tokenizer's ids do not fit the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        sequence_length: int,
        batch_size: int = 16,
        check: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if not model.is_causal:
            raise SettingsError(
                f"a '{model.settings.family}' model is an encoder: it predicts hidden tokens and neither continues "
                "texts nor says how likely they are. Evaluate a causal model, or this one without --tasks."
            )
        require_fitting(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self._check, self._progress = check, progress
        self._start = start_of(tokenizer)
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def texts(self, texts: Sequence[str]) -> list[float]:
        """ln p of each whole text, every token predicted exactly once."""
        encoded = [[self._start, *self.tokenizer.encode(text)] for text in texts]
        return [each.nats for each in self._score([(ids, len(ids) - 1) for ids in encoded])]

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """ln p of the second text of each pair after the first, of which the beginning is left out if it is too long.

        Both are encoded as one, so that tokens may not begin at the seam; spaces before it belong to the continuation.
        """
        return self._score([self._encoded(context, continuation) for context, continuation in pairs])

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A continuation of each text, cut before the first of its stops.

        Args:
            requests: Texts, each with `until` (a stop or several), `max_gen_toks`, and, where `do_sample` is true,
                `temperature`, `top_p` and `top_k`; else the likeliest token is taken each time.
        """
        asked = [Request(text, _sampling(wanted), row_seed(text, 0, 0)) for text, wanted in requests]
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number].prompt))
        found = [""] * len(asked)
        for first in range(0, len(order), self.batch_size):
            self._check()
            rows = order[first : first + self.batch_size]
            samples = continue_all(self.model, self.tokenizer, [asked[row] for row in rows])
            for row, sample in zip(rows, samples, strict=True):
                found[row] = _before(sample.text, requests[row][1].get("until") or ())
            self._progress(first + len(rows), len(order))
        return found

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], int]:
        bare = context.rstrip()
        if not bare:
            ids = self.tokenizer.encode(context + continuation)
            return [self._start, *ids], len(ids)
        ids = self.tokenizer.encode(context + continuation)
        return [*self._begin, *ids], max(0, len(ids) - len(self.tokenizer.encode(bare)))

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[Likelihood]:
        """Likelihoods of the last so many ids of each row, after those before them."""
        windows = [(number, *window) for number, (ids, scored) in enumerate(rows) for window in self._cut(ids, scored)]
        windows.sort(key=lambda window: -len(window[1]))
        nats, is_greedy, remaining = np.zeros(len(rows)), [True] * len(rows), [0] * len(rows)
        for number, _, _ in windows:
            remaining[number] += 1
        known = remaining.count(0)
        for first in range(0, len(windows), self.batch_size):
            self._check()
            part = windows[first : first + self.batch_size]
            for (number, _, _), (value, greedy) in zip(part, self._pass(part), strict=True):
                nats[number] += value
                is_greedy[number] = is_greedy[number] and greedy
                remaining[number] -= 1
                known += not remaining[number]
            self._progress(known, len(rows))
        return [Likelihood(float(value), greedy) for value, greedy in zip(nats, is_greedy, strict=True)]

    def _cut(self, ids: list[int], scored: int) -> list[tuple[list[int], int]]:
        """Windows of a row that score its last `scored` ids; none if there are none."""
        width = self.sequence_length
        if scored <= width:
            return [(ids[-width - 1 :], scored)] if scored else []
        ids = ids[-scored - 1 :]
        windows = sliding_windows(scored, width, width)
        return [(ids[window.start : window.stop + 1], window.scored) for window in windows]

    @torch.no_grad()
    def _pass(self, windows: Iterable[tuple[int, list[int], int]]) -> list[tuple[float, bool]]:
        """ln p of the targets of each window, and whether they are the likeliest ones, from one forward pass."""
        rows = [(ids, scored) for _, ids, scored in windows]
        shape = (len(rows), max(len(ids) for ids, _ in rows) - 1)
        tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        for row, (ids, scored) in enumerate(rows):
            length = len(ids) - 1
            tokens[row, :length] = torch.tensor(ids[:-1])
            targets[row, length - scored : length] = torch.tensor(ids[-scored:])
        device = next(self.model.parameters()).device
        is_scored = (targets != IGNORED).to(device)
        wanted = targets.to(device)[is_scored]
        with evaluating(self.model):
            logits = self.model(tokens.to(device), scored=is_scored).logits.float()
        nats = -torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
        greedy = logits.argmax(dim=1) == wanted
        sizes = [scored for _, scored in rows]
        pairs = zip(nats.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        return [(float(values.sum()), bool(hits.all())) for values, hits in pairs]


def _sampling(wanted: Mapping[str, Any]) -> SamplingSettings:
    """The harness's words for how to continue a text as settings of ours."""
    most = next((int(wanted[name]) for name in _LENGTHS if wanted.get(name) is not None), _LONGEST)
    if not wanted.get("do_sample"):
        return SamplingSettings(max_new_tokens=most, temperature=0.0, top_k=0, top_p=1.0)
    return SamplingSettings(
        max_new_tokens=most,
        temperature=float(wanted.get("temperature", 1.0)),
        top_k=int(wanted.get("top_k", 0)),
        top_p=float(wanted.get("top_p", 1.0)),
    )


def _before(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first stop in it."""
    for stop in (stops,) if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
