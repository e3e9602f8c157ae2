"""`Batch`: the tensors of one step, and the one place where inputs and targets are shifted apart.

How tokens are hidden from a model that reads both sides is `windows`' matter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and the token that each position is asked for.

    Of a causal batch the targets are shifted already: `targets[:, t]` follows `tokens[:, t]`. BOS is context and
    never a target, so nothing is asked to predict where the next document starts; EOS is a target. Of a masked
    batch `targets[:, t]` is what stood at position t.

    Attributes:
        tokens: int64 (B, T).
        targets: int64 (B, T), -100 where nothing is scored.
        num_targets: Scored targets; counted before the batch moves to a device, so reading it never waits.
        kinds: Of a masked batch, what the model reads at each position, int8 (B, T): 0 what stood there and is not
            scored, 1 the mask token, 2 a random token, 3 what stood there and is scored. None of a causal one.
    """

    tokens: Tensor
    targets: Tensor
    num_targets: int = -1
    kinds: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            object.__setattr__(self, "num_targets", int((self.targets != IGNORED).sum()))

    @classmethod
    def from_windows(cls, windows: Tensor, bos_id: int | None) -> "Batch":
        """Split windows of T + 1 tokens into inputs and targets.

        Args:
            windows: int64 (B, T + 1).
            bos_id: The id that is never a target, or None.
        """
        targets = windows[:, 1:].clone()
        if bos_id is not None:
            targets[targets == bos_id] = IGNORED
        return cls(windows[:, :-1].contiguous(), targets)

    @property
    def num_tokens(self) -> int:
        """What the batch counts for in `tokens_seen`: its targets, or if it is masked all tokens that are read."""
        return self.num_targets if self.kinds is None else self.tokens.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; for CUDA through pinned memory, without waiting for the copy."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        tokens, targets = self._move(self.tokens, device), self._move(self.targets, device)
        return Batch(tokens, targets, self.num_targets, None if self.kinds is None else self._move(self.kinds, device))

    @staticmethod
    def _move(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
