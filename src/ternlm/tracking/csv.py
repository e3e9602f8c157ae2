"""Comma-separated values for spreadsheets: a few columns of training and of evaluation."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ternlm.run_directory import RunDirectory, append_line
from ternlm.tracking.interface import Kind, Row, Tracker

_TRAIN = {
    "step": "step", "elapsed_seconds": "wall_s", "loss": "train/loss", "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm", "bpb": "train/bpb", "perplexity": "train/perplexity",
}  # fmt: skip
_EVAL = {
    "step": "step", "elapsed_seconds": "wall_s", "loss": "val/loss", "bpb": "val/bpb",
    "perplexity": "val/perplexity", "accuracy": "val/accuracy", "top5_accuracy": "val/top5_accuracy",
}  # fmt: skip


class CsvTracker(Tracker):
    """Appends to `logs/training_log.csv` and `logs/eval_log.csv`; a row is on disk when `log` returns."""

    def __init__(self, run: RunDirectory) -> None:
        self._tables = {"train": (run.training_csv, _TRAIN), "eval": (run.evaluation_csv, _EVAL)}

    def log(self, kind: Kind, row: Row) -> None:
        if kind in self._tables:
            file, columns = self._tables[kind]
            if not file.exists() or not file.stat().st_size:
                _append(file, columns)
            _append(file, ("" if row.get(key) is None else row[key] for key in columns.values()))


def _append(file: Path, values: Iterable[object]) -> None:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    append_line(file, line.getvalue())
