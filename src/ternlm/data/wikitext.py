"""WikiText as it is published and as it is scored: articles, lm-evaluation-harness's pages, and one long text.

Everywhere a *row* is one line with its end, as in the files ``wiki.{train,valid,test}.{raw,tokens}``; the datasets of
the hub store blank lines as empty rows. Where rows come from is left to `documents` and `hub`.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

WikiTextForm = Literal["articles", "detokenized", "joined"]
"""How WikiText becomes documents.

``articles``: one document per article; joined, they are the file byte for byte. ``detokenized``: the same articles as
lm-evaluation-harness's task `wikitext` scores them, without the spaces that divide words from punctuation. ``joined``:
one document, all rows with an empty line between each two, as GPTQ's script and those derived from it score it.
"""

_FILE = re.compile(r"wiki\.[^/\\]+\.(raw|tokens)(\.gz|\.zst)?")
_BLANK_LINES = re.compile(r"\A([^\S\n]*\n)*")
_HEADING = re.compile(r" = [^=](.*[^=])? = \n?")

# The rules and their order define the metric; some never apply to WikiText.
_PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_BEFORE = (("s '", "s'"),)
_NUMBERS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_AFTER = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
_QUOTED_DIGIT = re.compile(r"/' [0-9]/")
_ENCLOSED = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)


def is_wikitext_file(path: str) -> bool:
    """Whether a file is named as WikiText's own, such as ``wiki.test.raw``."""
    return _FILE.fullmatch(re.split(r"[/\\]", path)[-1]) is not None


def wikitext_documents(rows: Iterable[str], form: WikiTextForm) -> Iterator[str]:
    """Documents of the rows of one split, in their order."""
    if form == "joined":
        text = "\n\n".join(row if row.strip() else "" for row in rows)
        if text.strip():
            yield text
        return
    articles = wikitext_articles(rows)
    yield from articles if form == "articles" else map(detokenize, pages(articles))


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join rows into articles, one per top-level heading ``= Title =``.

    Empty rows become blank lines again, so the articles of a split, joined, are its file byte for byte.
    """
    article: list[str] = []
    empty = True
    for row in rows:
        if _HEADING.fullmatch(row) and not empty:
            yield "".join(article)
            article, empty = [], True
        article.append(row or "\n")
        empty = empty and not row.strip()
    if not empty:
        yield "".join(article)


def pages(articles: Iterable[str]) -> Iterator[str]:
    """Articles as lm-evaluation-harness's document-level WikiText has them.

    Each begins with its heading, and the line end that divides it from the next one belongs to none of them.
    """
    previous: str | None = None
    for article in articles:
        if previous is not None:
            yield previous.removesuffix("\n")
        previous = _BLANK_LINES.sub("", article, count=1)
    if previous is not None:
        yield previous


def detokenize(page: str) -> str:
    """A page without the spaces that WikiText puts around punctuation, as lm-evaluation-harness scores it.

    The rules are those of its task `wikitext`, version 2, in their order, so that the text is the same character by
    character.
    """
    for old, new in _BEFORE:
        page = page.replace(old, new)
    page = _QUOTED_DIGIT.sub("/'[0-9]/", page)
    for old, new in (*_NUMBERS, *_PUNCTUATION):
        page = page.replace(old, new)
    for pattern, kept in _ENCLOSED:
        page = pattern.sub(kept, page)
    for old, new in _AFTER:
        page = page.replace(old, new)
    return page


def page_words(page: str) -> int:
    """Words of a page as lm-evaluation-harness counts them: pieces between runs of whitespace.

    Whitespace at the beginning and at the end divides off an empty piece each, which counts.
    """
    return len(re.split(r"\s+", page))
