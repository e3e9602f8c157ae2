"""From a recipe and what was typed to the two arms: their settings, checked against each other, and their trials."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternlm.errors import SettingsError, TernlmError
from ternlm.training.sweep import SEED, Trial, flattened, shown_value
from ternlm.training.sweep_record import fingerprint
from ternlm.twin.definition import (
    ADJECTIVES,
    ARMS,
    LIMITS,
    ArmName,
    TwinSettings,
    final_trials,
    has_seed_of_its_own,
    own_settings,
    require_own,
    sweep_trials,
)
from ternlm.twin.record import TwinRecord

if TYPE_CHECKING:
    from ternlm.settings.resolve import Resolved
    from ternlm.training.settings import RunSettings


def make_record(
    recipe: str, shared: Mapping[str, Any], own: Mapping[ArmName, Mapping[str, Any]], options: Mapping[str, Any]
) -> TwinRecord:
    """The record of a new twin.

    Args:
        recipe: What both arms start from.
        shared: Settings of both arms, as they were typed.
        own: What each arm changes, as it was typed.
        options: Fields of `TwinSettings` besides `own`.

    Raises:
        SettingsError: A value is wrong, the recipe is full precision already, or the arms would differ in more than
            they may; the message names the arm.
    """
    from ternlm.recipes import load_recipe
    from ternlm.settings.resolve import environment_overrides
    from ternlm.training.settings import setting_names

    loaded, names = load_recipe(recipe), setting_names()
    both = {**flattened(environment_overrides(), names), **flattened(shared, names)}
    given: dict[ArmName, dict[str, Any]] = {
        "ternary": flattened(own.get("ternary", {}), names),
        "full": {**flattened(loaded.twin, names), **flattened(own.get("full", {}), names)},
    }
    for arm in ARMS:
        require_own(arm, given[arm])
    definition = TwinSettings.from_mapping({**options, "own": given})
    if has_seed_of_its_own(both, definition.seeds):
        raise SettingsError(f"{SEED} and --seeds both say the seed. Keep one of them.")
    record = TwinRecord(
        name=loaded.name,
        recipe=_lasting(recipe),
        description=loaded.description,
        shared=both,
        definition=definition.model_dump(mode="json", exclude_defaults=True),
        chosen={},
        trials=[],
        fingerprints={},
        ends={},
    )
    settings = {arm: arm_settings(record, arm) for arm in ARMS}
    _require_twins(settings["ternary"], settings["full"])
    _require_roundable(definition, settings["ternary"])
    return with_trials(record, sweep_trials_of(record))


def definition_of(record: TwinRecord) -> TwinSettings:
    """How the twin is made and measured."""
    return TwinSettings.from_mapping(record.definition)


def twin_id(record: TwinRecord) -> str:
    """A name that the same twin always gets, so that the same command goes on with it."""
    return f"{record.name}-twin-{identity(record)[:8]}"


def identity(record: TwinRecord) -> str:
    """A hash of all that decides what is trained; what is measured of it may change from one sitting to the next."""
    trained = {name: value for name, value in record.definition.items() if name not in ("texts", "ptq", "timing")}
    settings = [fingerprint(resolve_trial(record, Trial(arm, arm, None, _own(record, arm))).values) for arm in ARMS]
    return hashlib.sha256(repr((fingerprint(trained), settings)).encode()).hexdigest()


def arm_settings(record: TwinRecord, arm: ArmName) -> "RunSettings":
    """The settings of an arm before its learning rate is chosen.

    Raises:
        SettingsError: One of them is refused.
    """
    from ternlm.training.launch import settings_from

    trial = Trial(arm, arm, None, _own(record, arm))
    with naming(trial):
        return settings_from(resolve_trial(record, trial))


def resolve_trial(record: TwinRecord, trial: Trial) -> "Resolved":
    """The settings of a trial as `ternlm train` will have them."""
    from ternlm.recipes import load_recipe
    from ternlm.settings.resolve import Layer
    from ternlm.training.settings import resolve_settings

    loaded = load_recipe(record.recipe)
    return resolve_settings(
        [Layer(loaded.origin, loaded.values), Layer("twin", {**record.shared, **trial.overrides()})]
    )  # fmt: skip


def validated(record: TwinRecord, trials: list[Trial]) -> "dict[str, RunSettings]":
    """The settings of trials, by id.

    Raises:
        TernlmError: One of them is refused, or the recipe is no longer what the twin began with.
    """
    from ternlm.training.launch import settings_from

    found = {}
    for trial in trials:
        with naming(trial):
            resolved = resolve_trial(record, trial)
            if fingerprint(resolved.values) != record.fingerprints[trial.id]:
                raise SettingsError(
                    f"recipe '{record.recipe}' is no longer what the twin began with. Restore it, or start a new twin "
                    "with another --run-id."
                )
            found[trial.id] = settings_from(resolved)
    return found


def sweep_trials_of(record: TwinRecord) -> list[Trial]:
    """The trials that choose learning rates."""
    settings = {arm: arm_settings(record, arm) for arm in ARMS}
    training = settings["ternary"].training
    limits = {name: getattr(training, name.partition(".")[2]) for name in LIMITS}
    known = {name: value for name, value in limits.items() if value is not None}
    warmup = {arm: settings[arm].schedule.warmup_steps for arm in ARMS}
    return sweep_trials(definition_of(record), known, warmup)


def final_trials_of(record: TwinRecord) -> list[Trial]:
    """The trials that are compared; an arm whose every learning rate failed has none."""
    definition = definition_of(record)
    rates = {
        arm: record.chosen.get(arm)
        for arm in ARMS
        if not definition.is_swept(arm) or record.chosen.get(arm) is not None
    }  # fmt: skip
    return final_trials(definition, rates)


def with_trials(record: TwinRecord, trials: list[Trial]) -> TwinRecord:
    """The record with trials added that it does not hold yet.

    Raises:
        SettingsError: One of them is refused; the message names it.
    """
    from ternlm.training.launch import settings_from

    known = {trial.id for trial in record.trials}
    new = [trial for trial in trials if trial.id not in known]
    marks = dict(record.fingerprints)
    for trial in new:
        with naming(trial):
            resolved = resolve_trial(record, trial)
            settings_from(resolved)
            marks[trial.id] = fingerprint(resolved.values)
    return record._replace(trials=[*record.trials, *new], fingerprints=marks)


@contextmanager
def naming(trial: Trial) -> Iterator[None]:
    """What is refused inside the block is said with the name of the arm."""
    try:
        yield
    except TernlmError as error:
        raise type(error)(f"{ADJECTIVES.get(trial.arm, trial.arm)} arm: {error}") from None


def _own(record: TwinRecord, arm: ArmName) -> dict[str, Any]:
    return own_settings(definition_of(record), arm)


def _lasting(recipe: str) -> str:
    """A recipe that is found from any folder."""
    return str(Path(recipe).resolve()) if Path(recipe).suffix in (".yaml", ".yml", ".json") else recipe


def _require_twins(ternary: "RunSettings", full: "RunSettings") -> None:
    """Refuse two arms that are no ternary model and its twin.

    Raises:
        SettingsError: The first is full precision, or the networks differ in shape.
    """
    from ternlm.models import FULL_PRECISION, build_model

    if ternary.quantization.weights == "none":
        raise SettingsError(
            "the recipe is full precision already (quantization.weights=none), so it has no twin. Name a ternary "
            "recipe, or train it with 'ternlm train'."
        )
    import torch

    if ternary.model.vocab_size is None:
        size = {"vocab_size": ternary.tokenizer.vocab_size or 256}
        ternary, full = (
            each.model_copy(update={"model": each.model.model_copy(update=size)}) for each in (ternary, full)
        )
    with torch.device("meta"):
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in build_model(each.model, FULL_PRECISION).tensors().items()}
            for each in (ternary, full)
        ]
    different = sorted(
        name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
    )
    if different:
        raise SettingsError(
            f"the arms are not the same network: '{different[0]}' differs. Give settings of the model for both arms."
        )


def _require_roundable(definition: TwinSettings, ternary: "RunSettings") -> None:
    if definition.ptq and ternary.quantization.is_learned:
        raise SettingsError(
            f"--ptq rounds the finished twin, and quantization.quantizer={ternary.quantization.quantizer} learns its "
            "scales in training, which the twin never did. Leave --ptq out."
        )


def describe_own(record: TwinRecord, arm: ArmName) -> str:
    """What an arm changes, in a line."""
    own = _own(record, arm)
    return ", ".join(f"{name}={shown_value(value)}" for name, value in own.items())
