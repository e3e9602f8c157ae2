"""The corpora known by name, and how documents become training, validation and test splits.

Where a split comes from, in this order:

1. `data.validation_path` or `data.test_path`, if set;
2. the corpus's own split, if it has one;
3. carved off the training documents by hash: u = first 8 bytes of sha256(raw bytes) / 2^64; the document
   is test if u < test_fraction, validation if u < test_fraction + validation_fraction, else training.
   The same text lands in the same split in every order, on every machine, and in every larger corpus;
4. local files with fewer than 100 documents leave too little to chance (a folder of four novels), so each
   document is cut by position instead: the last validation_fraction of its bytes is validation, the part
   before it test, the rest training, cut at the last paragraph, line or word that ends before the mark.
   The three never overlap, but they share authors and topics: prefer separate files where there are any.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from ternlm.data.decoding import Decoder
from ternlm.data.documents import read_documents
from ternlm.data.hub import HubDataset, HubSource, hub_splits, parse_hub_source
from ternlm.data.reader import DocumentSource, Patience, Position, Source, read_pass
from ternlm.data.settings import DataSettings
from ternlm.data.stdlib import stdlib
from ternlm.data.wikitext import WikiTextForm, wikitext_documents
from ternlm.errors import DataError, SettingsError

SPLITS = ("train", "validation", "test")
FEW_DOCUMENTS = 100
_LONGEST_RETREAT = 4096  # bytes that a cut by position moves back to find a boundary

Documents = Callable[[], Iterator[str]]
Stream = Callable[[], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class CorpusEntry:
    """A corpus with a name.

    Attributes:
        name: What `data.source` says.
        description: One line for people.
        license: Of the text.
        size: Rough size of the training text.
        splits: Splits that the corpus itself defines.
        hub: Dataset on the hub, or None for built-in corpora.
        config: Its configuration.
        text_column: Column that holds the text.
        rows_are_lines: Rows are lines of articles and have to be joined.
    """

    name: str
    description: str
    license: str
    size: str
    splits: tuple[str, ...] = ("train",)
    hub: str | None = None
    config: str | None = None
    text_column: str = "text"
    rows_are_lines: bool = False


CORPORA: dict[str, CorpusEntry] = {
    "stories": CorpusEntry(
        "stories", "tiny tales generated from a seed", "public domain", "2.6 MB", SPLITS
    ),
    "stdlib": CorpusEntry(
        "stdlib", "source of the running Python's standard library", "PSF-2.0", "about 10 MB"
    ),
    "wikitext-2": CorpusEntry(
        "wikitext-2", "Wikipedia articles, raw text", "CC BY-SA 3.0, GFDL", "10.9 MB", SPLITS,
        "Salesforce/wikitext", "wikitext-2-raw-v1", rows_are_lines=True,
    ),
    "wikitext-103": CorpusEntry(
        "wikitext-103", "Wikipedia articles, raw text", "CC BY-SA 3.0, GFDL", "540 MB", SPLITS,
        "Salesforce/wikitext", "wikitext-103-raw-v1", rows_are_lines=True,
    ),
    "wikitext-2-tokens": CorpusEntry(
        "wikitext-2-tokens", "the same articles, split into words, rare ones <unk>", "CC BY-SA 3.0, GFDL", "10.8 MB",
        SPLITS, "Salesforce/wikitext", "wikitext-2-v1", rows_are_lines=True,
    ),
    "wikitext-103-tokens": CorpusEntry(
        "wikitext-103-tokens", "the same articles, split into words, rare ones <unk>", "CC BY-SA 3.0, GFDL", "539 MB",
        SPLITS, "Salesforce/wikitext", "wikitext-103-v1", rows_are_lines=True,
    ),
    "tinystories": CorpusEntry(
        "tinystories", "short stories in simple English, written by language models", "CDLA-Sharing-1.0",
        "1.9 GB", ("train", "validation"), "roneneldan/TinyStories",
    ),
    "fineweb-edu": CorpusEntry(
        "fineweb-edu", "educational web pages, a sample of 10B tokens", "ODC-By 1.0", "about 45 GB",
        ("train",), "HuggingFaceFW/fineweb-edu", "sample-10BT",
    ),
}  # fmt: skip


def open_corpus(settings: DataSettings, split: str, patience: Patience | None = None) -> Iterator[str]:
    """Documents of one split, in a fixed order.

    Args:
        settings: The source and how it is divided.
        split: ``train``, ``validation`` or ``test``.
        patience: As `open_sources` takes it.

    Raises:
        DataError: The split is unknown or empty, or the source cannot be read.
    """
    if split not in SPLITS:
        raise DataError(f"'{split}' is not a split. Use one of {', '.join(SPLITS)}.")
    streams = open_streams(settings, patience)
    empty = True
    for name, text in streams.get(split, streams["train"])():
        if name == split:
            empty = False
            yield text
    if empty:
        raise no_documents(settings, split)


def open_streams(
    settings: DataSettings, patience: Patience | None = None, decoder: Decoder | None = None
) -> dict[str, Stream]:
    """Everything a corpus stores, each document with its split, once.

    Args:
        settings: The source and how it is divided.
        patience, decoder: As `open_sources` takes them.

    Returns:
        ``train`` first, which also yields what is carved off it; then one stream for each split that has
        its own source.
    """
    patience = patience or Patience(settings.retry_for)
    sources = open_sources(settings, patience, decoder)
    return {name: partial(_documents, source, patience) for name, source in sources.items()}


def open_sources(
    settings: DataSettings, patience: Patience | None = None, decoder: Decoder | None = None
) -> dict[str, Source]:
    """`open_streams` as sources that can be read from any position on.

    Args:
        settings: The source and how it is divided.
        patience: What happens when a dataset cannot be reached; by default `settings.retry_for` decides.
        decoder: Remembers what was not valid UTF-8; by default nobody does, and `settings.encoding_errors` decides.

    Raises:
        DataError: The source does not exist.
        SettingsError: A revision is given for what has none.
    """
    decoder = decoder or Decoder(settings.encoding_errors)
    stored = _own_sources(settings, patience or Patience(settings.retry_for), decoder)
    shares = _carved(settings, stored)
    return {name: _labelled(settings, name, source, shares) for name, source in stored.items()}


def no_documents(settings: DataSettings, split: str) -> DataError:
    """The error for an empty split."""
    return DataError(
        f"the {split} split of '{settings.source}' holds no documents. "
        f"Set data.{split}_path, or raise data.{split}_fraction or the number of documents."
    )


def is_local(source: str) -> bool:
    """Whether a source is a path or glob."""
    return source not in CORPORA and not source.startswith("hf:")


def document_hash(raw: bytes) -> int:
    """What a document is known by: the first 8 bytes of the sha256 of its text."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


def bucket(raw: bytes) -> float:
    """Where a document falls in [0, 1): its hash as a fraction."""
    return document_hash(raw) / 2**64


def hub_dataset(settings: DataSettings) -> HubDataset | None:
    """The dataset on the hub that a source is, or None.

    Raises:
        DataError: The name is malformed.
        SettingsError: A revision is given for what has none.
    """
    entry = CORPORA.get(settings.source)
    name, config = entry.hub if entry else None, entry.config if entry else None
    if settings.source.startswith("hf:"):
        name, config = parse_hub_source(settings.source)
    dataset = None if name is None else HubDataset(name, config, settings.revision)
    if settings.revision is not None and (dataset is None or dataset.is_local):
        raise SettingsError(
            f"data.revision={settings.revision} names a revision of a dataset on the hub, and '{settings.source}' "
            "is none. Leave it out."
        )
    return dataset


def _own_sources(settings: DataSettings, patience: Patience, decoder: Decoder) -> dict[str, Documents | HubSource]:
    """What need not be carved, training first."""
    sources = _source_splits(settings, patience, decoder)
    for name, path in (("validation", settings.validation_path), ("test", settings.test_path)):
        if path is not None:
            sources[name] = _limited(_local(path, settings, decoder), settings.max_documents)
    return {name: sources[name] for name in SPLITS if name in sources}


def _source_splits(settings: DataSettings, patience: Patience, decoder: Decoder) -> dict[str, Documents | HubSource]:
    entry, dataset, most = CORPORA.get(settings.source), hub_dataset(settings), settings.max_documents
    _require_wikitext(settings, entry)
    if dataset is None:
        if entry is None:
            return {"train": _limited(_local(settings.source, settings, decoder), most)}
        return {split: _limited(_built_in(entry.name, split), most) for split in entry.splits}
    if entry is None:
        splits = patience.attempt(str(dataset), lambda: hub_splits(dataset))
    else:
        splits = {split: split for split in entry.splits}
    column = entry.text_column if entry else settings.text_column
    found: dict[str, Documents | HubSource] = {}
    for split, own in splits.items():
        source = HubSource(dataset, own, column, decoder)
        if entry is not None and entry.rows_are_lines:
            found[split] = _limited(partial(_wikitext, source, patience, settings.wikitext or "articles"), most)
        elif most is not None:
            found[split] = _limited(partial(_texts, source, patience), most)
        else:
            found[split] = source
    return found


def _built_in(name: str, split: str) -> Documents:
    if name == "stdlib":
        return stdlib

    def documents() -> Iterator[str]:
        from ternlm.data.stories import stories

        return stories(split)

    return documents


def _local(path: str, settings: DataSettings, decoder: Decoder) -> Documents:
    return lambda: read_documents(path, text_column=settings.text_column, decoder=decoder, wikitext=settings.wikitext)


def _limited(source: Documents, most: int | None) -> Documents:
    return lambda: islice(source(), most)


def _documents(source: Source, patience: Patience) -> Iterator[tuple[str, str]]:
    for _, split, text in read_pass(source, Position(), patience):
        if text and not text.isspace():
            yield split, text


def _texts(source: Source, patience: Patience) -> Iterator[str]:
    return (text for _, text in _documents(source, patience))


def _wikitext(source: Source, patience: Patience, form: WikiTextForm) -> Iterator[str]:
    return wikitext_documents((text for _, _, text in read_pass(source, Position(), patience)), form)


def _require_wikitext(settings: DataSettings, entry: CorpusEntry | None) -> None:
    if settings.wikitext is None or is_local(settings.source) or (entry is not None and entry.rows_are_lines):
        return
    known = ", ".join(name for name, each in CORPORA.items() if each.rows_are_lines)
    raise SettingsError(
        f"data.wikitext={settings.wikitext} says how WikiText is divided, and '{settings.source}' is another corpus. "
        f"Leave it out, or use {known}, or a file such as wiki.test.raw."
    )


def _labelled(settings: DataSettings, name: str, source: Documents | HubSource, shares: dict[str, float]) -> Source:
    """A source whose rows say which split they belong to."""
    if isinstance(source, HubSource):
        source.label = (lambda text: _split_of(bucket(text.encode()), shares)) if name == "train" else lambda text: name
        return source
    if name == "train":
        return DocumentSource(f"'{settings.source}'", lambda: _carve(settings, source, shares))
    return DocumentSource(f"'{settings.source}'", lambda: ((name, text) for text in source()))


def _carved(settings: DataSettings, sources: dict[str, Documents | HubSource]) -> dict[str, float]:
    shares = {"test": settings.test_fraction, "validation": settings.validation_fraction}
    return {name: share for name, share in shares.items() if name not in sources and share > 0}


def _carve(settings: DataSettings, source: Documents, shares: dict[str, float]) -> Iterator[tuple[str, str]]:
    few = is_local(settings.source) and len(list(islice(source(), FEW_DOCUMENTS))) < FEW_DOCUMENTS
    for text in source():
        if few:
            yield from _cut_by_position(text, shares)
        else:
            yield _split_of(bucket(text.encode()), shares), text


def _split_of(position: float, shares: dict[str, float]) -> str:
    edge = 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return "train"


def _cut_by_position(text: str, shares: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Parts of one document, held-out ones first so that a token limit on training does not lose them."""
    raw = text.encode()
    end = len(raw)
    for name in ("validation", "test"):
        share = int(shares.get(name, 0) * len(raw))
        if share:
            start = _boundary(raw, end - share, min(_LONGEST_RETREAT, share // 2))
            part = raw[start:end].decode()
            if part.strip():
                yield name, part
            end = start
    if raw[:end].strip():
        yield "train", raw[:end].decode()


def _boundary(raw: bytes, mark: int, retreat: int) -> int:
    """The end of the last paragraph, line or word before a mark, or else a character's edge."""
    for ending in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = raw.rfind(ending, mark - retreat, mark)
        if found >= 0:
            return found + len(ending)
    while mark > 0 and raw[mark] & 0xC0 == 0x80:
        mark -= 1
    return mark
