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
    values = torch.randn(parameter.shape, generator=generator_of(seed, name)) * std
    parameter.copy_(values)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose draws are a pure function of (seed, name)."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
