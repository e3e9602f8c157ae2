"""How sure a model was while it generated, read off the logits that the tokens were drawn from."""

import torch
from torch import Tensor

TOP = 5
"""Candidates kept per position."""

FIRST = 10
"""Positions whose candidates are kept."""


class Trace:
    """Entropies and likeliest tokens of samples that are generated together.

    Both are those of the model's own distribution, before temperature, penalties and cuts, and come
    from the pass that the token is drawn from: tracing costs no second one.
    """

    def __init__(self) -> None:
        self._entropies: list[Tensor] = []
        self._candidates: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor) -> None:
        """Note one position of every row.

        Args:
            logits: (batch, vocab_size).
        """
        logits = logits.float()
        self._entropies.append(torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1))
        if len(self._candidates) < FIRST:
            values, ids = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
            self._candidates.append((ids, values))

    def entropies(self) -> list[list[float]]:
        """-sum p ln p in nats: for each row, for each position."""
        return torch.stack(self._entropies, dim=1).tolist()

    def candidates(self) -> list[list[list[tuple[int, float]]]]:
        """(id, logit) of the `TOP` largest logits, largest first: for each row, for each of the `FIRST` positions."""
        ids, values = (torch.stack(part, dim=1).tolist() for part in zip(*self._candidates, strict=True))
        # Equal logits in the order of their ids, as argmax has them.
        return [
            [
                sorted(zip(*position, strict=True), key=lambda pair: (-pair[1], pair[0]))
                for position in zip(*row, strict=True)
            ]
            for row in zip(ids, values, strict=True)
        ]
