"""Settings: strict, frozen, from YAML, JSON and the command line, each value knowing its origin."""

from ternlm.settings.base import Settings
from ternlm.settings.numbers import Bytes, Count, Float, Seconds

__all__ = ["Bytes", "Count", "Float", "Seconds", "Settings"]
