"""Batches from a token stream: random windows for training, consecutive ones for evaluation.

There are no workers, no prefetch queue and no shuffle buffer: the position in the data is one integer,
the number of samples drawn so far over all epochs and all ranks. The order of windows is `sampler`'s.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ternlm.data.batch import IGNORED, Batch
from ternlm.data.sampler import window_start, windows_per_epoch
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
        sequence_length: Targets per window, T.
        seed: Chooses the order of the windows.
        bos_id: The id that is never a target, or None.
        device: Where batches go.

    Attributes:
        while_waiting, say: As `StreamLoader` has them; never called, since prepared data are there.

    Raises:
        DataError: The stream holds fewer than T + 1 tokens.
    """

    def __init__(
        self,
        stream: "TokenStream",
        batch_size: int,
        sequence_length: int,
        seed: int,
        bos_id: int | None,
        device: torch.device | str = "cpu",
    ):
        require_one_window(stream, sequence_length)
        self.stream = stream
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.bos_id = bos_id
        self.device = torch.device(device)
        self.windows_per_epoch = windows_per_epoch(len(stream), sequence_length)
        self.while_waiting: Callable[[str | None], None] = lambda complaint: None
        self.say: Callable[[str], None] = lambda sentence: None

    def batch(self, counter: int, size: int | None = None) -> Batch:
        """Samples [counter, counter + size) as one batch.

        Args:
            counter: Samples drawn before this batch, over all epochs.
            size: Number of windows; the default is `batch_size`.
        """
        length = self.sequence_length + 1
        windows = np.stack([self.stream.read(s, s + length) for s in self.starts(counter, size)])
        return Batch.from_windows(torch.from_numpy(windows.astype(np.int64)), self.bos_id).to(self.device)

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
                self.sequence_length,
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
            "sequence_length": self.sequence_length,
            "windows_per_epoch": self.windows_per_epoch,
            "tokens_per_epoch": self.windows_per_epoch * self.sequence_length,
            "batches_per_epoch": -(-self.windows_per_epoch // self.batch_size),
        }


def evaluation_batches(
    stream: "TokenStream",
    batch_size: int,
    sequence_length: int,
    bos_id: int | None,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Consecutive windows of T targets, in order, each with the previous token as context.

    Every token after the first is a target exactly once (BOS never); the first token of the stream is
    context only. The last window is padded with targets of -100 and the last batch may have fewer rows.

    Args:
        stream: Tokens of the split.
        batch_size: Windows per batch, B.
        sequence_length: Targets per window, T.
        bos_id: The id that is never a target, or None.
        max_tokens: Score only the first so many tokens of the split.
        device: Where batches go.

    Raises:
        DataError: The stream holds fewer than two tokens.
    """
    last = len(stream) - 1 if max_tokens is None else min(len(stream) - 1, max_tokens)
    if last < 1:
        raise DataError(
            f"the {stream.name} split holds {len(stream)} tokens; scoring needs at least 2. "
            f"Raise data.{stream.name}_fraction or set data.{stream.name}_path."
        )
    span = batch_size * sequence_length
    for start in range(0, last, span):
        read = torch.from_numpy(stream.read(start, min(start + span, last) + 1).astype(np.int64))
        yield _consecutive(read, sequence_length, bos_id).to(device)


def require_one_window(stream: "TokenStream", sequence_length: int) -> None:
    """Refuse a stream that cannot fill one window.

    Raises:
        DataError: The stream holds fewer than T + 1 tokens.
    """
    if len(stream) < sequence_length + 1:
        raise DataError(
            f"the {stream.name} split holds {len(stream):,} tokens; one window of data.sequence_length="
            f"{sequence_length} needs {sequence_length + 1:,}. Add text or lower data.sequence_length to "
            f"{max(len(stream) - 1, 1)} or less."
        )


def _consecutive(read: torch.Tensor, sequence_length: int, bos_id: int | None) -> Batch:
    scored = len(read) - 1
    rows = -(-scored // sequence_length)
    tokens = torch.zeros(rows * sequence_length, dtype=torch.int64)
    targets = torch.full((rows * sequence_length,), IGNORED, dtype=torch.int64)
    tokens[:scored], targets[:scored] = read[:-1], read[1:]
    if bos_id is not None:
        targets[targets == bos_id] = IGNORED
    return Batch(tokens.view(rows, sequence_length), targets.view(rows, sequence_length))
