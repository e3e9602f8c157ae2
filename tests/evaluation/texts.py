"""A token stream in memory, and a model with a memory small enough to follow by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders import tiny_bitnet
from ternlm.models import Output


class MemoryStream:
    """What an evaluation reads of a `TokenStream`, made of documents."""

    name = "validation"
    eval_id = "in memory"

    def __init__(self, documents: Sequence[str], bos_id: int | None = 254, eos_id: int | None = 255) -> None:
        marks = [[] if mark is None else [mark] for mark in (bos_id, eos_id)]
        rows = [[*marks[0], *text.encode(), *marks[1]] for text in documents]
        self.tokens = np.array([token for row in rows for token in row], dtype=np.uint8)
        self.document_ends = np.cumsum([len(row) for row in rows])
        self.document_bytes = np.array([len(text.encode()) for text in documents])
        self.document_hashes = np.array([abs(hash(text)) for text in documents], dtype=np.uint64)
        self.bytes, self.documents = int(self.document_bytes.sum()), len(documents)
        self.words = sum(len(text.split()) for text in documents)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


class EchoModel(torch.nn.Module):
    """h_t = h_{t-1} / 2 + E[token]; logits = W h: a memory of one vector, and nothing to compute in windows with."""

    compute_dtype = torch.float32
    is_causal = True
    is_recurrent = True

    def __init__(self, vocab_size: int = 256, width: int = 3) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(4)
        self.embed = torch.nn.Parameter(torch.randn(vocab_size, width, generator=draw))
        self.head = torch.nn.Parameter(torch.randn(vocab_size, width, generator=draw))
        self.settings = tiny_bitnet(vocab_size=vocab_size, max_position_embeddings=5).settings
        self.widths: list[tuple[int, int]] = []

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.embed.shape[1])

    def forward(
        self, tokens: Tensor, state: Tensor | None = None, lengths: Tensor | None = None, scored: Tensor | None = None
    ) -> Output:
        self.widths.append((tokens.shape[0], tokens.shape[1]))
        h = self.initial_state(len(tokens)) if state is None else state
        seen = []
        for t in range(tokens.shape[1]):
            moved = h / 2 + self.embed[tokens[:, t]]
            is_valid = torch.ones(len(tokens), dtype=torch.bool) if lengths is None else t < lengths
            h = torch.where(is_valid[:, None], moved, h)
            seen.append(h)
        logits = torch.stack(seen, dim=1) @ self.head.T
        return Output(logits if scored is None else logits[scored], None if state is None else h, {})

    def bit_linears(self) -> dict[str, Any]:
        return {}
