"""ternlm: train, measure and ship ternary language models."""

__version__ = "0.1.0"
