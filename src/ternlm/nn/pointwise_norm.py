"""Norms without statistics: a bounded curve for each element, learned scales, and no division by a norm."""

import torch
from torch import Tensor, nn

from ternlm.ops.grouped_tanh import grouped_tanh


class DyT(nn.Module):
    """y = weight * tanh(alpha x) + bias, computed in float32.

    alpha is one number and starts at 1, which suits widths up to about 1024; weight starts at 1, bias at 0.

    Args:
        features: Width of the last dimension.

    Source:
        Zhu et al. 2025, Transformers without Normalization (arXiv 2503.10622).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.alpha = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def initialize(self) -> None:
        """The documented initial values."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.alpha.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features), same dtype."""
        return grouped_tanh(x, self.weight, self.bias, self.alpha, None, 0)


class Derf(nn.Module):
    """y = weight * erf(alpha x + shift) + bias, computed in float32.

    alpha and shift are one number each and start at 1/2 and 0; weight starts at 1, bias at 0.

    Args:
        features: Width of the last dimension.

    Source:
        Chen et al. 2025, Stronger Normalization-Free Transformers (arXiv 2512.10938).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.alpha = nn.Parameter(torch.full((), 0.5))
        self.shift = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def initialize(self) -> None:
        """The documented initial values."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.alpha.fill_(0.5)
        self.shift.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features), same dtype."""
        bounded = torch.erf(self.alpha * x.to(self.weight.dtype) + self.shift)
        return torch.addcmul(self.bias, self.weight, bounded).to(x.dtype)
