"""Twins: a ternary model and the same network in full precision, made and measured alike. No torch at import time."""

from ternlm.twin.definition import ARMS, TwinSettings
from ternlm.twin.record import TwinDirectory, TwinRecord, find_twin

__all__ = ["ARMS", "TwinDirectory", "TwinRecord", "TwinSettings", "find_twin"]
