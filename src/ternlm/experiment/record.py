"""The folder of an experiment: the folder of its run, and beside the run's own files these.

|- experiment_summary.json        what it is, how far it is, and what came out; replaced after every stage
`- results/
   |- evaluation_results.json     the measurements of the trained model, and of its text
   |- chunks.html, chunks.png     of a hierarchical model, where it cuts held-out text
   `- generations.txt             the text
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ternlm.errors import EnvironmentFault
from ternlm.files import from_json, read_regular, replace_durably, to_json
from ternlm.run_directory import RunDirectory

SCHEMA = 1
STAGES = ("prepare", "train", "evaluate", "generate")
_LARGEST = 64 * 2**20


class ExperimentDirectory:
    """An experiment's folder.

    Args:
        path: The folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = RunDirectory(path)
        self.summary = path / "experiment_summary.json"
        self.results = path / "results" / "evaluation_results.json"
        self.generations = path / "results" / "generations.txt"
        self.chunk_page = path / "results" / "chunks.html"
        self.chunk_picture = path / "results" / "chunks.png"

    def read_results(self) -> dict[str, Any]:
        """What was measured so far; nothing where the file is missing or damaged, as it can be measured again."""
        found = _read(self.results)
        return found if isinstance(found.get("made_from", {}), dict) else {}

    def read_seconds(self) -> dict[str, float]:
        """Seconds of each stage in all sittings so far, as the summary has them."""
        seconds = _read(self.summary).get("seconds")
        known = seconds if isinstance(seconds, dict) else {}
        return {stage: known[stage] for stage in STAGES if isinstance(known.get(stage), int | float)}

    def training_facts(self) -> dict[str, Any]:
        """How far training is, as the run's status file says it."""
        names = ("state", "reason", "step", "max_steps", "tokens_seen", "elapsed_seconds", "loss", "val", "best")
        status = _read(self.run.status)
        return {name: status.get(name) for name in names}

    def write(self, file: Path, content: bytes) -> None:
        """Replace one of the files.

        Raises:
            EnvironmentFault: It cannot be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(file, content)
        except OSError as error:
            raise EnvironmentFault(
                f"'{file}' cannot be written: {error.strerror}. Free space, then give the same command again."
            ) from None

    def write_json(self, file: Path, value: dict[str, Any]) -> None:
        """`write` a mapping."""
        self.write(file, to_json(value))

    def files(self) -> dict[str, str]:
        """The files that a reader looks for, where they exist, by what they hold, relative to the folder."""
        named = {
            "evaluation_results": self.results,
            "generations": self.generations,
            "chunk_page": self.chunk_page,
            "chunk_picture": self.chunk_picture,
            "training_log": self.run.training_csv,
            "eval_log": self.run.evaluation_csv,
            "checkpoints": self.run.checkpoints,
            "settings": self.run.config,
        }
        return {name: file.relative_to(self.path).as_posix() for name, file in named.items() if file.exists()}


def key_of(*parts: Any) -> str:
    """A hash of JSON values: a result is made again exactly when what it was made from has changed."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(file: Path) -> dict[str, Any]:
    try:
        value = from_json(read_regular(file, _LARGEST))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
