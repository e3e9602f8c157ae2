"""Batches from a token stream: random windows for training, consecutive ones for evaluation.

What a batch is made of is `windows`' matter, the order of windows `sampler`'s. There are no workers, no prefetch
queue and no shuffle buffer: the position in the data is one integer, the number of samples drawn so far over all
epochs and all ranks.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ternlm.data.batch import Batch
from ternlm.data.sampler import window_start, windows_per_epoch
from ternlm.data.windows import Windows
from ternlm.errors import DataError

if TYPE_CHECKING:
    from ternlm.data.corpus import TokenStream


class Loader:
    """Training batches as a pure function of a sample counter.

    Sample c belongs to epoch c // windows_per_epoch. A run on several ranks shares one counter: rank r of
    a step that starts at c takes ``batch(c + r * size, size)``, so the order of the data does not depend
    on how many ranks there are.

    Args:
        stream: Tokens of the training split.
        batch_size: Default number of windows per batch, B.
        windows: Makes a batch of spans of the stream.
        seed: Chooses the order of the windows.
        device: Where batches go.

    Attributes:
        while_waiting, say: As `StreamLoader` has them; never called, since prepared data are there.

    Raises:
        DataError: The stream cannot fill one window.
    """

    def __init__(
        self,
        stream: "TokenStream",
        batch_size: int,
        windows: Windows,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        require_one_window(stream, windows)
        self.stream = stream
        self.batch_size = batch_size
        self.windows = windows
        self.seed = seed
        self.device = torch.device(device)
        self.windows_per_epoch = windows_per_epoch(len(stream), windows.stride, windows.overlap)
        self.while_waiting: Callable[[str | None], None] = lambda complaint: None
        self.say: Callable[[str], None] = lambda sentence: None

    def batch(self, counter: int, size: int | None = None) -> Batch:
        """Samples [counter, counter + size) as one batch.

        Args:
            counter: Samples drawn before this batch, over all epochs.
            size: Number of windows; the default is `batch_size`.
        """
        starts, reads = self.starts(counter, size), self.windows.reads
        spans = np.stack([self.stream.read(start, start + reads) for start in starts])
        keys = [divmod(sample, self.windows_per_epoch) for sample in range(counter, counter + len(starts))]
        return self.windows.batch(torch.from_numpy(spans.astype(np.int64)), keys).to(self.device)

    def starts(self, counter: int, size: int | None = None) -> list[int]:
        """First token of each of the samples [counter, counter + size)."""
        samples = np.arange(counter, counter + (self.batch_size if size is None else size), dtype=np.int64)
        starts = np.empty_like(samples)
        epochs = samples // self.windows_per_epoch
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = window_start(
                self.seed,
                int(epoch),
                samples[chosen] % self.windows_per_epoch,
                len(self.stream),
                self.windows.stride,
                self.windows.overlap,
            )
        return [int(start) for start in starts]

    def samples(self, counter: int, size: int | None = None) -> list[dict[str, Any]]:
        """What identifies each of the samples [counter, counter + size): `epoch`, `index` in it, token `start`."""
        starts = enumerate(self.starts(counter, size), start=counter)
        return [
            {"epoch": sample // self.windows_per_epoch, "index": sample % self.windows_per_epoch, "start": start}
            for sample, start in starts
        ]

    def release(self, counter: int) -> None:
        """Nothing to do: prepared data stay."""

    def epoch(self, counter: int) -> float:
        """Passes over the data after `counter` samples, as a fraction."""
        return counter / self.windows_per_epoch

    def describe(self) -> dict[str, int | None]:
        """What one epoch is made of."""
        return {
            "documents": self.stream.documents,
            "bytes": self.stream.bytes,
            "tokens": len(self.stream),
            "sequence_length": self.windows.sequence_length,
            "windows_per_epoch": self.windows_per_epoch,
            "tokens_per_epoch": self.windows_per_epoch * self.windows.stride,
            "batches_per_epoch": -(-self.windows_per_epoch // self.batch_size),
        }


def evaluation_batches(
    stream: "TokenStream",
    batch_size: int,
    windows: Windows,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Consecutive windows, in order, so that every token of the split belongs to one of them.

    Causal windows have the previous token as context: every token after the first is a target exactly once (BOS
    never), the first is context only, and the last window is padded with targets of -100. Of masked windows the
    last is a shorter batch of its own, since an encoder would read padding. The last batch may have fewer rows.

    Args:
        stream: Tokens of the split.
        batch_size: Windows per batch, B.
        windows: Makes a batch of spans of the stream.
        max_tokens: Only so many tokens from the beginning, those that are context only not counted.
        device: Where batches go.

    Raises:
        DataError: The stream is too short to score anything.
    """
    overlap = windows.overlap
    last = len(stream) - overlap if max_tokens is None else min(len(stream) - overlap, max_tokens)
    if last < 1:
        raise DataError(
            f"the {stream.name} split holds {len(stream)} tokens; scoring needs at least {1 + overlap}. "
            f"Raise data.{stream.name}_fraction or set data.{stream.name}_path."
        )
    span = batch_size * windows.stride
    for start in range(0, last, span):
        read = torch.from_numpy(stream.read(start, min(start + span, last) + overlap).astype(np.int64))
        for batch in windows.consecutive(read, start // windows.stride):
            yield batch.to(device)


def require_one_window(stream: "TokenStream", windows: Windows) -> None:
    """Refuse a stream that cannot fill one window.

    Raises:
        DataError: The stream is shorter than what one window reads.
    """
    missing = windows.reads - len(stream)
    if missing > 0:
        length = windows.sequence_length
        raise DataError(
            f"the {stream.name} split holds {len(stream):,} tokens; one window of data.sequence_length="
            f"{length} needs {windows.reads:,}. Add text or lower data.sequence_length to "
            f"{max(length - missing, 1)} or less."
        )
