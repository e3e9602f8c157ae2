"""What tasks of lm-evaluation-harness gave for checkpoints of a run, from ``eval/lm_eval_NNNNNN.json``."""

import re
from typing import Any

from ternlm.report import tail
from ternlm.report.tail import mapping, number, whole
from ternlm.run_directory import RunDirectory

_FILE = re.compile(r"lm_eval_(\d{6,})\.json")
_HOW = ("n_samples", "few_shot", "limit", "sequence_length", "version")
_MOST = 60


def task_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """`step`, `task`, `metrics`, `errors` (standard errors of metrics), `n_samples`, `limit`, `source`; by step."""
    folder = run.evaluations.parent
    matches = sorted(filter(None, map(_FILE.fullmatch, tail.names(folder))), key=lambda match: int(match[1]))
    rows = []
    for match in matches:
        given = mapping((tail.document(folder / match[0]) or {}).get("tasks"))
        for task, values in given.items():
            numbers = {name: number(value) for name, value in mapping(values).items() if name not in _HOW}
            known = {name: value for name, value in numbers.items() if value is not None}
            rows.append({
                "step": int(match[1]),
                "task": task,
                "metrics": {name: value for name, value in known.items() if "_stderr" not in name},
                "errors": {name.replace("_stderr", ""): value for name, value in known.items() if "_stderr" in name},
                "n_samples": whole(mapping(values).get("n_samples")),
                "limit": whole(mapping(values).get("limit")),
                "source": f"eval/{match[0]}",
            })  # fmt: skip
    return rows[-_MOST:]
