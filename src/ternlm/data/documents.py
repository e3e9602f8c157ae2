"""Documents from local files: text, Markdown, JSON lines and Parquet, plain or compressed.

`read_documents` is deterministic: files in sorted order, documents in file order, empty ones dropped.
Which corpora exist, and how documents are divided into splits, is left to `catalog`.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ternlm.data.decoding import Decoder
from ternlm.data.wikitext import WikiTextForm, is_wikitext_file, wikitext_documents
from ternlm.errors import DataError, missing_extra

BATCH_CHARACTERS = 2**20
DOCUMENT_SEPARATOR = b"<|endoftext|>"
Label = TypeVar("Label")
_COMPRESSIONS = (".gz", ".zst")
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def read_documents(
    source: str,
    *,
    text_column: str = "text",
    encoding_errors: str = "strict",
    decoder: Decoder | None = None,
    wikitext: WikiTextForm | None = None,
) -> Iterator[str]:
    """Documents of a file, a folder or a glob.

    A text file is one document, exactly as it is, unless lines holding only ``<|endoftext|>`` divide it;
    then blank lines around each document are dropped. A file named like ``wiki.test.raw`` is WikiText, and each of its
    articles is a document. A folder is read recursively, hidden files and
    other kinds skipped; a file named outright with an unknown ending is read as text.

    Args:
        source: A path or a glob such as ``texts/**/*.md``.
        text_column: Key of JSONL objects and column of Parquet files that holds the text.
        encoding_errors: ``strict``, ``replace`` (invalid UTF-8 becomes U+FFFD) or ``skip`` (documents with invalid
            UTF-8 are left out).
        decoder: Decodes in the way it was made for, instead of `encoding_errors`, and remembers what was invalid.
        wikitext: Read every file as WikiText, in this form.

    Raises:
        DataError: Nothing is found, a file is damaged or not UTF-8, or the text column is missing.
    """
    found = False
    decoder = decoder or Decoder(encoding_errors)
    for path in find_files(source):
        for text in _read_file(path, text_column, decoder, wikitext):
            if text and not text.isspace():
                found = True
                yield text
    if not found:
        raise DataError(f"'{source}' holds no text: every document is empty. Check the path and its files.")


def batches(rows: Iterator[tuple[Label, str]]) -> Iterator[list[tuple[Label, str]]]:
    """Groups of labelled documents worth encoding together, so that the tokenizer's threads have work."""
    batch: list[tuple[Label, str]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def find_files(source: str) -> list[Path]:
    """The files that `read_documents` reads, in its order.

    Raises:
        DataError: Nothing is found.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        below = sorted(path.rglob("*"))
        found = [file for file in below if _is_document(file.relative_to(path)) and file.is_file()]
        if not found:
            raise DataError(
                f"the folder '{source}' holds no documents. Put files ending in {', '.join(_SUFFIXES)} "
                "(or .gz, .zst of these) in it, or name other files with a glob."
            )
        return found
    if path.is_file():
        return [path]
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = sorted(Path(name) for name in names if Path(name).is_file())
    if not found:
        raise DataError(
            f"no file or folder '{source}'. Give an existing path or glob, a corpus name, or hf:owner/name."
        )
    return found


def _is_document(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name.lower().removesuffix(_compression(path)).endswith(_SUFFIXES)


def _compression(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def _read_file(path: Path, text_column: str, decoder: Decoder, wikitext: WikiTextForm | None) -> Iterator[str]:
    name = path.name.lower().removesuffix(_compression(path))
    try:
        if wikitext is not None or is_wikitext_file(name):
            yield from wikitext_documents(_rows(path, decoder), _require_rows(path, name, wikitext))
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, text_column, decoder)
        elif name.endswith(".jsonl"):
            yield from _read_json_lines(path, text_column, decoder)
        else:
            yield from _read_text(path, decoder)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}. Check the file, or leave it out.") from None


def _open(path: Path) -> BinaryIO:
    if _compression(path) == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if _compression(path) == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise missing_extra("zstandard", "hub", f"reading {path.name}") from None
    return cast(BinaryIO, io.BufferedReader(_ZstandardFile(path, zstandard.ZstdDecompressor)))


class _ZstandardFile(io.RawIOBase):
    """A compressed file read as a stream.

    The package's own reader ends quietly where a file was cut off, which would shorten a corpus unnoticed.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Any]):
        self._file = path.open("rb")
        self._decompressor = decompressor
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if self._frame is None or self._frame.eof:
                content = (self._frame.unused_data if self._frame else b"") or self._file.read(2**16)
                if not content:
                    return 0
                self._frame = self._decompressor().decompressobj()
            else:
                content = self._file.read(2**16)
                if not content:
                    raise EOFError("the compressed stream is cut off")
            self._pending = self._frame.decompress(content)
        taken = self._pending[: len(buffer)]
        buffer[: len(taken)] = taken
        self._pending = self._pending[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with the byte offset of each; a byte order mark at the start is dropped."""
    offset = 0
    with _open(path) as file:
        try:
            for line in file:
                start = 3 if offset == 0 and line.startswith(b"\xef\xbb\xbf") else 0
                yield offset + start, line[start:]
                offset += len(line)
        except Exception as error:
            # zstandard raises its own ZstdError, which cannot be named where the package is absent
            if type(error).__name__ != "ZstdError":
                raise
            raise OSError(f"damaged Zstandard stream ({error})") from None


def _rows(path: Path, decoder: Decoder) -> Iterator[str]:
    return (decoder.text(line, str(path), offset) for offset, line in _lines(path))


def _require_rows(path: Path, name: str, wikitext: WikiTextForm | None) -> WikiTextForm:
    """The form that a file is read in, if it holds text."""
    if name.endswith((".parquet", ".jsonl")):
        raise DataError(f"{path} is no text file, and data.wikitext={wikitext} divides the lines of one. Leave it out.")
    return wikitext or "articles"


def _read_text(path: Path, decoder: Decoder) -> Iterator[str]:
    start, divided = 0, False
    parts: list[bytes] = []
    for offset, line in _lines(path):
        if line.strip() == DOCUMENT_SEPARATOR:
            divided = True
            yield decoder.text(b"".join(parts), str(path), start).strip("\r\n")
            parts = []
            continue
        if not parts:
            start = offset
        parts.append(line)
    rest = decoder.text(b"".join(parts), str(path), start)
    yield rest.strip("\r\n") if divided else rest


def _read_json_lines(path: Path, text_column: str, decoder: Decoder) -> Iterator[str]:
    for number, (offset, line) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        text = decoder.text(line, str(path), offset)
        if not text:  # left out
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON ({error}). Repair or remove the line.") from None
        yield text_of(record, text_column, f"{path}, line {number}", decoder)


def _read_parquet(path: Path, text_column: str, decoder: Decoder) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "hub", f"reading {path.name}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise _no_column(str(path), text_column, columns)
            rows = count(1)
            for batch in file.iter_batches(columns=[text_column], batch_size=1024):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())  # a file may call bytes a string that are none
                for row, value in zip(rows, column.to_pylist(), strict=False):
                    if isinstance(value, bytes):
                        value = decoder.text(value, str(path), row=row)
                    yield text_of({text_column: value}, text_column, str(path), decoder)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}. Fetch it again.") from None


def text_of(record: Any, text_column: str, where: str, decoder: Decoder) -> str:
    """The text of one record: an object's column, or a plain string; null counts as empty.

    Raises:
        DataError: The column is missing or holds no text, or the text has a lone surrogate.
    """
    if isinstance(record, dict):
        if text_column not in record:
            raise _no_column(where, text_column, list(record))
        record = record[text_column]
    if record is None:
        return ""
    if not isinstance(record, str):
        raise DataError(f"{where}: '{text_column}' holds a {type(record).__name__}, not text. Set data.text_column.")
    return decoder.encodable(record, where)


def _no_column(where: str, text_column: str, columns: list[str]) -> DataError:
    return DataError(
        f"{where} has no column '{text_column}' but {', '.join(map(repr, columns)) or 'none at all'}. "
        "Set data.text_column to the one that holds the text."
    )
