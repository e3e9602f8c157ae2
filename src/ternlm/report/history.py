"""Curves of a run that is being written: each look reads only what was appended since the last one.

A file that is already large is sampled at evenly spaced places, so the first look is short as well, and
a curve keeps a bounded number of points however long the run is.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from ternlm.files import regular_file
from ternlm.report.tail import TAIL_BYTES, number, rows_in
from ternlm.run_directory import RunDirectory

_WHOLE_BYTES = 1024 * 1024
_DRAWABLE = 1e100  # sums of such values stay finite
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
MOST_POINTS = 2048

Curve = list[tuple[float, float]]


class Follower:
    """New rows of one JSONL file that only grows, or is replaced.

    Args:
        file: May be missing, and come later.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def poll(self) -> list[dict[str, Any]]:
        """Rows since the last call; all of them if the file began anew."""
        try:
            with regular_file(self._file) as stream:
                found = os.fstat(stream.fileno())
                if (found.st_dev, found.st_ino) != self._identity or found.st_size < self._offset:
                    self._offset = 0
                self._identity = (found.st_dev, found.st_ino)
                if found.st_size - self._offset > _WHOLE_BYTES:
                    return list(self._sampled(stream, found.st_size))
                return self._read(stream, found.st_size - self._offset)
        except OSError:
            return []

    def _read(self, stream: BinaryIO, size: int) -> list[dict[str, Any]]:
        stream.seek(self._offset)
        content = stream.read(size)
        self._offset += content.rfind(b"\n") + 1  # a line that is being written is read when it is complete
        return rows_in(content)

    def _sampled(self, stream: BinaryIO, size: int) -> Iterator[dict[str, Any]]:
        """A row from each of many places, and all rows at the end."""
        begin, end = self._offset, size - TAIL_BYTES
        for place in range(_SAMPLES):
            stream.seek(begin + (end - begin) * place // _SAMPLES)
            _, *lines = stream.read(_SAMPLE_BYTES).split(b"\n", 2)
            yield from rows_in(b"\n".join([*lines[:-1], b""]))
        self._offset = end
        yield from self._read(stream, TAIL_BYTES)


class History:
    """The curves of a run, by the names of their columns.

    Args:
        run: The run.
    """

    TRAIN = ("train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_sec")
    EVAL = ("val/loss",)

    def __init__(self, run: RunDirectory) -> None:
        self._sources = [(Follower(run.scalars), self.TRAIN), (Follower(run.evaluations), self.EVAL)]
        self.curves: dict[str, Curve] = {name: [] for name in (*self.TRAIN, *self.EVAL)}

    def poll(self) -> None:
        """Take in what was written since the last call."""
        for follower, columns in self._sources:
            rows = follower.poll()
            for name in columns:
                extend(self.curves[name], rows, name)


def extend(curve: Curve, rows: list[dict[str, Any]], column: str) -> None:
    """Append (step, value) of rows; a step that comes again, of a resumed run, replaces what followed it."""
    for row in rows:
        step, value = number(row.get("step")), number(row.get(column))
        if step is None or value is None or not 0 <= step < 2**53 or abs(value) > _DRAWABLE:
            continue
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    if len(curve) > MOST_POINTS:
        curve[:] = thinned(curve, MOST_POINTS // 2)


def thinned(curve: Curve, count: int) -> Curve:
    """The means of at most `count` equally wide parts, so that the beginning stays as fine as the end."""
    first, last = curve[0][0], curve[-1][0]
    parts: dict[int, Curve] = {}
    for x, y in curve:
        parts.setdefault(int((x - first) / (last - first) * (count - 1)), []).append((x, y))
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts.values()]
