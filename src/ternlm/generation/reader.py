"""Reading text into a model's memory: prompts of any lengths, then one token after the other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ternlm.models import LanguageModel

PIECE = 2048
"""Tokens of each row that a recurrent model reads in one pass, which bounds the memory of a long prompt."""


class Reader:
    """Rows of text that a model reads together from left to right, and what it remembers of them.

    A recurrent model reads every token once, however long the text is. Any other has a bounded context: when that
    of a row is full, its later half is read again.

    Args:
        model: In evaluation mode while it reads (`evaluating`).
        vocab_size: Ids that texts have; a model may know more.
        batch_size: Number of rows.

    Attributes:
        seen: (batch_size, vocab_size) bool, tokens that each row has had so far.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, batch_size: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._windows: list[list[int]] = [[] for _ in range(batch_size)]  # what a bounded context holds
        self._state: Any = None
        self.seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=self._device)

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read on; an interruption leaves the memory as it was.

        Args:
            rows: New tokens of each row, at least one.

        Returns:
            Logits for the token after each row, (batch_size, all ids of the model).
        """
        if self._model.is_recurrent:
            logits, self._state = self._forward(rows, self._state, PIECE)
        else:
            logits = self._read_bounded(rows)
        for row, ids in enumerate(rows):
            self.seen[row, torch.tensor(ids, device=self._device)] = True
        return logits

    def _read_bounded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        capacity = self._model.settings.max_position_embeddings
        windows = [[*ids, *row] for ids, row in zip(self._windows, rows, strict=True)]
        if self._state is not None and all(len(ids) <= capacity for ids in windows):
            logits, self._state = self._forward(rows, self._state)
        else:
            is_step = self._state is not None and all(len(row) == 1 for row in rows)
            most, kept = (capacity, capacity // 2) if is_step else (capacity - 1, capacity - 1)
            windows = [ids[-max(kept, 1) :] if len(ids) > most else ids for ids in windows]
            logits, self._state = self._forward(windows, None)
        self._windows = windows
        return logits

    def _forward(self, rows: Sequence[Sequence[int]], state: Any, piece: int | None = None) -> tuple[Tensor, Any]:
        """Logits after the last token of each row, and the state; `piece` tokens of each row per pass, or all."""
        state = self._model.initial_state(len(rows)) if state is None else state
        longest = max(len(row) for row in rows)
        if longest == 1:
            output = self._model(torch.tensor(rows, device=self._device), state)
            return output.logits[:, -1], output.state
        piece = piece or longest
        last: dict[int, Tensor] = {}
        for start in range(0, longest, piece):
            lengths = [min(max(len(row) - start, 0), piece) for row in rows]
            ends = [i for i, row in enumerate(rows) if start < len(row) <= start + piece]
            tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
            for i, row in enumerate(rows):
                tokens[i, : lengths[i]] = torch.tensor(row[start : start + piece], dtype=torch.int64)
            scored = torch.zeros(tokens.shape, dtype=torch.bool)
            scored[ends, [lengths[i] - 1 for i in ends]] = True
            real = torch.tensor(lengths, device=self._device)
            output = self._model(tokens.to(self._device), state, real, scored.to(self._device))
            state = output.state
            last |= dict(zip(ends, output.logits, strict=True))
        return torch.stack([last[i] for i in range(len(rows))]), state


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode; afterwards the mode is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
