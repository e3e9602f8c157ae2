"""Numbers as people write them: `2B`, `1e6`, `10_000`, `3e-4`, `512MiB`, `2h30m`.

YAML 1.1 reads `1e6` and `3e-4` as text, and no format knows `2B`; these parsers, attached to
setting types, make every source (YAML, JSON, command line) mean the same thing.
"""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_MULTIPLIERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTE_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)
_LONGEST, _LARGEST = 100, 2**63 - 1  # characters; what 64 bits hold
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms])", re.IGNORECASE)


def parse_float(value: Any) -> Any:
    """`3e-4`, `1_000`, `2B`, `25%` as a float; a number is returned unchanged, and what is no finite number refused."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("it is beyond 2^63")
    if not isinstance(value, str):
        return value
    text = value.replace("_", "").strip()
    number, suffix = _split(text.removesuffix("%"), value)
    if suffix.lower() not in _MULTIPLIERS or (suffix and text.endswith("%")):
        raise ValueError(f"'{value}' has the unknown suffix '{suffix}'; use k, M, B or T")
    return _finite(number * _MULTIPLIERS[suffix.lower()], value) / (100 if text.endswith("%") else 1)


def parse_count(value: Any) -> Any:
    """`2B`, `1e6`, `10_000` as an int; a fraction that is not whole is refused."""
    number = parse_float(value)
    if isinstance(number, float):
        if number != int(number):
            raise ValueError(f"'{value}' is not a whole number")
        return parse_float(int(number))
    return number


def parse_bytes(value: Any) -> Any:
    """`512MiB`, `2GB`, `1e9` as a number of bytes."""
    if not isinstance(value, str):
        return parse_count(value)
    number, suffix = _split(value.replace("_", "").strip(), value)
    if suffix and suffix.lower() not in _BYTE_UNITS:
        raise ValueError(f"'{value}' has the unknown unit '{suffix}'; use kB, MB, GB, KiB, MiB, GiB")
    return parse_float(int(_finite(number * _BYTE_UNITS.get(suffix.lower(), 1), value)))


def parse_duration(value: Any) -> Any:
    """`90`, `45s`, `2h30m`, `1d` as seconds."""
    if not isinstance(value, str):
        return parse_float(value)
    text = value.replace(" ", "")
    parts = _DURATION_PART.findall(text) if len(text) <= _LONGEST else []
    try:
        if parts and "".join(number + unit for number, unit in parts) == text:
            return _finite(sum(float(number) * _SECONDS[unit.lower()] for number, unit in parts), value)
        return _finite(float(text), value)
    except ValueError:
        raise ValueError(f"'{value}' is not a duration; write 90, 45s, 2h30m or 1d") from None


def _split(text: str, original: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None or not math.isfinite(float(match[1])):
        raise ValueError(f"'{original}' is not a number")
    return float(match[1]), match[2]


def _finite(number: float, original: str) -> float:
    if not math.isfinite(number):
        raise ValueError(f"'{original}' is not a finite number")
    return number


Float = Annotated[float, BeforeValidator(parse_float)]
Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_duration)]
