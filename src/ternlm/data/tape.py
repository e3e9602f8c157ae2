"""The training tokens of a source as one endless sequence, which can be entered at any token.

Per document the sequence holds [BOS] tokens [EOS], each marker only where the tokenizer has it, pass after pass.
It is a pure function of the source, the tokenizer and the held-out documents.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ternlm.data.blocks import Block, digest
from ternlm.data.catalog import document_hash
from ternlm.data.corpus import token_dtype
from ternlm.data.documents import batches
from ternlm.data.reader import Patience, Position, Source, read_pass
from ternlm.errors import DataError
from ternlm.tokenizers.interface import Tokenizer


class Document(NamedTuple):
    """A document of the training split.

    Attributes:
        position: Of its first token.
        ids: Its tokens with markers, (n,).
        bytes: UTF-8 bytes of its text.
    """

    position: Position
    ids: np.ndarray
    bytes: int


class Tape:
    """The training tokens of a source.

    Args:
        source: Rows with their splits.
        tokenizer: Makes the ids.
        held_out: Hashes of documents that are not trained on, whatever their split.
        patience: Waits where the source cannot be read.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, held_out: frozenset[int], patience: Patience) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._source = source
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._patience = patience
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def documents(self, start: Position, say: Callable[[str], None] = lambda text: None) -> Iterator[Document]:
        """Documents from the row of `start` on, without end.

        Args:
            start: Where to begin.
            say: Called with a sentence when a pass begins after another.

        Raises:
            DataError: A whole pass holds no training documents, or the source cannot be read.
        """
        while True:
            is_empty = True
            for batch in batches(self._training_rows(start)):
                self._patience.wait(0)
                encoded = self._tokenizer.encode_batch([text for _, text in batch])
                for (position, text), ids in zip(batch, encoded, strict=True):
                    marked = np.array([*self._begin, *ids, *self._end], dtype=self.dtype)
                    if len(marked):
                        is_empty = False
                        yield Document(position, marked, len(text.encode()))
            if is_empty and start == Position(start.epoch):
                raise DataError(f"{self._source.name} leaves no training documents. Choose another source.")
            start = Position(start.epoch + 1)
            say(f"{self._source.name} is read to its end: pass {start.epoch + 1} begins")

    def blocks(
        self, start: Position, size: int, say: Callable[[str], None] = lambda text: None
    ) -> Iterator[tuple[np.ndarray, Block]]:
        """Consecutive runs of `size` tokens, each beginning with the last token of the one before.

        Args:
            start: Position of the first token.
            size: Tokens per block, at least 2.
            say: As `documents` takes it.

        Raises:
            DataError: As `documents`, or there is no such token in the source any more.
        """
        documents = self.documents(start, say)
        document = next(documents)
        offset = start.token
        is_same = document.position == Position(start.epoch, start.file, start.row) and offset < len(document.ids)
        if start != Position() and not is_same:
            raise DataError(f"{self._source.name} has changed since it was read. Restore it, or start a new run.")
        last: list[int] = []
        while True:
            tokens = np.empty(size, dtype=self.dtype)
            tokens[: len(last)] = last
            filled = len(last)
            count = token_count = byte_count = 0
            while filled < size:
                if offset == len(document.ids):
                    document, offset = next(documents), 0
                taken = document.ids[offset : offset + size - filled]
                tokens[filled : filled + len(taken)] = taken
                filled, offset = filled + len(taken), offset + len(taken)
                # the token that two blocks share completes a document in the first of them only
                if offset == len(document.ids) and (filled > 1 or start == Position()):
                    count, token_count = count + 1, token_count + len(document.ids)
                    byte_count += document.bytes
            place = document.position
            end = Position(place.epoch, place.file, place.row, offset - 1)
            yield tokens, Block(start, end, count, token_count, byte_count, digest(tokens))
            start, last = end, [int(tokens[-1])]

    def _training_rows(self, start: Position) -> Iterator[tuple[Position, str]]:
        for position, split, text in read_pass(self._source, start, self._patience):
            is_training = split == "train" and text and not text.isspace()
            if is_training and document_hash(text.encode()) not in self._held_out:
                yield position, text
