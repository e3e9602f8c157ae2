"""Running sums over scored targets, in float64: of the whole text, and of each of its documents."""

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.masking import KINDS
from ternlm.tokenizers import Tokenizer


class Sums:
    """What an evaluation adds up, pass by pass.

    Args:
        tokenizer: Tells which targets are text.
        device: Where the logits are.
        documents: How many documents are told apart.

    Attributes:
        nll, text_nll: Nats of all targets, and of those that emit text.
        targets, tokens: Scored targets, and what counts for the speed.
        text_bytes, unknown: Bytes that targets emit; targets that hide text.
        hits: Targets among the 1, 5 and 10 largest logits.
        by_document: Nats of the targets that emit text, float64 (documents,).
        all_by_document, targets_by_document: Nats and number of all targets, float64 and int64 (documents,).
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device, documents: int) -> None:
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
        self._unk = tokenizer.unk_id
        self.nll = self.text_nll = 0.0
        self.targets = self.tokens = self.text_bytes = self.unknown = 0
        self.hits = [0, 0, 0]
        self.by_document, self.all_by_document = np.zeros(documents), np.zeros(documents)
        self.targets_by_document = np.zeros(documents, dtype=np.int64)
        self._by_kind = {name: [0, 0] for name in KINDS}  # right, all

    def add(self, logits: Tensor, batch: Batch, documents: Tensor | None) -> None:
        """Count a pass in.

        Args:
            logits: (rows, time, vocab), or (scored positions, vocab).
            batch: On the device of the logits.
            documents: (rows, time) on the CPU, the document of each target, or None.
        """
        scored = batch.targets != IGNORED
        wanted, logits = batch.targets[scored], (logits[scored] if logits.dim() == 3 else logits).float()
        nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
        lengths = self._token_bytes[wanted]
        # Ties count for the lowest id, as argmax does.
        own = logits.gather(1, wanted[:, None])
        ids = torch.arange(logits.shape[1], device=logits.device)
        ahead = ((logits > own) | ((logits == own) & (ids < wanted[:, None]))).sum(dim=1)
        text_nll = nll * (lengths > 0)
        self.nll += nll.sum().item()
        self.text_nll += text_nll.sum().item()
        self.text_bytes += int(lengths.sum())
        self.unknown += int((wanted == self._unk).sum()) if self._unk is not None else 0
        self.targets += wanted.numel()
        self.tokens += batch.num_tokens
        if documents is not None:
            owners = documents[scored.cpu()].numpy()
            count = len(self.by_document)
            self.by_document += np.bincount(owners, text_nll.cpu().numpy(), minlength=count)
            self.all_by_document += np.bincount(owners, nll.cpu().numpy(), minlength=count)
            self.targets_by_document += np.bincount(owners, minlength=count)
        if batch.kinds is not None:
            for name, kind in KINDS.items():
                of_kind = batch.kinds[scored] == kind
                self._by_kind[name][0] += int((ahead[of_kind] == 0).sum())
                self._by_kind[name][1] += int(of_kind.sum())
        self.hits = [hit + int((ahead < k).sum()) for hit, k in zip(self.hits, (1, 5, 10), strict=True)]

    def accuracy_by_kind(self) -> dict[str, float | None]:
        """Of an encoder, accuracy by what it reads at the target."""
        return {f"{name}_accuracy": right / count if count else None for name, (right, count) in self._by_kind.items()}
