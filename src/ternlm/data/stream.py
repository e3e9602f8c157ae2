"""A corpus that is read while it is trained on: what belongs to it in a folder, and how the folder is opened.

stream/
|- stream.json    what the stream is made of; another source, tokenizer or window length is refused
|- validation/    the held-out documents, a corpus like any other
|- index.jsonl    one line per token block ever made (`blocks`)
|- block-*.bin    the blocks that are there now
`- .lock          held by the process that reads here

Everything is a pure function of stream.json and the source, so a folder goes on from any moment it was left at.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ternlm
from ternlm.data.blocks import BlockStore
from ternlm.data.catalog import CORPORA, hub_dataset, is_local, open_sources
from ternlm.data.corpus import Corpus, TokenStream, describe_split, seal, token_dtype
from ternlm.data.documents import find_files
from ternlm.data.held_out import collect_held_out, describe_tokenizer, open_held_out
from ternlm.data.hub import newest_commit
from ternlm.data.producer import Producer
from ternlm.data.reader import Patience, Position, wait_unless
from ternlm.data.settings import DataSettings
from ternlm.data.shards import Progress
from ternlm.data.tape import Tape
from ternlm.errors import DataError, SettingsError
from ternlm.files import from_json, held, read_regular, replace_durably, to_json
from ternlm.tokenizers.interface import Tokenizer

if TYPE_CHECKING:
    import torch

    from ternlm.data.stream_loader import StreamLoader
    from ternlm.data.windows import Windows

SCHEMA = 1
RECORD = "stream.json"
VALIDATION = "validation"
BLOCK_TOKENS = 2**22
FIRST_TOKENS = 1000
_CHOSEN = ("revision", "block_tokens", "first_tokens")
"""What is decided when a stream begins, and kept."""


class StreamedCorpus:
    """A validation split on disk, and a training split that a thread reads ahead.

    Attributes:
        directory: Where it lies.
        splits: Names of the splits that `split` gives.
        revision: Commit of the dataset on the hub, or None for other sources.
        tokenizer_fingerprint: Of the tokenizer that makes the ids.
        vocab_size: Of that tokenizer.
    """

    splits = (VALIDATION,)

    def __init__(
        self, directory: Path, record: dict[str, Any], validation: Corpus, producer: Producer, lock: ExitStack
    ) -> None:
        self.directory = directory
        self.revision: str | None = record["revision"]
        self.tokenizer_fingerprint = validation.tokenizer_fingerprint
        self.vocab_size = validation.vocab_size
        self._record = record
        self._validation = validation
        self._producer = producer
        self._lock = lock
        producer.start()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the validation split, which also describes the tokenizer."""
        return self._validation.manifest

    def split(self, name: str) -> TokenStream:
        """The tokens of the validation split.

        Raises:
            DataError: Another split is asked for.
        """
        if name != VALIDATION:
            raise DataError(
                f"a streamed corpus has no {name} split on disk, only '{VALIDATION}'. Prepare the corpus instead: "
                "data.stream=false."
            )
        return self._validation.split(name)

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the tokens: equal exactly if the streams are equal."""
        parts = [self._record["sha256"], self._validation.fingerprint]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def loader(
        self,
        batch_size: int,
        windows: "Windows",
        seed: int,
        device: "torch.device | str" = "cpu",
    ) -> "StreamLoader":
        """Training batches.

        Raises:
            DataError: The stream was made for another window length.
        """
        from ternlm.data.stream_loader import StreamLoader

        if windows.sequence_length != self._record["sequence_length"]:
            raise DataError(
                f"the stream in {self.directory} was made for data.sequence_length="
                f"{self._record['sequence_length']}, not {windows.sequence_length}. Start a new run."
            )
        return StreamLoader(self._producer, batch_size, windows, seed, device)

    def bytes_per_token(self) -> float | None:
        """Raw bytes per target of the first block, or None before it is made; the same number all through a run."""
        made = self._producer.store.made
        if not made:
            return None
        markers = made[0].documents * (self.manifest["tokenizer"]["bos_id"] is not None)
        targets = made[0].document_tokens - markers
        return made[0].bytes / targets if targets else None

    def describe(self) -> dict[str, Any]:
        """Where the data come from and what they are, the training split as far as it was read."""
        store = self._producer.store
        blocks = store.made[:]
        train = {
            "documents": sum(block.documents for block in blocks),
            "tokens": len(blocks) * (store.tokens - 1) + bool(blocks),
            "bytes": sum(block.bytes for block in blocks),
            "shards": [
                {"file": f"block-{number:06d}.bin", "tokens": store.tokens, "sha256": block.sha256}
                for number, block in enumerate(blocks)
            ],
        }
        tokenizer = self.manifest["tokenizer"]
        return {
            "source": self._record["source"]["source"],
            "revision": self.revision,
            "tokenizer": {"name": tokenizer["name"], "fingerprint": tokenizer["fingerprint"]},
            "splits": {"train": train, VALIDATION: describe_split(self.split(VALIDATION))},
        }

    def first_tokens(self, n: int = FIRST_TOKENS) -> list[int]:
        """The first tokens of the training stream, at most 1000."""
        return [int(token) for token in self._record["first_tokens"][:n]]

    def close(self) -> None:
        """End the thread and let go of the folder."""
        self._producer.close()
        self._lock.close()


def open_stream(
    data: DataSettings,
    tokenizer: Tokenizer,
    directory: Path,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> StreamedCorpus:
    """Begin a stream in a folder, or go on with the one that is there; the reading ahead starts at once.

    Args:
        data: The source and how it is divided, with `data.stream`.
        tokenizer: Makes the ids.
        directory: Where blocks and validation documents go.
        progress: Called while validation documents are collected.
        should_stop: Asked meanwhile.
        say: Called with a sentence before something slow begins, and while a source cannot be read.

    Raises:
        DataError: The source is unreadable or empty, or the folder cannot be written, holds another stream, or
            is in use.
        SettingsError: The buffer is too small for the blocks in the folder.
        Interrupted: `should_stop` said so.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            in_use = DataError(f"{directory} is being read by another process. Stop it, or choose another run.")
            stack.enter_context(held(directory / ".lock", in_use))
            patience = Patience(data.retry_for, say, wait_unless(should_stop))
            record = _record(data, tokenizer, directory, patience)
            pinned = data.model_copy(update={"revision": record["revision"] or data.revision})
            validation = open_held_out(directory / VALIDATION)
            if validation is None:
                say(f"collecting {data.stream_validation_tokens:,} validation tokens of '{data.source}'")
                validation = collect_held_out(pinned, tokenizer, directory / VALIDATION, patience, progress)
            store = BlockStore(directory, record["block_tokens"], token_dtype(tokenizer.vocab_size))
            stack.callback(store.close)
        except OSError as error:
            raise DataError(
                f"the stream cannot be kept in {directory}: {error.strerror or error}. Free space or choose "
                "another folder with --runs-dir."
            ) from None
        hashes = frozenset(map(int, validation.split(VALIDATION).document_hashes))
        tape = Tape(open_sources(pinned, patience)["train"], tokenizer, hashes, patience)
        producer = Producer(store, tape, _capacity(data, store), patience)
        return StreamedCorpus(directory, record, validation, producer, stack.pop_all())


def _record(data: DataSettings, tokenizer: Tokenizer, directory: Path, patience: Patience) -> dict[str, Any]:
    """What stream.json holds, written if it is not there yet.

    Raises:
        DataError: It holds something else, or cannot be read.
    """
    wanted = _identity(data, tokenizer)
    path = directory / RECORD
    if not path.exists():
        return _begin(wanted, data, tokenizer, path, patience)
    try:
        record = dict(from_json(read_regular(path, 2**20)))
        if record["sha256"] != seal(record):
            raise ValueError("its own sha256 does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete the folder to read the source again.") from None
    differing = [name for name in wanted if record.get(name) != wanted[name]]
    if differing:
        raise DataError(
            f"{directory} holds a stream with another {' and '.join(differing).replace('_', ' ')}. Start a new run, "
            "or restore what it was made from."
        )
    return record


def _begin(
    wanted: dict[str, Any], data: DataSettings, tokenizer: Tokenizer, path: Path, patience: Patience
) -> dict[str, Any]:
    dataset = hub_dataset(data)
    commit = None if dataset is None else patience.attempt(str(dataset), partial(newest_commit, dataset))
    pinned = data.model_copy(update={"revision": commit or data.revision})
    tape = Tape(open_sources(pinned, patience)["train"], tokenizer, frozenset(), patience)
    tokens: list[int] = []
    for document in tape.documents(Position()):
        tokens += document.ids.tolist()
        if len(tokens) >= FIRST_TOKENS:
            break
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    length = data.sequence_length
    windows = max(1, (min(BLOCK_TOKENS, data.stream_buffer // 8 // itemsize) - 1) // length)
    chosen = {"revision": commit, "block_tokens": windows * length + 1, "first_tokens": tokens[:FIRST_TOKENS]}
    record = json.loads(to_json(wanted | chosen))
    record["sha256"] = seal(record)
    replace_durably(path, to_json(record))
    return dict(record)


def _identity(data: DataSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides the tokens of a stream and is known without reading it, as JSON values."""
    described = describe_tokenizer(tokenizer)
    entry = CORPORA.get(data.source)
    return {
        "schema": SCHEMA,
        "source": data.identity(),
        "files": _files(data),
        "ternlm_version": ternlm.__version__ if entry is not None and entry.hub is None else None,
        "tokenizer": {name: described[name] for name in ("fingerprint", "vocab_size")},
        "sequence_length": data.sequence_length,
        "validation_tokens": data.stream_validation_tokens,
    }


def _files(data: DataSettings) -> list[list[Any]]:
    """Name, size and time of change of every local file that is read."""
    local = [path for path in (data.source if is_local(data.source) else None, data.validation_path) if path]
    found = [path for source in local for path in find_files(source)]
    dataset = hub_dataset(data)
    if dataset is not None and dataset.is_local:
        found += sorted(path for path in Path(dataset.name).rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def _capacity(data: DataSettings, store: BlockStore) -> int:
    """Blocks that fit in the budget.

    Raises:
        SettingsError: Fewer than two.
    """
    capacity = data.stream_buffer // store.block_bytes
    if capacity < 2:
        raise SettingsError(
            f"data.stream_buffer={data.stream_buffer} holds fewer than two blocks of {store.block_bytes:,} bytes, "
            f"which {store.folder} was begun with. Give at least {2 * store.block_bytes}."
        )
    return capacity
