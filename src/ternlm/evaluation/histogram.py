"""How often values occur: bins of equal width, counted exactly, whatever the number of batches."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.ops.row_blocks import ELEMENTS


class Histogram:
    """Counts in bins of equal width between two edges; what lies beyond counts in the outermost bins.

    Args:
        low, high: The outer edges.
        bins: How many.

    Attributes:
        counts: int64, (bins,), on the CPU.
        nonfinite: Values that are not finite; they are in no bin.
    """

    def __init__(self, low: float, high: float, bins: int) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.nonfinite = 0

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        for part in values.detach().reshape(-1).split(16 * ELEMENTS):  # float32 counts are exact up to 2^24
            part = part.float()
            finite = part.isfinite()
            if not bool(finite.all()):
                self.nonfinite += int((~finite).sum())
                part = part[finite]
            counts = torch.histc(part.clamp(self.low, self.high), self.counts.numel(), self.low, self.high)
            self.counts += counts.to(torch.int64).cpu()

    def as_dict(self) -> dict[str, Any]:
        """Edges and counts as JSON values."""
        return {"low": self.low, "high": self.high, "counts": self.counts.tolist()}


def spread(values: Tensor, prefix: str) -> dict[str, float]:
    """``PREFIX_mean``, ``_min``, ``_q05``, ``_median``, ``_q95`` and ``_max`` of at least one value."""
    numbers = values.detach().double().cpu().numpy().ravel()
    names = ("min", "q05", "median", "q95", "max")
    quantiles = np.quantile(numbers, (0.0, 0.05, 0.5, 0.95, 1.0))
    named = {f"{prefix}_{name}": float(value) for name, value in zip(names, quantiles, strict=True)}
    return {f"{prefix}_mean": float(numbers.mean()), **named}
