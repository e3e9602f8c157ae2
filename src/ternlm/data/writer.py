"""The append-only writer of one split's shards, whose state fits in one small dictionary.

Everything a split consists of is a pure function of the documents appended, so cutting the files back to
a committed length and appending the same documents again gives the same bytes. When to commit, and what
becomes of the whole, is left to `shards`.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ternlm.data.corpus import TABLES, split_id
from ternlm.errors import DataError
from ternlm.files import AppendFile, synchronize_folder

PARTIAL = ".part"
_CHANGED = "it was changed from outside. Delete the folder and run `ternlm data prepare` again."


class SplitWriter:
    """Appends documents to one split.

    Files carry the ending ``.part`` until they are complete: shards when they are full, the rest in `finish`.

    Args:
        directory: The split's folder.
        dtype: Type of the ids on disk.
        shard_tokens: Most tokens per shard.
        state: What `commit` returned last, or None to start.
    """

    def __init__(self, directory: Path, dtype: np.dtype[Any], shard_tokens: int, state: dict[str, Any] | None = None):
        self.directory = directory
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        state = state or {}
        self.shards: list[dict[str, Any]] = list(state.get("shards", []))
        self.documents = int(state.get("documents", 0))
        self.tokens = int(state.get("tokens", 0))
        self.bytes = int(state.get("bytes", 0))
        self.words = int(state.get("words", 0))
        self.longest_document = int(state.get("longest_document", 0))
        self.dropped = int(state.get("dropped", 0))
        directory.mkdir(parents=True, exist_ok=True)
        self._remove_later_shards()
        self._committed: dict[str, str] = dict(state.get("sha256", {}))
        self._has_new_names = False
        self._tables = [self._reopen(name, self.documents * size) for name, size in TABLES.items()]
        self._open_shard(self.tokens - sum(shard["tokens"] for shard in self.shards))
        self._committed = {}

    def append(self, ids: np.ndarray, raw_bytes: int, words: int, digest: int) -> None:
        """Add one document.

        Args:
            ids: Its tokens with markers, (n,), any integer dtype.
            raw_bytes: UTF-8 bytes of its text.
            words: Whitespace-separated words of its text.
            digest: First 8 bytes of sha256 of its raw bytes.
        """
        self._append_tokens(ids.astype(self.dtype))
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += raw_bytes
        self.words += words
        self.longest_document = max(self.longest_document, len(ids))
        documents, hashes = self._tables
        documents.append(np.array([self.tokens, raw_bytes], dtype="<u8").tobytes())
        hashes.append(np.array([digest], dtype="<u8").tobytes())

    def commit(self) -> dict[str, Any]:
        """Bring everything appended to the disk and return the state that continues from here."""
        for file in (*self._tables, self._file):
            file.synchronize()
        if self._has_new_names:
            synchronize_folder(self.directory)
            self._has_new_names = False
        proof = {file.path.name: file.digest.hexdigest() for file in (*self._tables, self._file)}
        return {
            "shards": self.shards,
            "tokens": self.tokens,
            "dropped": self.dropped,
            "sha256": proof,
            **self._totals(),
        }

    def hashes(self) -> np.ndarray:
        """Hashes of all documents so far, sorted, uint64."""
        self._tables[1].write_out()
        return np.sort(np.fromfile(self.directory / ("hashes.bin" + PARTIAL), dtype="<u8"))

    def finish(self) -> dict[str, Any]:
        """Give all files their final names and return the split's part of the manifest."""
        if self._tokens_in_shard:
            self._close_shard()
        else:
            self._file.close()
            self._file.path.unlink()
        for file in self._tables:
            _complete(file)
        synchronize_folder(self.directory)
        tables = {name: file.digest.hexdigest() for name, file in zip(TABLES, self._tables, strict=True)}
        description = {**self._totals(), "tokens": self.tokens, "shards": self.shards, "tables": tables}
        return {**description, "eval_id": split_id(description)}

    def close(self) -> None:
        """Close the files; what was not committed is forgotten at the next start."""
        with ExitStack() as stack:  # each is closed, also where another fails
            for file in (*self._tables, self._file):
                stack.callback(file.close)

    def _append_tokens(self, ids: np.ndarray) -> None:
        while len(ids):
            taken = ids[: self.shard_tokens - self._tokens_in_shard]
            content = taken.tobytes()
            self._file.append(content)
            self._tokens_in_shard += len(taken)
            ids = ids[len(taken) :]
            if self._tokens_in_shard == self.shard_tokens:
                self._close_shard()
                self._open_shard(0)

    def _open_shard(self, tokens: int) -> None:
        self._shard_name = f"shard-{len(self.shards):05d}.bin"
        self._tokens_in_shard = tokens
        self._file = self._reopen(self._shard_name, tokens * self.dtype.itemsize)

    def _close_shard(self) -> None:
        _complete(self._file)
        synchronize_folder(self.directory)
        # a new list: a state handed out by commit must not change afterwards
        self.shards = [
            *self.shards,
            {"file": self._shard_name, "tokens": self._tokens_in_shard, "sha256": self._file.digest.hexdigest()},
        ]

    def _remove_later_shards(self) -> None:
        for path in self.directory.glob("shard-*.bin*"):
            if int(path.name[6:11]) > len(self.shards):
                path.unlink()

    def _reopen(self, name: str, length: int) -> AppendFile:
        """Open a partial file cut back to `length` bytes, which must be those that were committed.

        A file may have reached its final name after the last commit; then it becomes partial again.
        """
        path = self.directory / name
        partial = path.with_name(name + PARTIAL)
        if path.exists():
            path.rename(partial)
        found = partial.stat().st_size if partial.exists() else 0
        if found < length:
            raise DataError(f"{partial} has {found:,} bytes, {length:,} were committed: {_CHANGED}")
        self._has_new_names = True
        file = AppendFile(partial, length)
        if self._committed.get(partial.name, file.digest.hexdigest()) != file.digest.hexdigest():
            file.close()
            raise DataError(f"{partial} differs from what was committed (sha256): {_CHANGED}")
        return file

    def _totals(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "words": self.words,
            "longest_document": self.longest_document,
        }


def _complete(file: AppendFile) -> None:
    """Bring a partial file to the disk and give it its final name."""
    file.synchronize()
    file.close()
    file.path.rename(file.path.with_name(file.path.name.removesuffix(PARTIAL)))
