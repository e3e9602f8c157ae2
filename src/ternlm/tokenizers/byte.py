"""The byte tokenizer: id = UTF-8 byte, with two bytes that UTF-8 never uses as BOS and EOS."""

import hashlib
import json
from pathlib import Path

from ternlm.tokenizers.files import write_files
from ternlm.tokenizers.interface import Tokenizer, readable

BOS, EOS = 254, 255


class ByteTokenizer(Tokenizer):
    """256 ids. Ids 0 to 253 are the byte itself; 254 is BOS and 255 is EOS.

    Bytes 0xFE and 0xFF occur in no UTF-8 text, so every text is lossless and nothing is escaped. There
    is no padding id: 0 is a real byte, and padded targets are marked in the targets instead.
    """

    name = "byte"
    vocab_size = 256
    bos_id = BOS
    eos_id = EOS
    lossless = True
    fingerprint = hashlib.sha256(b"ternlm byte tokenizer: id = byte, bos 254, eos 255").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(readable(text).encode("utf-8"))

    def pieces(self) -> list[bytes]:
        return _PIECES

    def special_ids(self) -> frozenset[int]:
        return frozenset((BOS, EOS))

    def save(self, directory: Path) -> None:
        write_files(self, directory, kind="byte")

    def to_json(self) -> str:
        """A byte-level BPE without merges whose entry for byte b has id b."""
        names = byte_characters()
        names[BOS], names[EOS] = "<|bos|>", "<|eos|>"
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": names[index], **flags} for index in (BOS, EOS)],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {name: index for index, name in enumerate(names)},
                "merges": [],
            },
        }
        return json.dumps(document, ensure_ascii=False, indent=1)


def byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte, (256,).

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 upward in order.

    Source:
        Radford et al. 2019, GPT-2 (`bytes_to_unicode`).
    """
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in themselves else chr(next(others)) for byte in range(256)]


_PIECES = [bytes([byte]) if byte < BOS else b"" for byte in range(256)]
