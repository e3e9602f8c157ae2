"""What hostile files are made from: settings and tokenizer files that are sound, and pieces that are not."""

import json
import struct
from pathlib import Path

from ternlm.tokenizers import train_bpe

YAML = b"""# a comment
model: {hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4}
data:
  source: "stories"
  sequence_length: 1_6
training:
  max_steps: 1e3
  seed: 0x1F
  batch_size: '4'
optimizer:
  learning_rate: 2e-3
  betas: [0.9, 0.95]
"""
YAML_PIECES = [
    *(b"a: &a [1, 2]\nb: [*a, *a, *a]", b"a: &a [*a]", b"&a : *a", b"<<: {max_steps: 3}"),
    *(b"training: {max_steps: !!python/name:os.system ''}", b"!!python/object/apply:os.system ['true']"),
    *(b"training: !!int x", b"training: {max_steps: !!bool x}", b"x: !!timestamp y", b"seed: !!float ''"),
    *(b"x: !!binary !", b"x: !!set {a, b}", b"x: !!omap [a: 1]", b"x: !!pairs [a]", b"x: !<tag:x> y", b"x: ="),
    *(b"x: 2001-99-99", b"x: 99999-01-01", b"x: 1:30:99", b"x: .inf", b"x: .nan", b"max_time: 1e999s"),
    *(b"x: 0x" + b"f" * 5000, b"x: " + b"9" * 5000, b"x: 0b" + b"1" * 9999),
    *(b"? {a: b}\n: c", b"? [a]\n: c", b"--- \n...\n---\nx: 1", b"%YAML 9.9\n---", b"- x", b"\t x"),
    *(b"x: [" * 2000, b"x: {" * 400, b"x: |\n  text\n y", b"x: 'a", b'x: "\\ud800"', b'x: "\\U00110000"'),
    *(b"\x00", b"\xff\xfe", b"training:\n  max_steps: 3\n  max_steps: 4"),
]
VALUES = [
    *("1", "0", "-1", "1e3", "9e307T", "1e308", "nan%", "inf%", "1%", "1e999", "9" * 400 + "d", "9" * 5000),
    *("0x" + "f" * 4000, "[1, 2]", "[]", "{}", "{a: 1}", "null", "none", "auto", "true", "''", "a" * 3000, "é"),
    *("1" * 90 + "kib", "1d" * 3000, "\ud800", "\0", "a\nb", "[[[[1]]]]", "0.5", "5e-324", "1e-400", "2**3", "-0"),
    *("1_0_0", "_", "%", "e", ".", "+", "1e+", "byte", "train", "/dev/zero", "..", "bitnet", "ternary"),
]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """A folder for each kind of tokenizer file."""
    text = ["a story about a fox and a naïve hen, again and again " * 3] * 20
    train_bpe(text, 300).save(folder / "saved")
    train_bpe(text, 270).save(folder / "hugging-face")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghi", "##a", "##st", "story", ":"]
    contents = {
        "hugging-face/tokenizer_config.json": b'{"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}',
        "bert/vocab.txt": "\n".join(pieces).encode(),
        "bert/tokenizer_config.json": b'{"do_lower_case": true}',
        "bpe/tokenizer.model": sentencepiece_model(kind=2, fallback=True),
        "unigram/tokenizer.model": sentencepiece_model(kind=1, fallback=True),
        "unigram-json/tokenizer.json": json.dumps(UNIGRAM).encode(),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    document = json.loads((folder / "saved" / "tokenizer.json").read_text())["model"]
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "vocab.json").write_text(json.dumps(document["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["merges"]]
    (folder / "gpt2" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return {path.name: path for path in sorted(folder.iterdir())}


_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
UNIGRAM = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<unk>", **_SPECIAL}],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
    },
    "pre_tokenizer": _SPACE,
    "decoder": _SPACE,
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["story", -4.5]],
        "byte_fallback": False,
    },
}


def sentencepiece_model(kind: int, fallback: bool) -> bytes:
    """A SentencePiece file: pieces of text, score and type, then how it was trained and how text is normalized."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if fallback else []
    pieces += [
        (text, -float(rank), 1) for rank, text in enumerate(["▁", "a", "▁a", "st", "s", "t", "story", "o", "r", "y"])
    ]
    entries = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind_]))
        for text, score, kind_ in pieces
    ]
    trainer = b"\x18" + bytes([kind]) + b"\x98\x02" + bytes([fallback])
    return b"".join(entries) + field(2, trainer) + field(3, b"\x18\x01\x20\x00")


def field(number: int, content: bytes) -> bytes:
    """One field of a protobuf message that holds bytes."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)
