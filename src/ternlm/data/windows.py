"""How spans of the token stream become batches: `CausalWindows` for the next token, `MaskedWindows` for hidden ones.

Which spans, and in what order, is left to the loaders.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.masking import Masker, MaskingSettings
from ternlm.data.sampler import derived_key
from ternlm.errors import SettingsError
from ternlm.tokenizers.interface import Tokenizer


class Windows(ABC):
    """Turns spans of the token stream into batches.

    Attributes:
        sequence_length: Tokens that the model reads per window, T.
        stride: Tokens of the stream from the start of one window to the start of the next.
        overlap: Tokens that a window shares with the next one.
    """

    sequence_length: int
    stride: int
    overlap: int

    @property
    def reads(self) -> int:
        """Tokens of the stream that one window is made of."""
        return self.stride + self.overlap

    @abstractmethod
    def batch(self, spans: Tensor, keys: Sequence[tuple[int, int]]) -> Batch:
        """A batch of spans.

        Args:
            spans: int64 (B, `reads`).
            keys: Epoch and index of each sample: what is drawn for it follows from them and the seed.
        """

    @abstractmethod
    def consecutive(self, read: Tensor, first: int) -> Iterator[Batch]:
        """All of a part of the stream in windows side by side, for evaluation.

        Args:
            read: int64 (n,), whole windows and at the end of the stream perhaps a part of one, then `overlap` tokens.
            first: Number of its first window.
        """


class CausalWindows(Windows):
    """T tokens and the T that follow them, each window with the last target of the one before as context.

    Args:
        sequence_length: T.
        bos_id: The id that is never a target, or None.
    """

    overlap = 1

    def __init__(self, sequence_length: int, bos_id: int | None) -> None:
        self.sequence_length = self.stride = sequence_length
        self.bos_id = bos_id

    def batch(self, spans: Tensor, keys: Sequence[tuple[int, int]] = ()) -> Batch:
        return Batch.from_windows(spans, self.bos_id)

    def consecutive(self, read: Tensor, first: int = 0) -> Iterator[Batch]:
        """One batch; its last window is padded with targets of -100."""
        scored = len(read) - 1
        rows = -(-scored // self.stride)
        tokens = torch.zeros(rows * self.stride, dtype=torch.int64)
        targets = torch.full((rows * self.stride,), IGNORED, dtype=torch.int64)
        tokens[:scored], targets[:scored] = read[:-1], read[1:]
        if self.bos_id is not None:
            targets[targets == self.bos_id] = IGNORED
        yield Batch(tokens.view(rows, self.stride), targets.view(rows, self.stride))


class MaskedWindows(Windows):
    """[CLS] content [SEP], where some tokens of the content are hidden and scored.

    The content of a window is a span of the stream, so it may hold several documents or a part of one, and there is
    no padding. [CLS] and [SEP] are the tokenizer's begin and end markers; one that it does not have is left out, and
    the content is so much longer.

    Args:
        sequence_length: T, markers included.
        tokenizer: Has a mask token.
        settings: How much is hidden, and how.
        seed: Decides what is hidden, with the key of each window: a number, or the identity of a text.

    Raises:
        SettingsError: The tokenizer has no mask token, or T leaves no room between the markers.
    """

    overlap = 0

    def __init__(
        self, sequence_length: int, tokenizer: Tokenizer, settings: MaskingSettings, seed: int | str = 0
    ) -> None:
        require_mask_token(tokenizer)
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        markers = len(self._begin) + len(self._end)
        if sequence_length <= markers:
            raise SettingsError(
                f"data.sequence_length={sequence_length} leaves no room for text between the {markers} markers of "
                f"'{tokenizer.name}'. Give at least {markers + 1}."
            )
        self.sequence_length, self.stride = sequence_length, sequence_length - markers
        self.seed = seed
        self._masker = Masker(tokenizer, settings)

    def batch(self, spans: Tensor, keys: Sequence[tuple[int, int]]) -> Batch:
        content = spans.numpy()
        derived = [derived_key(self.seed, epoch, f"mask {index}") for epoch, index in keys]
        read, kinds = self._masker(content, np.array(derived, dtype=np.uint64))
        rows, first = len(content), len(self._begin)
        stop = first + content.shape[1]
        shape = (rows, stop + len(self._end))
        tokens, targets = torch.empty(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        placed = torch.zeros(shape, dtype=torch.int8)
        tokens[:, :first], tokens[:, stop:] = torch.tensor(self._begin), torch.tensor(self._end)
        tokens[:, first:stop], placed[:, first:stop] = torch.from_numpy(read), torch.from_numpy(kinds)
        targets[:, first:stop] = spans.masked_fill(placed[:, first:stop] == 0, IGNORED)
        return Batch(tokens, targets, kinds=placed)

    def consecutive(self, read: Tensor, first: int) -> Iterator[Batch]:
        """The whole windows as one batch, then what is left as a batch of one shorter row."""
        whole = len(read) // self.stride
        if whole:
            spans = read[: whole * self.stride].view(whole, self.stride)
            yield self.batch(spans, [(0, first + row) for row in range(whole)])
        if len(read) > whole * self.stride:
            yield self.batch(read[None, whole * self.stride :], [(0, first + whole)])


def build_windows(
    masking: MaskingSettings | None, tokenizer: Tokenizer, sequence_length: int, seed: int | str = 0
) -> Windows:
    """The windows of an objective.

    Args:
        masking: How tokens are hidden; None for the prediction of the next token.
        tokenizer: The one that made the stream.
        sequence_length: Tokens that the model reads per window.
        seed: Decides what is hidden.

    Raises:
        SettingsError: As `MaskedWindows` raises it.
    """
    if masking is None:
        return CausalWindows(sequence_length, tokenizer.bos_id)
    return MaskedWindows(sequence_length, tokenizer, masking, seed)


def require_mask_token(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with nothing to write over a hidden token.

    Raises:
        SettingsError: It has no mask token.
    """
    if tokenizer.mask_id is None:
        raise SettingsError(
            f"tokenizer '{tokenizer.name}' has no mask token, which a masked language model needs. Use one of an "
            "encoder, such as tokenizer.name=bert-base-uncased, or train one with tokenizer.name=train "
            "tokenizer.mask_token=true."
        )
