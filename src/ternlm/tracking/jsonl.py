"""JSON Lines: the complete record of a run, one file per kind of row."""

from ternlm.run_directory import RunDirectory, append_jsonl
from ternlm.tracking.interface import Kind, Row, Tracker


class JsonlTracker(Tracker):
    """Appends to `metrics/scalars.jsonl`, `eval/eval_results.jsonl` and `samples/samples.jsonl`."""

    def __init__(self, run: RunDirectory) -> None:
        self._files = {"train": run.scalars, "eval": run.evaluations, "sample": run.samples}

    def log(self, kind: Kind, row: Row) -> None:
        append_jsonl(self._files[kind], row)
