"""What an experiment file says: settings of a run, and what is done with the trained model.

    experiment_name: my-experiment        the name of its folder
    description: one line
    extends: hgrn-nano                    a recipe below the sections of this file
    model, data, training, ...            sections of settings, as in a recipe
    evaluation:                           settings of the run, and of the measurement at its end
      splits: [test]
    generation: {prompts: [...], samples: 8, max_new_tokens: 200, temperature: 0.8}
    output: {directory: FOLDER}           where all of it goes; by default runs/EXPERIMENT_NAME

Files of another trainer, whose keys differ, are translated by `translation`. How it is run is left to `stages`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from ternlm.errors import SettingsError
from ternlm.experiment.translation import is_foreign, translate
from ternlm.recipes import experiment_names, experiment_text, load_recipe, unknown_reference
from ternlm.run_directory import check_run_id
from ternlm.settings import Count, Settings
from ternlm.settings.parsing import parse_yaml
from ternlm.settings.resolve import Layer, read_mapping

Split = Literal["train", "validation", "test"]


class MeasurementSettings(Settings):
    """How the trained model is measured; the section `evaluation` holds these beside the settings of the run.

    Attributes:
        checkpoint: ``best``, the one with the lowest validation loss, or ``final``.
        splits: What it is measured on; None takes the test split, or validation where there is none.
        protocol: ``block`` or ``stream``, as `ternlm evaluate --protocol` takes them.
        baselines: Also score what needs no network: uniform, n-grams, gzip, xz.
        measured_tokens: Score only the first so many tokens of each split; None scores all of it.
    """

    checkpoint: Literal["best", "final"] = "best"
    splits: tuple[Split, ...] | None = None
    protocol: Literal["block", "stream"] = "block"
    baselines: bool = True
    measured_tokens: Count | None = Field(default=None, ge=1)

    @field_validator("splits")
    @classmethod
    def _once_each(cls, value: tuple[Split, ...] | None) -> tuple[Split, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("name one split or several, each once; none leaves the choice to the data")
        return value


class GenerationSettings(Settings):
    """What the trained model writes at the end; the section holds these beside the settings of sampling.

    Attributes:
        prompts: What it continues; None takes `evaluation.prompts`.
        samples: Continuations in all, prompts taken in turn; None is one of each prompt, and 0 none.
        sampling: How tokens are chosen, as `ternlm generate` takes it.
    """

    prompts: tuple[str, ...] | None = None
    samples: Count | None = Field(default=None, ge=0)
    sampling: dict[str, Any] = Field(default_factory=dict)


class Experiment(NamedTuple):
    """An experiment as its file gives it.

    Attributes:
        name: Of the experiment, and of its folder.
        description: One line.
        origin: Where the definition came from.
        layers: Settings of the run, lowest first.
        measurement, generation: What is done with the trained model.
        directory: The folder that the file asks for, or None.
        notes: Sentences on what was read differently, or not at all.
    """

    name: str
    description: str
    origin: str
    layers: tuple[Layer, ...]
    measurement: MeasurementSettings
    generation: GenerationSettings
    directory: Path | None
    notes: tuple[str, ...]


def load_experiment(
    reference: str, model_file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """A shipped experiment by name, or an experiment file (YAML or JSON) by path.

    Args:
        reference: The name or path.
        model_file: A file with the model's own settings, instead of those that the experiment has.
        overrides: Values above those of the file, by dotted name, for which `is_own` holds.

    Raises:
        SettingsError: There is no such experiment or file, or it is malformed.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml", ".json"):
        values, origin, folder = read_mapping(path), f"file {path}", path.parent
    elif reference in experiment_names():
        values, origin, folder = parse_yaml(experiment_text(reference)), f"experiment {reference}", Path()
    else:
        raise unknown_reference("experiment", reference, experiment_names())
    notes: list[str] = []
    if is_foreign(values):
        given = {} if model_file is None else {"model": {"config_file": str(model_file.absolute())}}
        values, notes = translate({**values, **given}, folder)
    elif model_file is not None:
        recipe = load_recipe(str(model_file))
        values, notes = {**values, "model": recipe.values.get("model", {})}, list(recipe.notes)
    return _experiment(_overridden(values, overrides or {}), path.stem, origin, notes)


def is_own(dotted: str) -> bool:
    """Whether a setting belongs to the experiment and not to its run."""
    section, _, field = dotted.partition(".")
    if section in ("evaluation", "eval"):
        return field in MeasurementSettings.model_fields
    return section in ("generation", "output") and bool(field)


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    above = dict(values)
    for dotted, value in overrides.items():
        section, _, field = dotted.partition(".")
        section = "evaluation" if section == "eval" else section
        fields = above.get(section)
        above[section] = {**(fields if isinstance(fields, Mapping) else {}), field: value}
    return above


def _experiment(values: dict[str, Any], stem: str, origin: str, notes: list[str]) -> Experiment:
    name = values.pop("experiment_name", None) or stem
    check_run_id(str(name))
    description = str(values.pop("description", None) or "")
    base, directory = values.pop("extends", None), _directory(values.pop("output", None))
    layers = []
    if base is not None:
        recipe = load_recipe(str(base))
        layers.append(Layer(recipe.origin, recipe.values))
    measurement = _taken(values, "evaluation", MeasurementSettings)
    own = values.pop("generation", None) or {}
    if not isinstance(own, Mapping):
        raise SettingsError("section 'generation' must hold settings, such as prompts and max_new_tokens.")
    generation = GenerationSettings.from_mapping(
        {key: own[key] for key in ("prompts", "samples") if key in own}
        | {"sampling": {key: value for key, value in own.items() if key not in ("prompts", "samples")}},
        "generation",
    )
    layers.append(Layer(origin, values))
    return Experiment(
        str(name), description, origin, tuple(layers), measurement, generation, directory, tuple(notes)
    )  # fmt: skip


def _taken(values: dict[str, Any], section: str, cls: type[MeasurementSettings]) -> MeasurementSettings:
    """The fields of one settings class out of a section that others share."""
    fields = values.get(section) or {}
    if not isinstance(fields, Mapping):
        raise SettingsError(f"section '{section}' must hold settings, not a {type(fields).__name__}.")
    own = {name: value for name, value in fields.items() if name in cls.model_fields}
    values[section] = {name: value for name, value in fields.items() if name not in own}
    return cls.from_mapping(own, section)


def _directory(output: Any) -> Path | None:
    if output is None:
        return None
    if isinstance(output, Mapping) and set(output) <= {"directory"}:
        output = output.get("directory")
    if output is None:
        return None
    if not isinstance(output, str) or not output.strip():
        raise SettingsError("section 'output' must say where the experiment goes: output: {directory: FOLDER}.")
    return Path(output).expanduser()
