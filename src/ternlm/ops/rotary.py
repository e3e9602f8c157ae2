"""Rotary position embedding: pairs of channels turned by an angle that grows with the position."""

import torch
from torch import Tensor


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """cos and sin of position * theta^(-2i / head_dim), stacked, in float32.

    Args:
        length: Number of positions.
        head_dim: Width of a head, even.
        theta: Base of the frequencies.

    Returns:
        (2, length, head_dim): cos and sin, the first half of the channels repeated in the second.

    Source:
        Su et al. 2021, "RoFormer" (arXiv 2104.09864), in the half-split channel order of Llama.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, theta**-exponents).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of the channels.

    Args:
        x: (batch, heads, time, head_dim).
        cos, sin: (time, head_dim) or (batch, 1, time, head_dim), cast to the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
