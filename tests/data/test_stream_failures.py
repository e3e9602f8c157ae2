"""Networks that fail: what is read stays the same, and people hear why they wait."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streams import BLOCK, BYTE, T, close_all, loader_of, opened, some_files, stream_settings, windows, write_dataset
from ternlm.data import open_corpus, prepare, reader, shards
from ternlm.data.hub import HubDataset, HubSource
from ternlm.data.reader import Patience, Position, read_pass, wait_unless
from ternlm.errors import DataError, Interrupted

datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
W = (BLOCK - 1) // T
FILES = some_files()


class Outage(Exception):
    """Of no kind that anybody catches by name."""


class FakeTime:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now, self.waits = 100.0, []

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)

    def patience(self, retry_for: float | None = None, say: Callable[[str], None] = lambda text: None) -> Patience:
        return Patience(retry_for, say, self.wait, lambda: self.now)


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 700)
    monkeypatch.setattr("ternlm.data.hub.ROWS", 5)
    monkeypatch.setattr(reader, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(reader, "LONGEST_WAIT", 0.02)
    yield
    close_all()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "source", FILES)


def failing(monkeypatch: pytest.MonkeyPatch, calls: set[int], name: str = "read") -> list[int]:
    """Let the calls of `load_dataset` and the tables of rows fail whose numbers, from 0, are in `calls`."""
    count = [0]
    load, rows = datasets.load_dataset, datasets.IterableDataset.iter

    def step() -> None:
        count[0] += 1
        if count[0] - 1 in calls:
            raise Outage(f"{name} {count[0] - 1} broke off\nand more")

    def load_or_fail(*arguments: Any, **options: Any) -> Any:
        step()
        return load(*arguments, **options)

    def rows_or_fail(self: Any, batch_size: int) -> Iterator[Any]:
        for table in rows(self, batch_size):
            step()
            yield table

    monkeypatch.setattr(datasets, "load_dataset", load_or_fail)
    monkeypatch.setattr(datasets.IterableDataset, "iter", rows_or_fail)
    return count


def hub_rows(source: str, start: Position, patience: Patience) -> list[tuple[Position, str]]:
    dataset = HubSource(HubDataset(source.removeprefix("hf:")), "train")
    return [(position, text) for position, _, text in read_pass(dataset, start, patience)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_reading_can_begin_at_every_row(tmp_path: Path, kind: str) -> None:
    source = write_dataset(tmp_path / "source", FILES, kind)
    every = [(Position(2, file, row), text or "") for file, rows in enumerate(FILES) for row, text in enumerate(rows)]
    assert hub_rows(source, Position(2), FakeTime().patience()) == every
    for number in (0, 1, 4, 5, 39, 40, 41, 64, 65, len(every) - 1):
        assert hub_rows(source, every[number][0], FakeTime().patience()) == every[number:]
    assert hub_rows(source, Position(2, 3, 0), FakeTime().patience()) == []


@pytest.mark.parametrize("calls", [{0}, {1}, {2, 3, 4, 5}, {5, 7, 8, 9, 20, 22}, set(range(1, 60, 2))])
def test_failures_at_any_place_change_no_row(source: str, monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    calm = hub_rows(source, Position(), FakeTime().patience())
    said: list[str] = []
    time = FakeTime()
    failing(monkeypatch, calls)
    assert hub_rows(source, Position(), time.patience(say=said.append)) == calm
    complaints = [sentence for sentence in said if sentence.startswith("waiting for data:")]
    assert len(complaints) == len(time.waits) == len(calls)
    folder = source.removeprefix("hf:")
    first = f"waiting for data: the dataset '{folder}' cannot be read: read {min(calls)} broke off; trying again in 0s"
    assert complaints[0] == first
    assert said[-1] == f"the dataset '{folder}' can be read again"


def test_a_file_that_is_missing_for_a_while_is_waited_for_and_not_passed_over(source: str) -> None:
    calm = hub_rows(source, Position(), FakeTime().patience())
    file = sorted(Path(source.removeprefix("hf:")).rglob("*.parquet"))[1]
    gone = file.with_name(".gone")
    said: list[str] = []

    def put_back(sentence: str) -> None:
        said.append(sentence)
        if "files now" in sentence:
            gone.rename(file)

    rows = []
    dataset = HubSource(HubDataset(source.removeprefix("hf:")), "train")
    for position, _, text in read_pass(dataset, Position(), FakeTime().patience(say=put_back)):
        rows.append((position, text))
        if len(rows) == 1:
            file.rename(gone)
    assert rows == calm
    assert any("No such file" in sentence for sentence in said)
    assert not gone.exists(), "the shorter list was noticed"


def test_waits_double_up_to_a_minute_and_start_over_after_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    time = FakeTime()
    said: list[str] = []
    patience = time.patience(say=said.append)
    for _ in range(8):
        patience.failed("it", reader.Unreadable("gone"))
    assert time.waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert said[3] == patience_sentence(8)
    assert patience.complaint == patience_sentence(60)
    patience.succeeded("it")
    assert patience.complaint is None
    patience.failed("it", reader.Unreadable("gone"))
    assert time.waits[-1] == 1


def patience_sentence(seconds: int) -> str:
    return f"waiting for data: it cannot be read: gone; trying again in {seconds}s"


def test_patience_ends_after_retry_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(reader, "LONGEST_WAIT", 60.0)
    failing(monkeypatch, set(range(3, 1000)))
    time = FakeTime()
    with pytest.raises(DataError, match=r"the dataset .* cannot be read: read \d+ broke off\. Check the name"):
        hub_rows(source, Position(), time.patience(10))
    assert time.waits == [1, 2, 4, 3]


def test_a_stream_through_many_failures_is_the_stream_without(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stream_settings(source)
    calm = opened(data, tmp_path / "calm")
    expected = windows(loader_of(calm), 0, 12 * W)
    calm.close()
    said: list[str] = []
    count = failing(monkeypatch, {0, 3, 4, 11, 20, 21, 22, 30, 40, 47, 48})
    corpus = opened(data, tmp_path / "stream", say=said.append)
    assert corpus.fingerprint == calm.fingerprint
    assert torch.equal(windows(loader_of(corpus), 0, 7 * W), expected[: 7 * W])
    corpus.close()
    again = opened(data, tmp_path / "stream")
    assert torch.equal(windows(loader_of(again), 5 * W, 12 * W), expected[5 * W :])
    assert count[0] > 48
    assert any("read 0 broke off; trying again" in sentence for sentence in said)


def test_the_trainer_hears_the_complaint_while_it_waits_and_the_error_at_the_end(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stream_settings(source)
    opened(data, tmp_path / "stream").close()
    folder = tmp_path / "stream"
    for path in folder.glob("block-*"):
        path.unlink()
    (folder / "index.jsonl").write_text("")
    monkeypatch.setattr(reader, "LONGEST_WAIT", 0.3)
    failing(monkeypatch, set(range(2, 10_000)), "row")
    loader = loader_of(opened(data.model_copy(update={"retry_for": 1.5}), folder))
    heard: list[str] = []
    loader.while_waiting = lambda complaint: heard.append(complaint or "")
    with pytest.raises(DataError, match=r"cannot be read: row \d+ broke off"):
        loader.batch(0)
    assert any(sentence.startswith("waiting for data: the dataset") for sentence in heard)
    with pytest.raises(DataError, match="broke off"):
        loader.batch(0)


def test_what_retrying_cannot_heal_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = FakeTime().patience()
    monkeypatch.setattr(wait, "wait", lambda seconds: pytest.fail("waited"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="'text' but 'body'"):
        hub_rows(f"hf:{tmp_path / 'other'}", Position(), wait)
    dataset = HubDataset(str(tmp_path / "other"), "config")
    with pytest.raises(DataError, match="'config' not found"):
        list(read_pass(HubSource(dataset, "train"), Position(), wait))
    with pytest.raises(DataError, match="Bad split"):
        list(read_pass(HubSource(HubDataset(str(tmp_path / "other")), "no-split"), Position(), wait))
    with pytest.raises(DataError, match="'text' but 'body'"):
        opened(stream_settings(f"hf:{tmp_path / 'other'}"), tmp_path / "stream")


def test_a_name_that_was_good_is_not_doubted_when_the_hub_loses_it_for_a_while(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.exceptions import DatasetNotFoundError

    calm = hub_rows(source, Position(), FakeTime().patience())
    failing(monkeypatch, {4})
    load = datasets.load_dataset
    calls = iter(range(10))

    def lost(*arguments: Any, **options: Any) -> Any:
        if next(calls) in (1, 2):
            raise DatasetNotFoundError("Dataset doesn't exist on the Hub")
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", lost)
    time = FakeTime()
    assert hub_rows(source, Position(), time.patience()) == calm
    assert len(time.waits) == 3

    calls = iter([1] * 10)
    with pytest.raises(DataError, match="doesn't exist"):
        hub_rows(source, Position(), FakeTime().patience())


def test_preparing_waits_through_failures_as_well(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 300)
    monkeypatch.setattr(shards, "COMMIT_TOKENS", 400)
    data = stream_settings(source).model_copy(update={"stream": False, "max_tokens": 1500})
    calm = prepare(data, BYTE, tmp_path / "calm")
    failing(monkeypatch, {0, 2, 5, 6, 9, 10})
    batches = iter(range(100))
    with pytest.raises(Interrupted):
        prepare(data, BYTE, tmp_path / "out", should_stop=lambda: next(batches) == 3)
    corpus = prepare(data, BYTE, tmp_path / "out")
    assert corpus.fingerprint == calm.fingerprint
    assert 1498 <= len(corpus.split("train")) <= 1500


def test_splits_are_asked_for_again_when_the_hub_does_not_answer(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream_settings(source).model_copy(update={"stream": False})
    calm = list(open_corpus(data, "train"))
    ask = datasets.get_dataset_split_names
    calls = iter(range(5))

    def names(*arguments: Any, **options: Any) -> Any:
        if next(calls) < 2:
            raise ConnectionError("no route to host")
        return ask(*arguments, **options)

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    said: list[str] = []
    time = FakeTime()
    assert list(open_corpus(data, "train", time.patience(say=said.append))) == calm
    assert len(time.waits) == 2 and "no route to host; trying again" in said[0]


def test_waiting_ends_soon_after_a_signal(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, set(range(3, 1000)))
    monkeypatch.setattr(reader, "FIRST_WAIT", 1e6)
    monkeypatch.setattr(reader, "LONGEST_WAIT", 1e6)
    asked = iter(range(100))
    patience = Patience(None, lambda text: None, wait_unless(lambda: next(asked) >= 2))
    with pytest.raises(Interrupted, match="to continue"):
        hub_rows(source, Position(), patience)


def test_a_mistake_in_the_program_is_not_taken_for_an_outage(source: str) -> None:
    def label(text: str) -> str:
        raise ZeroDivisionError

    dataset = HubSource(HubDataset(source.removeprefix("hf:")), "train", label=label)
    with pytest.raises(ZeroDivisionError):
        list(read_pass(dataset, Position(), FakeTime().patience()))
