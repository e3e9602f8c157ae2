"""The chunks of a text as one HTML page that needs nothing else: boxes in boxes, shaded by the router's probability."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from jinja2 import Environment

from ternlm.report.chunk_text import characters, labels, shown

Row = Mapping[str, Any]


class _Unit(NamedTuple):
    """What is shown as one: a character, or a byte that is part of none.

    Attributes:
        text: What to show.
        kind: ``char``, ``space``, ``line`` or ``byte``.
        shade: 0 to 1, the largest probability of its bytes at the outermost stage.
        title: What is shown under the pointer.
    """

    text: str
    kind: str
    shade: float
    title: str


class _Box(NamedTuple):
    """A chunk: those of the stage outside of it, or of the outermost stage units."""

    level: int
    title: str
    parts: "Sequence[_Box | _Unit]"


def chunk_page(record: Row, title: str) -> str:
    """The page.

    Args:
        record: As `evaluation.chunks.find_chunks` returns it.
        title: What model cut the text.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    stages = record["stages"]
    rows = [[stage["stage"], *(shown(stage, name) for name in labels())] for stage in stages]
    boxes = [*_boxes(record, len(stages) - 1, 0, record["bytes"])]
    histograms = [_bars(stage["lengths"]) for stage in stages]
    return environment.from_string(_PAGE).render(
        title=title, n_bytes=record["bytes"], head=["stage", *labels().values()], rows=rows, boxes=boxes,
        histograms=histograms, levels=len(stages),
    )  # fmt: skip


def _boxes(record: Row, level: int, start: int, end: int) -> Iterator[_Box]:
    """Chunks of a stage between two bytes; boundaries of an inner stage are boundaries of those around it."""
    chunks = record["stages"][level]["chunks"]
    for chunk in chunks[bisect_left(chunks, start, key=itemgetter("start")) :]:
        first, last, p = chunk["start"], chunk["end"], chunk["probability"]
        if first >= end:
            return
        inside = _boxes(record, level - 1, first, last) if level else _units(record, first, last)
        sure = "" if p is None else f", p = {p:.3f}"
        yield _Box(level, f"stage {level}: {last - first} bytes{sure}", [*inside])


def _units(record: Row, start: int, end: int) -> Iterator[_Unit]:
    probability = record["stages"][0]["probability"]
    for place, part, character in characters(bytes.fromhex(record["hex"][2 * start : 2 * end])):
        place += start
        kind = {" ": "space", "\n": "line"}.get(character, "char" if character.isprintable() else "byte")
        shade = max(probability[place + i] or 0.0 for i in range(len(part)))
        yield _Unit(part.hex().upper() if kind == "byte" or not character else character,
                    kind if character else "byte", shade, _title(record, place, part))  # fmt: skip


def _title(record: Row, place: int, part: bytes) -> str:
    lines = []
    for i, byte in enumerate(part):
        known = [(stage["stage"], stage["probability"][place + i]) for stage in record["stages"]]
        values = ", ".join(f"stage {number} p = {p:.3f}" for number, p in known if p is not None)
        lines.append(f"byte {place + i:,} = 0x{byte:02X}: {values or 'no position'}")
    return "\n".join(lines)


def _bars(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Heights of a histogram of lengths; the last bar holds everything longer."""
    most = 24
    counts = [*lengths[1:most], sum(lengths[most:])] if len(lengths) > most else list(lengths[1:])
    highest = max(counts, default=0) or 1
    return [
        {"height": round(90 * count / highest, 1), "count": count, "label": f"{i}+" if i == most else str(i)}
        for i, count in enumerate(counts, start=1)
    ]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chunks: {{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #1c2430; --quiet: #68707c; --line: #d5dae1; --shade: 59, 111, 182;
        --edge0: #3b6fb6; --edge1: #e08214; --edge2: #4d9a57; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181e; --ink: #e4e8ee; --quiet: #98a1ae; --line: #343b46; --shade: 96, 150, 224;
          --edge0: #6ea3ea; --edge1: #f0a64a; --edge2: #7cc487; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 72rem; padding: 0 1.25rem; }
h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
p { color: var(--quiet); margin: .3rem 0 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1.6rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; }
.text { font: 16px/2.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
        overflow-wrap: anywhere; }
.deep { line-height: 3.1; }
.box { border: 1px solid; border-radius: 4px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.l0 { border-color: var(--edge0); padding: 3px 1px; margin: 0 1px; }
.l1 { border-color: var(--edge1); padding: 8px 2px; margin: 0 2px; border-width: 2px; }
.l2 { border-color: var(--edge2); padding: 14px 3px; margin: 0 3px; border-width: 2px; }
.u { background: rgba(var(--shade), calc(var(--p) * var(--p) * .85)); padding: 2px 0; }
.byte { font-size: .7em; outline: 1px dotted var(--quiet); outline-offset: -1px; padding: 2px 1px; }
.line::before { content: "\\21B5"; color: var(--quiet); }
.key span { padding: .1rem .5rem; margin-right: .8rem; border-radius: 4px; }
.plots { display: flex; flex-wrap: wrap; gap: 2.5rem; margin-top: 2rem; }
.plot { display: flex; align-items: flex-end; gap: 2px; height: 110px; }
.plot div { width: 15px; text-align: center; font-size: 10px; color: var(--quiet); }
.plot i { display: block; background: var(--edge0); min-height: 1px; }
figcaption { color: var(--quiet); font-size: 13px; }
figure { margin: 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ "{:,}".format(n_bytes) }} bytes. A box is a chunk; the bluer a character, the likelier a chunk begins there.
Point at one for its bytes and probabilities.</p>
<div class="wide"><table>
<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="key">{% for level in range(levels) %}<span class="box l{{ [level, 2] | min }}" style="padding: .1rem .5rem">
stage {{ level }}</span>{% endfor %}</p>
{% macro draw(part) -%}
{%- if part.parts is defined -%}
<span class="box l{{ [part.level, 2] | min }}" title="{{ part.title }}">
{%- for inner in part.parts %}{{ draw(inner) }}{% endfor -%}
</span><wbr>
{%- else -%}
<span class="u {{ part.kind }}" style="--p:{{ '%.2f' % part.shade }}" title="{{ part.title }}">{{ part.text }}</span>
{%- endif -%}
{%- endmacro %}
<div class="text{{ ' deep' if levels > 1 }}">{% for box in boxes %}{{ draw(box) }}{% endfor %}</div>
<div class="plots">
{% for bars in histograms %}
<figure><div class="plot">
{% for bar in bars %}
<div title="{{ bar.count }} chunks"><i style="height:{{ bar.height }}px"></i>{{ bar.label }}</div>
{% endfor %}
</div><figcaption>stage {{ loop.index0 }}: chunks by length in bytes</figcaption></figure>
{% endfor %}
</div>
</body>
</html>
"""
