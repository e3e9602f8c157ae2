"""Sampling and decoding for any model family, through its state alone."""

from ternlm.generation.decode import Request, Sample, continue_all, generate, stream
from ternlm.generation.sampling import SamplingSettings, row_seed, sample_next
from ternlm.generation.trace import Trace

__all__ = [
    "Request", "Sample", "SamplingSettings", "Trace",
    "continue_all", "generate", "row_seed", "sample_next", "stream",
]  # fmt: skip
