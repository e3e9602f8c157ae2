"""From settings to a tokenizer and a prepared corpus: what every command that reads data does first."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ternlm.data.catalog import open_corpus
from ternlm.data.decoding import describe_invalid
from ternlm.data.reader import Patience, wait_unless
from ternlm.data.settings import DataSettings
from ternlm.data.shards import Corpus, Progress, default_directory, prepare, source_identity
from ternlm.data.stream import StreamedCorpus, open_stream
from ternlm.errors import DataError, SettingsError
from ternlm.tokenizers import Tokenizer, TokenizerSettings, load_tokenizer, train_bpe


class Prepared(NamedTuple):
    """A corpus, on disk or streamed, and the tokenizer that makes its tokens."""

    corpus: Corpus | StreamedCorpus
    tokenizer: Tokenizer


def prepare_data(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    folder: Path | None = None,
    verify: bool = False,
) -> Prepared:
    """Load or train the tokenizer, then tokenize the corpus unless that was done before, or begin to stream it.

    Args:
        data: The source.
        tokenizer: Which tokenizer; ``name="train"`` trains one on the training documents, once.
        progress, should_stop: As `prepare` takes them.
        say: Called with a sentence before something slow begins.
        folder: Where a stream keeps its blocks, with `data.stream`; a run's own.
        verify: Compare shards that were there already with their sha256 (about a second per gigabyte).

    Raises:
        DataError, TokenizerError: As `prepare`, `open_stream` and `load_tokenizer` raise them.
        SettingsError: A stream has no folder.
    """
    trains = tokenizer.name == "train"
    patience = Patience(data.retry_for, say, wait_unless(should_stop))
    loaded = _trained(data, tokenizer, patience) if trains else load_tokenizer(tokenizer.name)
    if data.stream:
        if folder is None:
            raise SettingsError(
                f"data.stream=true reads '{data.source}' while a run trains, and here is no run. Use data.stream=false."
            )
        return Prepared(open_stream(data, loaded, folder, progress, should_stop, say), loaded)
    directory = default_directory(data, loaded)
    is_new = not (directory / "manifest.json").exists()
    if is_new:
        say(f"preparing '{data.source}' in {directory}")
    corpus = prepare(data, loaded, directory, progress, should_stop, patience)
    invalid = corpus.invalid_bytes() if is_new else None
    if invalid is not None:
        say(describe_invalid(invalid))
    if verify and not is_new:
        corpus.verify()
    return Prepared(corpus, loaded)


def trained_directory(data: DataSettings, settings: TokenizerSettings) -> Path:
    """Where the tokenizer that is trained on a corpus is kept: in the cache, under a hash of what it is made from."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternlm" / "tokenizers"
    vocab_size, marked = settings.vocab_size, "|mask" if settings.mask_token else ""
    key = hashlib.sha256(f"{source_identity(data)}|{vocab_size}{marked}".encode()).hexdigest()[:16]
    return cache / f"bpe-{vocab_size}-{key}"


def _trained(data: DataSettings, settings: TokenizerSettings, patience: Patience) -> Tokenizer:
    """A byte-level BPE of the training documents, trained once."""
    directory, vocab_size = trained_directory(data, settings), settings.vocab_size
    if (directory / "tokenizer.json").exists():
        return load_tokenizer(directory)
    patience.say(f"training a BPE tokenizer of {vocab_size:,} ids on '{data.source}'")
    trained = train_bpe(open_corpus(data, "train", patience), vocab_size, mask_token=settings.mask_token)
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        trained.save(unfinished)
        if not directory.exists():
            unfinished.rename(directory)
    except OSError as error:
        raise DataError(
            f"the tokenizer cannot be kept in {directory.parent}: {error.strerror}. Set XDG_CACHE_HOME."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_tokenizer(directory)
