"""A prepared corpus on disk, read: `load_corpus`, `Corpus`, and `TokenStream`, one split's tokens.

A folder holds ``manifest.json`` and, per split, ``shard-NNNNN.bin`` (little-endian token ids, 1, 2 or 4
bytes each), ``documents.bin`` (uint64 pairs: end offset in tokens, raw UTF-8 bytes) and ``hashes.bin``
(uint64 per document, from sha256 of its bytes). The manifest holds the sha256 of each of them, and its own.
``invalid.json`` is there where documents were no valid UTF-8.
Writing is left to `shards`.

Tokens are read with positioned reads, not through a memory map: a shard that is cut off while it is in
use gives a short read, which becomes a DataError, where a map would end the process with SIGBUS.
"""

import hashlib
import json
import os
import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ternlm.errors import DataError
from ternlm.files import from_json, read_regular

if TYPE_CHECKING:
    import torch

    from ternlm.data.loader import Loader
    from ternlm.data.windows import Windows

SCHEMA = 2
MANIFEST = "manifest.json"
INVALID = "invalid.json"
LARGEST_MANIFEST = 64 * 2**20
SPLITS = ("train", "validation", "test")
TABLES = {"documents.bin": 16, "hashes.bin": 8}  # bytes per document
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
        self.documents = _count(description["documents"])
        self.bytes = _count(description["bytes"])
        self.words = _count(description["words"])
        self.longest_document = _count(description["longest_document"])
        self.eval_id = str(description["eval_id"])
        self.shards: list[dict[str, Any]] = description["shards"]
        self.dtype = token_dtype(vocab_size)
        hashes = {shard["file"]: shard["sha256"] for shard in self.shards}
        self._sha256: dict[str, str] = hashes | {name: description["tables"][name] for name in TABLES}
        self._vocab_size = vocab_size
        self._ends = np.cumsum([0, *(_count(shard["tokens"]) for shard in self.shards)])
        self._files: dict[int, int] = {}
        self._check_sizes(_count(description["tokens"]))

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
        return self._table("documents.bin", 2)[:, 0].astype(np.int64)

    @property
    def document_bytes(self) -> np.ndarray:
        """Raw UTF-8 bytes of each document, int64 (documents,)."""
        return self._table("documents.bin", 2)[:, 1].astype(np.int64)

    @property
    def document_hashes(self) -> np.ndarray:
        """First 8 bytes of sha256 of each document's raw bytes, uint64 (documents,)."""
        return self._table("hashes.bin", 1)[:, 0]

    def verify(self) -> None:
        """Compare every file with its sha256.

        Raises:
            DataError: A file's content is not what was prepared.
        """
        for name, promised in self._sha256.items():
            path = self.directory / name
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(path, error) from None
            if found != promised:
                raise DataError(f"{path} has sha256 {found[:12]}, its manifest promises {promised[:12]}. {_AGAIN}")

    def _read_shard(self, number: int, start: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        path = self.directory / self.shards[number]["file"]
        content = bytearray(count * size)
        try:
            if number not in self._files:
                self._files[number] = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._files[number])
            got = os.preadv(self._files[number], [content], start * size)
        except OSError as error:
            raise _unreadable(path, error) from None
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

    def _table(self, name: str, columns: int) -> np.ndarray:
        path = self.directory / name
        try:
            values = np.fromfile(path, dtype="<u8")
        except OSError as error:
            raise _unreadable(path, error) from None
        if len(values) != self.documents * columns:
            raise DataError(f"{path} was cut off while in use. {_AGAIN}")
        return values.reshape(-1, columns)

    def _check_sizes(self, tokens: int) -> None:
        if tokens != len(self):
            raise DataError(
                f"the shards of {self.directory} hold {len(self):,} tokens, the manifest promises {tokens:,}. " + _AGAIN
            )
        promised = [(shard["file"], int(shard["tokens"]), self.dtype.itemsize) for shard in self.shards]
        promised += [(name, self.documents, size) for name, size in TABLES.items()]
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
        self.vocab_size = _count(manifest["tokenizer"]["vocab_size"])
        for marker in (manifest["tokenizer"]["bos_id"], manifest["tokenizer"]["eos_id"]):
            if marker is not None and not 0 <= marker < self.vocab_size:
                raise ValueError(f"marker {marker}")
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

    def loader(
        self,
        batch_size: int,
        windows: "Windows",
        seed: int,
        device: "torch.device | str" = "cpu",
    ) -> "Loader":
        """Training batches.

        Raises:
            DataError: The training split cannot fill one window.
        """
        from ternlm.data.loader import Loader

        return Loader(self.split("train"), batch_size, windows, seed, device)

    def bytes_per_token(self) -> float | None:
        """Raw bytes per target of the training split, or None if it has no targets."""
        stream = self.split("train")
        markers = stream.documents * (self.manifest["tokenizer"]["bos_id"] is not None)
        return stream.bytes / (len(stream) - markers) if len(stream) > markers else None

    def describe(self) -> dict[str, Any]:
        """Where the data come from and what they are: source, revision, tokenizer, splits with their shards."""
        source, tokenizer = self.manifest["source"], self.manifest["tokenizer"]
        return {
            "source": source["source"],
            "revision": source.get("revision"),
            "tokenizer": {"name": tokenizer["name"], "fingerprint": tokenizer["fingerprint"]},
            "splits": {name: describe_split(stream) for name, stream in self._streams.items()},
        }

    def invalid_bytes(self) -> dict[str, Any] | None:
        """What `Decoder.found` noted while the corpus was prepared; None if every document was valid UTF-8."""
        try:
            found = from_json(read_regular(self.directory / INVALID, LARGEST_MANIFEST))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("places"), list) else None

    def first_tokens(self, n: int = 1000) -> list[int]:
        """The first tokens of the training split, at most `n`."""
        stream = self.split("train")
        return [int(token) for token in stream.read(0, min(n, len(stream)))]

    def verify(self) -> None:
        """Compare every file of every split with its sha256.

        Raises:
            DataError: One is not what was prepared.
        """
        for name in self.splits:
            self.split(name).verify()

    def close(self) -> None:
        """Nothing to do; a `StreamedCorpus` has a thread to end."""


def describe_split(stream: TokenStream) -> dict[str, Any]:
    """Documents, tokens, bytes and shards of a split."""
    return {"documents": stream.documents, "tokens": len(stream), "bytes": stream.bytes, "shards": stream.shards}


def load_corpus(directory: Path, verify: bool = False) -> Corpus:
    """Open a prepared corpus.

    Args:
        directory: A folder that `prepare` finished.
        verify: Also compare every file with its sha256; otherwise sizes only.

    Raises:
        DataError: The folder is not a finished corpus, or a file differs from the manifest.
    """
    manifest = read_manifest(directory)
    try:
        corpus = Corpus(directory, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{directory / MANIFEST} is damaged ({error!r}). {_AGAIN}") from None
    if verify:
        corpus.verify()
    return corpus


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus.

    Raises:
        DataError: It is missing, damaged, or of another schema.
    """
    path = directory / MANIFEST
    try:
        manifest = from_json(read_regular(path, LARGEST_MANIFEST))
    except FileNotFoundError:
        raise DataError(f"{directory} holds no prepared corpus. Run `ternlm data prepare` first.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        found = found if isinstance(found, int) and abs(found) < 2**31 else "none"
        raise DataError(f"{path} has schema {found}; this version reads {SCHEMA}. {_AGAIN}")
    if manifest.get("sha256") != seal(manifest):
        raise DataError(f"{path} is damaged: its own sha256 does not fit. {_AGAIN}")
    _check_names(path, manifest)
    return manifest


def seal(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its field `sha256`, which holds this."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds every id."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def split_id(description: dict[str, Any]) -> str:
    """`eval_id`: sha256 of a split's manifest part, without the id itself and the hashes of the tables."""
    content = {key: value for key, value in description.items() if key not in ("eval_id", "tables")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse manifests whose parts disagree with their own id, or whose shard names leave the folder."""
    try:
        for name in SPLITS:
            description = manifest["splits"][name]
            intact = description["eval_id"] == split_id(description)
            plain = all(re.fullmatch(r"shard-\d{5}\.bin", shard["file"]) for shard in description["shards"])
            hashes = [*(shard["sha256"] for shard in description["shards"]), *description["tables"].values()]
            if not intact or not plain or not all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes):
                raise DataError(f"{path} is damaged: the {name} split does not match its eval_id. {_AGAIN}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). {_AGAIN}") from None


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a count that is none")
    return value


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}. {_AGAIN}")
