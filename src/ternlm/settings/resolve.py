"""From recipe, file, environment and command line to one nested mapping in which every value knows its origin."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ternlm.errors import SettingsError
from ternlm.settings.base import shortened
from ternlm.settings.parsing import LARGEST, parse_settings

ENVIRONMENT_PREFIX = "TERNLM__"


class Layer(NamedTuple):
    """Values from one place, under the name of that place."""

    origin: str
    values: Mapping[str, Any]


class Resolved(NamedTuple):
    """Merged values, and for each dotted path the name of the layer that set it last."""

    values: dict[str, Any]
    origins: dict[str, str]


class Names:
    """The sections and fields that exist, and the other spellings that are accepted.

    Args:
        sections: Field names of each section.
        aliases: Other spelling to canonical dotted name, e.g. ``n_layer: model.num_hidden_layers``.
        section_aliases: Other spelling of a section to its name, e.g. ``optim: optimizer``.
    """

    def __init__(
        self,
        sections: Mapping[str, Iterable[str]],
        aliases: Mapping[str, str],
        section_aliases: Mapping[str, str],
    ) -> None:
        self.sections = {name: set(fields) for name, fields in sections.items()}
        self.aliases, self.section_aliases = aliases, section_aliases

    def canonical(self, dotted: str) -> str:
        """The full name of a setting written in full, by a field name that is unique, or by an alias.

        Raises:
            SettingsError: No setting has the name, or several sections have it.
        """
        dotted = dotted.replace("-", "_")
        section, _, field = dotted.partition(".")
        section = self.section_aliases.get(section, section)
        if not field:
            return self._bare(section)
        if section not in self.sections:
            raise SettingsError(self._unknown(dotted))
        alias = self.aliases.get(field, "")
        if field not in self.sections[section] and alias.startswith(f"{section}."):
            return alias
        if field.partition(".")[0] not in self.sections[section]:
            raise SettingsError(self._unknown(f"{section}.{field}"))
        return f"{section}.{field}"

    def _bare(self, name: str) -> str:
        owners = [section for section, fields in self.sections.items() if name in fields]
        if name in self.aliases:
            return self.aliases[name]
        if len(owners) == 1:
            return f"{owners[0]}.{name}"
        if owners:
            choices = " or ".join(f"{owner}.{name}" for owner in owners)
            raise SettingsError(f"setting '{name}' exists in several sections. Write {choices}.")
        raise SettingsError(self._unknown(name))

    def _unknown(self, dotted: str) -> str:
        dotted = shortened(dotted)
        full = [f"{section}.{field}" for section, fields in self.sections.items() for field in fields]
        section, _, field = dotted.rpartition(".")
        near = difflib.get_close_matches(dotted, full, n=1, cutoff=0.75)
        if not near:
            pool = {name: f"{own}.{name}" for own, names in self.sections.items() for name in names}
            inside = {name: full for name, full in pool.items() if not section or full.startswith(f"{section}.")}
            pool = {**(inside or pool), **self.aliases}
            near = [pool[name] for name in difflib.get_close_matches(field, list(pool), n=1, cutoff=0.6)]
        hint = f"Did you mean '{near[0]}'?" if near else f"Sections: {', '.join(self.sections)}."
        return f"unknown setting '{dotted}'. {hint}"


def resolve(layers: Sequence[Layer], names: Names) -> Resolved:
    """Merge layers, later ones winning.

    Raises:
        SettingsError: A name is unknown or ambiguous.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for dotted, value in _flatten(layer.values):
            full = names.canonical(dotted)
            section, _, field = full.partition(".")
            values.setdefault(section, {})[field] = value
            origins[full] = layer.origin
    return Resolved(values, origins)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping.

    Raises:
        SettingsError: The file is missing, malformed, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise SettingsError(f"settings file '{path}' cannot be read: {error.strerror}. Check the path.") from None
    try:
        value = parse_settings(content, is_json=path.suffix == ".json")
    except ValueError as error:
        raise SettingsError(f"settings file '{path}' is malformed: {shortened(str(error))}.") from None
    if not isinstance(value, dict):
        raise SettingsError(f"settings file '{path}' must hold sections with settings, not a {type(value).__name__}.")
    return value


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["a.b=v", ...]`` as a flat mapping; values are read as YAML, so ``[1, 2]`` and ``null`` work.

    Raises:
        SettingsError: A word holds no ``=`` or its value is malformed.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise SettingsError(f"'{shortened(assignment)}' is not a setting. Write section.name=value.")
        try:
            values[name] = parse_settings(text.encode("utf-8", errors="surrogatepass"))
        except ValueError:
            raise SettingsError(f"the value of '{shortened(assignment)}' is malformed. Quote it.") from None
    return values


def environment_overrides(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``TERNLM__section__name=value`` variables as a flat mapping."""
    environment = os.environ if environment is None else environment
    return parse_overrides(
        f"{name.removeprefix(ENVIRONMENT_PREFIX).replace('__', '.')}={value}"
        for name, value in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX)
    )


def _flatten(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            for inner, leaf in value.items():
                yield f"{key}.{inner}", leaf
        else:
            yield str(key), value
