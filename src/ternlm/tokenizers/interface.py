"""The one interface between text and ids: `Tokenizer`, and `StreamDecoder` for printing while ids arrive.

Everything that turns ids back into text or bytes is derived here from one table, the raw bytes that
each id emits, so `decode`, `stream`, `token_bytes` and `text_bytes` cannot disagree. How text becomes
ids is left to the subclasses (`byte`, `library`); where files come from is left to `pretrained`.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ternlm.errors import TernlmError, TokenizerError
from ternlm.settings.base import shortened


class Tokenizer(ABC):
    """Turns text into token ids and back.

    `encode` never adds special tokens and never reads text as one: the text ``"<s>"`` is three
    characters. A tokenizer whose begin and end markers are the same token (GPT-2) reports it as
    `eos_id` only, so that "BOS is never a target, EOS is" has one meaning everywhere.

    Attributes:
        name: Human name, such as ``"byte"`` or ``"llama-2"``.
        vocab_size: Number of ids; every id is in ``[0, vocab_size)``.
        bos_id, eos_id, pad_id, unk_id, mask_id: Special ids, or None where there is none.
        lossless: True if, for every text, ``decode(encode(text)) == text`` and the byte lengths of
            its tokens sum to its UTF-8 length. Where it is False (lower-casing, normalization, the
            dummy prefix of SentencePiece) bits per byte need the raw bytes of whole documents.
        prefix_bytes: Bytes that the first token of a text counts although the text does not hold
            them: 1 for the space that SentencePiece and WordPiece put before the text, else 0.
        fingerprint: sha256 (hex) of everything that decides the ids.
    """

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    mask_id: int | None = None
    lossless: bool = False
    prefix_bytes: int = 0
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Lone surrogates are read as U+FFFD."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write files from which `load_tokenizer(directory)` builds an equal tokenizer."""

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The raw bytes each id emits, (vocab_size,); empty for special tokens."""

    @abstractmethod
    def special_ids(self) -> frozenset[int]:
        """Ids that emit no text."""

    @abstractmethod
    def to_json(self) -> str:
        """The tokenizer as the text of a Hugging Face `tokenizer.json`."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids: specials are skipped, invalid UTF-8 becomes U+FFFD, ids of no token are refused.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        raw = b"".join(self.piece(index) for index in ids)
        return raw[self._prefix_length(raw) :].decode("utf-8", errors="replace")

    def piece(self, index: int) -> bytes:
        """The raw bytes of one id."""
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(
                f"token id {index} is outside the vocabulary of '{self.name}' (0 to {self.vocab_size - 1}). "
                "Use the tokenizer that the ids were made with."
            )
        return self.pieces()[index]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id emits, int32 (vocab_size,); 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces()], dtype=np.int32)

    def text_bytes(self, ids: Sequence[int]) -> int:
        """Raw UTF-8 bytes of the text that was encoded to `ids`: the sum of `token_bytes` less the prefix."""
        raw = b"".join(self.piece(index) for index in ids)
        return len(raw) - self._prefix_length(raw)

    def stream(self, prompt: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder that prints ids as they arrive.

        Args:
            prompt: Ids that are on the screen already; what follows is printed as their continuation.
        """
        return StreamDecoder(self, prompt)

    def _prefix_length(self, raw: bytes) -> int:
        return self.prefix_bytes if raw.startswith(b" ") else 0


class StreamDecoder:
    """Text of ids that arrive one at a time; a character is returned when its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True
        for index in prompt:
            self.feed(index)

    def feed(self, index: int) -> str:
        """The characters that this id completes; never part of a character."""
        raw = self._tokenizer.piece(index)
        if raw and self._at_start:
            self._at_start = False
            if raw.startswith(b" "):
                raw = raw[self._tokenizer.prefix_bytes :]
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What is left: a replacement character if the last character never became complete."""
        return self._decoder.decode(b"", final=True)


def readable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot express, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, Rust panics included, into a `TokenizerError`.

    A panic arrives as `PanicException`, which derives from BaseException and passes every
    `except Exception`.
    """
    try:
        yield
    except (TernlmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001 (a Rust panic is no Exception)
        reason = str(error).strip().splitlines()
        raise TokenizerError(
            f"{doing} failed: {shortened(reason[0], 200) if reason else type(error).__name__}. "
            "The files may be damaged or of another kind; fetch them again or choose another tokenizer."
        ) from None
