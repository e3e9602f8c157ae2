"""The corpus `tinystories` as its dataset stores it: Parquet files, a validation split of its own and no test split."""

from dataclasses import replace
from pathlib import Path

import pytest

from ternlm.data import CORPORA, DataSettings, open_corpus, prepare, statistics
from ternlm.data.hub import HubDataset
from ternlm.tokenizers import load_tokenizer

datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")

STORIES = [f"Once upon a time, number {i} said “hi” to {i % 7} cats.\n\nThe end." for i in range(260)]
HELD_OUT = [f"One day, a dog met {i} ducks. They were happy." for i in range(9)]


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset's layout in a folder, under the catalog's own entry."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "TinyStories" / "data"
    folder.mkdir(parents=True)
    for part in range(2):
        table = pyarrow.table({"text": STORIES[130 * part : 130 * (part + 1)]})
        parquet.write_table(table, folder / f"train-0000{part}-of-00002-{'ab' * 8}.parquet")
    parquet.write_table(pyarrow.table({"text": HELD_OUT}), folder / f"validation-00000-of-00001-{'cd' * 8}.parquet")
    monkeypatch.setitem(CORPORA, "tinystories", replace(CORPORA["tinystories"], hub=str(tmp_path / "TinyStories")))
    assert HubDataset(str(tmp_path / "TinyStories")).is_local


def test_the_validation_split_is_the_datasets_own_and_the_test_split_is_carved_from_training() -> None:
    data = DataSettings(source="tinystories", test_fraction=0.1)
    train, validation, test = (list(open_corpus(data, split)) for split in ("train", "validation", "test"))
    assert validation == HELD_OUT
    assert sorted(train + test) == sorted(STORIES)
    assert 5 < len(test) < 60
    assert not set(train) & set(test)


def test_max_samples_reads_the_first_stories_of_each_stored_split() -> None:
    data = DataSettings(source="tinystories", test_fraction=0, max_documents=5)
    assert list(open_corpus(data, "train")) == STORIES[:5]
    assert list(open_corpus(data, "validation")) == HELD_OUT[:5]


def test_prepared_bytes_are_the_stories_bytes(tmp_path: Path) -> None:
    data = DataSettings(source="tinystories", test_fraction=0)
    corpus = prepare(data, load_tokenizer("byte"), tmp_path / "corpus")
    counted = statistics(corpus, 64)
    assert counted["train"]["documents"] == len(STORIES)
    assert counted["train"]["bytes"] == sum(len(story.encode()) for story in STORIES)
    assert counted["train"]["bytes_per_token"] == 1.0
    assert corpus.invalid_bytes() is None
