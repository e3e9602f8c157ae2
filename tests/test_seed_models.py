"""Model files of simplified_slm and hnet_bit: what they become, what is left out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ternlm.errors import SettingsError
from ternlm.models import QuantizationMode, build_model, model_settings
from ternlm.recipes import load_recipe
from ternlm.recipes.seed import model_section

COMMON = {
    "vocab_size": 256, "num_heads": 1, "expand_ratio": 1, "hidden_ratio": 4, "intermediate_size": None,
    "hidden_act": "swish", "attn_mode": "fused_recurrent", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "use_cache": True, "pad_token_id": None, "bos_token_id": 254, "eos_token_id": 255, "tie_word_embeddings": False,
    "initializer_range": 0.02, "use_short_conv": False, "conv_size": 4, "share_conv_kernel": True,
    "use_lower_bound": True,
}  # fmt: skip
FLAT: dict[str, Any] = {
    "model_type": "simplified_slm", "hidden_size": 512, "num_hidden_layers": 6, "fuse_cross_entropy": True, **COMMON
}  # fmt: skip
ONE: dict[str, Any] = {
    "model_type": "hnet_bit", "d_model": [256, 384], "num_blocks": [[4, 0, 4], [8]], "use_fused_bitlinear": False,
    **COMMON,
}  # fmt: skip
WIDE = {"num_heads": 4, "expand_ratio": 2, "use_short_conv": True, "use_lower_bound": False}
ATTENTION = {"d_model": [256, 512], "num_blocks": [[4, 0, 4], [12]], "innermost_use_attention": True,
             "attention_window_size": 128, "attention_layers_pattern": "xaxaxaxaxaxa"}  # fmt: skip


def parameters(values: dict[str, Any]) -> int:
    with torch.device("meta"):
        return build_model(model_settings(model_section(values)[0]), QuantizationMode()).parameter_counts().total


@pytest.mark.parametrize(
    ("values", "total"),
    [
        (FLAT, 20_734_464),
        (ONE, 21_340_160),
        (ONE | {"d_model": [512, 768, 1024], "num_blocks": [[4, 0, 4], [4, 0, 4], [8]]}, 189_612_032),
        (ONE | WIDE, 28_191_744 - 2 * (8 * 256 + 8 * 384)),
        (ONE | WIDE | ATTENTION | {"attention_num_heads": 4, "use_lower_bound": True}, 56_519_936),
    ],
)
def test_files_become_models_with_their_parameters(values: dict[str, Any], total: int) -> None:
    assert parameters(values) == total


def test_what_changes_nothing_is_left_out_with_a_sentence_each() -> None:
    model, notes = model_section(FLAT)
    assert model["family"] == "hgrn" and model["scan_impl"] == "auto"
    for key in ("use_cache", "fuse_cross_entropy", "pad_token_id", "num_heads"):
        assert len([note for note in notes if f"model.{key}" in note]) == 1
        assert key not in model
    assert len(notes) == 4
    assert model_section({"model_type": "simplified_slm", "hidden_size": 24}) == (
        {"family": "hgrn", "hidden_size": 24}, []
    )  # fmt: skip
    derived = model_section(ONE | {"hidden_size": 256, "num_hidden_layers": 16})
    assert not {"hidden_size", "num_hidden_layers"} & derived[0].keys() and len(derived[1]) == len(notes) + 2


@pytest.mark.parametrize(("mode", "impl"), [("naive", "reference"), ("chunk", "chunk"), ("fused_recurrent", "auto")])
def test_h14_the_way_of_scanning_and_the_heads_change_no_result(mode: str, impl: str) -> None:
    small = FLAT | {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 61}
    outputs = []
    for overrides in ({"attn_mode": mode, "num_heads": 4}, {}):
        section, _ = model_section(small | overrides)
        assert section["scan_impl"] == (impl if overrides else "auto")
        model = build_model(model_settings(section), QuantizationMode(activations="none"))
        model.initialize(0)
        with torch.no_grad():
            outputs.append(model(torch.arange(40)[None] % 61).logits)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_attention_without_heads_of_its_own_takes_those_of_the_file() -> None:
    model, notes = model_section(ONE | WIDE | ATTENTION)
    assert model["attention_num_heads"] == 4
    assert any("taken as attention_num_heads" in note for note in notes)
    assert "attention_num_heads" not in model_section(ONE | WIDE)[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is unknown. Use simplified_slm or hnet_bit"),
        ({"model_type": ["hnet_bit"]}, "is unknown"),
        (FLAT | {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be had: the gate"),
        (FLAT | {"attn_mode": "parallel"}, "fused_recurrent or fused_chunk or chunk or naive"),
        (FLAT | {"eos_token_id": 2}, "eos_token_id=2 cannot be had: the byte tokenizer has no other. Write 255"),
        (FLAT | {"num_heads": 3}, "num_heads=3 does not divide a memory of 512"),
        (ONE | {"num_heads": 5}, "num_heads=5 does not divide a memory of 256"),
        (FLAT | {"num_heads": 0}, "above 0"),
    ],
)
def test_what_would_change_a_result_and_cannot_be_had_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        model_section(values)


def test_n14_a_file_with_a_middle_that_is_not_zero_is_refused_like_any_other() -> None:
    with pytest.raises(SettingsError, match="the entry \\[4, 2, 4\\]"):
        model_settings(model_section(ONE | {"num_blocks": [[4, 2, 4], [8]]})[0])
    with pytest.raises(SettingsError, match=r"Did you mean 'model\.num_blocks'"):
        model_settings(model_section(ONE | {"num_block": 1})[0])


def test_a_model_file_is_a_recipe_of_a_model_on_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ONE))
    recipe = load_recipe(str(tmp_path / "config.json"))
    assert set(recipe.values) == {"model", "tokenizer"} and recipe.values["tokenizer"] == {"name": "byte"}
    assert any("num_heads" in note for note in recipe.notes)
    settings = model_settings(recipe.values["model"])
    assert settings.family == "hnet" and settings.d_model == (256, 384)  # type: ignore[attr-defined]
    assert load_recipe("demo").notes == ()
