import gzip
import json
from pathlib import Path

import pytest

from ternlm.data import read_documents
from ternlm.errors import DataError


def read(source: object, **options: str) -> list[str]:
    return list(read_documents(str(source), **options))


def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n one\r\n\ntwo \xc3\xa9\n")
    assert read(tmp_path / "a.txt") == ["\n one\r\n\ntwo é\n"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_separator_lines_divide_a_file_and_empty_documents_are_dropped(tmp_path: Path, newline: str) -> None:
    lines = [
        "<|endoftext|>",
        "first",
        "",
        "still first",
        "",
        "<|endoftext|>",
        " ",
        "<|endoftext|>",
        "",
        "second",
    ]
    (tmp_path / "a.txt").write_bytes(newline.join(lines).encode())
    assert read(tmp_path / "a.txt") == [f"first{newline}{newline}still first", "second"]


def test_a_separator_inside_a_line_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two\n")
    assert read(tmp_path / "a.txt") == ["one <|endoftext|> two\n"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt") == ["hello"]


def test_a_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ["b.txt", "a.md", "sub/c.txt", ".hidden.txt", ".git/x.txt", "image.png", "code.py"]:
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["b.txt", "sub/c.txt"]


def test_a_file_named_outright_is_text_whatever_its_ending(tmp_path: Path) -> None:
    (tmp_path / "wiki.valid.raw").write_text("raw")
    assert read(tmp_path / "wiki.valid.raw") == ["raw"]


def test_json_lines_plain_and_compressed_give_the_same(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    records = [{"text": "one\n"}, {"text": ""}, {"text": None}, "two", {"text": "drei 🙂", "id": 3}]
    content = ("\n".join(json.dumps(record) for record in records) + "\n\n").encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    for name in ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]:
        assert read(tmp_path / name) == ["one\n", "two", "drei 🙂"]


def test_parquet_gives_the_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": [f"text {i}" for i in range(2500)] + [None, ""], "id": list(range(2502))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path, text_column="body") == [f"text {i}" for i in range(2500)]
    with pytest.raises(DataError, match="'body', 'id'"):
        read(tmp_path)


def test_invalid_utf8_names_file_offset_and_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n<|endoftext|>\n\n12\xff4\n")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 22.*encoding_errors=replace"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding_errors="replace") == ["good", "12\ufffd4"]


def test_invalid_utf8_in_json_lines_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'"abc"\n"d\xfe"\n')
    with pytest.raises(DataError, match="0xfe at offset 8"):
        read(tmp_path / "a.jsonl")


def test_a_lone_surrogate_in_json_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    with pytest.raises(DataError, match=r"line 1.*lone surrogate"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", encoding_errors="replace") == ["a\ufffdb"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "x"}', "no column 'text' but 'body'"),
        ('{"text": 3}', "holds a int"),
        ("[1]", "holds a list"),
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
    ],
)
def test_bad_records_name_the_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_and_cut_off_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"this is not what the name says")
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_file_is_an_error_not_a_short_corpus(tmp_path: Path, ending: str) -> None:
    compress = gzip.compress if ending == "gz" else pytest.importorskip("zstandard").compress
    whole = compress(b"".join(b'{"text": "%d"}\n' % i for i in range(50_000)))
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(whole)
    assert len(read(path)) == 50_000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_several_zstandard_frames_are_read_as_one_file(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert read(tmp_path) == ["one two"]


def test_missing_and_empty_sources_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="holds no documents"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(DataError, match="every document is empty"):
        read(tmp_path)
