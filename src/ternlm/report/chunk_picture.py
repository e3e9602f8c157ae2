"""The chunks of a text as a picture: the router's probability at every byte, chunks as shaded bands."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

from ternlm.report.chunk_text import characters

Row = Mapping[str, Any]

SHOWN = 480
"""Bytes that are drawn."""

_WIDTH = 60
_COLORS = ("#3b6fb6", "#e08214", "#4d9a57")
_GREY = "#b4bac2"
_FONT = "DejaVu Sans Mono"


def draw_chunks(record: Row) -> Figure:
    """The beginning of the text in rows of 60 bytes.

    Bars are the probabilities of the outermost stage, in colour where it cuts; a dot is that of an inner stage, filled
    where it cuts. Bands are every other chunk of the innermost stage.

    Args:
        record: As `evaluation.chunks.find_chunks` returns it.
    """
    stages, size = record["stages"], min(record["bytes"], SHOWN)
    rows = -(-size // _WIDTH)
    figure = Figure(figsize=(13, 0.9 + 1.25 * rows), layout="constrained")
    more = f", the first {size:,} of {record['bytes']:,} bytes" if size < record["bytes"] else ""
    figure.suptitle(f"Where the model cuts{more}", fontsize=11)
    names = _names(bytes.fromhex(record["hex"])[:size])
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for number, axes in enumerate(panels):
        start, end = number * _WIDTH, min((number + 1) * _WIDTH, size)
        _bands(axes, stages[-1], start, end)
        for stage in stages:
            _probabilities(axes, stage, start, end)
        axes.axhline(0.5, color="#444444", ls="--", lw=0.6)
        axes.set(xlim=(start - 0.5, start + _WIDTH - 0.5), ylim=(0, 1.05), yticks=(0, 0.5, 1))
        axes.set_xticks(range(start, end), names[start:end], fontsize=9, fontfamily=_FONT)
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", labelsize=7)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), fontsize=8, frameon=False)
    return figure


def draw_statistics(stages: Sequence[Row]) -> Figure:
    """How long chunks are, and how sure the router is: two histograms per stage.

    Args:
        stages: With the statistics of `evaluation.chunks.ChunkCounts`.
    """
    figure = Figure(figsize=(9, 0.5 + 2.3 * len(stages)), layout="constrained")
    figure.suptitle("Chunks", fontsize=11)
    for stage, (left, right) in zip(stages, figure.subplots(len(stages), 2, squeeze=False), strict=True):
        color = _COLORS[stage["stage"] % len(_COLORS)]
        left.bar(range(len(stage["lengths"])), stage["lengths"], width=0.9, color=color)
        left.set_xlabel(f"bytes of a chunk of stage {stage['stage']}", fontsize=8)
        left.set_xlim(0.4, max(len(stage["lengths"]) - 0.4, 1.6))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        histogram = stage["histogram"]
        width = (histogram["high"] - histogram["low"]) / len(histogram["counts"])
        places = [histogram["low"] + (i + 0.5) * width for i in range(len(histogram["counts"]))]
        right.bar(places, histogram["counts"], width=0.9 * width, color=color)
        right.axvline(0.5, color="#444444", ls="--", lw=0.6)
        right.set_xlim(0, 1)
        right.set_xlabel(f"probability that a chunk of stage {stage['stage']} begins", fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelsize=7)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    return figure


def _bands(axes: Any, stage: Row, start: int, end: int) -> None:
    for number, chunk in enumerate(stage["chunks"]):
        first, last = max(chunk["start"], start), min(chunk["end"], end)
        if first < last and number % 2 == 0:
            label = f"chunks of stage {stage['stage']}" if number == 0 else None
            axes.axvspan(first - 0.5, last - 0.5, color="#e8ecf2", lw=0, zorder=0, label=label)


def _probabilities(axes: Any, stage: Row, start: int, end: int) -> None:
    """Bars of the outermost stage, dots of the others."""
    cuts = {chunk["start"] for chunk in stage["chunks"] if chunk["probability"] is not None}
    known = [(place, stage["probability"][place]) for place in range(start, end)]
    number, color = stage["stage"], _COLORS[stage["stage"] % len(_COLORS)]
    for is_cut, label in ((False, "no chunk begins"), (True, "a chunk begins")):
        points = [(place, p) for place, p in known if p is not None and (place in cuts) is is_cut]
        points = points or [(start, math.nan)]  # draws nothing, and has its colour in the legend
        places, values = [place for place, _ in points], [p for _, p in points]
        if number == 0:
            axes.bar(places, values, width=0.62, color=color if is_cut else _GREY, label=f"stage 0, {label}", zorder=2)
        else:
            axes.plot(places, values, "o", ms=5, mec=color, mfc=color if is_cut else "white",
                      label=f"stage {number}, {label}", zorder=3 + number)  # fmt: skip


def _names(raw: bytes) -> list[str]:
    """What stands below each byte: a character below its first one, hex digits for what the font does not have."""
    names = []
    for _, part, character in characters(raw):
        if character == " ":
            names.append("\u2423")
        elif character == "\n":
            names.append("\u21b5")
        elif character and character.isprintable() and _has_glyph(character):
            names += [character.replace("$", r"\$"), *("\u00b7" for _ in part[1:])]
        else:
            names += [f"{byte:02X}" for byte in part]
    return names


@lru_cache(maxsize=1)
def _font() -> Any:
    return FT2Font(font_manager.findfont(_FONT))


def _has_glyph(character: str) -> bool:
    return bool(_font().get_char_index(ord(character)))
