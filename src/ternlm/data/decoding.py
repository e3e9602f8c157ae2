"""Bytes to text, and a record of the documents that were no valid UTF-8: `Decoder`."""

import re
from typing import Any

from ternlm.errors import DataError

_SHOWN = 5  # places that a record names
_SURROGATES = re.compile("[\ud800-\udfff]")


class Decoder:
    """Decodes documents and remembers where that failed; a document that is read again counts once.

    Args:
        errors: ``strict`` raises; ``replace`` reads each invalid sequence as U+FFFD; ``skip`` makes the document
            empty, and empty documents are dropped by whoever reads them.
    """

    def __init__(self, errors: str = "strict") -> None:
        self.errors = errors
        self._found: dict[tuple[str, str], int] = {}

    def text(self, raw: bytes, file: str, offset: int = 0, row: int | None = None) -> str:
        """The text of a document.

        Args:
            raw: Its bytes.
            file: Where it comes from.
            offset: Byte of the file where the document begins, if the file stores it as it is.
            row: Row of the file, if it stores rows; then positions count from the beginning of the row's text.

        Raises:
            DataError: It is not UTF-8, and `errors` is strict.
        """
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            first = error.start
        replaced = raw.decode("utf-8", errors="replace")
        sequences = replaced.count("\ufffd") - raw.count("\ufffd".encode())
        place = ("" if row is None else f"row {row:,}, ") + f"offset {offset + first:,}"
        if self.errors == "strict":
            more = "" if sequences == 1 else f", the first of {sequences:,} such places in this document"
            raise DataError(
                f"{file} is not UTF-8: byte 0x{raw[first]:02x} at {place}{more}. Convert the file, or set "
                "data.encoding_errors=replace to read such bytes as U+FFFD, or =skip to leave such documents out; "
                "where no settings are given, --encoding-errors replace or skip."
            )
        self._found[file, place] = sequences
        return "" if self.errors == "skip" else replaced

    def encodable(self, text: str, where: str) -> str:
        """A text that UTF-8 can express; JSON can hold half a surrogate pair, which is no character.

        Raises:
            DataError: It holds one, and `errors` is strict.
        """
        if not _SURROGATES.search(text):
            return text
        if self.errors == "strict":
            raise DataError(
                f"{where}: the text holds a lone surrogate, which UTF-8 cannot express. Set "
                "data.encoding_errors=replace to read it as U+FFFD, or =skip to leave such documents out; "
                "where no settings are given, --encoding-errors replace or skip."
            )
        replaced, sequences = _SURROGATES.subn("\ufffd", text)
        self._found[where, "lone surrogate"] = sequences
        return "" if self.errors == "skip" else replaced

    def found(self) -> dict[str, Any] | None:
        """What was found so far, as JSON values; None if every document was valid.

        `documents` and `sequences` count the invalid documents and the places in them, `files` counts files,
        `places` names the first places, and `handling` says what was done.
        """
        if not self._found:
            return None
        places = [f"{file}, {place}" for file, place in list(self._found)[:_SHOWN]]
        return {
            "handling": self.errors,
            "documents": len(self._found),
            "sequences": sum(self._found.values()),
            "files": len({file for file, _ in self._found}),
            "places": places,
        }


def describe_invalid(found: dict[str, Any]) -> str:
    """What `Decoder.found` says, as a sentence."""
    one = found["documents"] == 1
    done = {"replace": "read as U+FFFD", "skip": "left out"}[found["handling"]]
    what = ("the document was" if one else "they were") if found["handling"] == "skip" else "such bytes were"
    more = "" if found["documents"] <= len(found["places"]) else ", ..."
    return (
        f"{found['documents']:,} document{'' if one else 's'} held {found['sequences']:,} invalid UTF-8 "
        f"sequence{'' if found['sequences'] == 1 else 's'}; {what} {done}: {'; '.join(found['places'])}{more}"
    )
