"""Numbers, times and settings as a report writes them."""

import json
from collections.abc import Mapping
from typing import Any

from ternlm.report.tail import number
from ternlm.tracking.console import short_count, short_duration

NOTHING = "-"
"""In the place of what is not known."""

_LONGEST = 80


def count(value: Any) -> str:
    """``1,248,000``."""
    found = number(value)
    return NOTHING if found is None else f"{found:,.0f}"


def short(value: Any, unit: str = "") -> str:
    """``1.2M``, with a unit behind it."""
    found = number(value)
    return NOTHING if found is None else f"{short_count(found)}{unit and ' '}{unit}"


def decimal(value: Any, digits: int = 4, unit: str = "") -> str:
    """``0.7656``, with a unit behind it."""
    found = number(value)
    return NOTHING if found is None else f"{found:.{digits}f}{unit and ' '}{unit}"


def significant(value: Any, digits: int = 3) -> str:
    """``0.00379``."""
    found = number(value)
    return NOTHING if found is None else f"{found:.{digits}g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share: ``74.1 %``."""
    found = number(value)
    return NOTHING if found is None else f"{100 * found:.{digits}f} %"


def duration(value: Any) -> str:
    """``1m29s``."""
    found = number(value)
    return NOTHING if found is None else short_duration(found)


def size(value: Any) -> str:
    """Bytes: ``2.5 MB``, in powers of ten."""
    found = number(value)
    if found is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(found) < 1000:
            return f"{found:.0f} B" if unit == "B" else f"{found:.3g} {unit}"
        found /= 1000
    return f"{found:.3g} TB"


def setting(value: Any) -> str:
    """The value of a setting; JSON for what is no text, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def perplexity_name(row: Mapping[str, Any]) -> str:
    """What one target of an evaluation is: a byte, a token, a masked token."""
    unit = row.get("perplexity_unit")
    return unit if isinstance(unit, str) and unit else "token"
