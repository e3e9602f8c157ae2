"""The table against the paper: every row is measured, so whatever is broken on purpose turns its row and no other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from builders import tiny_corpus, tiny_model, tiny_settings, tiny_trainer
from ternlm.checkpoint import Loaded
from ternlm.evaluation import alignment, probe
from ternlm.evaluation.alignment import align, measure, update_alignment
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, QuantizationMode
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.ops import activation_rounding, quantize
from ternlm.ops.quantize import dequantize_weight, quantize_activation
from ternlm.run_directory import RunDirectory
from ternlm.tokenizers import load_tokenizer

Break = Callable[[LanguageModel, Path, pytest.MonkeyPatch], None]


def loaded(tmp_path: Path, family: str = "bitnet", mode: QuantizationMode | None = None, **sizes: Any) -> Loaded:
    """A model as a checkpoint gives it, with an optimizer's file beside it."""
    model = tiny_model(family, mode, **{"vocab_size": 256, "max_position_embeddings": 64, **sizes}).eval()
    model.compute_dtype = torch.bfloat16
    save_file({"m": torch.zeros(3)}, tmp_path / "optimizer.safetensors")
    return Loaded(model, load_tokenizer("byte"), {}, {"step": 7}, tmp_path)


def verdicts(found: Loaded) -> dict[str, str]:
    return {row["part"]: row["verdict"] for row in align(found)}


def first(model: LanguageModel) -> BitLinear:
    return next(iter(model.bit_linears().values()))


def flip_a_code(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    first(model).refresh()
    codes = first(model).codes
    codes[0, 0] = 0 if codes[0, 0] else 1


def change_a_scale(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    first(model).refresh()
    first(model).scale[0] *= 1.01


def round_half_up(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    def upward(scaled: Tensor, levels: int | None, noise: Tensor | None = None) -> Tensor:
        if levels is not None:
            scaled.clamp_(-levels, levels)
        return scaled.add_(0.5).floor_()

    for module in (quantize, activation_rounding):
        if hasattr(module, "round_to_levels_"):
            patch.setattr(module, "round_to_levels_", upward)


def four_bits(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.set_mode(QuantizationMode(activations="int4"))


def no_activations(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.set_mode(QuantizationMode(activations="none"))


def one_scale_for_all_tokens(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    def forward(self: BitLinear, x: Tensor, grid: Tensor | None = None) -> tuple[Tensor, ...]:
        s = 127 / x.float().abs().max()
        weight = torch.cat([dequantize_weight(codes, scale) for codes, scale in self.matrices().values()])
        return F.linear((x.float() * s).round() / s, weight).to(x.dtype).split(self.sizes, dim=-1)

    patch.setattr(BitLinear, "forward", forward)


def scales_before_the_product(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    def forward(self: BitLinear, x: Tensor, grid: Tensor | None = None) -> tuple[Tensor, ...]:
        codes, s = quantize_activation(x, 8)
        weight = torch.cat([dequantize_weight(codes, scale) for codes, scale in self.matrices().values()])
        return F.linear((codes / s).to(x.dtype), weight.to(x.dtype)).split(self.sizes, dim=-1)

    patch.setattr(BitLinear, "forward", forward)


def one_scale_per_row(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.set_mode(QuantizationMode(granularity="row"))


def drop_a_norm(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    next(model.blocks()).mlp.ffn_sub_norm = nn.Identity()  # type: ignore[union-attr]


def norm_by_magnitude(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return x / x.abs().mean(dim=-1, keepdim=True) * self.weight.to(x.dtype)

    patch.setattr(RMSNorm, "forward", forward)


def other_gate(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    next(model.blocks()).mlp.activation = "relu2"  # type: ignore[union-attr, assignment]


def add_a_bias(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.register_parameter("extra_bias", nn.Parameter(torch.zeros(3)))


def no_rotation(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.rotary[0], model.rotary[1] = 1.0, 0.0  # type: ignore[index]


def unused_rotation(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ternlm.nn.attention.rotate", lambda x, cos, sin: x)


def coarse_embedding(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    table = model.model.embed_tokens.weight  # type: ignore[union-attr]
    table.copy_(table.sign() * 0.02)  # type: ignore[operator, union-attr]


def rounded_head(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    coarse = quantize.dequantize_weight(*quantize.ternarize(model.model.embed_tokens.weight))  # type: ignore[union-attr, arg-type]

    def compute(norm: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        seen.append(output)

    def replace(model: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        return output._replace(logits=F.linear(seen[-1], coarse.to(seen[-1].dtype)))

    seen: list[Tensor] = []
    model.model.norm.register_forward_hook(compute)  # type: ignore[union-attr]
    model.register_forward_hook(replace)


def coarse_latents(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    for layer in model.bit_linears().values():
        layer.weight.copy_(layer.weight.bfloat16())


def coarse_moments(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    save_file({"m": torch.zeros(3), "v": torch.zeros(3, dtype=torch.bfloat16)}, path / "optimizer.safetensors")


def compute_in_float32(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    model.compute_dtype = torch.float32


def add_a_plain_layer(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    next(model.blocks()).extra = nn.Linear(3, 5, bias=False)


BREAKS: list[tuple[Break, set[str]]] = [
    (flip_a_code, {"ternary weights"}),
    (change_a_scale, {"scale of weights"}),
    (round_half_up, {"rounding", "activations", "product"}),  # halves are common in bfloat16
    (four_bits, {"activations"}),
    (no_activations, {"activations", "product"}),
    (one_scale_for_all_tokens, {"activations", "product"}),
    (scales_before_the_product, {"product"}),
    (one_scale_per_row, {"scale of weights", "ternary weights"}),
    (drop_a_norm, {"norms"}),
    (norm_by_magnitude, {"norms", "computation"}),
    (other_gate, {"feed-forward network"}),
    (add_a_bias, {"biases"}),
    (no_rotation, {"positions"}),
    (unused_rotation, {"positions"}),
    (coarse_embedding, {"embedding and head"}),
    (rounded_head, {"embedding and head"}),
    (coarse_latents, {"latent weights"}),
    (coarse_moments, {"state of the optimizer"}),
    (compute_in_float32, {"computation"}),
    (add_a_plain_layer, {"coverage"}),
]


def test_a_model_made_as_the_paper_says_is_the_same_in_every_part(tmp_path: Path) -> None:
    rows = align(loaded(tmp_path))
    assert {row["verdict"] for row in rows} == {"same"}, [row for row in rows if row["verdict"] != "same"]
    assert {*rows[0]} == {"part", "definition", "run", "verdict", "source"}
    assert len({row["part"] for row in rows}) == len(rows) == 14
    assert "all codes of 14 matrices" in rows[0]["run"]


@pytest.mark.parametrize(("broken", "parts"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_e10_what_is_broken_on_purpose_turns_its_row_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Break, parts: set[str]
) -> None:
    found = loaded(tmp_path)
    with torch.no_grad():
        broken(found.model, tmp_path, monkeypatch)
    seen = verdicts(found)
    assert {part for part, verdict in seen.items() if verdict != "same"} == parts, seen
    assert {seen[part] for part in parts} == {"differs"}


def test_e10_a_model_that_is_nothing_but_nan_is_no_success(tmp_path: Path) -> None:
    found = loaded(tmp_path)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.fill_(torch.nan)
    seen = verdicts(found)
    for part in ("scale of weights", "ternary weights", "activations", "norms", "feed-forward network"):
        assert seen[part] == "differs", part


def test_the_full_precision_twin_differs_where_it_is_meant_to(tmp_path: Path) -> None:
    rows = {row["part"]: row for row in align(loaded(tmp_path, mode=FULL_PRECISION))}
    differing = {part for part, row in rows.items() if row["verdict"] == "differs"}
    assert differing == {"ternary weights", "scale of weights", "rounding", "activations", "product", "coverage"}
    assert rows["ternary weights"]["run"] == "0 of 14 matrices are ternary, the others full precision"
    assert rows["activations"]["run"].startswith("not rounded in 8 layers of 8")


@pytest.mark.parametrize(("layout", "missing"), [("prenorm", "not before down, o"), ("double", "before 8 of 8")])
def test_the_place_of_norms_is_read_off_the_pass(tmp_path: Path, layout: str, missing: str) -> None:
    rows = {row["part"]: row for row in align(loaded(tmp_path, norm_layout=layout))}
    assert missing in rows["norms"]["run"]
    assert rows["norms"]["verdict"] == ("differs" if layout == "prenorm" else "same")


@pytest.mark.parametrize("quantizer", ["twn", "ttq", "lsq"])
def test_other_quantizers_are_told_from_absmean(tmp_path: Path, quantizer: Any) -> None:
    seen = verdicts(loaded(tmp_path, mode=QuantizationMode(quantizer=quantizer)))
    assert (seen["scale of weights"], seen["product"]) == ("differs", "same")


@pytest.mark.parametrize("family", MODELS)
def test_every_family_can_be_measured_and_is_left_as_it_was(tmp_path: Path, family: str) -> None:
    found = loaded(tmp_path, family)
    model = found.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    record = measure(found)
    json.dumps(record, allow_nan=False)
    assert model.training
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    seen = {row["part"]: row["verdict"] for row in record["rows"]}
    assert seen["ternary weights"] == seen["scale of weights"] == seen["latent weights"] == "same"
    assert record["parameters"]["ternary"] == model.parameter_counts().ternary
    assert record["parameters"]["scales"] == sum(len(layer.sizes) for layer in model.bit_linears().values())


def test_packed_weights_say_that_their_latents_are_unknown(tmp_path: Path) -> None:
    found = loaded(tmp_path)
    for layer in found.model.bit_linears().values():
        layer.refresh()
        layer.take_codes(layer.codes.clone(), layer.scale.clone())
    seen = verdicts(found)
    assert {part for part, verdict in seen.items() if verdict == "unknown"} == {
        "ternary weights", "scale of weights", "rounding", "latent weights"
    }  # fmt: skip
    assert seen["activations"] == seen["product"] == "same"


def test_a_checkpoint_without_optimizer_says_so(tmp_path: Path) -> None:
    found = loaded(tmp_path)
    (tmp_path / "optimizer.safetensors").unlink()
    assert verdicts(found)["state of the optimizer"] == "unknown"
    (tmp_path / "optimizer.safetensors").write_bytes(b"no tensors")
    assert verdicts(found)["state of the optimizer"] == "unknown"


def test_only_some_layers_of_a_very_deep_model_are_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_MOST_PRODUCTS", 3)
    rows = {row["part"]: row for row in align(loaded(tmp_path))}
    assert rows["product"]["run"].startswith("exact in 3 of 3 layers")


def test_the_sentence_is_no_longer_than_the_model_reads(tmp_path: Path) -> None:
    found = loaded(tmp_path, max_position_embeddings=11)
    seen = probe.observe(found.model, found.tokenizer)
    assert seen.logits is not None
    assert seen.logits.shape == (11, 256)


def test_a_runs_newest_good_checkpoint_is_measured_and_a_run_without_one_is_not(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, training={"max_steps": 2, "checkpoint_every_steps": 2})
    trainer = tiny_trainer(tmp_path / "run", tiny_corpus(tmp_path), settings)
    trainer.run()
    run = RunDirectory(tmp_path / "run")
    assert update_alignment(run)
    record = json.loads(run.alignment.read_text())
    assert (record["step"], record["checkpoint"], record["schema"]) == (2, "step_000002", 1)
    assert {row["source"] for row in record["rows"]} == {"checkpoints/step_000002"}
    assert next(row for row in record["rows"] if row["part"] == "state of the optimizer")["verdict"] == "same"
    assert not update_alignment(RunDirectory(tmp_path / "none"))
    (run.checkpoints / "step_000002" / "model.safetensors").write_bytes(b"gone")
    assert not update_alignment(run)
