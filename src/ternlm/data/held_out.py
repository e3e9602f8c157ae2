"""The validation split of a stream: the first documents of that split, kept in a folder like any corpus."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ternlm.data.catalog import SPLITS, document_hash, no_documents, open_sources
from ternlm.data.corpus import MANIFEST, SCHEMA, Corpus, load_corpus, seal, token_dtype
from ternlm.data.reader import Patience, Position, Source, read_pass
from ternlm.data.settings import DataSettings
from ternlm.data.shards import SHARD_TOKENS, Progress
from ternlm.data.writer import SplitWriter
from ternlm.errors import DataError
from ternlm.files import replace_durably, synchronize_folder, to_json
from ternlm.tokenizers.interface import Tokenizer


def collect_held_out(
    data: DataSettings,
    tokenizer: Tokenizer,
    folder: Path,
    patience: Patience,
    progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """The first `data.stream_validation_tokens` of the validation split, in whole documents.

    They are taken from the source's own validation split or `data.validation_path` where there is one, else
    from the documents of the source that are carved off for validation, which no stream ever trains on.

    Args:
        data: The source, with the revision that is read.
        tokenizer: Makes the ids.
        folder: Where the corpus goes, whole or not at all.
        patience: Waits where the source cannot be read.
        progress: Called now and then with what was collected.

    Raises:
        DataError: There are no such documents, or the source cannot be read.
        OSError: The folder cannot be written.
    """
    sources = open_sources(data, patience)
    if "validation" not in sources and not data.validation_fraction:
        raise no_documents(data, "validation")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {name: SplitWriter(unfinished / name, dtype, SHARD_TOKENS) for name in SPLITS}
    try:
        source = sources.get("validation", sources["train"])
        _write(writers["validation"], _texts(source, patience), tokenizer, data.stream_validation_tokens, progress)
        if not writers["validation"].documents:
            raise no_documents(data, "validation")
        manifest = {
            "schema": SCHEMA,
            "identity": None,
            "source": data.identity(),
            "tokenizer": describe_tokenizer(tokenizer),
            "duplicates_dropped": dict.fromkeys(SPLITS, 0),
            "splits": {name: writer.finish() for name, writer in writers.items()},
        }
    finally:
        for writer in writers.values():
            writer.close()
    replace_durably(unfinished / MANIFEST, to_json(manifest | {"sha256": seal(manifest)}))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    synchronize_folder(folder.parent)
    return load_corpus(folder)


def open_held_out(folder: Path) -> Corpus | None:
    """What `collect_held_out` left in a folder, or None where it is missing or damaged."""
    try:
        return load_corpus(folder, verify=True)
    except DataError:
        return None


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    names = ("name", "fingerprint", "vocab_size", "bos_id", "eos_id", "lossless")
    return {name: getattr(tokenizer, name) for name in names}


def _texts(source: Source, patience: Patience) -> Iterator[str]:
    for number, (_, split, text) in enumerate(read_pass(source, Position(), patience)):
        if number % 256 == 0:
            patience.wait(0)
        if split == "validation" and text and not text.isspace():
            yield text


def _write(
    writer: SplitWriter,
    texts: Iterator[str],
    tokenizer: Tokenizer,
    limit: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    started = time.monotonic()
    for text in texts:
        raw = text.encode()
        ids = np.array([*begin, *tokenizer.encode(text), *end], dtype=np.int64)
        writer.append(ids, len(raw), len(text.split()), document_hash(raw))
        if progress is not None:
            progress(Progress(writer.documents, writer.tokens, writer.bytes, time.monotonic() - started))
        if writer.tokens >= limit:
            return
