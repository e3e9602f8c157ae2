"""Numbers for eyes: few letters, no digit that means nothing; for the axes of figures and beside their bars."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.ticker import Formatter

_LARGE, _SMALL = 10_000.0, 1e-3


class ShortNumbers(Formatter):
    """Ticks of an axis in as few letters as tell them apart: ``12k``, ``0.25``, ``3e-4``."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return significant(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        steps = [step for before, after in pairwise(values) if (step := abs(after - before))]
        if not steps:
            return [significant(value) for value in values]
        smallest, largest = min(steps), max(map(abs, values))
        unit_from = 1000.0 if largest >= _LARGE else _LARGE  # 7.5k beside 10k, 7500 among small ones
        is_decimal = largest >= _SMALL and smallest >= _SMALL / 100  # 0.0005 beside 0.001, 5e-4 among smaller ones
        return [short_number(value, smallest, unit_from, 0.0 if is_decimal else _SMALL) for value in values]


def significant(value: float, digits: int = 4) -> str:
    """A number in at most so many digits: ``0.3104``, ``12.3k``."""
    size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    text = short_number(value, 10.0 ** (size - digits + 1))
    return re.sub(r"(\.\d*?)0+(?=$|e|[a-zA-Z])", lambda match: match[1].removesuffix("."), text)


def short_number(value: float, step: float, unit_from: float = _LARGE, decimal_from: float = _SMALL) -> str:
    """A number in few letters, exact to a part of `step`: ``0``, ``1.5M``, ``2.25``, ``3e-4``.

    Args:
        value: The number.
        step: What tells it from others.
        unit_from: The smallest size that is told in thousands.
        decimal_from: The smallest size that is told without an exponent.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit_from <= size < 1e15 and size >= unit:
            return f"{value / unit:.{max(_decimals(step / unit), 0)}f}{suffix}"
    if size < decimal_from or size >= 1e15:
        digits = max(0, min(3, math.floor(math.log10(size)) + _decimals(step)))
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(_decimals(step), 0)}f}"


def _decimals(step: float) -> int:
    """Places behind the point that tell values apart that lie `step` apart; of large steps less than none."""
    if not step or not math.isfinite(step):
        return 3
    digits = -math.floor(math.log10(step) + 1e-9)
    leading = step * 10.0**digits
    return digits if abs(round(leading) - leading) < 1e-6 * leading else digits + 1
