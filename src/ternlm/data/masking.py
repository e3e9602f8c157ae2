"""Hiding tokens for a masked language model: which positions, and what the model reads there instead.

Everything follows from one 64-bit key per row, so a row is masked alike in any batch, process and sitting. Where
rows come from and how they become batches is left to `windows`.
"""

from typing import Self

import numpy as np
from pydantic import field_validator, model_validator

from ternlm.data.sampler import mix
from ternlm.settings import Float, Settings
from ternlm.tokenizers.interface import Tokenizer

MASK, RANDOM, KEPT = 1, 2, 3
"""What stands at a scored position, as `Batch.kinds` says it; 0 where nothing is scored."""

KINDS = {"mask": MASK, "random": RANDOM, "kept": KEPT}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LAST = np.uint64(2**64 - 1)
_DRAWS = 3


class MaskingSettings(Settings):
    """How a masked language model's text is hidden from it.

    Attributes:
        mask_fraction: Share of the tokens of a window that are scored, special tokens not counted.
        mask_share: Share of the scored positions at which the model reads the mask token.
        random_share: Share at which it reads a random token; at the rest it reads what stood there.
        whole_word: Choose words instead of tokens, so that no piece of a chosen word is left to see.
    """

    mask_fraction: Float = 0.15
    mask_share: Float = 0.8
    random_share: Float = 0.1
    whole_word: bool = False

    @field_validator("mask_fraction")
    @classmethod
    def _hides_some_and_shows_some(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("something must be hidden and something must be left to see; give a share such as 0.15")
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.mask_share < 0 or self.random_share < 0 or self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share} are shares of the scored "
                "positions; neither may be negative, and their sum must not exceed 1"
            )
        return self


class Masker:
    """Hides tokens of rows, given one key per row.

    Of n ordinary tokens in a row, max(1, floor(fraction * n)) are scored, drawn without replacement; of whole words
    so many, in random order, that at least as many tokens are scored. Ordinary is what emits text; special tokens,
    the unknown token among them, are never scored and never drawn as random tokens.

    A piece continues a word if there is an ordinary piece before it, if it does not begin with white space and the
    one before does not end with it: `##` pieces of WordPiece, and of byte-level BPE and SentencePiece the pieces
    without a leading space, so that punctuation belongs to the word before it there and is a word in WordPiece.

    Args:
        tokenizer: Has a mask token.
        settings: Shares.

    Source:
        Devlin et al. 2018, BERT, section 3.1 (arXiv 1810.04805); whole words: its repository, May 2019. The
        generator is SplitMix64 (Steele et al. 2014).
    """

    def __init__(self, tokenizer: Tokenizer, settings: MaskingSettings) -> None:
        pieces, special = tokenizer.pieces(), tokenizer.special_ids()
        assert tokenizer.mask_id is not None
        self.settings = settings
        self.mask_id = tokenizer.mask_id
        self.is_ordinary = np.array([bool(piece) and i not in special for i, piece in enumerate(pieces)])
        self._ordinary = np.flatnonzero(self.is_ordinary)
        self._begins = np.array([piece[:1].isspace() for piece in pieces])
        self._ends = np.array([piece[-1:].isspace() for piece in pieces])

    def __call__(self, tokens: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model reads in place of the tokens, and the kind of each position.

        Args:
            tokens: int64 (B, n).
            keys: uint64 (B,).

        Returns:
            int64 (B, n), and int8 (B, n) as in `Batch.kinds`.
        """
        scored = self._choose(tokens, _draw(keys[:, None], np.arange(tokens.shape[1]), 0))
        rows, positions = np.nonzero(scored)
        settings = self.settings
        share = (_draw(keys[rows], positions, 1) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        is_random = share < settings.mask_share + settings.random_share
        kind = np.where(share < settings.mask_share, MASK, np.where(is_random, RANDOM, KEPT)).astype(np.int8)
        other = ((_draw(keys[rows], positions, 2) >> np.uint64(32)) * np.uint64(len(self._ordinary))) >> np.uint64(32)
        replaced = np.where(kind == MASK, self.mask_id, self._ordinary[other.astype(np.int64)])
        read, kinds = tokens.copy(), np.zeros(tokens.shape, dtype=np.int8)
        read[rows, positions] = np.where(kind == KEPT, tokens[rows, positions], replaced)
        kinds[rows, positions] = kind
        return read, kinds

    def _choose(self, tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The scored positions, bool (B, n): those that come first in a random order of tokens or words."""
        ordinary = self.is_ordinary[tokens]
        count = ordinary.sum(axis=1)
        wanted = np.maximum(1, np.floor(self.settings.mask_fraction * count + 1e-9).astype(np.int64))
        order = order >> np.uint64(1)
        if self.settings.whole_word:
            order = np.take_along_axis(order, self._word_starts(tokens, ordinary), axis=1)
        order = np.where(ordinary, order, _LAST)
        last = np.take_along_axis(np.sort(order, axis=1), np.minimum(wanted, tokens.shape[1])[:, None] - 1, axis=1)
        chosen: np.ndarray = ordinary & (order <= last)
        return chosen

    def _word_starts(self, tokens: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
        """Position of the first piece of each token's word, int64 (B, n)."""
        starts = self._begins[tokens]
        starts[:, 0] = True
        starts[:, 1:] |= self._ends[tokens[:, :-1]] | ~ordinary[:, :-1]
        positions = np.where(starts, np.arange(tokens.shape[1]), 0)
        found: np.ndarray = np.maximum.accumulate(positions, axis=1)
        return found


def _draw(keys: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """Uniform 64-bit numbers: number 3 i + purpose + 1 of each key's generator for position i."""
    numbers = (_DRAWS * positions + purpose + 1).astype(np.uint64)
    drawn: np.ndarray = mix(keys + numbers * _GOLDEN)
    return drawn
