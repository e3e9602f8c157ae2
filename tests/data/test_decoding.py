"""Bytes that are no UTF-8: refused, replaced or left out, and always reported."""

import json
from pathlib import Path

import pytest

from builders import TRAIN
from ternlm.data import DataSettings, load_corpus, prepare, read_documents
from ternlm.data.decoding import Decoder, describe_invalid
from ternlm.errors import DataError, Interrupted
from ternlm.tokenizers import load_tokenizer

BAD = b"one \xff two \xce\n"  # two invalid sequences, the first at byte 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three valid documents and two damaged ones, of several kinds."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(BAD)
    (texts / "b.txt").write_text("a \ufffd that was written so", encoding="utf-8")
    (texts / "c.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "not \xfe fine"}\n{"text": "\xce\xb1"}\n')
    return texts


def test_strict_names_file_offset_and_how_many_places(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BAD)
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 4, the first of 2 such.*=skip"):
        list(read_documents(str(tmp_path)))


def test_replace_reads_every_document_and_counts_what_was_replaced(folder: Path) -> None:
    decoder = Decoder("replace")
    texts = list(read_documents(str(folder), decoder=decoder))
    assert texts == ["one \ufffd two \ufffd\n", "a \ufffd that was written so", "fine", "not \ufffd fine", "α"]
    found = decoder.found()
    assert found is not None
    assert (found["documents"], found["sequences"], found["files"]) == (2, 3, 2)
    assert found["places"] == [f"{folder / 'a.txt'}, offset 4", f"{folder / 'c.jsonl'}, offset 31"]


def test_skip_leaves_out_the_damaged_documents_alone(folder: Path) -> None:
    decoder = Decoder("skip")
    texts = list(read_documents(str(folder), decoder=decoder))
    assert texts == ["a \ufffd that was written so", "fine", "α"]
    assert (decoder.found() or {})["documents"] == 2


def test_a_document_that_is_read_twice_counts_once(folder: Path) -> None:
    decoder = Decoder("replace")
    for _ in range(2):
        list(read_documents(str(folder), decoder=decoder))
    assert (decoder.found() or {})["sequences"] == 3


def test_valid_text_leaves_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("η γάτα 猫 🐈", encoding="utf-8")
    decoder = Decoder("replace")
    assert list(read_documents(str(tmp_path), decoder=decoder)) == ["η γάτα 猫 🐈"]
    assert decoder.found() is None


@pytest.mark.parametrize("by_dictionary", [False, True])
@pytest.mark.parametrize("handling", ["replace", "skip"])
def test_parquet_strings_that_are_none_are_handled_like_files(
    tmp_path: Path, handling: str, by_dictionary: bool
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"good \xce\xb1", b"bad \xe4\xbd", None], type=pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers(), raw.null_count)
    stored = column.dictionary_encode() if by_dictionary else column
    parquet.write_table(pyarrow.table({"text": stored}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"byte 0xe4 at row 2, offset 4"):
        list(read_documents(str(tmp_path)))
    decoder = Decoder(handling)
    wanted = ["good α", "bad \ufffd"] if handling == "replace" else ["good α"]
    assert list(read_documents(str(tmp_path), decoder=decoder)) == wanted
    assert (decoder.found() or {})["documents"] == 1


def test_a_lone_surrogate_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "whole"}\n')
    assert list(read_documents(str(tmp_path), encoding_errors="skip")) == ["whole"]


def test_every_byte_string_up_to_three_bytes_is_replaced_or_left_out_without_an_error() -> None:
    edges = [0x00, 0x41, 0x7F, 0x80, 0xBF, 0xC2, 0xCE, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFE, 0xFF]
    strings = [bytes(part) for a in edges for b in edges for c in edges for part in ([a], [a, b], [a, b, c])]
    for raw in strings:
        replace, skip = Decoder("replace"), Decoder("skip")
        assert replace.text(raw, "f") == raw.decode("utf-8", "replace")
        is_valid = replace.found() is None
        assert skip.text(raw, "f") == (raw.decode("utf-8") if is_valid else "")


def test_sentences_say_how_many_where_and_what_became_of_them(folder: Path) -> None:
    decoder = Decoder("skip")
    decoder.text(b"\xff", "x.txt", 7)
    sentence = describe_invalid(decoder.found() or {})
    assert sentence == "1 document held 1 invalid UTF-8 sequence; the document was left out: x.txt, offset 7"
    for number in range(6):
        decoder.text(b"\xff", f"{number}.txt")
    assert describe_invalid(decoder.found() or {}).endswith("3.txt, offset 0, ...")


@pytest.mark.parametrize("stops_once", [False, True])
def test_a_prepared_corpus_keeps_the_record_also_when_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_once: bool
) -> None:
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 300)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TRAIN):
        raw = text.encode() + (b" \xff" if number % 20 == 3 else b"")
        (tmp_path / "texts" / f"{number:03}.txt").write_bytes(raw)
    data = DataSettings(source=str(tmp_path / "texts"), encoding_errors="replace", cache=str(tmp_path / "cache"))
    place, tokenizer, asked = tmp_path / "corpus", load_tokenizer("byte"), iter([False, False, True])
    if stops_once:
        with pytest.raises(Interrupted):
            prepare(data, tokenizer, place, should_stop=lambda: next(asked))
    prepare(data, tokenizer, place)
    found = load_corpus(place).invalid_bytes()
    assert found is not None
    assert (found["documents"], found["sequences"], found["handling"]) == (3, 3, "replace")


def test_a_damaged_record_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n\n".join(TRAIN).encode() + b"\xff")
    data = DataSettings(source=str(tmp_path / "a.txt"), encoding_errors="replace")
    corpus = prepare(data, load_tokenizer("byte"), tmp_path / "corpus")
    assert json.loads((tmp_path / "corpus" / "invalid.json").read_text())["documents"] == 1
    (tmp_path / "corpus" / "invalid.json").write_text("{")
    assert corpus.invalid_bytes() is None
