import json
import os
from pathlib import Path

import numpy as np
import pytest

from ternlm.data import Corpus, DataSettings, load_corpus, prepare, shards, statistics
from ternlm.data.corpus import seal
from ternlm.errors import DataError
from ternlm.tokenizers import ByteTokenizer, train_bpe

TEXT = "".join(f"line {i} of the only document\n\n" for i in range(200))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    (tmp_path / "a.txt").write_text(TEXT)
    return prepare(DataSettings(source=str(tmp_path / "a.txt")), ByteTokenizer(), tmp_path / "out")


def test_reading_across_shards_equals_one_array(corpus: Corpus) -> None:
    stream = corpus.split("train")
    whole = np.concatenate([np.fromfile(path, "<u1") for path in sorted(stream.directory.glob("shard-*.bin"))])
    assert len(stream.shards) > 5
    for start, stop in [
        (0, len(stream)),
        (0, 0),
        (699, 701),
        (700, 1400),
        (650, 2200),
        (len(stream), len(stream)),
    ]:
        assert np.array_equal(stream.read(start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 10**9)])
def test_reading_outside_the_stream_is_refused(corpus: Corpus, start: int, stop: int) -> None:
    with pytest.raises(DataError, match="leave the train split"):
        corpus.split("train").read(start, stop)


def test_a_short_shard_names_both_numbers(corpus: Corpus) -> None:
    os.truncate(corpus.directory / "train" / "shard-00001.bin", 699)
    with pytest.raises(DataError, match=r"shard-00001\.bin holds 699 tokens, its manifest promises 700"):
        load_corpus(corpus.directory)


def test_a_shard_cut_off_while_in_use_is_an_error_not_a_crash(corpus: Corpus) -> None:
    stream = corpus.split("train")
    stream.read(700, 800)
    os.truncate(corpus.directory / "train" / "shard-00001.bin", 50)
    with pytest.raises(DataError, match="cut off while in use"):
        stream.read(700, 800)


@pytest.mark.parametrize("name", ["shard-00000.bin", "documents.bin", "hashes.bin"])
def test_one_flipped_bit_is_found_by_verify(corpus: Corpus, name: str) -> None:
    load_corpus(corpus.directory, verify=True)
    path = corpus.directory / "validation" / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} has sha256"):
        load_corpus(corpus.directory, verify=True)


@pytest.mark.parametrize("name", ["shard-00002.bin", "documents.bin", "hashes.bin"])
def test_a_missing_file_is_named(corpus: Corpus, name: str) -> None:
    (corpus.directory / "train" / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        load_corpus(corpus.directory)


def test_a_token_outside_the_vocabulary_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    made = prepare(DataSettings(source=str(tmp_path / "a.txt")), train_bpe([TEXT], 280), tmp_path / "out")
    path = made.directory / "train" / "shard-00000.bin"
    content = np.fromfile(path, "<u2")
    content[5] = 999
    content.tofile(path)
    with pytest.raises(DataError, match="token 999, outside the vocabulary"):
        load_corpus(made.directory).split("train").read(0, 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("splits"),
        lambda m: m.pop("tokenizer"),
        lambda m: m.update(schema=99),
        lambda m: m["splits"]["train"].update(tokens=3),
        lambda m: m["splits"]["train"]["shards"][0].update(file="../../elsewhere.bin"),
        lambda m: m["splits"].update(test=None),
        lambda m: m["splits"]["train"].update(documents="many"),
        lambda m: m["splits"]["train"].pop("tables"),
        lambda m: m["splits"].update(train=[1]),
        lambda m: m["tokenizer"].update(vocab_size=10**400),
        lambda m: m["tokenizer"].update(bos_id="first"),
    ],
)
def test_a_changed_manifest_is_refused(corpus: Corpus, change) -> None:
    path = corpus.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        load_corpus(corpus.directory)
    path.write_text(json.dumps(manifest | {"sha256": seal(manifest)}))
    with pytest.raises(DataError):
        load_corpus(corpus.directory)


def test_a_manifest_that_does_not_fit_its_own_hash_is_refused(corpus: Corpus) -> None:
    path = corpus.directory / "manifest.json"
    path.write_text(path.read_text().replace('"name": "byte"', '"name": "bite"'))
    with pytest.raises(DataError, match="its own sha256"):
        load_corpus(corpus.directory)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_manifest_that_is_no_manifest_is_refused(corpus: Corpus, content: str) -> None:
    (corpus.directory / "manifest.json").write_text(content)
    with pytest.raises(DataError):
        load_corpus(corpus.directory)


def test_a_folder_without_corpus_and_a_split_without_documents_say_what_to_do(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data prepare"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="not a split"):
        corpus.split("dev")
    data = DataSettings(source=str(tmp_path / "a.txt"), test_fraction=0)
    without = prepare(data, ByteTokenizer(), tmp_path / "without")
    assert without.splits == ("train", "validation")
    with pytest.raises(DataError, match=r"data\.test_fraction"):
        without.split("test")


def test_statistics_add_up(corpus: Corpus) -> None:
    found = statistics(corpus, 100)
    assert sum(split["bytes"] for split in found.values()) == len(TEXT.encode())
    train = found["train"]
    assert train["tokens"] == train["bytes"] + 2
    assert train["bytes_per_token"] == 1.0
    assert train["documents"] == 1
    assert train["longest_document_tokens"] == train["median_document_tokens"] == train["tokens"]
    assert train["sequences"] == (train["tokens"] - 100) // 100


def test_real_books_become_three_parts_that_rebuild_them(shared_data: Path, tmp_path: Path) -> None:
    data = DataSettings(source=str(shared_data / "books"))
    made = prepare(data, ByteTokenizer(), tmp_path / "books")
    found = statistics(made, 256)
    raw = sum(path.stat().st_size for path in (shared_data / "books").glob("*.txt"))
    marks = sum(path.read_bytes().startswith(b"\xef\xbb\xbf") for path in (shared_data / "books").glob("*.txt"))
    assert sum(split["bytes"] for split in found.values()) == raw - 3 * marks
    assert [split["documents"] for split in found.values()] == [4, 4, 4]
