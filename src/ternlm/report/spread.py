"""Rows of a JSONL file as they lie spread over its whole length, and the curves that are in them.

A report is about a whole run, so it wants the beginning as much as the end; a file of any size is read in bounded time
and memory. Nothing is raised for what is missing, damaged, or being written at this moment.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ternlm.files import regular_file
from ternlm.report.tail import loads, number, read_end, rows_in

MOST_POINTS = 600
"""Points that a curve keeps."""

_WHOLE_BYTES = 16 * 1024 * 1024
_PLACES, _LONGEST_ROW, _MOST_BYTES = 1024, 4 * 1024 * 1024, 128 * 1024 * 1024
_LARGEST_STEP = 2**53
_DRAWABLE = 1e100  # sums of such values stay finite

Row = dict[str, Any]
Points = list[list[float]]


def spread_rows(file: Path) -> list[Row]:
    """The rows of a file in the order of their steps: all of them, or of a large file those at evenly spaced places.

    A row without a step is left out. A step that comes again, as after a resume, replaces what followed it.
    """
    kept: list[Row] = []
    for row in _rows(file):
        step = number(row.get("step"))
        if step is None or not 0 <= step < _LARGEST_STEP:
            continue
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append({**row, "step": int(step)})
    return kept


def all_rows(file: Path) -> list[Row]:
    """The rows of a file that is a history, in the order in which they were written; of a large one, the newest."""
    return rows_in(read_end(file, _WHOLE_BYTES))


def curve(rows: Iterable[Row], column: str) -> Points:
    """[step, value] of every row that has the number; thinned."""
    points = [(row["step"], number(row.get(column))) for row in rows]
    return thinned([[step, value] for step, value in points if value is not None and abs(value) < _DRAWABLE])


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Of each stretch the lowest and the highest point, so that no peak is lost; the ends as they are."""
    if len(points) <= most:
        return points
    length = -(-2 * len(points) // max(most - 2, 1))
    kept = [points[0]]
    for start in range(1, len(points) - 1, length):
        stretch = points[start : min(start + length, len(points) - 1)]
        low, high = (choose(stretch, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted([low] if low == high else [low, high])
    return [*kept, points[-1]]


def evenly(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of the rows, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[place * (len(rows) - 1) // (most - 1)] for place in range(most)]


def _rows(file: Path) -> Iterator[Row]:
    try:
        with regular_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= _WHOLE_BYTES:
                yield from rows_in(stream.read(size))
            else:
                yield from _sampled(stream, size)
    except OSError:
        return


def _sampled(stream: BinaryIO, size: int) -> Iterator[Row]:
    """The first whole row behind each of many places, and the last one; rows may be longer than the way between."""
    end = read = 0
    for place in range(_PLACES):
        begin = max(size * place // _PLACES, end)
        stream.seek(begin)
        if begin and begin != end:
            read += len(stream.readline(_LONGEST_ROW))  # the rest of a row that began before
        line = stream.readline(_LONGEST_ROW)
        read += len(line)
        end = stream.tell()
        row = loads(line) if line.endswith(b"\n") else None
        if isinstance(row, dict):
            yield row
        if read > _MOST_BYTES:
            break
    stream.seek(max(size - _LONGEST_ROW, end))
    yield from rows_in(stream.read(_LONGEST_ROW))[-1:]
