"""Recipes: complete settings of a run, one YAML file each, shipped with the package."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ternlm.errors import SettingsError
from ternlm.settings.resolve import read_mapping


class Recipe(NamedTuple):
    """A named set of values.

    Attributes:
        name: Name of the shipped recipe, or stem of the user's file.
        origin: Where the values come from, for the record.
        description: One line.
        values: Settings by section.
    """

    name: str
    origin: str
    description: str
    values: dict[str, Any]


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sizes in numeric order."""
    folder = resources.files(__package__)
    names = (file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def recipe_text(name: str) -> str:
    """The file of a shipped recipe.

    Raises:
        SettingsError: No recipe has this name.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"Did you mean '{near[0]}'?" if near else f"Recipes: {', '.join(names)}."
        raise SettingsError(f"unknown recipe '{name}'. {hint} 'ternlm recipes' lists them; a .yaml file works too.")
    return resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(reference: str) -> Recipe:
    """A shipped recipe by name, or a settings file (YAML or JSON) by path.

    A recipe may begin with ``extends: NAME``, which puts its values on top of another recipe's.

    Raises:
        SettingsError: There is no such recipe or file, or it is malformed.
    """
    if Path(reference).suffix in (".yaml", ".yml", ".json"):
        path = Path(reference)
        name, origin, values = path.stem, f"file {path}", read_mapping(path)
    else:
        name, origin, values = reference, f"recipe {reference}", yaml.safe_load(recipe_text(reference))
    base, description = values.pop("extends", None), str(values.pop("description", ""))
    if base is not None:
        values = _on_top(load_recipe(str(base)).values, values)
    return Recipe(name, origin, description, values)


def _on_top(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for section, fields in values.items():
        below = merged.get(section)
        merged[section] = below | fields if isinstance(below, dict) and isinstance(fields, dict) else fields
    return merged
