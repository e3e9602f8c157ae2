import contextlib
import random
import struct
from pathlib import Path

import pytest

from ternlm.errors import TokenizerError
from ternlm.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_sentencepiece,
    read_sentencepiece,
)

SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(*fields: tuple[int, int | bytes | float]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def model(
    pieces: list[tuple[str, float, int]], kind: int = 2, fallback: int = 0, prefix: int = 1, extra: int = 0
) -> bytes:
    entries = [(1, message((1, text.encode()), (2, score), (3, type_))) for text, score, type_ in pieces]
    trainer = message((3, kind), (35, fallback))
    return message(*entries, (2, trainer), (3, message((3, prefix), (4, extra))))


def normal(*texts: str) -> list[tuple[str, float, int]]:
    return [(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]


def test_fields_are_read() -> None:
    found = read_sentencepiece(model([*SPECIAL, ("ab", -1.5, NORMAL)], kind=1, fallback=1, prefix=0, extra=1))
    assert found.pieces[3] == ("ab", -1.5, NORMAL)
    assert (found.model_type, found.byte_fallback) == (1, True)
    assert (found.add_dummy_prefix, found.remove_extra_whitespaces) == (False, True)


def test_merges_follow_the_score_of_the_union_not_the_order_of_ids() -> None:
    pieces = [*SPECIAL, ("bc", -1.0, NORMAL), ("ab", -2.0, NORMAL), *((c, -9.0, NORMAL) for c in "abc▁")]
    tokenizer = build_sentencepiece(model(pieces, prefix=0), "tiny")
    assert [tokenizer.pieces()[i] for i in tokenizer.encode("abc")] == [b"a", b"bc"]


def test_unknown_characters_are_one_unknown_or_their_bytes() -> None:
    pieces = [*SPECIAL, *normal("▁", "a")]
    without = build_sentencepiece(model(pieces, prefix=0), "tiny")
    assert without.encode("a🙂éa") == [4, 0, 4]
    every = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    fallback = build_sentencepiece(model([*SPECIAL, *every, *normal("▁", "a")], fallback=1, prefix=0), "tiny")
    assert fallback.decode(fallback.encode("a🙂a")) == "a🙂a"
    assert fallback.text_bytes(fallback.encode("a🙂a")) == 6
    assert len(fallback.encode("<0x41>")) == 6


def test_control_pieces_are_never_merged_into() -> None:
    pieces = [*SPECIAL, *normal("s>", "<s", "<", "s", ">", "▁")]
    tokenizer = build_sentencepiece(model(pieces, prefix=0), "tiny")
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"


def test_dummy_prefix_and_whitespace_rules() -> None:
    pieces = [*SPECIAL, *normal("▁a", "▁", "a")]
    kept = build_sentencepiece(model(pieces), "tiny")
    assert [kept.pieces()[i] for i in kept.encode(" a")] == [b" ", b" a"]
    assert kept.encode("") == []
    shortened = build_sentencepiece(model(pieces, extra=1), "tiny")
    assert shortened.encode("  a   a ") == shortened.encode("a a")
    assert not shortened.lossless


def test_unigram_takes_the_best_path() -> None:
    pieces = [*SPECIAL, ("a", -3.0, NORMAL), ("b", -3.0, NORMAL), ("ab", -5.0, NORMAL), ("▁", -3.0, NORMAL)]
    tokenizer = build_sentencepiece(model(pieces, kind=1, prefix=0), "tiny")
    assert tokenizer.encode("ab") == [5]
    assert 2 not in tokenizer.encode("</s>")


def test_splitting_before_spaces_changes_no_id() -> None:
    """The fast path cuts text before runs of spaces; a vocabulary where that is unsafe must not be cut."""
    every = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces = [*SPECIAL, *every, *normal("a▁b", "a▁", "▁a", "▁", "a", "b")]
    tokenizer = build_sentencepiece(model(pieces, fallback=1, prefix=0), "tiny")
    assert [tokenizer.pieces()[i] for i in tokenizer.encode("a b")] == [b"a b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (model([*SPECIAL, *normal("a")], kind=3), "word or character"),
        (model([*SPECIAL, ("x", 0.0, UNUSED)]), "unused"),
        (model([*SPECIAL, ("x", 0.0, USER_DEFINED)]), "user-defined"),
        (model(normal("a")), "no unknown"),
        (b"", "no pieces"),
        (model([*SPECIAL, *normal("a")]) + message((3, message((2, b"\xff\xff\xff\x7f")))), "normalization is cut off"),
        (b"\x0a\xff\xff\xff\xff\x0f", "damaged"),
        (b"\x0b", "damaged"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_with_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        build_sentencepiece(content, "tiny")


def test_random_damage_raises_nothing_but_tokenizer_errors() -> None:
    sound = model([*SPECIAL, *normal("▁", "a", "b", "ab", "▁a")])
    draw = random.Random(3)
    for _ in range(400):
        broken = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        with contextlib.suppress(TokenizerError):
            build_sentencepiece(bytes(broken[: draw.randint(1, len(broken))]), "broken").encode("ab a")


def test_scores_of_the_published_file_are_read(shared_data: Path) -> None:
    found = read_sentencepiece((shared_data / "tokenizers" / "llama-2" / "tokenizer.model").read_bytes())
    assert len(found.pieces) == 32000
    assert (found.pieces[0][2], found.pieces[1][2]) == (UNKNOWN, CONTROL)
    assert found.pieces[259] == ("▁▁", -1e9, NORMAL)
    assert found.pieces[260] == ("▁t", -1.0, NORMAL)
