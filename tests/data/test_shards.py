import fcntl
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders import tiny_data_settings
from ternlm.data import DataSettings, default_directory, load_corpus, prepare, shards
from ternlm.data.corpus import Corpus, token_dtype
from ternlm.data.preparation import prepare_data
from ternlm.errors import DataError, Interrupted
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings, train_bpe

BYTE = ByteTokenizer()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(shards, "COMMIT_TOKENS", 900)
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 150)


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    draw = random.Random(5)
    texts = [f"document {i}: " + "naïve text " * draw.randint(0, 9) for i in range(150)]
    (tmp_path / "source.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataSettings(source=str(tmp_path / "source.jsonl"), validation_fraction=0.15, test_fraction=0.1)


def files(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_the_stream_is_bos_text_eos_per_document(tmp_path: Path, data: DataSettings) -> None:
    corpus = prepare(data, BYTE, tmp_path / "out")
    assert corpus.splits == ("train", "validation", "test")
    total = 0
    for name in corpus.splits:
        stream = corpus.split(name)
        tokens = stream.read(0, len(stream))
        assert (tokens == BYTE.eos_id).sum() == (tokens == BYTE.bos_id).sum() == stream.documents
        start = 0
        for end, size in zip(stream.document_ends, stream.document_bytes, strict=True):
            document = tokens[start:end]
            assert (document[0], document[-1]) == (BYTE.bos_id, BYTE.eos_id)
            assert BYTE.decode(document.tolist()).startswith("document ")
            assert len(document) - 2 == size
            start = end
        assert start == len(stream)
        assert stream.bytes == stream.document_bytes.sum()
        assert stream.words == len(BYTE.decode(tokens.tolist()).replace("document", " document").split())
        assert stream.longest_document == np.diff([0, *stream.document_ends]).max()
        total += stream.documents
    assert total == 150


def test_splits_share_no_document(tmp_path: Path, data: DataSettings) -> None:
    corpus = prepare(data, BYTE, tmp_path / "out")
    hashes = [set(corpus.split(name).document_hashes.tolist()) for name in corpus.splits]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 150


def test_a_validation_file_that_repeats_training_documents_loses_them(tmp_path: Path, data: DataSettings) -> None:
    lines = Path(data.source).read_text().splitlines()
    held = [*lines[:3], json.dumps({"text": "new one"}), lines[9], json.dumps({"text": "new two"})]
    (tmp_path / "held.jsonl").write_text("\n".join(held))
    data = data.model_copy(update={"validation_path": str(tmp_path / "held.jsonl"), "test_fraction": 0.0})
    corpus = prepare(data, BYTE, tmp_path / "out")
    stream = corpus.split("validation")
    assert BYTE.decode(stream.read(0, len(stream)).tolist()) == "new onenew two"
    assert corpus.manifest["duplicates_dropped"] == {"train": 0, "validation": 4, "test": 0}


@pytest.mark.parametrize("seed", range(4))
def test_stopped_at_random_points_and_resumed_is_byte_identical(tmp_path: Path, data: DataSettings, seed: int) -> None:
    draw = random.Random(seed)
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"text": f"held {i}"}) for i in range(40)))
    data = data.model_copy(update={"validation_path": str(tmp_path / "held.jsonl")})
    prepare(data, BYTE, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def sitting(kind: str) -> None:
        batches = iter(range(draw.randint(2, 12)))

        def stop() -> bool:
            if next(batches, None) is not None:
                return False
            if kind == "kill":
                raise Killed
            return True

        prepare(data, BYTE, tmp_path / "parts", should_stop=stop)

    interruptions = 0
    while True:
        try:
            sitting(draw.choice(["stop", "kill"]))
            break
        except (Interrupted, Killed):
            interruptions += 1
            assert not (tmp_path / "parts" / "manifest.json").exists()
    assert interruptions >= 2
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_crash_in_any_file_operation_and_a_second_try_is_byte_identical(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import os

    prepare(data, BYTE, tmp_path / "whole")
    original: Callable[..., object] = Path.rename if failing == "rename" else os.fsync
    crash_after = 1
    finished = False
    while not finished:
        left = crash_after

        def crashing(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(*((Path, "rename") if failing == "rename" else (os, "fsync")), crashing)
            try:
                prepare(data, BYTE, tmp_path / "parts")
                finished = True
            except KeyboardInterrupt:
                crash_after += 7
    assert crash_after > 5
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["documents.bin.part", "hashes.bin.part", "shard-"])
def test_a_committed_part_that_changed_meanwhile_is_refused(tmp_path: Path, data: DataSettings, name: str) -> None:
    calls = iter(range(10))
    with pytest.raises(Interrupted):
        prepare(data, BYTE, tmp_path / "out", should_stop=lambda: next(calls, None) is None)
    (path,) = (path for path in (tmp_path / "out" / "train").glob("*.part") if path.name.startswith(name))
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"differs from what was committed.*Delete the folder"):
        prepare(data, BYTE, tmp_path / "out")


@pytest.mark.parametrize("record", [{"stream": "x"}, {"splits": []}, {"splits": {"train": {"shards": 5}}}])
def test_a_damaged_record_of_progress_is_refused(tmp_path: Path, data: DataSettings, record: dict[str, object]) -> None:
    calls = iter(range(10))
    with pytest.raises(Interrupted):
        prepare(data, BYTE, tmp_path / "out", should_stop=lambda: next(calls, None) is None)
    path = tmp_path / "out" / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    with pytest.raises(DataError, match=r"progress\.json is damaged"):
        prepare(data, BYTE, tmp_path / "out")


def test_a_record_left_beside_the_manifest_is_cleared_away(tmp_path: Path, data: DataSettings) -> None:
    prepare(data, BYTE, tmp_path / "out")
    (tmp_path / "out" / "progress.json").write_text("{}")
    prepare(data, BYTE, tmp_path / "out")
    assert not (tmp_path / "out" / "progress.json").exists()


def test_an_interrupted_sitting_continues_instead_of_starting_again(tmp_path: Path, data: DataSettings) -> None:
    calls = iter(range(10))
    with pytest.raises(Interrupted, match="to continue"):
        prepare(data, BYTE, tmp_path / "out", should_stop=lambda: next(calls, None) is None)
    seen = []
    prepare(data, BYTE, tmp_path / "out", progress=seen.append)
    assert seen[0].documents > 10
    assert seen[-1].documents == 150
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)


def test_a_finished_corpus_is_opened_not_made_again(tmp_path: Path, data: DataSettings) -> None:
    first = prepare(data, BYTE, tmp_path / "out")
    again = prepare(data, BYTE, tmp_path / "out", progress=lambda _: pytest.fail("tokenized twice"))
    assert again.fingerprint == first.fingerprint


def test_another_corpus_in_the_folder_is_refused(tmp_path: Path, data: DataSettings) -> None:
    prepare(data, BYTE, tmp_path / "out")
    with pytest.raises(DataError, match="another source, tokenizer"):
        prepare(data.model_copy(update={"test_fraction": 0.2}), BYTE, tmp_path / "out")


def test_settings_that_changed_during_an_interruption_start_again(tmp_path: Path, data: DataSettings) -> None:
    calls = iter(range(10))
    with pytest.raises(Interrupted):
        prepare(data, BYTE, tmp_path / "out", should_stop=lambda: next(calls, None) is None)
    changed = data.model_copy(update={"max_documents": 120})
    prepare(changed, BYTE, tmp_path / "out")
    prepare(changed, BYTE, tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path, data: DataSettings) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            prepare(data, BYTE, tmp_path / "out")


def test_a_finished_corpus_may_be_opened_by_many_at_once(tmp_path: Path, data: DataSettings) -> None:
    first = prepare(data, ByteTokenizer(), tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare(data, ByteTokenizer(), tmp_path / "out").fingerprint == first.fingerprint


@pytest.mark.parametrize("limit", [5, 997, 1000, 1003, 2500])
def test_max_tokens_ends_the_training_split_exactly(tmp_path: Path, data: DataSettings, limit: int) -> None:
    corpus = prepare(data.model_copy(update={"max_tokens": limit}), BYTE, tmp_path / "out")
    stream = corpus.split("train")
    tokens = stream.read(0, len(stream))
    assert limit - 2 <= len(stream) <= limit
    assert tokens[-1] == BYTE.eos_id
    assert (tokens == BYTE.eos_id).sum() == stream.documents


def test_max_tokens_keeps_an_own_validation_split_whole(tmp_path: Path, data: DataSettings) -> None:
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"text": f"held {i}"}) for i in range(40)))
    data = data.model_copy(update={"validation_path": str(tmp_path / "held.jsonl"), "max_tokens": 500})
    assert prepare(data, BYTE, tmp_path / "out").split("validation").documents == 40


def test_a_bpe_corpus_counts_raw_bytes_and_uses_two_bytes_per_token(tmp_path: Path, data: DataSettings) -> None:
    bpe = train_bpe(["document naïve text 0123456789 " * 30], 290)
    corpus = prepare(data, bpe, tmp_path / "out")
    stream = corpus.split("train")
    assert stream.dtype == np.dtype("<u2")
    tokens = stream.read(0, len(stream))
    assert bpe.token_bytes()[tokens].sum() == stream.bytes
    assert (stream.directory / "shard-00000.bin").stat().st_size == 2000


@pytest.mark.parametrize(("vocabulary", "size"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_ids_take_the_fewest_bytes(vocabulary: int, size: int) -> None:
    assert token_dtype(vocabulary).itemsize == size


def test_the_default_directory_follows_what_matters_and_nothing_else(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    usual = default_directory(data, BYTE)
    assert usual.parent == tmp_path / "xdg" / "ternlm" / "data"
    assert usual.name.startswith("source.jsonl-byte-")
    assert default_directory(data.model_copy(update={"sequence_length": 9}), BYTE) == usual
    assert default_directory(data.model_copy(update={"test_fraction": 0.3}), BYTE) != usual
    assert default_directory(data, train_bpe(["abc " * 9], 270)) != usual
    assert default_directory(data.model_copy(update={"cache": str(tmp_path)}), BYTE).parent == tmp_path
    Path(data.source).write_text('{"text": "changed"}')
    assert default_directory(data, BYTE) != usual
    assert default_directory(DataSettings(source="hf:owner/name:config"), BYTE).name.startswith("name-config-byte")


def test_no_training_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="no text"):
        prepare(DataSettings(source=str(tmp_path)), BYTE, tmp_path / "out")


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path, data: DataSettings) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(data, BYTE, tmp_path / "file" / "out")


def test_the_manifest_says_what_was_made(tmp_path: Path, data: DataSettings) -> None:
    corpus = prepare(data, BYTE, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["fingerprint"] == BYTE.fingerprint == corpus.tokenizer_fingerprint
    assert manifest["source"]["source"] == data.source
    assert load_corpus(tmp_path / "out").split("test").eval_id == manifest["splits"]["test"]["eval_id"]
    assert not (tmp_path / "out" / "progress.json").exists()


def test_a_run_notices_a_flipped_bit_in_a_shard_before_it_trains_on_it(tmp_path: Path) -> None:
    data = tiny_data_settings(tmp_path)
    prepared = prepare_data(data, TokenizerSettings(), verify=True)
    assert isinstance(prepared.corpus, Corpus)
    shard = min((prepared.corpus.directory / "train").glob("shard-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    prepare_data(data, TokenizerSettings())  # by its size nothing is wrong
    with pytest.raises(DataError, match="sha256"):
        prepare_data(data, TokenizerSettings(), verify=True)
