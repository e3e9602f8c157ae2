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
from itertools import islice

from ternlm.data.documents import read_documents
from ternlm.data.hub import hub_documents, hub_rows, hub_splits, parse_hub_source, wikitext_articles
from ternlm.data.settings import DataSettings
from ternlm.data.stdlib import stdlib
from ternlm.errors import DataError

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
    "tinystories": CorpusEntry(
        "tinystories", "short stories in simple English, written by language models", "CDLA-Sharing-1.0",
        "1.9 GB", ("train", "validation"), "roneneldan/TinyStories",
    ),
    "fineweb-edu": CorpusEntry(
        "fineweb-edu", "educational web pages, a sample of 10B tokens", "ODC-By 1.0", "about 45 GB",
        ("train",), "HuggingFaceFW/fineweb-edu", "sample-10BT",
    ),
}  # fmt: skip


def open_corpus(settings: DataSettings, split: str) -> Iterator[str]:
    """Documents of one split, in a fixed order.

    Args:
        settings: The source and how it is divided.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: The split is unknown or empty, or the source cannot be read.
    """
    if split not in SPLITS:
        raise DataError(f"'{split}' is not a split. Use one of {', '.join(SPLITS)}.")
    streams = open_streams(settings)
    empty = True
    for name, text in streams.get(split, streams["train"])():
        if name == split:
            empty = False
            yield text
    if empty:
        raise DataError(
            f"the {split} split of '{settings.source}' holds no documents. "
            f"Set data.{split}_path, or raise data.{split}_fraction or the number of documents."
        )


def open_streams(settings: DataSettings) -> dict[str, Stream]:
    """Everything a corpus stores, each document with its split, once.

    Returns:
        ``train`` first, which also yields what is carved off it; then one stream for each split that has
        its own source.
    """
    sources = _own_sources(settings)
    limited = {name: _limited(source, settings.max_documents) for name, source in sources.items()}
    training = limited.pop("train")
    shares = _carved(settings, sources)
    streams: dict[str, Stream] = {"train": lambda: _carve(settings, training, shares)}
    return streams | {name: _labelled(name, source) for name, source in limited.items()}


def is_local(source: str) -> bool:
    """Whether a source is a path or glob."""
    return source not in CORPORA and not source.startswith("hf:")


def bucket(raw: bytes) -> float:
    """Where a document falls in [0, 1): the first 8 bytes of its sha256, as a fraction."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def _own_sources(settings: DataSettings) -> dict[str, Documents]:
    """Openers of the splits that need not be carved, training first."""
    sources = _source_splits(settings)
    for name, path in (("validation", settings.validation_path), ("test", settings.test_path)):
        if path is not None:
            sources[name] = _local(path, settings)
    return {name: sources[name] for name in SPLITS if name in sources}


def _source_splits(settings: DataSettings) -> dict[str, Documents]:
    entry = CORPORA.get(settings.source)
    if entry is None:
        if not settings.source.startswith("hf:"):
            return {"train": _local(settings.source, settings)}
        name, config = parse_hub_source(settings.source)
        column, errors = settings.text_column, settings.encoding_errors
        return {
            split: _bind(hub_documents, name, config, own, column, errors)
            for split, own in hub_splits(name, config).items()
        }
    if entry.hub is None:
        return {split: _built_in(entry.name, split) for split in entry.splits}
    return {split: _hub_entry(entry, split, settings.encoding_errors) for split in entry.splits}


def _built_in(name: str, split: str) -> Documents:
    if name == "stdlib":
        return stdlib

    def documents() -> Iterator[str]:
        from ternlm.data.stories import stories

        return stories(split)

    return documents


def _hub_entry(entry: CorpusEntry, split: str, encoding_errors: str) -> Documents:
    read = hub_rows if entry.rows_are_lines else hub_documents
    rows = _bind(read, entry.hub or "", entry.config, split, entry.text_column, encoding_errors)
    return (lambda: wikitext_articles(rows())) if entry.rows_are_lines else rows


def _local(path: str, settings: DataSettings) -> Documents:
    column, errors = settings.text_column, settings.encoding_errors
    return lambda: read_documents(path, text_column=column, encoding_errors=errors)


def _bind(function: Callable[..., Iterator[str]], *arguments: str | None) -> Documents:
    return lambda: function(*arguments)


def _limited(source: Documents, most: int | None) -> Documents:
    return lambda: islice(source(), most)


def _labelled(name: str, source: Documents) -> Stream:
    return lambda: ((name, text) for text in source())


def _carved(settings: DataSettings, sources: dict[str, Documents]) -> dict[str, float]:
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
