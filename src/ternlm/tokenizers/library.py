"""`LibraryTokenizer`: any tokenizer of the `tokenizers` library behind our interface.

What each id emits is read from the tokenizer's own description (byte-level characters, the "▁" of
SentencePiece, the "##" of WordPiece), so byte counts need no decoding. Where the description comes from
is left to `pretrained`, `sentencepiece` and `training`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer, Sequence, Split

from ternlm.errors import TokenizerError
from ternlm.files import replace_durably
from ternlm.tokenizers.byte import byte_characters
from ternlm.tokenizers.files import SPECIAL_NAMES, write_files
from ternlm.tokenizers.interface import Tokenizer, library_errors, readable

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_DECIDES_THE_IDS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
_CONVENTIONS = {
    "bos": ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "[CLS]"),
    "eos": ("</s>", "<|eos|>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "<|mask|>", "[MASK]"),
}
_LARGEST_ID = 2**22
_PROBE = "  Probe: naïve\tЖук 猫\n\n🙂 e\u0301 \x00\ufffd\u2028  "


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: The library's object; padding and truncation are switched off.
        name: Human name.
        special_tokens: Texts of special tokens by ``bos``, ``eos``, ``pad``, ``unk``, ``mask``; for a name
            left out, the usual spellings are looked up; None means there is none.
        model_file: Content of the SentencePiece file it was built from, saved beside `tokenizer.json`.

    Raises:
        TokenizerError: The library refuses the description, or the vocabulary is empty.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        name: str,
        special_tokens: dict[str, str | None] | None = None,
        model_file: bytes | None = None,
    ):
        self.name = name
        self.model_file = model_file
        with library_errors(f"reading the tokenizer '{name}'"):
            _plain(inner)
            document = json.loads(inner.to_str())
            vocabulary = inner.get_vocab(with_added_tokens=True)
            self._inner = inner
            if not vocabulary:
                raise TokenizerError(f"the tokenizer '{name}' has an empty vocabulary. Fetch its files again.")
            self.vocab_size = max(vocabulary.values()) + 1
            self._set_special_ids(document, vocabulary, special_tokens or {})
            self._pieces = _piece_table(document, vocabulary, self._special, self.vocab_size)
            self.prefix_bytes = 1 if self._raw("a").startswith(b" ") else 0
            self.lossless = _keeps_every_text(document, vocabulary) and self._raw(_PROBE) == _PROBE.encode()
            self.fingerprint = self._fingerprint(document)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with library_errors(f"encoding with '{self.name}'"):
            encoded = self._inner.encode_batch_fast([readable(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def pieces(self) -> list[bytes]:
        return self._pieces

    def special_ids(self) -> frozenset[int]:
        return self._special

    def to_json(self) -> str:
        return str(self._inner.to_str(pretty=True))

    def save(self, directory: Path) -> None:
        write_files(self, directory, kind="library")
        if self.model_file is not None:
            replace_durably(directory / "tokenizer.model", self.model_file)

    def _raw(self, text: str) -> bytes:
        return b"".join(self._pieces[index] for index in self.encode(text))

    def _set_special_ids(
        self, document: dict[str, Any], vocabulary: dict[str, int], given: dict[str, str | None]
    ) -> None:
        given = {"unk": _unknown_token(document)} | given if _unknown_token(document) else given
        ids: dict[str, int | None] = {}
        for name in SPECIAL_NAMES:
            spellings: Iterable[str | None] = (given[name],) if name in given else _CONVENTIONS[name]
            ids[name] = next((vocabulary[text] for text in spellings if text in vocabulary), None)
        added = {token["id"] for token in document.get("added_tokens", []) if token["special"]}
        self._special = frozenset(added | {index for index in ids.values() if index is not None})
        # one token in two roles keeps the role of EOS, see Tokenizer
        self.eos_id = ids["eos"]
        self.bos_id, self.pad_id = (None if ids[n] == self.eos_id else ids[n] for n in ("bos", "pad"))
        self.unk_id, self.mask_id = ids["unk"], ids["mask"]

    def _fingerprint(self, document: dict[str, Any]) -> str:
        content = {key: document.get(key) for key in _DECIDES_THE_IDS}
        content["special"] = [getattr(self, f"{name}_id") for name in SPECIAL_NAMES]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_small_ids(ids: Iterable[Any]) -> None:
    """Refuse ids beyond any vocabulary; the library would list every id that is left out below them.

    Raises:
        TokenizerError: One is too large.
    """
    largest = max((index for index in ids if isinstance(index, int)), default=0)
    if largest > _LARGEST_ID:
        raise TokenizerError(
            f"the tokenizer has an id above the {_LARGEST_ID:,} that are supported. Fetch its files again."
        )


def require_sound_map(content: bytes) -> None:
    """Refuse a compiled normalization (`precompiled_charsmap`) that is shorter than it says.

    The library sets memory aside by the declared size, and ends the process where there is too little.

    Raises:
        TokenizerError: It is cut off or damaged.
    """
    if len(content) < 4 or int.from_bytes(content[:4], "little") > len(content) - 4:
        raise TokenizerError("the tokenizer's compiled normalization is cut off. Fetch its files again.")


def _plain(inner: tokenizers.Tokenizer) -> None:
    """Make the library read text as text: no padding, no truncation, no special tokens found in it."""
    inner.no_padding()
    inner.no_truncation()
    inner.encode_special_tokens = True
    document = json.loads(inner.to_str())
    if document["model"]["type"] == "Unigram":
        special = [token["content"] for token in document.get("added_tokens", []) if token["special"]]
        _split_inside(inner, special, json.dumps(document["pre_tokenizer"]))


def _split_inside(inner: tokenizers.Tokenizer, special: list[str], present: str) -> None:
    """Put a boundary after the first character of each special token's and byte piece's spelling.

    A Unigram model holds these as ordinary pieces with the best score, so it would find them in text;
    across a boundary it cannot.
    """
    spelled = [f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in sorted(special) if len(t) > 1]
    pattern = "|".join([*spelled, "<(?=0x[0-9A-F]{2}>)"])
    if json.dumps(pattern) in present:
        return
    split = Split(tokenizers.Regex(pattern), behavior="merged_with_previous")
    before: PreTokenizer | None = inner.pre_tokenizer
    inner.pre_tokenizer = split if before is None else Sequence([before, split])


def _unknown_token(document: dict[str, Any]) -> str | None:
    model = document["model"]
    if model["type"] == "Unigram":
        return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None


def _piece_table(
    document: dict[str, Any], vocabulary: dict[str, int], special: frozenset[int], size: int
) -> list[bytes]:
    pieces = [b""] * size
    emits = _emission(document)
    added = {token["id"]: token["content"] for token in document.get("added_tokens", [])}
    for token, index in vocabulary.items():
        if index not in special:
            pieces[index] = added[index].encode() if index in added else emits(token)
    return pieces


def _emission(document: dict[str, Any]) -> Callable[[str], bytes]:
    """The function from a vocabulary entry to the bytes it stands for."""
    parts = json.dumps([document["pre_tokenizer"], document["decoder"], document["normalizer"]])
    if '"ByteLevel"' in parts:
        values = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda token: b"".join(bytes([values[c]]) if c in values else c.encode() for c in token)
    if document["model"]["type"] == "WordPiece":
        prefix = document["model"].get("continuing_subword_prefix", "##")
        return lambda token: (token.removeprefix(prefix) if token.startswith(prefix) else " " + token).encode()
    fallback = bool(document["model"].get("byte_fallback")) or '"ByteFallback"' in parts

    def spelled(token: str) -> bytes:
        match = _BYTE_PIECE.fullmatch(token) if fallback else None
        return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()

    return spelled


def _keeps_every_text(document: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether the description is byte-level BPE over all 256 bytes, with nothing that alters the text."""
    model = document["model"]
    parts = json.dumps(document["pre_tokenizer"])
    return (
        model["type"] == "BPE"
        and '"ByteLevel"' in parts
        and '"Removed"' not in parts
        and '"add_prefix_space": true' not in parts
        and document["normalizer"] is None
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not any(t["lstrip"] or t["rstrip"] for t in document.get("added_tokens", []) if not t["special"])
        and vocabulary.keys() >= _bytes_of_text()
    )


def _bytes_of_text() -> set[str]:
    """Characters of the bytes that occur in UTF-8: all but C0, C1 and F5 to FF."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return {character for byte, character in enumerate(byte_characters()) if byte not in never}
