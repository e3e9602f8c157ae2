"""JSON Lines: the complete record of a run, one file per kind of row."""

from ternlm.run_directory import RunDirectory, append_jsonl
from ternlm.tracking.interface import Kind, Row, Tracker


class JsonlTracker(Tracker):
    """Appends to the file of each kind in `metrics/`, `eval/` and `samples/`."""

    def __init__(self, run: RunDirectory) -> None:
        self._files = {
            "train": run.scalars, "eval": run.evaluations, "sample": run.samples,
            "ternary": run.ternary, "system": run.system, "event": run.events,
        }  # fmt: skip

    def log(self, kind: Kind, row: Row) -> None:
        append_jsonl(self._files[kind], row)
