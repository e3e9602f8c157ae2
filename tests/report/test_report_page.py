"""A report as a page and as Markdown: complete in itself, accessible, and true to what it was given."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from ternlm.report.blocks import Chart, Number, Numbers, Paragraph, Section, Table, Text
from ternlm.report.charts import Series, bars, heat_map, lines
from ternlm.report.markdown import markdown
from ternlm.report.page import html_page
from ternlm.report.palette import PALETTE
from ternlm.report.plain_text import printable

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too' \x00\x1b[2J \u202eabc \ud800 | `code` *star* [link](x)"
_VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Tree(HTMLParser):
    """Elements with their attributes; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def curve(points: int = 40) -> Figure:
    return lines([Series("ternary", [(step, 3 + 1 / (1 + step)) for step in range(points)]),
                  Series("full precision", [(step, 2 + 1 / (1 + step)) for step in range(points)])],
                 "step", "nats per token")  # fmt: skip


def heat() -> Figure:
    return heat_map(["0.qkv", "0.out"], [1, 50, 100], [[0.3, 0.4, None], [0.2, 0.3, 0.5]], "step", "share of zeros")


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    table = Table(["part", "value", HOSTILE], [["norm", "1,234", HOSTILE], ["bias", "5", "none" * 30]], f"C {HOSTILE}",
                  (1,), "eval/alignment.json", ["good", "bad"], ["https://arxiv.org/abs/2402.17764", ""])  # fmt: skip
    numbers = Numbers([Number("Held-out loss", "3.142 nats", "2.01 bits per byte", "eval/eval_results.jsonl")])
    return [
        Section("In short", [Paragraph(HOSTILE), Paragraph("It diverged.", "bad"), numbers]),
        Section("Curves", [Chart("Loss", f"Falls to 3.03. {HOSTILE}", curve, "metrics/scalars.jsonl", wide=True),
                           Chart("Zeros", "From 0.2 to 0.5.", heat), Chart("Again", "The same.", curve)]),
        Section("Tables", [table, Table(["a"], [], "Nothing came.")]),
        Section("Texts", [Text(f"Once upon\n{HOSTILE}\n```\n~~~~", "Greedy", 9), Text("ternlm train x")], True),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(sections: list[Section]) -> str:
    return html_page("a <run>", "finished", sections)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page: str) -> None:
    tree = Tree(page)
    assert not tree.all("script") and not tree.all("link") and not tree.all("iframe")
    assert not [name for _, attributes in tree.elements for name in attributes if name.startswith("on")]
    addresses = [str(value) for _, attributes in tree.elements for name, value in attributes.items()
                 if name in ("src", "href", "xlink:href")]  # fmt: skip
    outside = [address for address in addresses if not address.startswith(("#", "data:image/png"))]
    assert outside == ["https://arxiv.org/abs/2402.17764"], "only a link that a reader may follow"
    assert "url(" not in page.replace("url(#", "") and "@import" not in page
    (policy,) = [meta["content"] for meta in tree.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")


def test_what_was_given_is_shown_as_text_and_never_as_markup(page: str) -> None:
    tree = Tree(page)
    shown = "".join(tree.text)
    assert shown.count("<script>alert(1)</script>") >= 5
    assert "\\x00\\x1b[2J \\u202eabc \\ud800" in shown
    assert not re.search("[\x00-\x08\x0e-\x1f\u202a-\u202e\ud800-\udfff]", page)
    assert page.encode("utf-8").decode("utf-8") == page


def test_every_id_is_there_once_and_every_reference_leads_to_one(page: str) -> None:
    tree = Tree(page)
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {word for _, attributes in tree.elements for name in ("aria-labelledby", "aria-describedby")
             for word in str(attributes.get(name) or "").split()}  # fmt: skip
    linked = {str(value)[1:] for _, attributes in tree.elements for name, value in attributes.items()
              if name in ("href", "xlink:href") and str(value).startswith("#")}  # fmt: skip
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    assert named and linked and used
    assert named | linked | used <= set(ids)


def test_every_picture_has_a_title_and_a_description_in_words(page: str) -> None:
    tree = Tree(page)
    pictures = tree.all("svg")
    assert len(pictures) == 4, "the wide chart is drawn for narrow and for wide screens"
    assert all(picture["role"] == "img" for picture in pictures)
    titles, words = (re.findall(rf"<{tag} id=[^>]*>([^<]+)</{tag}>", page) for tag in ("title", "desc"))
    assert titles == ["Loss", "Loss", "Zeros", "Again"]
    assert words[2:] == ["From 0.2 to 0.5.", "The same."]


def test_tables_name_their_rows_and_columns_and_can_be_scrolled_with_keys(page: str) -> None:
    tree = Tree(page)
    assert [head["scope"] for head in tree.all("th")] == ["col"] * 3 + ["row"] * 2
    regions = [attributes for _, attributes in tree.elements if attributes.get("role") == "region"]
    assert len(regions) == 3
    assert all(region["tabindex"] == "0" and ("aria-labelledby" in region or "aria-label" in region)
               for region in regions)  # fmt: skip
    assert "Nothing to show." in page


def test_a_folded_section_opens_without_a_script_and_the_contents_name_every_section(page: str) -> None:
    tree = Tree(page)
    assert len(tree.all("details")) == len(tree.all("summary")) == 1
    assert [link["href"] for link in tree.all("a") if str(link["href"]).startswith("#")] == [
        f"#part-{number}" for number in (1, 2, 3, 4)
    ]
    assert re.findall(r"<h([1-6])>", page) == ["1", "2", "2", "2", "2"]


def test_pictures_take_their_colours_and_letters_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert {"var(--series0)", "var(--series1)", "var(--ink)", "var(--quiet)"} <= set(
        re.findall(r"var\([^)]+\)", drawings)
    )
    assert not [light for light, _ in PALETTE.values() if light in drawings]
    assert "<text" in drawings and "font-family" not in drawings and "DejaVu" not in drawings


def test_dark_is_for_screens_alone_so_that_paper_stays_light(page: str) -> None:
    (dark,) = re.findall(r"@media screen and \(prefers-color-scheme: dark\) \{ :root \{([^}]*)\}", page)
    assert all(f"--{name}: {pair[1]};" in dark for name, pair in PALETTE.items())
    (light,) = re.findall(r"^:root \{([^}]*)\}", page, re.MULTILINE)
    assert all(f"--{name}: {pair[0]};" in light for name, pair in PALETTE.items())
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"width", "ground", "edge"}
    assert used <= set(PALETTE)


def test_a_page_with_thirty_charts_of_long_curves_is_below_two_megabytes() -> None:
    charts = [Chart(f"{number}", "x", lambda: curve(20_000), wide=number == 0) for number in range(30)]
    assert len(html_page("t", "s", [Section("all", charts)]).encode()) < 2_000_000


def test_the_same_record_gives_the_same_page(sections: list[Section], page: str) -> None:
    assert html_page("a <run>", "finished", sections) == page


def test_a_chart_that_knows_nothing_and_an_empty_section_are_still_a_page() -> None:
    nothing = Chart("Bars", "Nothing yet.", lambda: bars([], [], "bytes"))
    assert "no values yet" in html_page("t", "", [Section("empty"), Section("chart", [nothing])])


def test_a_chart_that_cannot_be_drawn_is_told_in_words_and_costs_nothing_else() -> None:
    def broken() -> Figure:
        raise ValueError("no such thing")

    page = html_page("t", "s", [Section("a", [Chart("Loss", "It falls to 3.", broken), Chart("Zeros", "z", heat)])])
    assert "It falls to 3. (Not drawn: no such thing)" in page
    assert len(Tree(page).all("svg")) == 1


def test_markdown_tells_charts_in_words_and_keeps_every_number(sections: list[Section]) -> None:
    text = markdown("a <run>", "finished", sections)
    assert text.startswith("# a \\<run>\n\nfinished\n\n## In short\n")
    assert "**Failed:** It diverged." in text
    assert "- **Held-out loss:** 3.142 nats (2.01 bits per byte) *from eval/eval\\_results.jsonl*" in text or (
        "- **Held-out loss:** 3.142 nats (2.01 bits per byte) *from eval/eval_results.jsonl*" in text
    )
    assert "**Zeros.** From 0.2 to 0.5." in text
    assert "[norm](https://arxiv.org/abs/2402.17764) | 1,234 |" in text


def test_markdown_shows_hostile_text_as_it_is_and_keeps_every_row_on_its_line(sections: list[Section]) -> None:
    text = markdown("t", "s", sections)
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    outside, fenced = text.split("`````text\n")[0], re.findall(r"^`{4,}text$", text, re.MULTILINE)
    assert fenced == ["````text"], "longer than any fence inside"
    assert "<script>" not in outside.replace("\\<script>", "").split("````")[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\r\nb\tc", "a\nb\tc"), ("bell\x07", "bell\\x07"), ("\ufeffx", "\\ufeffx"), ("naïve 🙂 中", "naïve 🙂 中")],
)
def test_text_is_made_printable_and_otherwise_left_alone(text: str, shown: str) -> None:
    assert printable(text) == shown
