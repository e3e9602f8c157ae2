"""The base of every settings object: frozen, strict about names, and clear about mistakes."""

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ternlm.errors import SettingsError


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown names.

    Subclasses declare fields with types and defaults; `from_mapping` turns any mistake into one
    `SettingsError` sentence that names the dotted path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _none_means_null(cls, values: Any) -> Any:
        """`none` empties an optional setting, as `null` does; where `none` is a choice it stays one."""
        if not isinstance(values, Mapping):
            return values
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {name: None if value == "none" and name in optional else value for name, value in values.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Validate a mapping.

        Args:
            values: Field values, nested mappings for nested settings.
            path: Dotted prefix used in messages, e.g. ``"model"``.

        Raises:
            SettingsError: A name is unknown or a value breaks its rule.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise SettingsError(describe(error, cls, path)) from None
        except UnicodeEncodeError:
            raise SettingsError(f"a setting{path and f' in {path}'} holds half a surrogate pair, not text.") from None


def describe(error: ValidationError, cls: type[BaseModel], path: str = "") -> str:
    """One sentence for the first mistake pydantic found."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    dotted = ".".join([path, *location] if path else location)
    if first["type"] == "extra_forbidden":
        parent = _class_at(cls, location[:-1])
        prefix = dotted.rpartition(".")[0]
        return unknown_name(dotted, prefix, parent.model_fields if parent else ())
    if first["type"] == "missing":
        return f"setting '{dotted}' is required and has no default. Add {dotted}=VALUE."
    reason = shortened(first["msg"].removeprefix("Value error, ").removeprefix("Input should be "), 300)
    reason = reason.replace("a valid tuple", "a list in brackets")
    if not dotted:
        return reason
    if isinstance(first["input"], dict) and first["type"] == "value_error":  # a rule between settings names them itself
        return f"{reason}." if f"{dotted}." in reason else f"{dotted}: {reason}."
    verb = "" if first["type"] == "value_error" else "must be "
    return f"setting {shortened(dotted)}={_shown(first['input'])} is refused: {verb}{reason}."


def shortened(text: str, most: int = 100) -> str:
    """A text for a message: one line, and not endless."""
    text = " ".join(text[: 2 * most].split())
    return text if len(text) <= most else f"{text[:most]}..."


def unknown_name(dotted: str, prefix: str, known: Iterable[str]) -> str:
    """The message for a name nobody declared, with the nearest declared one."""
    dotted = shortened(dotted)
    message = f"unknown setting '{dotted}'."
    near = difflib.get_close_matches(dotted.rpartition(".")[2], list(known), n=1, cutoff=0.5)
    if near:
        return f"{message} Did you mean '{prefix + '.' if prefix else ''}{near[0]}'?"
    return f"{message} Known here: {', '.join(sorted(known))}."


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"(a {type(value).__name__} too large to show)"


def _class_at(cls: type[BaseModel] | None, location: list[str]) -> type[BaseModel] | None:
    for part in location:
        field = cls.model_fields.get(part) if cls else None
        annotation = field.annotation if field else None
        cls = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return cls
