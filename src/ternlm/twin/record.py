"""The folder of a twin, and the files in it.

runs/<twin_id>/
|- twin.json           definition, what both arms share, the trials, how each ended, the learning rates that were chosen
|- ternary/, full/     the two arms, ordinary runs; with seeds ternary-s0/, full-s0/ and so on
|- ternary-rate-0.004/ a point of an arm's sweep, an ordinary run
|- TRIAL.log           what a trial said to stderr, if anything
|- scores/             what each arm scored on each text, with the nats of every document
|- comparison.json     the result
|- report.*            the result to read, html and md, and json with the numbers of all runs
`- twin.lock           held while a process works on the twin
"""

from pathlib import Path
from typing import Any, NamedTuple

from ternlm.errors import EnvironmentFault
from ternlm.files import from_json, read_regular, replace_durably, to_json
from ternlm.run_directory import SCORES, TWIN
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import LARGEST, End, TrialFolder, find_trials, read_trial_rows, trial_rows

SCHEMA = 1


class TwinRecord(NamedTuple):
    """What `twin.json` holds.

    Attributes:
        name: Name of the recipe.
        recipe: What both arms start from.
        description: The recipe's own line.
        shared: Settings of both arms, by full dotted name; the environment's are among them.
        definition: `TwinSettings` as JSON values.
        chosen: The learning rate of each arm that was swept, once that is known; None where every point failed.
        trials: Those that choose learning rates, then those that are compared.
        fingerprints: Of the settings of each trial, by id.
        ends: Of the trials that have been run, by id.
    """

    name: str
    recipe: str
    description: str
    shared: dict[str, Any]
    definition: dict[str, Any]
    chosen: dict[str, float | None]
    trials: list[Trial]
    fingerprints: dict[str, str]
    ends: dict[str, End]


class TwinDirectory(TrialFolder[TwinRecord]):
    """A twin's folder."""

    verb, name = "twin", TWIN

    @property
    def comparison(self) -> Path:
        """The result."""
        return self.path / "comparison.json"

    def scores(self, trial_id: str, text: str) -> Path:
        """What an arm scored on a text."""
        plain = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text)
        return self.path / SCORES / f"{trial_id}--{plain}.json"

    def write(self, record: TwinRecord) -> None:
        """Replace `twin.json`."""
        fields = {name: value for name, value in record._asdict().items() if name not in ("fingerprints", "ends")}
        replace_durably(self.file, to_json({"schema": SCHEMA, "id": self.id, **fields, "trials": trial_rows(record)}))

    def read(self) -> TwinRecord:
        """What `twin.json` holds.

        Raises:
            EnvironmentFault: There is none, or it is damaged.
        """
        try:
            fields = from_json(read_regular(self.file, LARGEST))
            kept = read_trial_rows(fields["trials"])
            return TwinRecord(**{name: fields[name] for name in TwinRecord._fields if name not in kept}, **kept)
        except OSError as error:
            raise EnvironmentFault(
                f"there is no twin in '{self.path}': {TWIN}: {error.strerror}. Check the path."
            ) from None
        except (ValueError, LookupError, TypeError):
            raise EnvironmentFault(
                f"'{self.file}' is damaged. The runs beside it are whole; start the twin anew with another --run-id."
            ) from None


def find_twin(reference: str, root: Path) -> TwinDirectory:
    """A twin by path, name, unique prefix of a name, or ``latest``.

    Raises:
        EnvironmentFault: No twin matches, or several do.
    """
    return TwinDirectory(find_trials(reference, root, TwinDirectory.verb, TWIN))
