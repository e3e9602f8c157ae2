import hashlib
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from ternlm.data import CORPORA, DataSettings, open_corpus
from ternlm.data.catalog import bucket
from ternlm.data.hub import parse_hub_source
from ternlm.data.stdlib import stdlib, stdlib_files
from ternlm.data.wikitext import wikitext_articles
from ternlm.errors import DataError, SettingsError

SPLITS = ("train", "validation", "test")


def many_documents(folder: Path, count: int = 400) -> DataSettings:
    lines = [json.dumps({"text": f"document number {i} about {i * i}"}) for i in range(count)]
    (folder / "many.jsonl").write_text("\n".join(lines))
    return DataSettings(source=str(folder / "many.jsonl"), validation_fraction=0.1, test_fraction=0.2)


def test_hash_splits_are_disjoint_complete_and_of_the_wanted_size(tmp_path: Path) -> None:
    data = many_documents(tmp_path)
    parts = {split: list(open_corpus(data, split)) for split in SPLITS}
    assert sum(map(len, parts.values())) == 400
    assert len(set().union(*parts.values())) == 400
    assert 20 < len(parts["validation"]) < 60
    assert 55 < len(parts["test"]) < 105


def test_the_bucket_is_the_start_of_the_sha256_and_decides_alone(tmp_path: Path) -> None:
    assert bucket(b"x") == int(hashlib.sha256(b"x").hexdigest()[:16], 16) / 2**64
    data = many_documents(tmp_path)
    for text in open_corpus(data, "test"):
        assert bucket(text.encode()) < 0.2
    for text in open_corpus(data, "validation"):
        assert 0.2 <= bucket(text.encode()) < 0.3


def test_a_growing_corpus_moves_no_document_to_another_split(tmp_path: Path) -> None:
    before = set(open_corpus(many_documents(tmp_path, 200), "test"))
    after = set(open_corpus(many_documents(tmp_path, 400), "test"))
    assert before < after


def test_few_documents_are_cut_by_position_without_overlap_or_loss(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        text = "".join(f"{name} paragraph {i} naïve.\nsecond line {i}\n\n" for i in range(300))
        (tmp_path / f"{name}.txt").write_text(text)
        texts.append(text)
    data = DataSettings(source=str(tmp_path), validation_fraction=0.1, test_fraction=0.2)
    parts = {split: list(open_corpus(data, split)) for split in SPLITS}
    for number, text in enumerate(texts):
        train, test, validation = (parts[name][number] for name in ("train", "test", "validation"))
        assert train + test + validation == text
        assert train.endswith("\n\n") and test.endswith("\n\n")
        assert len(validation.encode()) == pytest.approx(0.1 * len(text.encode()), rel=0.05)
        assert len(test.encode()) == pytest.approx(0.2 * len(text.encode()), rel=0.05)


@pytest.mark.parametrize("text", ["é" * 999, "🙂" * 333, "word " * 200, "line\r\n" * 200])
def test_a_cut_never_divides_a_character(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    data = DataSettings(source=str(tmp_path), validation_fraction=0.13, test_fraction=0.07)
    parts = [next(open_corpus(data, split)) for split in ("train", "test", "validation")]
    assert "".join(parts) == text


def test_explicit_paths_leave_training_whole(tmp_path: Path) -> None:
    data = many_documents(tmp_path)
    (tmp_path / "held.txt").write_text("held out")
    held = str(tmp_path / "held.txt")
    data = data.model_copy(update={"validation_path": held, "test_path": held})
    assert list(open_corpus(data, "validation")) == ["held out"]
    assert list(open_corpus(data, "test")) == ["held out"]
    assert len(list(open_corpus(data, "train"))) == 400


def test_an_explicit_validation_file_still_leaves_test_carved_from_training(tmp_path: Path) -> None:
    data = many_documents(tmp_path)
    (tmp_path / "held.txt").write_text("held out")
    data = data.model_copy(update={"validation_path": str(tmp_path / "held.txt")})
    test, train = set(open_corpus(data, "test")), set(open_corpus(data, "train"))
    assert test and not test & train and len(test | train) == 400


def test_max_documents_limits_what_is_read(tmp_path: Path) -> None:
    data = many_documents(tmp_path).model_copy(update={"max_documents": 150})
    assert sum(len(list(open_corpus(data, split))) for split in SPLITS) == 150


def test_empty_and_unknown_splits_are_refused(tmp_path: Path) -> None:
    data = many_documents(tmp_path).model_copy(update={"validation_fraction": 0.0})
    with pytest.raises(DataError, match=r"validation split.*validation_fraction"):
        list(open_corpus(data, "validation"))
    with pytest.raises(DataError, match="not a split"):
        list(open_corpus(data, "dev"))


def test_the_standard_library_is_python_source_in_a_fixed_order() -> None:
    data = DataSettings(source="stdlib")
    validation = list(open_corpus(data, "validation"))
    assert len(validation) > 5
    assert any("import " in text for text in validation)
    assert list(islice(stdlib(), 5)) == [path.read_text("utf-8") for path in stdlib_files()[:5]]
    assert not any("site-packages" in path.parts or "test" in path.parts for path in stdlib_files())


def test_built_in_corpora_open_and_every_entry_is_complete() -> None:
    pytest.importorskip("ternlm.data.stories")
    stories = open_corpus(DataSettings(source="stories"), "train")
    assert len({next(stories) for _ in range(3)}) == 3
    for name, entry in CORPORA.items():
        assert entry.name == name
        assert entry.description and entry.license and entry.size and "train" in entry.splits


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:owner/name", ("owner/name", None)),
        ("hf:owner/some-name:config-1", ("owner/some-name", "config-1")),
        ("hf:HuggingFaceFW/fineweb-edu@sample-10BT", ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
    ],
)
def test_hub_names_are_read(source: str, expected: tuple[str, str | None]) -> None:
    assert parse_hub_source(source) == expected


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:a b/c"])
def test_what_is_no_hub_name_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="owner/name"):
        parse_hub_source(source)


@pytest.mark.parametrize("source", ["stories", "texts/*.md", "hf:{folder}"])
def test_a_revision_of_what_has_none_is_refused(tmp_path: Path, source: str) -> None:
    data = DataSettings(source=source.format(folder=tmp_path), revision="v1")
    with pytest.raises(SettingsError, match=r"data\.revision=v1"):
        next(open_corpus(data, "train"))


def test_wikitext_rows_become_articles() -> None:
    rows = ["", " = One = \n", "", " text\n", " = = Section = = \n", " more\n", "", " = Two = \n", " end\n"]
    assert list(wikitext_articles(rows)) == [
        "\n = One = \n\n text\n = = Section = = \n more\n\n",
        " = Two = \n end\n",
    ]
    assert list(wikitext_articles(["", ""])) == []


def test_articles_of_the_real_file_are_sixty_and_join_to_it(shared_data: Path) -> None:
    raw = (shared_data / "wikitext-2" / "wiki.valid.raw").read_bytes().decode()
    rows = [line if line.strip() else "" for line in re.findall(r"[^\n]*\n", raw)]
    articles = list(wikitext_articles(rows))
    assert "".join(articles) == raw
    assert len(articles) == 60
