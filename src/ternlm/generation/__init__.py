"""Sampling and decoding for any model family, through its state alone."""

from ternlm.generation.decode import Sample, generate, stream
from ternlm.generation.sampling import SamplingSettings, sample_next

__all__ = ["Sample", "SamplingSettings", "generate", "sample_next", "stream"]
