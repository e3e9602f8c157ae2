"""Logits of `bitnet` against Hugging Face `BitNetForCausalLM`, which quantizes latents online, in float32.

The model is written as a folder and read back by `transformers`, so that names, shapes and the configuration
are compared as well. Needs the packages transformers and accelerate.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders import random_tokens, tiny_bitnet

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def write_folder(folder: Path, model: Any, changes: dict[str, Any]) -> None:
    """A Hugging Face folder with the latents of the model, to be quantized on every forward pass."""
    settings = model.settings
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{
            name: getattr(settings, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            )
        },
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "rope_theta": settings.rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "modules_to_not_convert": ["lm_head"],
        },
        **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in model.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lively(**overrides: Any) -> Any:
    model = tiny_bitnet(vocab_size=67, **overrides).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.mul_(10) if parameter.dim() == 2 else parameter.add_(0.2 * noise)
    return model


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    # Their quantizers are compiled on first use, which takes longer than everything else here.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits: torch.Tensor = theirs(tokens).logits
        kinds = {type(module).__name__ for module in theirs.modules()}
    assert "AutoBitLinear" in kinds
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_logits_equal_those_of_transformers(tied: bool, activation: str, tmp_path: Path) -> None:
    model = lively(tie_word_embeddings=tied, hidden_act=activation, rope_theta=500.0)
    tokens = random_tokens(2, 17, vocab_size=67)
    write_folder(tmp_path, model, {})
    with torch.no_grad():
        ours = model(tokens).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, their_logits(tmp_path, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-2}, {"hidden_act": "relu2"}, {"rope_parameters": None}])
def test_the_comparison_notices_a_different_setting(changes: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = lively(rope_theta=500.0), random_tokens(1, 17, vocab_size=67)
    changes = {"rope_theta": 10_000.0, **changes} if "rope_parameters" in changes else changes
    write_folder(tmp_path, model, changes)
    with torch.no_grad():
        ours = model(tokens).logits
    assert not torch.allclose(ours, their_logits(tmp_path, tokens), rtol=1e-2, atol=1e-2)
