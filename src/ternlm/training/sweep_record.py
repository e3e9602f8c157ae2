"""The folder of a sweep, and the one file in it that says what the sweep is.

runs/<sweep_id>/
|- sweep.json     definition, what all trials share, the trials, and how each of them ended
|- <trial_id>/    an ordinary run
|- <trial_id>.log what a trial said to stderr, if anything
|- summary.*      json, csv, md, png, svg; made anew after every trial
`- sweep.lock     held while a process works on the sweep
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ternlm.errors import EnvironmentFault
from ternlm.files import from_json, held, read_regular, replace_durably, to_json
from ternlm.run_directory import SWEEP, RunDirectory
from ternlm.training.sweep import Metric, Trial

SCHEMA = 1
LARGEST = 64 * 2**20


class End(NamedTuple):
    """How a trial's process ended.

    Attributes:
        code: Its exit code; negative for a signal that nothing handled.
        error: The last line it said to stderr, if it failed.
    """

    code: int
    error: str | None


class SweepRecord(NamedTuple):
    """What `sweep.json` holds.

    Attributes:
        name: Name of the sweep file, or of the recipe.
        origin: Where the definition came from.
        description: One line.
        recipe: What every trial starts from.
        shared: Settings of all trials, by full dotted name; the environment's are among them.
        metric: What is compared.
        definition: The sweep file as it was read, with what the command line added.
        trials: In the order of the definition.
        fingerprints: Of the settings of each trial, by id.
        ends: Of the trials that have been run, by id.
    """

    name: str
    origin: str
    description: str
    recipe: str
    shared: dict[str, Any]
    metric: Metric
    definition: dict[str, Any]
    trials: list[Trial]
    fingerprints: dict[str, str]
    ends: dict[str, End]


class TrialRecord(Protocol):
    """What running trials needs to know of the record that they belong to, as `SweepRecord` has it."""

    @property
    def recipe(self) -> str: ...
    @property
    def shared(self) -> dict[str, Any]: ...
    @property
    def trials(self) -> list[Trial]: ...
    @property
    def fingerprints(self) -> dict[str, str]: ...
    @property
    def ends(self) -> dict[str, End]: ...


Record = TypeVar("Record", bound=TrialRecord)


class TrialFolder(ABC, Generic[Record]):
    """A folder of runs that were defined together, with one file that says what they are.

    Args:
        path: The folder; it may not exist yet.

    Attributes:
        verb: The command that works on it, which is also what it is called: ``sweep``.
        file: What it is, and how its trials ended.
    """

    verb: str
    name: str

    def __init__(self, path: Path) -> None:
        self.path, self.id, self.file = path, path.name, path / self.name

    def run(self, trial: Trial) -> RunDirectory:
        """The run of a trial."""
        return RunDirectory(self.path / trial.id)

    def log(self, trial: Trial) -> Path:
        """What a trial said to stderr."""
        return self.path / f"{trial.id}.log"

    @property
    def resume_command(self) -> str:
        """What a user types to go on."""
        return f"ternlm {self.verb} --resume {self.path}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            EnvironmentFault: Another process works on it, or the folder cannot be written.
        """
        in_use = EnvironmentFault(f"{self.verb} '{self.path}' is being run by another process. Stop it first.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(
                f"{self.verb} folder '{self.path}' cannot be written: {error.strerror}. Choose another with --runs-dir."
            ) from None
        with held(self.path / f"{self.verb}.lock", in_use):
            yield

    @abstractmethod
    def write(self, record: Record) -> None:
        """Replace the file."""


class SweepDirectory(TrialFolder[SweepRecord]):
    """A sweep's folder."""

    verb, name = "sweep", SWEEP

    def summary(self, ending: str) -> Path:
        """A file of the summary, by its ending: json, csv, md, png, svg."""
        return self.path / f"summary.{ending}"

    def write(self, record: SweepRecord) -> None:
        """Replace `sweep.json`."""
        fields = {name: value for name, value in record._asdict().items() if name not in ("fingerprints", "ends")}
        replace_durably(self.file, to_json({"schema": SCHEMA, "id": self.id, **fields, "trials": trial_rows(record)}))

    def read(self) -> SweepRecord:
        """What `sweep.json` holds.

        Raises:
            EnvironmentFault: There is none, or it is damaged.
        """
        try:
            fields = from_json(read_regular(self.file, LARGEST))
            kept = read_trial_rows(fields["trials"])
            return SweepRecord(**{name: fields[name] for name in SweepRecord._fields if name not in kept}, **kept)
        except OSError as error:
            raise EnvironmentFault(
                f"there is no sweep in '{self.path}': {SWEEP}: {error.strerror}. Check the path."
            ) from None
        except (ValueError, LookupError, TypeError):
            raise EnvironmentFault(
                f"'{self.file}' is damaged. The runs beside it are whole; start the sweep anew with another --sweep-id."
            ) from None


def find_sweep(reference: str, root: Path) -> SweepDirectory:
    """A sweep by path, name, unique prefix of a name, or ``latest``.

    Raises:
        EnvironmentFault: No sweep matches, or several do.
    """
    return SweepDirectory(find_trials(reference, root, SweepDirectory.verb, SWEEP))


def find_trials(reference: str, root: Path, verb: str, file_name: str) -> Path:
    """The folder with a file of this name, by path, name, unique prefix of a name, or ``latest``.

    Args:
        reference: What the user typed.
        root: Where runs live.
        verb: What such a folder is called.
        file_name: The file that says what it is.

    Raises:
        EnvironmentFault: None matches, or several do.
    """
    if (Path(reference) / file_name).is_file():
        return Path(reference)
    known = {file.parent.name: file for file in sorted(root.glob(f"*/{file_name}"))}
    if reference == "latest" and known:
        return max(known.values(), key=lambda file: file.stat().st_mtime).parent
    matches = [name for name in known if name == reference] or [name for name in known if name.startswith(reference)]
    if len(matches) == 1:
        return known[matches[0]].parent
    if matches:
        raise EnvironmentFault(f"'{reference}' matches several {verb}s: {', '.join(matches)}. Write more of the name.")
    raise EnvironmentFault(
        f"no {verb} '{reference}' in '{root}' ({verb}s: {', '.join(known) or 'none'}). Give its path or name."
    )


def trial_rows(record: TrialRecord) -> list[dict[str, Any]]:
    """The trials of a record as JSON values, each with its fingerprint and its end."""
    return [
        {**trial._asdict(), "fingerprint": record.fingerprints[trial.id], **_end_fields(record.ends.get(trial.id))}
        for trial in record.trials
    ]


def read_trial_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The `trials`, `fingerprints` and `ends` of a record, from what `trial_rows` made of them.

    Raises:
        LookupError, TypeError: The rows are malformed.
    """
    rows = list(rows)
    return {
        "trials": [Trial(*(row[name] for name in Trial._fields)) for row in rows],
        "fingerprints": {row["id"]: row["fingerprint"] for row in rows},
        "ends": {row["id"]: End(row["exit_code"], row["error"]) for row in rows if row["exit_code"] is not None},
    }


def fingerprint(values: Mapping[str, Any]) -> str:
    """A hash of settings by section, the same wherever and however they were written down."""
    return hashlib.sha256(to_json(values)).hexdigest()[:16]


def _end_fields(end: End | None) -> dict[str, Any]:
    return {"exit_code": None, "error": None} if end is None else {"exit_code": end.code, "error": end.error}
