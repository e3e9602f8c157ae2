"""Ternary codes in fewer bits, exactly: 2 bits each (four per byte) or 1.6 bits (five per byte).

`pack_2bit` is the run-time layout: 256 consecutive columns of a row share 64 bytes, the byte j of
a block holding columns j, j + 64, j + 128 and j + 192. `pack_trits` is the smaller layout for disk.
"""

import torch
from torch import Tensor

from ternlm.errors import CheckpointError

BLOCK = 256


def pack_2bit(codes: Tensor) -> Tensor:
    """Four codes per byte, in blocks of 256 columns.

    byte[r, 64 b + j] = sum over n = 0..3 of (Q[r, 256 b + 64 n + j] + 1) * 4^n; the last block is
    padded with zeros (stored as 1).

    Args:
        codes: int8 in {-1, 0, +1}, (rows, columns).

    Returns:
        uint8, (rows, 64 * ceil(columns / 256)).
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % BLOCK)) + 1
    digits = padded.view(rows, -1, 4, 64).to(torch.uint8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device).view(1, 1, 4, 1)
    return (digits << shifts).sum(dim=2, dtype=torch.uint8).view(rows, -1)


def unpack_2bit(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_2bit`: int8 codes, (rows, columns).

    Raises:
        CheckpointError: A 2-bit field holds 3, which no ternary code has.
    """
    if bool((packed & (packed >> 1) & 0b01010101).any()):
        raise CheckpointError("packed weights hold the 2-bit value 3, which is no ternary code. Export again.")
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).view(1, 1, 4, 1)
    digits = (packed.view(packed.shape[0], -1, 1, 64) >> shifts).bitwise_and_(3)
    return digits.view(packed.shape[0], -1).view(torch.int8).sub_(1)[:, :columns].contiguous()


def pack_trits(codes: Tensor) -> Tensor:
    """Five codes per byte, most significant first: byte = sum over n = 0..4 of (Q[5t + n] + 1) * 3^(4 - n).

    Args:
        codes: int8 in {-1, 0, +1}, (rows, columns).

    Returns:
        uint8 in 0..242, (rows, ceil(columns / 5)); the last byte of a row is padded with zeros.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 5)) + 1
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.uint8, device=codes.device)
    return (padded.view(rows, -1, 5).to(torch.uint8) * powers).sum(dim=2, dtype=torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_trits`: int8 codes, (rows, columns).

    Raises:
        CheckpointError: A byte is above 242, which no five codes have.
    """
    if bool((packed > 242).any()):
        raise CheckpointError("packed weights hold a byte above 242, which is no group of trits. Export again.")
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.uint8, device=packed.device)
    digits = packed.unsqueeze(-1) // powers % 3
    return digits.view(packed.shape[0], -1)[:, :columns].to(torch.int8) - 1
