"""Continuing text with any causal model, through its state alone, and filling gaps in it with an encoder."""

from ternlm.generation.decode import GrowingText, Request, Sample, continue_all, generate, numbered, stream
from ternlm.generation.fill import Candidate, Filled, fill, has_mask, require_causal, require_encoder
from ternlm.generation.sampling import SamplingSettings, row_seed, sample_next
from ternlm.generation.trace import Trace

__all__ = [
    "Candidate", "Filled", "GrowingText", "Request", "Sample", "SamplingSettings", "Trace",
    "continue_all", "fill", "generate", "has_mask", "numbered", "require_causal", "require_encoder", "row_seed",
    "sample_next", "stream",
]  # fmt: skip
