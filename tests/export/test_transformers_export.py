"""Folders for transformers: what it can run it runs as trained, and everything else is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exported import loaded

from builders import TRAIN, random_tokens
from ternlm.checkpoint import ternary_matrices
from ternlm.errors import SettingsError, TernlmError
from ternlm.export import Choices, export
from ternlm.export.transformers_weights import pack_row_blocks, transformers_tensors, unpack_row_blocks
from ternlm.tokenizers import train_bpe

FULL = {"weights": "none", "activations": "none"}
UNTIED = {"tie_word_embeddings": False}
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({}, "bitnet"),
    ({"hidden_act": "relu2", **UNTIED}, "bitnet"),
    ({"norm_layout": "prenorm"}, "llama"),
    ({"norm_layout": "prenorm", "hidden_act": "relu2", **UNTIED, "rope_theta": 500.0}, "llama"),
    ({"norm_layout": "double", **UNTIED, "rms_norm_eps": 1e-3}, "llama"),
]
RUN: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((form, model, {}, kind) for model, kind in SHAPES for form in ("hf", "hf-packed")),
    ("hf-packed", {}, {"quantizer": "twn"}, "bitnet"),
    ("hf", {}, FULL, "bitnet"),
    ("hf", {"norm_layout": "prenorm", **UNTIED}, FULL, "llama"),
]
REFUSED = [
    ("hf-packed", "hgrn", {}, {}, r"model\.family=hgrn\. --to packed takes it"),
    ("hf", "qdyt", {}, {}, r"model\.family=qdyt\. --to packed takes it"),
    ("hf-packed", "hnet", {}, {}, r"model\.family=hnet\. --to packed takes it"),
    ("hf-packed", "bitnet", {}, {"granularity": "row"}, r"quantization\.granularity=row.*--to packed takes it"),
    ("hf", "bitnet", {}, {"granularity": "group", "group_size": 8}, r"granularity=group.*--to packed takes it"),
    ("hf-packed", "bitnet", {}, {"quantizer": "ttq"}, r"granularity=row.*--to packed takes it"),
    ("hf-packed", "bitnet", {}, {"activations": "none"}, r"quantization\.activations=none.*--to packed takes it"),
    ("hf", "bitnet", {}, {"activations": "int4"}, r"quantization\.activations=int4.*--to packed takes it"),
    ("hf", "bitnet", {}, {"quantizer": "twn"}, r"quantizer=twn.*--to packed and --to hf-packed take it"),
    ("hf", "bitnet", {}, {"weights": "int8"}, r"8 of its 8 layers are not ternary.*--to packed takes it"),
    ("hf-packed", "bitnet", {}, FULL, r"quantization\.weights=none.*--to hf takes it"),
    ("hf", "bitnet", {"norm_layout": "double"}, FULL, r"model\.norm_layout=double"),
    ("hf-packed", "bitnet", {"intermediate_size": 42}, {}, r"42 rows, .* no multiple of 4\. --to packed and --to hf"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers compiles its quantizers otherwise."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.int8)


def test_x02_row_blocks_match_the_published_layout() -> None:
    codes = torch.tensor([[(5 * r + c) % 3 - 1 for c in range(4)] for r in range(8)], dtype=torch.int8)
    assert pack_row_blocks(codes).tolist() == [[36, 73, 146, 36], [146, 36, 73, 146]]
    assert torch.equal(unpack_row_blocks(pack_row_blocks(codes)), codes)


@pytest.mark.parametrize("rows", [4, 12, 52])
@pytest.mark.parametrize("columns", [1, 7, 256])
def test_row_blocks_come_back(rows: int, columns: int) -> None:
    codes = random_codes(rows, columns)
    before = codes.clone()
    assert torch.equal(unpack_row_blocks(pack_row_blocks(codes)), codes) and torch.equal(codes, before)


def test_row_blocks_are_those_of_transformers() -> None:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes = random_codes(20, 9)
    assert torch.equal(pack_row_blocks(codes), bitnet.pack_weights(codes.clone()))


@pytest.mark.parametrize("quantizer", ["absmean", "twn"])
def test_x01_codes_and_scales_are_those_of_the_layers_and_scales_are_multiplied(quantizer: str) -> None:
    source = loaded(quantization={"quantizer": quantizer})
    tensors = transformers_tensors(source.model, "hf-packed", torch.bfloat16)
    for name, (codes, scale) in ternary_matrices(source.model).items():
        assert torch.equal(unpack_row_blocks(tensors[f"{name}.weight"]), codes)
        assert tensors[f"{name}.weight_scale"].dtype == torch.float32
        assert tensors[f"{name}.weight_scale"].tolist() == [float(scale)]
    others = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert "model.embed_tokens.weight" in others and "model.layers.1.mlp.ffn_sub_norm.weight" in others


@pytest.mark.parametrize(("form", "model", "quantization", "kind"), RUN, ids=str)
def test_x05_what_transformers_can_run_it_runs_as_trained(
    tmp_path: Path, form: str, model: dict[str, Any], quantization: dict[str, Any], kind: str
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    source = loaded(quantization=quantization, **model)
    found = export(source, tmp_path / "out", Choices(form))["verification"]
    assert found["status"] == "passed" and found["relative_l2_unrounded"] < 1e-5
    assert found["largest_logit_difference"] < 0.1 * found["largest_logit"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    assert not (tmp_path / ".tmp-out").exists()


@pytest.mark.parametrize(("form", "family", "model", "quantization", "message"), REFUSED, ids=str)
def test_x03_what_transformers_cannot_run_is_refused_with_the_setting_and_the_way_out(
    tmp_path: Path, form: str, family: str, model: dict[str, Any], quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        export(loaded(family, quantization, **model), tmp_path / "out", Choices(form))
    assert list(tmp_path.iterdir()) == []


def test_every_key_of_the_configuration_is_written(tmp_path: Path) -> None:
    source = loaded(rope_theta=500.0, rms_norm_eps=1e-4)
    export(source, tmp_path / "out", Choices("hf-packed", verify=False))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {
        "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": 256, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 37, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
        "attention_bias": False, "bos_token_id": 254, "eos_token_id": 255, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0, "dtype": "float32",
        "torch_dtype": "float32",
    }  # fmt: skip
    assert wanted.items() <= config.items()
    assert config["quantization_config"] == {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"], "use_rms_norm": False, "rms_norm_eps": 1e-4,
    }  # fmt: skip
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 37


def test_latent_weights_are_exported_as_they_are_and_never_in_16_bits(tmp_path: Path) -> None:
    source = loaded()
    export(source, tmp_path / "out", Choices("hf", verify=False))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == source.model.tensors().keys()
    assert all(torch.equal(tensor, source.model.tensors()[name]) for name, tensor in tensors.items())
    with pytest.raises(SettingsError, match="latent weights, whose codes would change in bfloat16"):
        export(source, tmp_path / "other", Choices("hf", dtype="bfloat16"))


def test_sixteen_bits_where_they_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    facts = export(loaded(), tmp_path / "out", Choices("hf-packed", dtype="bfloat16"))
    assert facts["verification"]["status"] == "passed" and facts["verification"]["limit"] > 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_trained_tokenizer_gives_the_same_ids_there(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokenizer = train_bpe(TRAIN, 300)
    export(loaded(tokenizer=tokenizer), tmp_path / "out", Choices("hf-packed"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in [*TRAIN[:20], "\x00\x7f  ü 🙂 \r\n"]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


K = "model.layers.1.self_attn.k_proj.weight"
V = K.replace("k_proj", "v_proj")
WRONG_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "swapped": lambda tensors: tensors.update({K: tensors[V], V: tensors[K]}),
    "scale": lambda tensors: tensors[f"{K}_scale"].mul_(0.7),
    "missing": lambda tensors: tensors.pop("model.layers.0.mlp.ffn_sub_norm.weight"),
}
WRONG_SETTINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "activation": lambda config: config.update(hidden_act="relu2"),
    "epsilon": lambda config: config.update(rms_norm_eps=1e-4),
    "positions": lambda config: config["rope_parameters"].update(rope_theta=50.0),
    "polarity": lambda config: config["quantization_config"].pop("linear_class"),
    "head": lambda config: config["quantization_config"].update(modules_to_not_convert=["other"]),
}


@pytest.mark.parametrize("wrong", [*WRONG_TENSORS, *WRONG_SETTINGS])
def test_x07_an_export_that_transformers_computes_otherwise_is_noticed_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ternlm.export import writing

    name = "transformers_tensors" if wrong in WRONG_TENSORS else "transformers_config"
    right, change = getattr(writing, name), {**WRONG_TENSORS, **WRONG_SETTINGS}[wrong]

    def broken(*arguments: Any) -> Any:
        found = right(*arguments)
        change(found)
        return found

    monkeypatch.setattr(writing, name, broken)
    source = loaded(initializer_range=0.1, embedding_init_std=0.02, tie_word_embeddings=wrong != "head")
    with pytest.raises(TernlmError, match="the export is not the model it came from"):
        export(source, tmp_path / "out", Choices("hf-packed"))
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_comparison_is_skipped_and_never_called_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternlm.export.verification.find_spec", lambda name: None)
    found = export(loaded(), tmp_path / "out", Choices("hf-packed"))["verification"]
    assert found["status"] == "skipped" and "pip install 'ternlm[hub]' accelerate" in found["reason"]


def test_comparing_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers.integrations import bitnet

    source, rounding = loaded(), bitnet.ActQuant
    tokens = random_tokens(2, 9, vocab_size=256)
    with torch.no_grad():
        before = source.model(tokens).logits
        export(source, tmp_path / "out", Choices("hf-packed"))
        assert torch.equal(source.model(tokens).logits, before)
    assert bitnet.ActQuant is rounding
