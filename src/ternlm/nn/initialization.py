"""Initial values, each a pure function of (seed, parameter name)."""

import hashlib

import torch
from torch import Tensor


@torch.no_grad()
def normal_(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill with N(0, std^2) from a generator keyed by (seed, name).

    Adding, removing or reordering other parameters does not change the draw, and neither does the
    global random state. The numbers are drawn on the CPU, so every device starts alike.
    """
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(parameter.shape, generator=generator) * std
    parameter.copy_(values)
