"""From the words after `ternlm sweep` to a definition, its trials, and the record that `sweep.json` keeps."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ternlm.errors import SettingsError, TernlmError

if TYPE_CHECKING:
    from ternlm.settings.resolve import Resolved
    from ternlm.training.settings import RunSettings
    from ternlm.training.sweep import SweepSettings, Trial
    from ternlm.training.sweep_record import SweepRecord

_DISTRIBUTION = re.compile(r"(log|uniform|choice)\((.*)\)")


class Words(NamedTuple):
    """A definition as it was given.

    Attributes:
        name: Of the sweep file, or of the recipe.
        origin: Where the definition came from.
        values: Of the definition, not yet validated.
    """

    name: str
    origin: str
    values: dict[str, Any]


def read_words(words: list[str], flags: Mapping[str, Any], options: Mapping[str, Any]) -> Words:
    """``[SWEEP] [RECIPE] [KEY=VALUE]...`` and flags as a definition; what the command line says wins.

    Args:
        words: A value in brackets is a grid, ``log(a,b)``, ``uniform(a,b)`` and ``choice(a,b,...)`` are random.
        flags: Settings by dotted name.
        options: Fields of `SweepSettings`; None where not given.

    Raises:
        SettingsError: A name is unknown, or there are too many.
    """
    from ternlm.recipes import load_sweep
    from ternlm.training.settings import setting_names
    from ternlm.training.sweep import flattened

    plain = [word for word in words if "=" not in word]
    if not plain:
        raise SettingsError("no sweep given. Try 'ternlm sweep learning-rate bitnet-1m', or 'ternlm recipes'.")
    file = load_sweep(plain[0])
    recipes = plain if file is None else plain[1:]
    if len(recipes) > 1:
        raise SettingsError(f"two recipes given: '{recipes[0]}' and '{recipes[1]}'. Settings are written key=value.")
    values = {} if file is None else dict(file.values)
    if recipes:
        values["recipe"] = recipes[0]
    names = setting_names()
    fixed, grid, draws = _sorted_out([word for word in words if "=" in word])
    shared = values.get("settings", {})
    if isinstance(shared, Mapping):
        values["settings"] = {**flattened(shared, names), **flattened(flags, names), **flattened(fixed, names)}
    for field, given in (("grid", grid), ("random", draws)):
        below = values.get(field, {})
        if given and isinstance(below, Mapping):
            parts = (below, given)
            values[field] = {names.canonical(str(key)): value for part in parts for key, value in part.items()}
    values |= {name: value for name, value in options.items() if value is not None}
    if not recipes and not values.get("recipe"):
        raise SettingsError(f"sweep '{plain[0]}' is for any recipe: name one, as in: ternlm sweep {plain[0]} bitnet-1m")
    stem = Path(recipes[0]).stem if recipes else ""
    name = f"{stem}-sweep" if file is None else f"{file.name}-{stem}" if stem else file.name
    return Words(name, "command line" if file is None else file.origin, values)


def make_record(words: Words, say: Callable[[str], None]) -> "SweepRecord":
    """The record of a new sweep; an arm that is the same as an earlier one is left out.

    Args:
        words: The definition.
        say: Called with a sentence for each arm left out.

    Raises:
        SettingsError: A value is wrong; the message names the trial.
    """
    from ternlm.settings.resolve import environment_overrides
    from ternlm.training.settings import setting_names
    from ternlm.training.sweep import SweepSettings, expand, flattened
    from ternlm.training.sweep_record import SweepRecord, fingerprint

    definition = SweepSettings.from_mapping(words.values)
    names = setting_names()
    shared = {**flattened(environment_overrides(), names), **flattened(definition.settings, names)}
    recipe = _lasting(definition.recipe or "")
    trials = _different(expand(definition, names, _current(recipe, shared)), recipe, shared, say)
    fingerprints = {trial.id: fingerprint(resolve_trial(recipe, shared, trial).values) for trial in trials}
    return SweepRecord(
        words.name,
        words.origin,
        definition.description,
        recipe,
        shared,
        definition.metric,
        _as_json(definition),
        trials,
        fingerprints,
        {},
    )


def sweep_id(record: "SweepRecord") -> str:
    """A name that the same sweep always gets, so that the same command goes on with it."""
    text = repr([(trial.id, record.fingerprints[trial.id]) for trial in record.trials])
    return f"{record.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def resolve_trial(recipe: str, shared: Mapping[str, Any], trial: "Trial | None") -> "Resolved":
    """The settings of a trial as `ternlm train` will have them; of None, what all trials share."""
    from ternlm.recipes import load_recipe
    from ternlm.settings.resolve import Layer
    from ternlm.training.settings import resolve_settings

    loaded = load_recipe(recipe)
    own = trial.overrides() if trial is not None else {}
    return resolve_settings([Layer(loaded.origin, loaded.values), Layer("sweep", {**shared, **own})])


def validated(record: "SweepRecord") -> "dict[str, RunSettings]":
    """The settings of every trial, by id.

    Raises:
        TernlmError: One of them is refused, or the recipe is no longer what the sweep began with.
    """
    from ternlm.training.launch import settings_from
    from ternlm.training.sweep_record import fingerprint

    found = {}
    for trial in record.trials:
        with naming(trial):
            resolved = resolve_trial(record.recipe, record.shared, trial)
        if fingerprint(resolved.values) != record.fingerprints[trial.id]:
            raise SettingsError(
                f"trial '{trial.id}': recipe '{record.recipe}' is no longer what the sweep began with. "
                "Restore it, or start a new sweep with another --sweep-id."
            )
        with naming(trial):
            found[trial.id] = settings_from(resolved)
    return found


@contextmanager
def naming(trial: "Trial") -> Iterator[None]:
    """What is refused inside the block is said with the name of the trial."""
    try:
        yield
    except TernlmError as error:
        raise type(error)(f"trial '{trial.arm}': {error}") from None


def _sorted_out(words: list[str]) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, dict[str, Any]]]:
    """Assignments as plain settings, lists to try, and distributions."""
    from ternlm.settings.resolve import parse_overrides

    fixed, grid, draws = {}, {}, {}
    for word in words:
        key, _, text = word.partition("=")
        drawn = _DISTRIBUTION.fullmatch(text.strip())
        if drawn is not None:
            draws[key] = _distribution(drawn[1], parse_overrides([f"{key}=[{drawn[2]}]"])[key], word)
            continue
        value = parse_overrides([word])[key]
        if isinstance(value, list):
            grid[key] = value
        else:
            fixed[key] = value
    return fixed, grid, draws


def _distribution(kind: str, values: list[Any], word: str) -> dict[str, Any]:
    if kind == "choice":
        return {"choices": values}
    if len(values) != 2:
        raise SettingsError(f"'{word}': {kind} takes two bounds, as in {kind}(1e-4,1e-2).")
    return {"low": values[0], "high": values[1], "log": kind == "log"}


def _current(recipe: str, shared: Mapping[str, Any]) -> Callable[[str], Any]:
    """What the recipe and the shared settings give a setting, looked up only if somebody asks."""

    @cache
    def settings() -> dict[str, Any]:
        from ternlm.training.launch import settings_from

        return settings_from(resolve_trial(recipe, shared, None)).model_dump()

    def value(key: str) -> Any:
        section, _, field = key.partition(".")
        return settings()[section].get(field)

    return value


def _different(
    trials: "list[Trial]", recipe: str, shared: Mapping[str, Any], say: Callable[[str], None]
) -> "list[Trial]":
    """The trials whose settings no earlier one has: a sweep file for several recipes may name what one has anyway."""
    from ternlm.training.launch import settings_from

    found: list[tuple[RunSettings, Trial]] = []
    for trial in trials:
        with naming(trial):
            settings = settings_from(resolve_trial(recipe, shared, trial))
        same = next((earlier for known, earlier in found if known == settings), None)
        if same is None:
            found.append((settings, trial))
        elif trial.seed in (None, trials[0].seed):
            say(f"trial '{trial.arm}' is the same as '{same.arm}' and is left out")
    return [trial for _, trial in found]


def _lasting(recipe: str) -> str:
    """A recipe that is found from any folder."""
    return str(Path(recipe).resolve()) if Path(recipe).suffix in (".yaml", ".yml", ".json") else recipe


def _as_json(definition: "SweepSettings") -> dict[str, Any]:
    values: dict[str, Any] = definition.model_dump(mode="json", exclude_defaults=True)
    return values
