"""A report as one HTML file that needs nothing else: no network, no script; light, dark, phone and paper."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ternlm.report.blocks import Block, Chart, Section
from ternlm.report.page_style import STYLE
from ternlm.report.palette import PALETTE
from ternlm.report.plain_text import printable
from ternlm.report.vector import inline_svg

_WIDER, _MOST_LISTED = 2.05, 16


def html_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: Shown as heading and in the window's title.
        subtitle: One line below it.
        sections: What the page holds, each named in the list of contents.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    parts = [{"id": f"part-{number}", "title": section.title, "is_folded": section.is_folded,
              "groups": [*_groups(section.blocks, f"p{number}")]}
             for number, section in enumerate(sections, start=1)]  # fmt: skip
    return environment.from_string(_PAGE).render(
        title=title, subtitle=subtitle, parts=parts, style=Markup(_variables() + STYLE), most_listed=_MOST_LISTED
    )


def _shown(value: Any) -> Any:
    """Text without what no page may hold; markup as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _variables() -> str:
    """The colours as variables: light everywhere, dark on screens that ask for it, so that paper stays light."""
    light, dark = (" ".join(f"--{name}: {pair[theme]};" for name, pair in PALETTE.items()) for theme in (0, 1))
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark} }} }}\n"
    )


def _groups(blocks: Sequence[Block], name: str) -> Iterator[dict[str, Any]]:
    """Blocks by kind; charts that follow each other stand side by side."""
    number = 0
    for kind, members in groupby(blocks, key=lambda block: type(block).__name__.lower()):
        for group in [list(members)] if kind == "chart" else [[member] for member in members]:
            shown = []
            for block in group:
                number += 1
                shown.append(_picture(block, f"{name}-{number}") if isinstance(block, Chart) else block)
            yield {"kind": kind, "id": f"{name}-{number}", "blocks": shown, "block": shown[0]}


def _picture(chart: Chart, name: str) -> dict[str, Any]:
    """The chart drawn; one that cannot be is told in words, for the rest of the page is worth having."""
    try:
        drawings, words = _drawings(chart, name), ""
    except Exception as error:  # noqa: BLE001 (matplotlib fails in many ways on values no one thought of)
        drawings, words = [], f"{chart.alt} (Not drawn: {error})"
    return {"title": chart.title, "source": chart.source, "wide": chart.wide, "drawings": drawings, "words": words}


def _drawings(chart: Chart, name: str) -> list[Markup]:
    """One drawing; of a wide chart a second for wide screens."""
    drawings = [Markup(inline_svg(chart.draw(), f"{name}-0", chart.title, chart.alt))]
    if chart.wide:
        figure = chart.draw()
        figure.set_size_inches(figure.get_figwidth() * _WIDER, figure.get_figheight())
        drawings.append(Markup(inline_svg(figure, f"{name}-1", chart.title, chart.alt)))
    return drawings


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{{ title }}</title>
<style>
{{ style }}</style>
</head>
<body>
{% macro from(source) %}
{% if source %}<p class="source">from {{ source }}</p>{% endif %}
{% endmacro %}
{% macro paragraph(block) %}
<p class="paragraph {{ block.kind }}">{{ block.text }}</p>
{% endmacro %}
{% macro numbers(block) %}
<dl class="numbers">
{% for number in block.numbers %}
<div><dt>{{ number.label }}</dt><dd class="value">{{ number.value }}</dd>
{% if number.detail %}<dd>{{ number.detail }}</dd>{% endif %}
{% if number.source %}<dd class="source">from {{ number.source }}</dd>{% endif %}
</div>
{% endfor %}
</dl>
{% endmacro %}
{% macro style(is_number, cell) %}
{% set size = cell | length %}
{{- " class=" }}
{%- if is_number %}"number"{% elif size > 60 %}"longer"{% elif size > 22 %}"long"{% elif size < 15 %}"short"
{%- else %}"plain"{% endif %}
{% endmacro %}
{% macro table(block, id) %}
<div class="table">
<p class="caption" id="{{ id }}">{{ block.caption }}</p>
{% if block.rows %}
<div class="scroll" tabindex="0" role="region" aria-labelledby="{{ id }}">
{% set width = "many" if block.columns | length > 3 else "few" %}
<table aria-labelledby="{{ id }}" class="{{ width }}{% if block.kinds %} marked{% endif %}">
<thead><tr>
{% for column in block.columns %}
<th scope="col"{% if loop.index0 in block.numeric %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
{% set address = block.links[loop.index0] if block.links else "" %}
<tr{% if block.kinds %} class="{{ block.kinds[loop.index0] }}"{% endif %}>
{% for cell in row %}
{% if loop.first %}
<th scope="row"{{ style(0 in block.numeric, cell) }}>
{%- if address.startswith("https://") %}<a href="{{ address }}" rel="noreferrer">{{ cell }}</a>
{%- else %}{{ cell }}{% endif %}</th>
{% else %}
<td{{ style(loop.index0 in block.numeric, cell) }}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p class="paragraph">Nothing to show.</p>
{% endif %}
{{ from(block.source) }}
</div>
{% endmacro %}
{% macro text(block, id) %}
<div class="text">
{% if block.caption %}<p class="caption" id="{{ id }}">{{ block.caption }}</p>{% endif %}
<pre tabindex="0" role="region" {% if block.caption %}aria-labelledby="{{ id }}"{% else %}aria-label="text"{% endif %}>
{%- if block.emphasis %}<b>{{ block.text[:block.emphasis] }}</b>{% endif %}{{ block.text[block.emphasis:] }}</pre>
</div>
{% endmacro %}
{% macro charts(blocks) %}
<div class="charts">
{% for chart in blocks %}
<figure{% if chart.wide %} class="wide"{% endif %}>
<figcaption>{{ chart.title }}</figcaption>
{% for drawing in chart.drawings %}
{{ drawing }}
{% endfor %}
{% if chart.words %}<p class="paragraph">{{ chart.words }}</p>{% endif %}
{{ from(chart.source) }}
</figure>
{% endfor %}
</div>
{% endmacro %}
{% macro draw(groups) %}
{% for group in groups %}
{% if group.kind == "paragraph" %}{{ paragraph(group.block) }}
{% elif group.kind == "numbers" %}{{ numbers(group.block) }}
{% elif group.kind == "table" %}{{ table(group.block, group.id) }}
{% elif group.kind == "text" %}{{ text(group.block, group.id) }}
{% else %}{{ charts(group.blocks) }}
{% endif %}
{% endfor %}
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
</header>
{% macro contents() %}
<ul>
{% for part in parts %}<li><a href="#{{ part.id }}">{{ part.title }}</a></li>
{% endfor %}
</ul>
{% endmacro %}
{% if parts | length > 2 %}
<nav aria-label="Contents">
{% if parts | length > most_listed %}<details><summary>Contents</summary>{{ contents() }}</details>
{% else %}{{ contents() }}
{% endif %}
</nav>
{% endif %}
<main>
{% for part in parts %}
<section id="{{ part.id }}">
{% if part.is_folded %}
<details><summary><h2>{{ part.title }}</h2></summary>
{{ draw(part.groups) }}
</details>
{% else %}
<h2>{{ part.title }}</h2>
{{ draw(part.groups) }}
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
