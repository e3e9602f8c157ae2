"""Counter-based noise: numbers that are a pure function of (key, stream, row, column) and of nothing else.

There is no generator and no state, so a forward pass that is repeated (activation checkpointing, a resumed run)
meets the same numbers, and the global random state is never touched. The arithmetic is that of wrapping 32-bit
integers, exact everywhere, so a compiled graph, an eager one and another device agree to the last bit.

A column and a row are hashed once each; an element mixes the two hashes and yields 16 bits of noise, two
neighbouring columns per 32-bit word.
"""

import hashlib
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _SECOND = -2048144789, -1028477387  # the odd factors of MurmurHash3's finalizer
_HALF_WORDS_IN_ORDER = sys.byteorder == "little"


def noise_key(seed: int, *parts: int) -> int:
    """A key in [0, 2^31) from a seed and whatever else tells two draws apart (step, micro-step, site)."""
    text = "|".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def uniform(key: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Numbers k / 2^16, k = 0 .. 65,535, that look independent and uniform.

    Args:
        key: (), int32 or int64 in [0, 2^31), on the device of the result.
        shape: The last dimension counts as columns, all others together as rows.
        stream: Tells draws under one key apart.

    Returns:
        float32 in [0, 1).
    """
    columns = shape[-1] if len(shape) else 1
    rows = math.prod(shape[:-1]) if len(shape) else 1
    words = NoiseRows(key, rows, columns, stream).words(slice(0, rows))
    return ((words.float() + 32768.0) * 2.0**-16).view(tuple(shape))


def happens(key: Tensor, chance: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """True with probability `chance`, (): never at 0, always at 1. Bool, of the given shape."""
    return uniform(key, shape, stream) < chance


def bypassed(key: Tensor, chance: Tensor, by: str, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Which elements of a tensor go past a quantizer, as a mask that broadcasts to its shape.

    Args:
        key: (), int32 or int64 in [0, 2^31).
        chance: (), the probability.
        by: ``token_row``, one draw for each place of all but the last dimension; ``batch``, one draw for all;
            ``element``.
        shape: Shape of the tensor.
        stream: Tells draws under one key apart.
    """
    shapes = {"token_row": (*shape[:-1], 1), "batch": (1,) * len(shape), "element": tuple(shape)}
    return happens(key, chance, shapes[by], stream)


class NoiseRows:
    """The noise of a matrix, made a few rows at a time.

    Args:
        key: (), int32 or int64 in [0, 2^31).
        rows, columns: Shape of the matrix.
        stream: Tells draws under one key apart.
    """

    def __init__(self, key: Tensor, rows: int, columns: int, stream: int = 0) -> None:
        self._columns = columns
        self._is_packed = _HALF_WORDS_IN_ORDER and not torch.compiler.is_compiling()
        key = _hash(key.to(torch.int32) + stream * 40503)
        places = torch.arange(columns, dtype=torch.int32, device=key.device)
        self._is_odd = (places & 1) == 1
        pairs = places[: (columns + 1) // 2] if self._is_packed else places >> 1
        # Exclusive or, not sum or product: a compiler may do arithmetic on positions in more than 32 bits.
        self._column_hashes = _hash(pairs ^ key)[None]
        key = _hash(key ^ _FIRST)  # or the hashes of row i and of column i would cancel
        self._row_hashes = _hash(torch.arange(rows, dtype=torch.int32, device=key.device) ^ key)[:, None]

    def words(self, block: slice) -> Tensor:
        """Signed 16-bit noise of some rows: (rows, columns), int16, or int32 of the same values in a compiled graph."""
        return self._halves(_mix(self._column_hashes ^ self._row_hashes[block]))

    def odd(self, block: slice) -> Tensor:
        """Odd numbers between -2^15 and 2^15, symmetric, so of mean zero: (rows, columns), float32."""
        mixed = _mix(self._column_hashes ^ self._row_hashes[block])
        return self._halves(mixed.bitwise_or_(0x10001)).float()

    def _halves(self, mixed: Tensor) -> Tensor:
        if self._is_packed:
            return mixed.view(torch.int16)[:, : self._columns]
        # What the view above reads: the low half of a word is the even column, the high half the odd one.
        return torch.where(self._is_odd, mixed >> 16, (mixed << 16) >> 16)


def _hash(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3: every bit of the result depends on every bit of x."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _mix(x: Tensor) -> Tensor:
    """A cheaper hash, in place, of what is a mixture of hashes already."""
    x = x.mul_(_FIRST)
    x = x.add_(x >> 16)
    x = x.mul_(_SECOND)
    return x.add_(x >> 16)
