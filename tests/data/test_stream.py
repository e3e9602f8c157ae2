"""Streams over real files read by the `datasets` package, compared with tokens worked out from the documents."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from streams import (
    BLOCK,
    BUFFER,
    BYTE,
    T,
    close_all,
    loader_of,
    opened,
    position_in_unit_interval,
    some_files,
    stream_settings,
    training_tokens,
    windows,
    write_dataset,
)
from ternlm.data import DataSettings, blocks, open_corpus, prepare
from ternlm.data.blocks import BlockStore
from ternlm.data.loader import Loader
from ternlm.data.preparation import prepare_data
from ternlm.data.stream import StreamedCorpus, open_stream
from ternlm.data.stream_loader import StreamLoader
from ternlm.data.windows import CausalWindows
from ternlm.errors import DataError, Interrupted, SettingsError
from ternlm.tokenizers import TokenizerSettings, load_tokenizer, train_bpe

datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
W = (BLOCK - 1) // T
FILES = some_files()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 700)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "source", FILES)


@pytest.fixture
def data(source: str) -> DataSettings:
    return stream_settings(source)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The samples of 20 blocks, from a stream that nothing disturbed."""
    folder = tmp_path_factory.mktemp("expected")
    corpus = opened(stream_settings(write_dataset(folder / "source", FILES)), folder / "stream")
    found = windows(loader_of(corpus), 0, 20 * W)
    corpus.close()
    return found


def block_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("block-"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_every_token_of_every_pass_is_a_target_exactly_once(tmp_path: Path, kind: str) -> None:
    corpus = opened(stream_settings(write_dataset(tmp_path / "source", FILES, kind)), tmp_path / "stream")
    loader = loader_of(corpus)
    sentences: list[str] = []
    loader.say = sentences.append
    count = 40 * W
    reference = training_tokens(FILES, BYTE, count * T + 1)
    samples = loader.samples(0, count)
    assert sorted(sample["start"] for sample in samples) == list(range(0, count * T, T))
    for row, sample in zip(windows(loader, 0, count), samples, strict=True):
        assert row.tolist() == reference[sample["start"] : sample["start"] + T + 1].tolist()
    epochs = [loader.epoch(block * W) for block in range(40)]
    one_pass = sum(len(t.encode()) + 2 for f in FILES for t in f if t and t.strip() and is_for_training(t))
    assert epochs == [block * (BLOCK - 1) // one_pass for block in range(40)]
    assert 1.0 <= epochs[-1] < 4.0
    assert [s for s in sentences if "pass 2 begins" in s and str(tmp_path) in s]
    corpus.close()


def is_for_training(text: str) -> bool:
    return position_in_unit_interval(text) >= 0.1


@pytest.mark.parametrize("name", ["trained", "llama-2"])
def test_other_tokenizers_stream_the_tokens_they_make(tmp_path: Path, source: str, name: str, request) -> None:
    if name == "trained":
        tokenizer = train_bpe([text for rows in FILES for text in rows if text], 300)
    else:
        tokenizer = load_tokenizer(request.getfixturevalue("shared_data") / "tokenizers" / name)
    corpus = opened(stream_settings(source), tmp_path / "stream", tokenizer)
    loader = loader_of(corpus)
    count = 3 * loader.windows_per_block
    reference = training_tokens(FILES, tokenizer, count * T + 1)
    for row, sample in zip(windows(loader, 0, count), loader.samples(0, count), strict=True):
        assert row.tolist() == reference[sample["start"] : sample["start"] + T + 1].tolist()
    assert corpus.first_tokens(50) == reference[:50].tolist()
    corpus.close()


def test_bos_is_context_and_the_seed_and_batch_size_decide_what_they_should(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor
) -> None:
    corpus = opened(data, tmp_path / "stream")
    masked = corpus.loader(6, CausalWindows(T, BYTE.bos_id), 5).batch(0, 40)
    plain = corpus.loader(6, CausalWindows(T, None), 5).batch(0, 40)
    assert torch.equal(masked.tokens, plain.tokens)
    assert torch.equal(masked.targets == -100, plain.targets == BYTE.bos_id) and (masked.targets == -100).any()
    assert torch.equal(plain.tokens, expected[:40, :-1])
    assert not torch.equal(windows(loader_of(corpus, seed=6), 0, W), expected[:W])
    assert torch.equal(windows(loader_of(corpus, seed=6), 0, W).sum(), expected[:W].sum())
    with pytest.raises(DataError, match="sequence_length=16, not 8"):
        corpus.loader(6, CausalWindows(8, None), 5)
    corpus.close()


@pytest.mark.parametrize("stop", [0, 1, W - 1, W, 3 * W + 5, 11 * W + 3])
def test_a_stream_that_was_closed_goes_on_at_the_exact_token(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, stop: int
) -> None:
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    for counter in range(0, stop, 7):
        loader.batch(counter, 7)
        loader.release(counter)
    corpus.close()
    again = opened(data, tmp_path / "stream")
    assert again.fingerprint == corpus.fingerprint
    assert torch.equal(windows(loader_of(again), stop, stop + 3 * W), expected[stop : stop + 3 * W])
    again.close()


def test_a_folder_copied_at_any_moment_goes_on_identically(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[Path] = []
    write = blocks.write_durably
    rename = Path.replace

    def snapshot() -> None:
        if threading.current_thread().name == "ternlm-stream" and len(moments) < 12:
            moments.append(tmp_path / f"copy-{len(moments)}")
            shutil.copytree(tmp_path / "stream", moments[-1])

    def torn_write(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        snapshot()
        path.unlink()
        write(path, content)

    def renamed(path: Path, target: Path) -> Path:
        snapshot()
        result = rename(path, target)
        snapshot()
        return result

    monkeypatch.setattr(blocks, "write_durably", torn_write)
    monkeypatch.setattr(Path, "replace", renamed)
    corpus = opened(data, tmp_path / "stream")
    windows(loader_of(corpus), 0, 5 * W)
    corpus.close()
    monkeypatch.setattr(blocks, "write_durably", write)
    monkeypatch.setattr(Path, "replace", rename)
    assert len(moments) == 12
    for folder in moments:
        again = opened(data, folder)
        assert torch.equal(windows(loader_of(again), W - 3, 5 * W), expected[W - 3 : 5 * W])
        again.close()


def test_the_budget_is_used_and_never_exceeded(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = blocks.write_durably

    def measured(path: Path, content: bytes) -> None:
        write(path, content)
        sizes.append(sum(file.stat().st_size for file in block_files(tmp_path / "stream")))

    monkeypatch.setattr(blocks, "write_durably", measured)
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    found = []
    for counter in range(0, 20 * W, W):
        found.append(windows(loader, counter, counter + W))
        if counter % (5 * W) == 0:
            loader.release(counter)
    corpus.close()
    assert torch.equal(torch.cat(found), expected)
    assert BUFFER // 2 < max(sizes) <= BUFFER


def test_blocks_that_were_deleted_are_made_again_identically(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor
) -> None:
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    windows(loader, 0, 12 * W)
    loader.release(11 * W)
    loader.batch(11 * W)
    corpus.close()
    again = opened(data, tmp_path / "stream")
    gone = {0, 1, 2} & {int(path.stem[6:]) for path in block_files(tmp_path / "stream")}
    assert gone == set()
    assert torch.equal(windows(loader_of(again), 0, 20 * W), expected)
    again.close()


def test_without_release_the_stream_makes_room_for_what_is_needed(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor
) -> None:
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    assert torch.equal(windows(loader, 0, 20 * W), expected)
    assert torch.equal(loader.batch(2 * W, 15 * W).tokens, expected[2 * W : 17 * W, :-1])
    corpus.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_block_is_found_and_made_again(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, damage: str
) -> None:
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    loader.batch(0)
    while len(block_files(tmp_path / "stream")) < 4:
        loader.batch(len(block_files(tmp_path / "stream")) * W)
    path = tmp_path / "stream" / "block-000002.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content[:-5] if damage == "truncate" else content)
    if damage == "delete":
        path.unlink()
    sentences: list[str] = []
    loader.say = sentences.append
    assert torch.equal(windows(loader, W, 4 * W), expected[W : 4 * W])
    assert any("block 2" in sentence and "made again" in sentence for sentence in sentences)
    corpus.close()


def test_a_damaged_line_of_the_index_costs_only_time(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor
) -> None:
    corpus = opened(data, tmp_path / "stream")
    windows(loader_of(corpus), 0, 6 * W)
    corpus.close()
    index = tmp_path / "stream" / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:3], lines[3].replace('"documents": ', '"documents": 1'), *lines[4:]]))
    again = opened(data, tmp_path / "stream")
    assert torch.equal(windows(loader_of(again), 4 * W, 8 * W), expected[4 * W : 8 * W])
    again.close()
    index.write_text(index.read_text()[:-30])
    again = opened(data, tmp_path / "stream")
    assert torch.equal(windows(loader_of(again), 7 * W, 9 * W), expected[7 * W : 9 * W])
    again.close()


def test_a_source_that_changed_is_noticed(tmp_path: Path, data: DataSettings) -> None:
    corpus = opened(data, tmp_path / "stream")
    windows(loader_of(corpus), 0, 12 * W)
    write_dataset(tmp_path / "source", [[f"{text} " for text in rows] for rows in FILES])
    with pytest.raises(DataError, match=r"changed"):
        windows(loader_of(corpus), 0, 12 * W)
    corpus.close()
    with pytest.raises(DataError, match="another files"):
        opened(data, tmp_path / "stream")


def test_another_tokenizer_length_or_source_is_refused_and_a_larger_buffer_is_not(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor
) -> None:
    opened(data, tmp_path / "stream").close()
    with pytest.raises(DataError, match="another tokenizer"):
        opened(data, tmp_path / "stream", train_bpe(["abc " * 9], 270))
    with pytest.raises(DataError, match="another sequence length"):
        opened(data.model_copy(update={"sequence_length": 8}), tmp_path / "stream")
    with pytest.raises(DataError, match="another source"):
        opened(data.model_copy(update={"validation_fraction": 0.2}), tmp_path / "stream")
    with pytest.raises(SettingsError, match=r"fewer than two blocks.*at least 994"):
        opened(data.model_copy(update={"stream_buffer": 993}), tmp_path / "stream")
    for buffer in (994, 10 * BUFFER):
        corpus = opened(data.model_copy(update={"stream_buffer": buffer}), tmp_path / "stream")
        assert torch.equal(windows(loader_of(corpus), 0, 5 * W), expected[: 5 * W])
        corpus.close()


def test_validation_is_whole_documents_that_are_never_trained_on(tmp_path: Path, source: str) -> None:
    corpus = opened(stream_settings(source, stream_validation_tokens=100), tmp_path / "stream")
    stream = corpus.split("validation")
    texts = [text for rows in FILES for text in rows if text and 0.05 <= position_in_unit_interval(text) < 0.1]
    tokens = stream.read(0, len(stream)).tolist()
    wanted, count = [], 0
    for text in texts:
        if count >= 100:
            break
        wanted += [BYTE.bos_id, *text.encode(), BYTE.eos_id]
        count = len(wanted)
    assert tokens == wanted and len(texts) > stream.documents >= 2
    loader = loader_of(corpus)
    span = windows(loader, 0, 40 * W)
    flat = np.empty(40 * W * T, dtype=np.uint8)
    for row, sample in zip(span, loader.samples(0, 40 * W), strict=True):
        flat[sample["start"] : sample["start"] + T] = row[:-1]
    trained = set(flat.tobytes().split(bytes([BYTE.eos_id, BYTE.bos_id]))[1:-1])
    assert len(trained) > 60 and not trained & {text.encode() for text in texts}
    with pytest.raises(DataError, match="no train split on disk"):
        corpus.split("train")
    corpus.close()


def test_own_validation_documents_are_not_trained_on_either(tmp_path: Path, source: str) -> None:
    texts = [text for rows in FILES for text in rows if text and is_for_training(text)]
    (tmp_path / "held.txt").write_text("\n<|endoftext|>\n".join([texts[0], "new one", texts[20].strip()]))
    data = stream_settings(source, validation_path=str(tmp_path / "held.txt"), stream_validation_tokens=10_000)
    corpus = opened(data.model_copy(update={"test_fraction": 0.1}), tmp_path / "stream")
    assert corpus.split("validation").documents == 3
    rest = [[text for text in rows if text not in (texts[0], texts[20])] for rows in FILES]
    reference = training_tokens(rest, BYTE, 3 * W * T + 1)
    loader = loader_of(corpus)
    for row, sample in zip(windows(loader, 0, 3 * W), loader.samples(0, 3 * W), strict=True):
        assert row.tolist() == reference[sample["start"] : sample["start"] + T + 1].tolist()
    corpus.close()


def test_damaged_validation_documents_are_collected_again(tmp_path: Path, data: DataSettings) -> None:
    corpus = opened(data, tmp_path / "stream")
    corpus.close()
    path = tmp_path / "stream" / "validation" / "validation" / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = opened(data, tmp_path / "stream")
    assert again.fingerprint == corpus.fingerprint
    assert again.split("validation").read(0, 20).tolist() == corpus.split("validation").read(0, 20).tolist()
    again.close()


@pytest.mark.parametrize("values", [{"validation_fraction": 0}, {"validation_fraction": 1e-9}])
def test_a_stream_without_validation_documents_is_refused(tmp_path: Path, source: str, values: dict) -> None:
    with pytest.raises(DataError, match=r"validation split of .* holds no documents"):
        opened(stream_settings(source, **values), tmp_path / "stream")


def test_a_source_without_training_documents_is_refused(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "source", [[None, "", " "]])
    with pytest.raises(DataError, match="no training documents"):
        opened(stream_settings(source), tmp_path / "stream")


@pytest.mark.parametrize("kind", ["folder", "stories"])
def test_local_files_and_built_in_corpora_stream_what_they_would_prepare(tmp_path: Path, kind: str) -> None:
    name = "stories"
    if kind == "folder":
        write_dataset(tmp_path / "texts", [rows * 2 for rows in FILES], "jsonl")
        name = str(tmp_path / "texts")
    data = stream_settings(name)
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    texts = open_corpus(data.model_copy(update={"stream": False}), "train")
    reference = np.concatenate([[254, *next(texts).encode(), 255] for _ in range(60)])
    for stop in (0, W + 3):
        found = windows(loader, stop, 4 * W)
        for row, sample in zip(found, loader.samples(stop, 4 * W - stop), strict=True):
            assert row.tolist() == reference[sample["start"] : sample["start"] + T + 1].tolist()
        corpus.close()
        corpus = opened(data, tmp_path / "stream")
        loader = loader_of(corpus)
    corpus.close()


def test_closing_ends_the_thread_and_frees_the_folder(tmp_path: Path, data: DataSettings) -> None:
    corpus = opened(data, tmp_path / "stream")
    assert [thread for thread in threading.enumerate() if thread.name == "ternlm-stream"]
    with pytest.raises(DataError, match="another process"):
        opened(data, tmp_path / "stream")
    corpus.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ternlm-stream"]
    corpus.close()
    with pytest.raises(DataError, match="closed"):
        loader_of(corpus).batch(500 * W)
    opened(data, tmp_path / "stream").close()


def test_what_while_waiting_raises_ends_the_waiting_and_nothing_else(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    add = BlockStore.add

    def slow(store: BlockStore, *arguments: object) -> None:
        gate.wait(30)
        add(store, *arguments)

    monkeypatch.setattr(BlockStore, "add", slow)
    corpus = opened(data, tmp_path / "stream")
    loader = loader_of(corpus)
    heard: list[str | None] = []

    def stop(complaint: str | None) -> None:
        heard.append(complaint)
        if len(heard) == 2:
            raise Interrupted("enough")

    loader.while_waiting = stop
    with pytest.raises(Interrupted, match="enough"):
        loader.batch(0)
    assert heard == [None, None]
    gate.set()
    assert torch.equal(windows(loader, 0, W), expected[:W])
    corpus.close()


def test_a_disk_that_fails_is_one_sentence_in_the_trainer_and_the_folder_goes_on(
    tmp_path: Path, data: DataSettings, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = blocks.write_durably
    left = 3

    def full(path: Path, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            path.write_bytes(content[:50])
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write_durably", full)
        corpus = opened(data, tmp_path / "stream")
        loader = loader_of(corpus)
        with pytest.raises(DataError, match=r"cannot be written.*No space left.*stream_buffer"):
            windows(loader, 0, 5 * W)
        assert torch.equal(windows(loader, 0, 3 * W), expected[: 3 * W])
        corpus.close()
    again = opened(data, tmp_path / "stream")
    assert torch.equal(windows(loader_of(again), 0, 5 * W), expected[: 5 * W])
    again.close()


def test_describing_a_stream_and_a_prepared_corpus_uses_the_same_words(tmp_path: Path, data: DataSettings) -> None:
    streamed = opened(data, tmp_path / "stream")
    loader = loader_of(streamed)
    windows(loader, 0, 4 * W)
    prepared = prepare(data.model_copy(update={"stream": False}), BYTE, tmp_path / "prepared")
    for corpus in (streamed, prepared):
        described = corpus.describe()
        assert described["source"] == data.source and described["revision"] is None
        assert described["tokenizer"] == {"name": "byte", "fingerprint": BYTE.fingerprint}
        for split in described["splits"].values():
            assert split.keys() == {"documents", "tokens", "bytes", "shards"}
            assert all(shard.keys() == {"file", "tokens", "sha256"} for shard in split["shards"])
    assert streamed.first_tokens() == prepared.first_tokens() and len(streamed.first_tokens()) == 1000
    assert prepared.bytes_per_token() == pytest.approx(1.0, abs=0.05)
    assert streamed.bytes_per_token() == prepared.bytes_per_token() or streamed.bytes_per_token() is not None
    train = streamed.describe()["splits"]["train"]
    assert train["tokens"] == len(train["shards"]) * (BLOCK - 1) + 1 and len(train["shards"]) >= 4
    reference = training_tokens(FILES, BYTE, train["tokens"])
    assert train["documents"] == int((reference == BYTE.eos_id).sum())
    described = loader.describe()
    assert described["windows_per_epoch"] is None is loader.windows_per_epoch
    assert described["tokens"] >= 4 * W * T
    prepared.close()
    streamed.close()


def test_bytes_per_token_counts_text_and_end_markers_of_the_first_block(tmp_path: Path, data: DataSettings) -> None:
    corpus = opened(data, tmp_path / "stream")
    loader_of(corpus).batch(0)
    first = training_tokens(FILES, BYTE, BLOCK)
    whole = first[: np.flatnonzero(first == BYTE.eos_id)[-1] + 1]
    text = int(((whole != BYTE.eos_id) & (whole != BYTE.bos_id)).sum())
    assert corpus.bytes_per_token() == text / int((whole != BYTE.bos_id).sum())
    corpus.close()


def test_both_loaders_say_which_samples_they_draw(tmp_path: Path, data: DataSettings) -> None:
    corpus = prepare(data.model_copy(update={"stream": False}), BYTE, tmp_path / "prepared")
    loader = corpus.loader(5, CausalWindows(T, BYTE.bos_id), 3)
    assert isinstance(loader, Loader)
    per_epoch = loader.windows_per_epoch
    samples = loader.samples(per_epoch - 2)
    assert [sample["start"] for sample in samples] == loader.starts(per_epoch - 2)
    assert [(sample["epoch"], sample["index"]) for sample in samples] == [
        (0, per_epoch - 2), (0, per_epoch - 1), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip
    loader.release(per_epoch)
    assert torch.equal(loader.batch(0).tokens, corpus.loader(5, CausalWindows(T, BYTE.bos_id), 3).batch(0).tokens)


def test_preparing_data_for_a_run_begins_the_stream_in_its_folder(tmp_path: Path, data: DataSettings) -> None:
    said: list[str] = []
    seen: list[int] = []
    corpus, tokenizer = prepare_data(
        data, TokenizerSettings(name="byte"), lambda p: seen.append(p.tokens), say=said.append, folder=tmp_path / "run"
    )
    assert isinstance(corpus, StreamedCorpus) and corpus.directory == tmp_path / "run"
    assert isinstance(corpus.loader(2, CausalWindows(T, tokenizer.bos_id), 0), StreamLoader)
    assert seen[-1] == len(corpus.split("validation"))
    assert any("collecting 300 validation tokens" in sentence for sentence in said)
    corpus.close()
    with pytest.raises(SettingsError, match=r"data\.stream=false"):
        prepare_data(data, TokenizerSettings(name="byte"))


def test_a_stop_while_validation_documents_are_collected_leaves_nothing_half(
    tmp_path: Path, data: DataSettings
) -> None:
    asked = iter(range(100))
    with pytest.raises(Interrupted, match="to continue"):
        open_stream(data, BYTE, tmp_path / "stream", should_stop=lambda: next(asked) >= 1)
    corpus = opened(data, tmp_path / "stream")
    assert corpus.split("validation").documents >= 2
    corpus.close()


def test_the_newest_commit_is_found_once_and_kept(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    newest = "a" * 40
    asked: list[str | None] = []
    load = datasets.load_dataset

    def load_pinned(name: str, config: str | None, *, split: str, streaming: bool, revision: str | None) -> object:
        asked.append(revision)
        return load(source.removeprefix("hf:"), split=split, streaming=streaming)

    class Information:
        @property
        def sha(self) -> str:
            return newest

    monkeypatch.setattr(datasets, "load_dataset", load_pinned)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["train"])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: Information())
    data = stream_settings("hf:owner/name")
    corpus = opened(data, tmp_path / "stream")
    corpus.close()
    assert corpus.revision == corpus.describe()["revision"] == "a" * 40
    newest = "b" * 40
    again = opened(data, tmp_path / "stream")
    again.close()
    assert again.revision == "a" * 40 and again.fingerprint == corpus.fingerprint
    assert set(asked) == {"a" * 40}
    other = opened(data, tmp_path / "other")
    other.close()
    assert other.revision == "b" * 40 and other.fingerprint != corpus.fingerprint
