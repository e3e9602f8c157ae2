"""The `datasets` path over local files in the schemas of FineWeb-Edu and TinyStories."""

import json
from pathlib import Path

import pytest

from ternlm.data import DataSettings, open_corpus
from ternlm.data.hub import HubDataset, HubSource, hub_splits
from ternlm.data.reader import Patience, Position, read_pass
from ternlm.errors import DataError, EnvironmentFault

datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def fineweb_rows(count: int) -> dict[str, list]:
    return {
        "text": [f"web page number {i}" for i in range(count)],
        "id": [f"<urn:uuid:{i}>" for i in range(count)],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.org/{i}" for i in range(count)],
        "language_score": [0.9] * count,
        "token_count": [4] * count,
        "score": [3.1] * count,
    }


def test_parquet_with_one_split_is_divided_by_hash(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder = tmp_path / "fineweb"
    folder.mkdir()
    parquet.write_table(pyarrow.table(fineweb_rows(200)), folder / "train-00000.parquet")
    data = DataSettings(source=f"hf:{folder}", validation_fraction=0.2, test_fraction=0.2)
    parts = [list(open_corpus(data, split)) for split in ("train", "validation", "test")]
    assert sorted(text for part in parts for text in part) == sorted(fineweb_rows(200)["text"])
    assert all(len(part) > 20 for part in parts)


def test_json_lines_with_their_own_validation_keep_it(tmp_path: Path) -> None:
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, count in (("train", 30), ("validation", 4)):
        lines = [json.dumps({"text": f"{split} story {i}"}) for i in range(count)] + [json.dumps({"text": ""})]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    assert hub_splits(HubDataset(str(folder))) == {"train": "train", "validation": "validation"}
    data = DataSettings(source=f"hf:{folder}", test_fraction=0.0)
    assert list(open_corpus(data, "validation")) == [f"validation story {i}" for i in range(4)]
    assert list(open_corpus(data, "train")) == [f"train story {i}" for i in range(30)]


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="'text' but 'body'"):
        list(read_pass(HubSource(HubDataset(str(folder)), "train"), Position(), Patience()))


def test_an_unreachable_dataset_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    for source in ("hf:owner/name", "tinystories", "wikitext-2", "fineweb-edu"):
        with pytest.raises(DataError, match="no route to host"):
            list(open_corpus(DataSettings(source=source, retry_for=0), "train"))


def test_official_splits_and_configurations_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, *, split: str, streaming: bool, revision: str | None) -> object:
        asked.append((name, config, split, streaming, revision))
        return datasets.Dataset.from_list([{"text": " = A title = \n"}, {"text": " a line\n"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(open_corpus(DataSettings(source="wikitext-2"), "test")) == [" = A title = \n a line\n"]
    pinned = DataSettings(source="fineweb-edu", validation_fraction=0, test_fraction=0, revision="v1.2")
    list(open_corpus(pinned, "train"))
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True, None),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True, "v1.2"),
    ]


def test_without_the_extra_the_install_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'ternlm\[hub\]'"):
        list(open_corpus(DataSettings(source="tinystories"), "train"))
