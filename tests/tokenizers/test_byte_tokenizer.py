import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers

from ternlm.errors import TokenizerError
from ternlm.tokenizers import ByteTokenizer, load_tokenizer

BYTE = ByteTokenizer()


def test_ids_are_the_utf8_bytes_and_decode_to_the_text(any_text: str) -> None:
    assert BYTE.encode(any_text) == list(any_text.encode())
    assert BYTE.decode(BYTE.encode(any_text)) == any_text
    assert BYTE.text_bytes(BYTE.encode(any_text)) == len(any_text.encode())


def test_decoding_never_raises_on_any_two_bytes_nor_on_random_three() -> None:
    draw = random.Random(7)
    cases = [(), *itertools.product(range(256), repeat=1), *itertools.product(range(256), repeat=2)]
    cases += [tuple(draw.randrange(256) for _ in range(3)) for _ in range(5000)]
    for ids in cases:
        text = BYTE.decode(ids)
        assert text == bytes(i for i in ids if i < 254).decode(errors="replace")


def test_special_ids_emit_nothing() -> None:
    assert BYTE.decode([BYTE.bos_id, 72, 105, BYTE.eos_id]) == "Hi"
    assert BYTE.token_bytes().tolist() == [1] * 254 + [0, 0]
    assert BYTE.special_ids() == {254, 255}


def test_no_text_contains_the_special_ids() -> None:
    every = "".join(map(chr, [*range(0x300), 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF]))
    assert max(BYTE.encode(every)) < 254


def test_a_lone_surrogate_reads_as_the_replacement_character() -> None:
    assert BYTE.decode(BYTE.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("index", [-1, 256])
def test_an_id_outside_the_vocabulary_is_refused(index: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        BYTE.decode([index])


def test_stream_prints_each_character_when_its_last_byte_arrives() -> None:
    stream = BYTE.stream()
    assert [stream.feed(i) for i in "é🙂!".encode()] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.finish() == ""


def test_stream_equals_decode_for_random_bytes() -> None:
    draw = random.Random(11)
    for _ in range(2000):
        ids = [draw.choice([65, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0xE2, 0xFF, draw.randrange(256)]) for _ in range(9)]
        stream = BYTE.stream()
        assert "".join([*map(stream.feed, ids), stream.finish()]) == BYTE.decode(ids)


def test_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    stream = BYTE.stream()
    assert stream.feed(0xF0) + stream.feed(0x9F) == ""
    assert stream.finish() == "\ufffd"


def test_stream_continues_a_prompt_without_printing_it() -> None:
    stream = BYTE.stream(prompt=[0xC3])
    assert stream.feed(0xA9) == "é"


def test_saved_folder_loads_equal_and_its_json_gives_the_same_ids_in_the_library(
    tmp_path: Path, multilingual: list[str]
) -> None:
    BYTE.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").fingerprint == BYTE.fingerprint
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for text in multilingual:
        assert library.encode(text).ids == BYTE.encode(text)
        assert library.decode(BYTE.encode(text)) == text
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert library.token_to_id(config["bos_token"]) == 254
    assert library.token_to_id(config["eos_token"]) == 255
