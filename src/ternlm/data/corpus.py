"""A prepared corpus on disk, read: `load_corpus`, `Corpus`, and `TokenStream`, one split's tokens.

A folder holds ``manifest.json`` and, per split, ``shard-NNNNN.bin`` (little-endian token ids, 1, 2 or 4
bytes each), ``documents.bin`` (uint64 pairs: end offset in tokens, raw UTF-8 bytes) and ``hashes.bin``
(uint64 per document, from sha256 of its bytes). Writing it is left to `shards`.

Tokens are read with positioned reads, not through a memory map: a shard that is cut off while it is in
use gives a short read, which becomes a DataError, where a map would end the process with SIGBUS.
"""

import hashlib
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from ternlm.errors import DataError

SCHEMA = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
_AGAIN = "Delete the folder and run `ternlm data prepare` again."


class TokenStream:
    """The tokens of one split as one long array, read across shards.

    Per document the stream holds [BOS] tokens [EOS], each marker only where the tokenizer has it.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        documents: Number of documents.
        bytes: Raw UTF-8 bytes of all documents.
        words: Whitespace-separated words of all documents.
        longest_document: Tokens of the longest document, markers included.
        eval_id: sha256 of the split's part of the manifest.
        dtype: Little-endian unsigned type of the shards.
    """

    def __init__(self, directory: Path, name: str, description: dict[str, Any], vocab_size: int):
        self.name = name
        self.directory = directory / name
        self.documents = int(description["documents"])
        self.bytes = int(description["bytes"])
        self.words = int(description["words"])
        self.longest_document = int(description["longest_document"])
        self.eval_id = str(description["eval_id"])
        self.shards: list[dict[str, Any]] = description["shards"]
        self.dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._ends = np.cumsum([0, *(int(shard["tokens"]) for shard in self.shards)])
        self._files: dict[int, int] = {}
        self._check_sizes(int(description["tokens"]))

    def __len__(self) -> int:
        """Number of tokens, markers included."""
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), (stop - start,), in the shards' dtype.

        Raises:
            DataError: The range leaves the stream, or a shard is damaged.
        """
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"tokens [{start}, {stop}) leave the {self.name} split of {len(self)} tokens.")
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self._ends[first + 1]))
            parts.append(self._read_shard(first, start - int(self._ends[first]), end - start))
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    @property
    def document_ends(self) -> np.ndarray:
        """One past the last token of each document, int64 (documents,)."""
        return self._documents_table()[:, 0].astype(np.int64)

    @property
    def document_bytes(self) -> np.ndarray:
        """Raw UTF-8 bytes of each document, int64 (documents,)."""
        return self._documents_table()[:, 1].astype(np.int64)

    @property
    def document_hashes(self) -> np.ndarray:
        """First 8 bytes of sha256 of each document's raw bytes, uint64 (documents,)."""
        return np.fromfile(self.directory / "hashes.bin", dtype="<u8")

    def verify(self) -> None:
        """Compare every shard with its sha256.

        Raises:
            DataError: A shard's content is not what was prepared.
        """
        for shard in self.shards:
            path = self.directory / shard["file"]
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise DataError(
                    f"shard {path} has sha256 {found[:12]}, its manifest promises {shard['sha256'][:12]}. {_AGAIN}"
                )

    def _read_shard(self, number: int, start: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        path = self.directory / self.shards[number]["file"]
        if number not in self._files:
            self._files[number] = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._files[number])
        content = bytearray(count * size)
        got = os.preadv(self._files[number], [content], start * size)
        if got != count * size:
            raise DataError(
                f"shard {path} gave {got:,} of {count * size:,} bytes at offset {start * size:,}: "
                f"it was cut off while in use. {_AGAIN}"
            )
        values = np.frombuffer(content, dtype=self.dtype)
        if self._vocab_size < 256**size and count and int(values.max()) >= self._vocab_size:
            raise DataError(
                f"shard {path} holds token {int(values.max())}, outside the vocabulary of {self._vocab_size}: "
                f"it is damaged. {_AGAIN}"
            )
        return values

    def _documents_table(self) -> np.ndarray:
        return np.fromfile(self.directory / "documents.bin", dtype="<u8").reshape(-1, 2)

    def _check_sizes(self, tokens: int) -> None:
        if tokens != len(self):
            raise DataError(
                f"the shards of {self.directory} hold {len(self):,} tokens, the manifest promises {tokens:,}. " + _AGAIN
            )
        promised = [(shard["file"], int(shard["tokens"]), self.dtype.itemsize) for shard in self.shards]
        promised += [("documents.bin", self.documents, 16), ("hashes.bin", self.documents, 8)]
        for file, count, size in promised:
            path = self.directory / file
            if not path.is_file():
                raise DataError(f"{path} is missing. {_AGAIN}")
            found = path.stat().st_size
            if found != count * size:
                noun = "tokens" if file.startswith("shard") else "documents"
                raise DataError(f"{path} holds {found / size:,.10g} {noun}, its manifest promises {count:,}. {_AGAIN}")


class Corpus:
    """A prepared corpus: its splits and what they were made of.

    Attributes:
        directory: Where it lies.
        manifest: The content of ``manifest.json``.
        tokenizer_fingerprint: Of the tokenizer that made the ids.
        vocab_size: Of that tokenizer.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.tokenizer_fingerprint = str(manifest["tokenizer"]["fingerprint"])
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self._streams = {
            name: TokenStream(directory, name, manifest["splits"][name], self.vocab_size)
            for name in SPLITS
            if manifest["splits"][name]["documents"]
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold documents."""
        return tuple(self._streams)

    def split(self, name: str) -> TokenStream:
        """The tokens of a split.

        Raises:
            DataError: The split is unknown or holds no documents.
        """
        if name not in SPLITS:
            raise DataError(f"'{name}' is not a split. Use one of {', '.join(SPLITS)}.")
        if name not in self._streams:
            raise DataError(
                f"the {name} split of {self.directory} holds no documents. "
                f"Set data.{name}_path, or raise data.{name}_fraction or the number of documents."
            )
        return self._streams[name]

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokenizer and all splits: equal exactly if the prepared data are equal."""
        parts = [self.tokenizer_fingerprint, *(self.manifest["splits"][name]["eval_id"] for name in SPLITS)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def load_corpus(directory: Path, verify: bool = False) -> Corpus:
    """Open a prepared corpus.

    Args:
        directory: A folder that `prepare` finished.
        verify: Also compare every shard with its sha256; otherwise sizes only.

    Raises:
        DataError: The folder is not a finished corpus, or a file differs from the manifest.
    """
    manifest = read_manifest(directory)
    try:
        corpus = Corpus(directory, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{directory / MANIFEST} is damaged ({error!r}). {_AGAIN}") from None
    if verify:
        for name in corpus.splits:
            corpus.split(name).verify()
    return corpus


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus.

    Raises:
        DataError: It is missing, damaged, or of another schema.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} holds no prepared corpus. Run `ternlm data prepare` first.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{path} has schema {found!r}; this version reads {SCHEMA}. {_AGAIN}")
    _check_names(path, manifest)
    return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds every id."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def split_id(description: dict[str, Any]) -> str:
    """`eval_id`: sha256 of a split's manifest part, without the id itself."""
    content = {key: value for key, value in description.items() if key != "eval_id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse manifests whose parts disagree with their own id, or whose shard names leave the folder."""
    try:
        for name in SPLITS:
            description = manifest["splits"][name]
            intact = description["eval_id"] == split_id(description)
            plain = all(re.fullmatch(r"shard-\d{5}\.bin", shard["file"]) for shard in description["shards"])
            if not intact or not plain:
                raise DataError(f"{path} is damaged: the {name} split does not match its eval_id. {_AGAIN}")
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). {_AGAIN}") from None
