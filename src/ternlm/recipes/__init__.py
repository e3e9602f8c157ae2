"""Recipes: complete settings of a run, one YAML file each, shipped with the package; sweeps over them; experiments."""

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from ternlm.errors import SettingsError
from ternlm.recipes.seed import is_model_config, model_section
from ternlm.settings.resolve import read_mapping


class Recipe(NamedTuple):
    """A named set of values.

    Attributes:
        name: Name of the shipped recipe, or stem of the user's file.
        origin: Where the values come from, for the record.
        description: One line.
        values: Settings by section.
        notes: A sentence for each key of a foreign file that was left out.
        twin: Settings that the full-precision twin of `ternlm twin` changes besides its rounding.
    """

    name: str
    origin: str
    description: str
    values: dict[str, Any]
    notes: tuple[str, ...] = ()
    twin: Mapping[str, Any] = MappingProxyType({})


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sizes in numeric order."""
    names = _names(resources.files(__package__))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def sweep_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(_names(_folder("sweeps")))


def experiment_names() -> list[str]:
    """Names of the shipped experiments."""
    return sorted(_names(_folder("experiments")))


def recipe_text(name: str) -> str:
    """The file of a shipped recipe.

    Raises:
        SettingsError: No recipe has this name.
    """
    names = recipe_names()
    if name not in names:
        raise unknown_reference("recipe", name, names)
    return resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def sweep_text(name: str) -> str:
    """The file of a shipped sweep; the name is one of `sweep_names`."""
    return _folder("sweeps").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def experiment_text(name: str) -> str:
    """The file of a shipped experiment; the name is one of `experiment_names`."""
    return _folder("experiments").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_sweep(reference: str) -> Recipe | None:
    """A shipped sweep by name, or a sweep file by path; None if this names a recipe, or a file of settings.

    The values are those of a sweep file, not yet validated.

    Raises:
        SettingsError: There is no such sweep, recipe or file, or it is malformed.
    """
    if Path(reference).suffix in (".yaml", ".yml", ".json"):
        path = Path(reference)
        name, origin, values = path.stem, f"file {path}", read_mapping(path)
    elif reference in sweep_names():
        name, origin, values = reference, f"sweep {reference}", yaml.safe_load(sweep_text(reference))
    else:
        if reference not in recipe_names():
            raise unknown_reference("sweep or recipe", reference, [*sweep_names(), *recipe_names()])
        return None
    is_sweep = not values.keys().isdisjoint(("trials", "grid", "random", "recipe", "seeds", "samples"))
    return Recipe(name, origin, str(values.get("description", "")), values) if is_sweep else None


def load_recipe(reference: str) -> Recipe:
    """A shipped recipe by name, or a settings file (YAML or JSON) by path.

    A recipe may begin with ``extends: NAME``, which puts its values on top of another recipe's, and hold ``twin:``,
    full names of settings with their values for the full-precision twin. A file that names a
    ``model_type`` describes a model alone (`ternlm.recipes.seed`), on bytes.

    Raises:
        SettingsError: There is no such recipe or file, or it is malformed.
    """
    if Path(reference).suffix in (".yaml", ".yml", ".json"):
        path = Path(reference)
        name, origin, values = path.stem, f"file {path}", read_mapping(path)
    else:
        name, origin, values = reference, f"recipe {reference}", yaml.safe_load(recipe_text(reference))
    if "experiment_name" in values:
        raise SettingsError(f"'{reference}' is an experiment and no recipe. Run it with: ternlm experiment {reference}")
    if is_model_config(values):
        model, notes = model_section(values)
        return Recipe(name, origin, "", {"model": model, "tokenizer": {"name": "byte"}}, tuple(notes))
    base, description = values.pop("extends", None), str(values.pop("description", ""))
    twin = values.pop("twin", None) or {}
    if not isinstance(twin, dict):
        raise SettingsError(f"'{reference}': twin holds settings of the full-precision twin, not {twin!r}.")
    if base is not None:
        below = load_recipe(str(base))
        values, twin = _on_top(below.values, values), {**below.twin, **twin}
    return Recipe(name, origin, description, values, (), twin)


def _on_top(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for section, fields in values.items():
        below = merged.get(section)
        merged[section] = below | fields if isinstance(below, dict) and isinstance(fields, dict) else fields
    return merged


def _folder(name: str) -> Traversable:
    return resources.files(__package__).joinpath(name)


def _names(folder: Traversable) -> Iterable[str]:
    return (file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def unknown_reference(kind: str, name: str, names: list[str]) -> SettingsError:
    """The error for a name that is none of the shipped ones, with what it is instead, or the nearest of these."""
    if kind == "experiment" and name in recipe_names():
        return SettingsError(
            f"'{name}' is a recipe and no experiment. Train it with: ternlm train {name}, or name it in an experiment "
            f"file with extends: {name}."
        )
    if name in experiment_names():
        return SettingsError(f"'{name}' is an experiment and no recipe. Run it with: ternlm experiment {name}")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."
    return SettingsError(f"unknown {kind} '{name}'. {hint} 'ternlm recipes' lists them; a .yaml file works too.")
