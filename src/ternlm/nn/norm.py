"""Root-mean-square normalization."""

import torch
from torch import Tensor, nn

from ternlm.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * g, statistics in float32, gain applied in the dtype of x.

    Args:
        features: Width of the last dimension.
        eps: Added to the mean square, inside the root.

    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features), same dtype."""
        return rms_norm(x, self.weight, self.eps)
