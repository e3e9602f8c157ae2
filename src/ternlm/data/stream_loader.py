"""Batches from a stream: windows of one token block after another, in an order computed from the seed.

As for prepared data, the position is one integer, the number of samples drawn so far by all ranks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ternlm.data.batch import Batch
from ternlm.data.producer import Producer
from ternlm.data.sampler import permute
from ternlm.data.windows import Windows


class StreamLoader:
    """Training batches as a pure function of a sample counter; `batch` waits until its blocks are there.

    A block shares its first token with the block before and is cut into W windows. Causal windows fill it, so
    every token of the stream is a target exactly once; masked ones leave less than a window at its end.
    Sample c is window permutation(seed, c // W)[c % W] of block c // W.

    Args:
        producer: Gives the blocks.
        batch_size: Default number of windows per batch, B.
        windows: Makes a batch of spans of a block.
        seed: Chooses the order of the windows in each block.
        device: Where batches go.

    Attributes:
        windows_per_block: W.
        windows_per_epoch: None: how long the stream is shows only when it ends.
        while_waiting: Called about every 0.2 s while a block is not there, with the complaint about the source
            or None where it is merely slow; what it raises ends the waiting.
        say: Called with a sentence when a pass over the source ends or a block had to be made again.
    """

    windows_per_epoch: int | None = None

    def __init__(
        self,
        producer: Producer,
        batch_size: int,
        windows: Windows,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        self.batch_size = batch_size
        self.windows = windows
        self.seed = seed
        self.device = torch.device(device)
        self.windows_per_block = (producer.store.tokens - 1) // windows.stride
        self.while_waiting: Callable[[str | None], None] = lambda complaint: None
        self.say: Callable[[str], None] = lambda sentence: None
        self._producer = producer
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, counter: int, size: int | None = None) -> Batch:
        """Samples [counter, counter + size) as one batch.

        Args:
            counter: Samples drawn before this batch.
            size: Number of windows; the default is `batch_size`.

        Raises:
            DataError: The source cannot be read any more.
        """
        starts, reads = self._starts(counter, size), self.windows.reads
        spans = np.empty((len(starts), reads), dtype=np.int64)
        for row, start in enumerate(starts):
            number, offset = divmod(int(start), self._producer.store.tokens - 1)
            spans[row] = self._tokens(number)[offset : offset + reads]
        while self._producer.sentences:
            self.say(self._producer.sentences.popleft())
        keys = [(0, counter + row) for row in range(len(starts))]
        return self.windows.batch(torch.from_numpy(spans), keys).to(self.device)

    def samples(self, counter: int, size: int | None = None) -> list[dict[str, Any]]:
        """What identifies each of the samples [counter, counter + size).

        Returns:
            For each: `epoch`, the pass its block begins in, or None if the block was never made; `index`, the
            sample itself; `start`, the window's first token counted from the beginning of the stream.
        """
        found = []
        for sample, start in enumerate(self._starts(counter, size), start=counter):
            epoch = self.epoch(sample)
            found.append({"epoch": None if epoch is None else int(epoch), "index": sample, "start": int(start)})
        return found

    def epoch(self, counter: int) -> float | None:
        """Completed passes over the source where the block of this sample begins, None if it was never made."""
        made, number = self._producer.store.made, counter // self.windows_per_block
        return float(made[number].start.epoch) if number < len(made) else None

    def describe(self) -> dict[str, int | None]:
        """What was read so far."""
        made, tokens = self._producer.store.made, self._producer.store.tokens
        return {
            "documents": sum(block.documents for block in made),
            "bytes": sum(block.bytes for block in made),
            "tokens": len(made) * (tokens - 1) + bool(made),
            "sequence_length": self.windows.sequence_length,
            "windows_per_epoch": None,
            "tokens_per_epoch": None,
            "batches_per_epoch": None,
            "windows_per_block": self.windows_per_block,
        }

    def release(self, counter: int) -> None:
        """Allow everything to be deleted that only samples before `counter` need."""
        self._producer.release(counter // self.windows_per_block)

    def _starts(self, counter: int, size: int | None) -> np.ndarray:
        """First token of each of the samples, counted from the beginning of the stream, int64."""
        samples = np.arange(counter, counter + (self.batch_size if size is None else size), dtype=np.int64)
        blocks = samples // self.windows_per_block
        starts = blocks * (self._producer.store.tokens - 1)
        for number in np.unique(blocks):
            chosen = samples[blocks == number] % self.windows_per_block
            order = permute(chosen, self.windows_per_block, self.seed, int(number))
            starts[blocks == number] += order * self.windows.stride
        return starts

    def _tokens(self, number: int) -> np.ndarray:
        if self._block[0] != number:
            self._block = (number, self._producer.block(number, self.while_waiting))
        return self._block[1]
