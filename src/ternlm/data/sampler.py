"""Which window of the token stream is sample k of epoch e: a pure function, with no state to save.

An epoch shifts all windows by a phase in [0, S), so that window edges fall elsewhere each time, and
visits them in the order of a keyed permutation that is computed, not stored. Everything follows from
(seed, epoch, index); how batches are made of windows is left to `loader`.
"""

import hashlib

import numpy as np

ROUNDS = 6


def windows_per_epoch(num_tokens: int, stride: int, overlap: int = 1) -> int:
    """Windows that fit for every phase; 0 if not even one fits.

    One window needs S + o tokens. With any phase up to S - 1, floor((N - S - o + 1) / S) windows fit; a stream
    that holds one window but not at every phase has one.

    Args:
        num_tokens: Length of the stream, N.
        stride: Tokens from one window to the next, S.
        overlap: Tokens that a window shares with the next one, o: 1 where the last is a target only, or 0.
    """
    if num_tokens < stride + overlap:
        return 0
    return max(1, (num_tokens - stride - overlap + 1) // stride)


def window_start(
    seed: int, epoch: int, index: int | np.ndarray, num_tokens: int, stride: int, overlap: int = 1
) -> np.ndarray:
    """First token of sample `index` of an epoch.

    start = phase(seed, epoch) + S * permutation(seed, epoch)[index]

    Args:
        seed: Any integer.
        epoch: Number of completed passes over the stream.
        index: Sample numbers within the epoch, in [0, windows_per_epoch), a number or an array.
        num_tokens: Length of the stream, N.
        stride: Tokens from one window to the next, S.
        overlap: Tokens that a window shares with the next one, o.

    Returns:
        int64, the shape of `index`; the window is [start, start + S + o).

    Raises:
        ValueError: An index is outside the epoch.
    """
    windows = windows_per_epoch(num_tokens, stride, overlap)
    indices = np.asarray(index, dtype=np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= windows):
        raise ValueError(f"sample index outside the epoch of {windows} windows")
    phases = min(stride, num_tokens - windows * stride - overlap + 1)
    phase = derived_key(seed, epoch, "phase") % phases
    starts: np.ndarray = phase + stride * permute(indices, windows, seed, epoch)
    return starts


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Apply the permutation of [0, size) that belongs to (seed, epoch).

    A balanced Feistel network permutes [0, 4^h), the smallest such range that holds `size`; values that
    land outside are sent through again until they fall inside (cycle walking), which keeps it a bijection.
    O(1) memory whatever the size.

    Args:
        indices: int64, any shape, in [0, size).
        size: Length of the permuted range.

    Source:
        Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 4 and 5.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(derived_key(seed, epoch, f"round {number}")) for number in range(ROUNDS)]
    values = _feistel(indices.astype(np.uint64).reshape(-1), half, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of 64-bit numbers (Steele et al. 2014); unsigned overflow is wanted."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def derived_key(seed: int | str, epoch: int, purpose: str) -> int:
    """A 64-bit number that belongs to a purpose, a pure function of the arguments."""
    digest = hashlib.blake2b(f"{seed}|{epoch}|{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
