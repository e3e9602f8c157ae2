"""`Batch`: the tensors of one step, and the one place where inputs and targets are shifted apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and next-token targets, shifted already: `targets[:, t]` follows `tokens[:, t]`.

    BOS is context and never a target, so nothing is asked to predict where the next document starts;
    EOS is a target.

    Attributes:
        tokens: int64 (B, T).
        targets: int64 (B, T), -100 where nothing is scored.
        num_targets: Scored targets; counted before the batch moves to a device, so reading it never waits.
    """

    tokens: Tensor
    targets: Tensor
    num_targets: int = -1

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

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; for CUDA through pinned memory, without waiting for the copy."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        if device.type != "cuda":
            return Batch(self.tokens.to(device), self.targets.to(device), self.num_targets)
        tokens, targets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.tokens, self.targets))
        return Batch(tokens, targets, self.num_targets)
