"""WikiText as articles, as the pages of lm-evaluation-harness, and as one text; from files as from the hub."""

import gzip
import re
from pathlib import Path

import pytest

from ternlm.data import DataSettings, open_corpus, read_documents
from ternlm.data.wikitext import detokenize, is_wikitext_file, page_words, pages, wikitext_articles, wikitext_documents
from ternlm.errors import DataError, SettingsError

RAW = (
    ' \n = One = \n \n A text @-@ with 1 @,@ 5 words , and ( more ) . \n \n = = Part = = \n \n It \'s " so " ; end . \n'
    " \n = Two = \n \n The last = one . \n \n"
)
ROWS = [line if line.strip() else "" for line in RAW.splitlines(keepends=True)]


def pages_by_line(text: str) -> list[str]:
    """Pages found in another way: split at every line end, a new one at every heading of the first level."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found if "".join(lines).strip()]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("wiki.test.raw", True),
        ("a/b/wiki.valid.tokens", True),
        ("wiki.train.tokens.gz", True),
        ("wiki.txt", False),
        ("mywiki.test.raw", False),
        ("wiki.test.raw/other.txt", False),
    ],
)
def test_files_are_known_by_their_published_names(name: str, is_one: bool) -> None:
    assert is_wikitext_file(name) is is_one


def test_a_local_file_becomes_the_articles_that_the_hub_gives(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    (tmp_path / "wiki.test.tokens.gz").write_bytes(gzip.compress(RAW.encode()))
    articles = list(read_documents(str(tmp_path / "wiki.test.raw")))
    assert "".join(articles) == RAW
    assert [article.split("=")[1] for article in articles] == [" One ", " Two "]
    assert articles == list(read_documents(str(tmp_path / "wiki.test.tokens.gz")))
    from_rows = list(wikitext_articles(ROWS))
    assert [re.sub(r"\n +\n", "\n\n", article) for article in articles] == [
        re.sub(r"^\n", " \n", article) if number == 0 else article for number, article in enumerate(from_rows)
    ]


def test_a_title_may_have_one_letter() -> None:
    rows = [" = X = \n", "one\n", " = = Y = = \n", "two\n", " = Zed = \n", "three\n"]
    assert len(list(wikitext_articles(rows))) == 2


def test_another_name_is_wikitext_on_request_only(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(RAW, encoding="utf-8")
    assert len(list(read_documents(str(tmp_path / "other.txt")))) == 1
    assert len(list(read_documents(str(tmp_path / "other.txt"), wikitext="articles"))) == 2


@pytest.mark.parametrize("rows", [ROWS, RAW.splitlines(keepends=True)])
def test_pages_are_those_of_the_harness_up_to_blanks_in_empty_lines(rows: list[str]) -> None:
    found = list(pages(wikitext_articles(rows)))
    expected = pages_by_line(RAW)
    without_blanks = [[re.sub(r"\n *(?=\n|$)", "\n", page) for page in each] for each in (found, expected)]
    assert without_blanks[0] == without_blanks[1]
    assert list(map(detokenize, found)) == list(map(detokenize, expected))
    assert list(map(page_words, found)) == list(map(page_words, expected))


def test_pages_of_the_real_files_are_found_in_another_way_too(shared_data: Path) -> None:
    for name, count in (("wiki.test.tokens", 62), ("wiki.valid.raw", 60)):
        path = shared_data / "wikitext-2" / name
        found = list(pages(read_documents(str(path))))
        assert len(found) == count
        assert found == pages_by_line(path.read_bytes().decode())


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (" = = = Deep = = = \n \n text . \n", " === Deep ===\n\ntext.\n"),
        ("10 @,@ 000 @.@ 5 well @-@ known", "10,000.5 well-known"),
        ("a , b ; c : d ! e ? f . g", "a, b; c: d! e? f. g"),
        ("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'"),
        ("boys ' toys", "boys' toys"),
        ("John 's toys", "John's toys"),
        ("5 \u00b0 N of", "5\u00b0N of"),
        ("grade N then", "grade 1 then"),
    ],
)
def test_detokenizing_takes_the_spaces_around_punctuation_away(page: str, expected: str) -> None:
    assert detokenize(page) == expected


def test_words_of_a_page_include_the_empty_pieces_at_both_ends() -> None:
    assert page_words(" = One = \n a b\n") == len(["", "=", "One", "=", "a", "b", ""])
    assert page_words("a b") == 2


def test_joined_rows_are_one_document_with_an_empty_line_between_each_two() -> None:
    (joined,) = wikitext_documents(ROWS, "joined")
    assert joined == "\n\n".join(ROWS)
    assert list(wikitext_documents(RAW.splitlines(keepends=True), "joined")) == [joined]
    assert list(wikitext_documents([" \n", ""], "joined")) == []


def test_a_form_is_part_of_a_corpus_identity_and_older_corpora_are_still_found() -> None:
    assert "wikitext" not in DataSettings(source="wikitext-2").identity()
    plain, named = DataSettings(source="texts/a.txt"), DataSettings(source="texts/wiki.test.raw")
    assert "wikitext" not in plain.identity()
    assert "wikitext" in named.identity()  # its articles were one document before
    forms = [DataSettings(source="wikitext-2", wikitext=form).identity() for form in ("articles", "joined")]
    assert forms[0] != forms[1]


def test_the_form_reaches_the_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    path = str(tmp_path / "wiki.test.raw")
    whole = {"source": path, "validation_fraction": 0.0, "test_fraction": 0.0}
    found = {
        form: list(open_corpus(DataSettings.from_mapping(whole | {"wikitext": form}), "train"))
        for form in ("articles", "detokenized", "joined")
    }
    assert [len(documents) for documents in found.values()] == [2, 2, 1]
    assert found["detokenized"] == [detokenize(page) for page in pages(found["articles"])]


@pytest.mark.parametrize("source", ["stories", "hf:owner/name"])
def test_what_is_not_wikitext_is_refused(source: str) -> None:
    with pytest.raises(SettingsError, match=r"data\.wikitext=joined .* another corpus.*wikitext-2"):
        next(open_corpus(DataSettings(source=source, wikitext="joined"), "train"))


def test_rows_of_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no text file, and data\.wikitext=joined"):
        list(read_documents(str(tmp_path / "a.jsonl"), wikitext="joined"))
