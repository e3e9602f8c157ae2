"""Token blocks on disk, with a record of every block ever made, so that any of them can be made again.

A folder holds ``block-NNNNNN.bin`` (little-endian token ids) for the blocks that are there now, and
``index.jsonl`` with one line per block that was ever there. A block comes into being in this order: written
under another name, synchronized, renamed, entered in the index; so whatever the moment of a crash, a block is
either whole and in the index, or is made again. When to make and delete blocks is left to `producer`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ternlm.data.reader import Position
from ternlm.errors import DataError
from ternlm.files import AppendFile, from_json, read_regular, synchronize_folder, write_durably

INDEX = "index.jsonl"
PARTIAL = ".part"


@dataclass(frozen=True)
class Block:
    """A block in the index.

    Attributes:
        start, end: Positions of its first and last token; the next block starts at `end`.
        documents: Documents that are complete with this block.
        document_tokens, bytes: Tokens, markers included, and raw UTF-8 bytes of these documents.
        sha256: Of its tokens as they lie on disk.
    """

    start: Position
    end: Position
    documents: int
    document_tokens: int
    bytes: int
    sha256: str


class BlockStore:
    """The blocks of a folder.

    Args:
        folder: Made if missing.
        tokens: Tokens per block.
        dtype: Type of the ids on disk.

    Attributes:
        made: Every block ever made, by number.
        present: Numbers of the blocks that are on disk.
        block_bytes: Size of a block on disk.
    """

    def __init__(self, folder: Path, tokens: int, dtype: np.dtype[Any]) -> None:
        self.folder = folder
        self.tokens = tokens
        self.dtype = dtype
        self.block_bytes = tokens * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        self.made, length = _read_index(folder / INDEX)
        self._index = AppendFile(folder / INDEX, length)
        synchronize_folder(folder)
        self.present = self._tidied()

    def add(self, tokens: np.ndarray, block: Block) -> None:
        """Bring the next block and its entry to the disk.

        Raises:
            OSError: The disk is full or failing; the store is to be opened anew.
        """
        number = len(self.made)
        self._write(number, tokens)
        self._index.append(_line(number, block))
        self._index.synchronize()
        self.made.append(block)
        self.present.add(number)

    def restore(self, number: int, tokens: np.ndarray) -> None:
        """Bring a block back that was made before.

        Raises:
            DataError: The tokens are not those of the block.
            OSError: As `add`.
        """
        if digest(tokens) != self.made[number].sha256:
            raise DataError(
                f"block {number} of {self.folder} was made again and differs from what it was: the source has "
                "changed since. Restore it, or start a new run."
            )
        self._write(number, tokens)
        self.present.add(number)

    def read(self, number: int) -> np.ndarray | None:
        """The tokens of a block, (tokens,), or None if its file is missing or damaged."""
        try:
            content = read_regular(self._path(number), self.block_bytes)
        except OSError:
            return None
        tokens = np.frombuffer(content, dtype=self.dtype) if len(content) == self.block_bytes else None
        return tokens if tokens is not None and digest(tokens) == self.made[number].sha256 else None

    def remove(self, number: int) -> None:
        """Delete a block; its entry stays."""
        self.present.discard(number)
        self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the index."""
        self._index.close()

    def _write(self, number: int, tokens: np.ndarray) -> None:
        path = self._path(number)
        partial = path.with_name(path.name + PARTIAL)
        partial.unlink(missing_ok=True)
        write_durably(partial, tokens.tobytes())
        partial.replace(path)
        synchronize_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.bin"

    def _tidied(self) -> set[int]:
        """Numbers of the whole blocks in the folder; what else a crash left is deleted."""
        present = {number for number in range(len(self.made)) if self._is_whole(self._path(number))}
        known = {self._path(number) for number in present}
        for path in self.folder.glob("block-*"):
            if path not in known:
                path.unlink()
        return present

    def _is_whole(self, path: Path) -> bool:
        return path.is_file() and path.stat().st_size == self.block_bytes


def digest(tokens: np.ndarray) -> str:
    """sha256 of tokens as they lie on disk."""
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def _line(number: int, block: Block) -> bytes:
    fields = {"block": number, **vars(block), "start": block.start.as_list(), "end": block.end.as_list()}
    return (json.dumps({**fields, "check": _check(fields)}, sort_keys=True) + "\n").encode()


def _check(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _read_index(path: Path) -> tuple[list[Block], int]:
    """The entries before the first line that is torn or damaged, and their length in bytes."""
    blocks: list[Block] = []
    length = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            fields = from_json(line)
            check, number = fields.pop("check"), fields["block"]
            if check != _check(fields) or number != len(blocks) or not line.endswith(b"\n"):
                break
            start, end = Position(*fields["start"]), Position(*fields["end"])
            del fields["block"]
            blocks.append(Block(**{**fields, "start": start, "end": end}))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        length += len(line)
    return blocks, length
