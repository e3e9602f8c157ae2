"""Documents to token shards on disk: `prepare`, resumable and byte-identical however often it was stopped.

A preparation is a pure function of the documents in order. At every commit the files are on disk and
``progress.json`` says how far they are valid and how many documents they hold; after an interruption the
files are cut back to that point and the documents skipped. The manifest is written last, so a folder with
a manifest is complete. Reading is left to `corpus`, files of one split to `writer`.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import ternlm
from ternlm.data.catalog import SPLITS, is_local, open_streams
from ternlm.data.corpus import (
    INVALID,
    LARGEST_MANIFEST,
    MANIFEST,
    SCHEMA,
    Corpus,
    TokenStream,
    load_corpus,
    read_manifest,
    seal,
    token_dtype,
)
from ternlm.data.decoding import Decoder
from ternlm.data.documents import batches, find_files
from ternlm.data.reader import Patience
from ternlm.data.settings import DataSettings
from ternlm.data.writer import SplitWriter
from ternlm.errors import DataError, Interrupted
from ternlm.files import from_json, held, read_regular, replace_durably, synchronize_folder, to_json
from ternlm.tokenizers.interface import Tokenizer

__all__ = [
    "Corpus",
    "Progress",
    "TokenStream",
    "default_directory",
    "load_corpus",
    "prepare",
    "source_identity",
]

SHARD_TOKENS = 2**26
COMMIT_TOKENS = 2**23
_STATE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a preparation is; totals over all splits, earlier sittings included.

    Attributes:
        documents, tokens, bytes: Written so far.
        elapsed_s: Seconds of this sitting.
    """

    documents: int
    tokens: int
    bytes: int
    elapsed_s: float


def prepare(
    data: DataSettings,
    tokenizer: Tokenizer,
    directory: Path,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    patience: Patience | None = None,
) -> Corpus:
    """Tokenize all splits of a corpus into a folder, or open it if that was done before.

    Training stops at `data.max_tokens`, the last document cut to fit. A document of an own validation or
    test split that is also a training document is dropped from the former and counted in the manifest.

    Args:
        data: The source and how it is divided.
        tokenizer: Makes the ids.
        directory: Where the corpus goes; `default_directory` gives the usual place.
        progress: Called after each batch of documents.
        should_stop: Asked after each batch of documents.
        patience: What is done while a dataset cannot be read.

    Raises:
        DataError: The source is unreadable or empty, the folder cannot be written, holds another corpus,
            or is being prepared by another process.
        Interrupted: `should_stop` said so; what was done is kept and the next call goes on from there.
    """
    identity = _identity(data, tokenizer)
    try:
        if (directory / MANIFEST).exists():  # whoever finished it needs no lock any more, and neither do readers
            return _open_finished(directory, identity)
        with _locked(directory):
            if (directory / MANIFEST).exists():
                return _open_finished(directory, identity)
            _Preparation(data, tokenizer, directory, identity, patience).run(progress, should_stop)
            return load_corpus(directory)
    except OSError as error:
        raise DataError(
            f"the corpus cannot be written to {directory}: {error.strerror or error}. "
            "Free space or choose another folder with data.cache."
        ) from None


def default_directory(data: DataSettings, tokenizer: Tokenizer) -> Path:
    """``<cache>/<name>-<hash>``; the hash covers settings, tokenizer and, for local files, size and time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternlm" / "data"
    root = cache if data.cache is None else Path(data.cache).expanduser()
    name = re.sub(r"[^\w.-]+", "-", Path(data.source.removeprefix("hf:")).name).strip("-.") or "corpus"
    return root / f"{name[:40]}-{tokenizer.name[:20]}-{_identity(data, tokenizer)[:12]}".replace("/", "-")


class _Preparation:
    """One sitting of a preparation."""

    def __init__(
        self,
        data: DataSettings,
        tokenizer: Tokenizer,
        directory: Path,
        identity: str,
        patience: Patience | None = None,
    ):
        self.patience = patience
        self.decoder = Decoder(data.encoding_errors)
        self.data = data
        self.tokenizer = tokenizer
        self.directory = directory
        self.identity = identity
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.writers: dict[str, SplitWriter] = {}
        self.stream = self.consumed = 0
        try:
            self._continue(self._read_state())
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise DataError(f"{directory / _STATE} is damaged. Delete the folder and prepare it again.") from None
        self.started = time.monotonic()
        self.uncommitted = 0

    def run(self, progress: Callable[[Progress], None] | None, should_stop: Callable[[], bool]) -> None:
        try:
            streams = list(open_streams(self.data, self.patience, self.decoder).values())
            while self.stream < len(streams):
                self._write_stream(streams[self.stream](), progress, should_stop)
                self.stream, self.consumed = self.stream + 1, 0
            self._commit()
            self._finish()
        finally:
            for writer in self.writers.values():
                writer.close()

    def _write_stream(
        self,
        documents: Iterator[tuple[str, str]],
        progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        known = self.writers["train"].hashes() if self.stream else np.empty(0, dtype="<u8")
        full = False
        for batch in batches(islice(documents, self.consumed, None)):
            encoded = self.tokenizer.encode_batch([text for _, text in batch])
            for (name, text), ids in zip(batch, encoded, strict=True):
                full = not self._write_document(name, text, ids, known)
                if full:
                    break
                self.consumed += 1
            if progress is not None:
                progress(self._progress())
            if full:
                return
            if self.uncommitted >= COMMIT_TOKENS:
                self._commit()
            if should_stop():
                self._commit()
                raise Interrupted(
                    f"the preparation of {self.directory} stopped after {self._progress().documents:,} "
                    "documents. Give the same command again to continue."
                )

    def _write_document(self, name: str, text: str, ids: list[int], known: np.ndarray) -> bool:
        """Append one document; False if the training split is full and the stream is to end."""
        raw = text.encode()
        digest = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")
        size, words = len(raw), len(text.split())
        if known.size and known[min(int(np.searchsorted(known, digest)), known.size - 1)] == digest:
            self.dropped[name] += 1
            return True
        marks = (self.tokenizer.bos_id is not None) + (self.tokenizer.eos_id is not None)
        if name == "train" and self.data.max_tokens is not None:
            room = self.data.max_tokens - self.writers["train"].tokens - marks
            if room < 1:
                return False
            if room < len(ids):
                ids = ids[:room]
                size, words = self.tokenizer.text_bytes(ids), len(self.tokenizer.decode(ids).split())
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        self.writers[name].append(np.array([*begin, *ids, *end], dtype=np.int64), size, words, digest)
        self.uncommitted += len(ids) + marks
        return True

    def _commit(self) -> None:
        state = {
            "schema": SCHEMA,
            "identity": self.identity,
            "stream": self.stream,
            "consumed": self.consumed,
            "dropped": self.dropped,
            "splits": {name: writer.commit() for name, writer in self.writers.items()},
        }
        replace_durably(self.directory / _STATE, to_json(state))
        self.uncommitted = 0

    def _finish(self) -> None:
        if not self.writers["train"].documents:
            raise DataError(
                f"'{self.data.source}' leaves no training documents. Add text or raise data.max_documents "
                "or data.max_tokens."
            )
        self._record_invalid()
        tokenizer = self.tokenizer
        manifest = {
            "schema": SCHEMA,
            "identity": self.identity,
            "source": self.data.identity(),
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
                "lossless": tokenizer.lossless,
            },
            "duplicates_dropped": self.dropped,
            "splits": {name: writer.finish() for name, writer in self.writers.items()},
        }
        replace_durably(self.directory / MANIFEST, to_json(manifest | {"sha256": seal(manifest)}))
        (self.directory / _STATE).unlink(missing_ok=True)

    def _record_invalid(self) -> None:
        """What was no UTF-8; documents of an earlier sitting were read again, and count as often."""
        found = self.decoder.found()
        if found is not None:
            replace_durably(self.directory / INVALID, to_json(found))
        else:
            (self.directory / INVALID).unlink(missing_ok=True)

    def _continue(self, state: dict[str, Any]) -> None:
        self.stream = int(state.get("stream", 0))
        self.consumed = int(state.get("consumed", 0))
        self.dropped = {name: int(state.get("dropped", {}).get(name, 0)) for name in SPLITS}
        for name in SPLITS:
            committed = state.get("splits", {}).get(name)
            self.writers[name] = SplitWriter(self.directory / name, self.dtype, SHARD_TOKENS, committed)
        synchronize_folder(self.directory)  # the splits are there before a record speaks of them

    def _read_state(self) -> dict[str, Any]:
        try:
            state = from_json(read_regular(self.directory / _STATE, LARGEST_MANIFEST))
        except (FileNotFoundError, ValueError):
            state = {}
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            # files without a matching record belong to nobody
            for name in SPLITS:
                shutil.rmtree(self.directory / name, ignore_errors=True)
            return {}
        return state

    def _progress(self) -> Progress:
        writers = self.writers.values()
        return Progress(
            documents=sum(writer.documents for writer in writers),
            tokens=sum(writer.tokens for writer in writers),
            bytes=sum(writer.bytes for writer in writers),
            elapsed_s=time.monotonic() - self.started,
        )


def source_identity(data: DataSettings) -> str:
    """sha256 of everything that decides which documents a source gives.

    For local files that is their paths, sizes and times of change, not their content.

    Raises:
        DataError: Local files are missing.
    """
    local = [data.source] if is_local(data.source) else []
    local += [path for path in (data.validation_path, data.test_path) if path is not None]
    stats = [(str(path), path.stat()) for source in local for path in find_files(source)]
    content = {
        "schema": SCHEMA,
        "settings": data.identity(),
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "built_in": None if is_local(data.source) else ternlm.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(data: DataSettings, tokenizer: Tokenizer) -> str:
    """sha256 of everything that decides the shards' content."""
    return hashlib.sha256(f"{source_identity(data)}|{tokenizer.fingerprint}".encode()).hexdigest()


def _open_finished(directory: Path, identity: str) -> Corpus:
    if read_manifest(directory).get("identity") != identity:
        raise DataError(
            f"{directory} holds a corpus of another source, tokenizer or data settings. "
            "Choose another folder, or delete this one."
        )
    (directory / _STATE).unlink(missing_ok=True)  # left by a process that ended right after it wrote the manifest
    return load_corpus(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    in_use = DataError(f"{directory} is being prepared by another process. Wait for it, or choose another folder.")
    with held(directory / ".lock", in_use):
        yield
