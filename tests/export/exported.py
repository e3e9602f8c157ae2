"""Checkpoints to export: tiny models of any family, with norms that are not one, loaded from nowhere."""

from pathlib import Path
from typing import Any

import torch

from builders import tiny_model
from ternlm.checkpoint import Loaded
from ternlm.models import LanguageModel
from ternlm.models.stages import QuantizationSettings
from ternlm.tokenizers import ByteTokenizer, Tokenizer


def loaded(
    family: str = "bitnet",
    quantization: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    state: dict[str, Any] | None = None,
    **model: Any,
) -> Loaded:
    """A model in evaluation mode as a checkpoint would give it."""
    known = tokenizer or ByteTokenizer()
    settings = QuantizationSettings.from_mapping(quantization or {}, "quantization")
    built = tiny_model(family, settings.base(), vocab_size=known.vocab_size, **model).eval()
    _disturb(built)
    config = {
        "model": built.settings.model_dump(mode="json"),
        "quantization": settings.model_dump(mode="json"),
        "training": {"precision": "fp32"},
        "data": {"sequence_length": 9},
    }
    counters = {"step": 3, "total_steps": 9, "run_id": "mine", "progress": {"tokens": 77}, "detector": {"a": 1}}
    fingerprint = {"tokenizer_fingerprint": known.fingerprint}
    return Loaded(built, known, config, counters | fingerprint | (state or {}), Path("nowhere"))


@torch.no_grad()
def _disturb(model: LanguageModel) -> None:
    """Norm gains and embeddings that a swapped, forgotten or copied norm would show in."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
