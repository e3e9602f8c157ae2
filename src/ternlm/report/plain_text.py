"""Any text made fit to be shown: what a model writes may hold bytes that no page, file or terminal should meet raw."""

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """The text with control characters, marks of direction and halves of surrogate pairs spelled as ``\\x07``.

    Line ends become ``\\n``; tabs and line ends stay.
    """
    return _CONTROL.sub(_spelled, text.replace("\r\n", "\n"))


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
