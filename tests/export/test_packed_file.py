"""Packed files: the codes and scales a model computes with come back bit for bit, and nothing else loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exported import loaded

from builders import Fault, random_tokens
from ternlm import checkpoint
from ternlm.checkpoint import pack, packed_bytes, packed_snapshot, ternary_matrices, write_snapshot
from ternlm.checkpoint.manifest import PACKED, seal
from ternlm.checkpoint.packed import load_packed
from ternlm.checkpoint.snapshot import serialize
from ternlm.errors import CheckpointError, SettingsError, StorageFault, TernlmError
from ternlm.export import Choices, export
from ternlm.models import FULL_PRECISION, QuantizationMode
from ternlm.models.stages import QuantizationSettings, Stages

QUANTIZERS: list[dict[str, Any]] = [
    {},
    {"quantizer": "twn"},
    {"granularity": "row"},
    {"granularity": "group", "group_size": 8},
    {"quantizer": "ttq"},
    {"quantizer": "lsq"},
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(random_tokens(2, 11, vocab_size=256)).logits
    return found


def saved(folder: Path, source: checkpoint.Loaded, **options: Any) -> Path:
    folder.mkdir(parents=True)
    packed = pack(source.model, **options)
    write_snapshot(folder, packed_snapshot(packed, source.tokenizer, source.config, source.state))
    return folder


@pytest.mark.parametrize("family", ["bitnet", "qdyt", "hgrn", "hnet"])
@pytest.mark.parametrize("quantization", QUANTIZERS, ids=str)
def test_the_size_that_is_told_is_that_of_the_parameters_in_the_file(family: str, quantization: dict[str, Any]) -> None:
    extra = {"quantize_lm_head": True} if family == "hgrn" else {}
    model = loaded(family, quantization, **extra).model
    names, size = {name for name, _ in model.named_parameters()}, 0
    for name, tensor in pack(model).tensors.items():
        is_packed = name.endswith((".weight_packed", ".weight_scale"))
        size += tensor.nbytes if is_packed else 2 * tensor.numel() * (name in names)
    assert packed_bytes(model) == size


@pytest.mark.parametrize("family", ["bitnet", "qdyt", "hgrn", "hnet"])
@pytest.mark.parametrize("quantization", QUANTIZERS, ids=str)
def test_x07_logits_of_every_family_and_quantizer_come_back_equal(
    tmp_path: Path, family: str, quantization: dict[str, Any]
) -> None:
    extra = {"quantize_lm_head": True} if family == "hgrn" else {}
    source = loaded(family, quantization, **extra)
    again = checkpoint.load(saved(tmp_path / "a", source))
    assert torch.equal(logits(again.model), logits(source.model))
    before, after = ternary_matrices(source.model), ternary_matrices(again.model)
    assert before.keys() == after.keys() and len(before) > 2
    assert not extra or "lm_head.decoder" in before
    for name, (codes, scale) in before.items():
        assert torch.equal(after[name][0], codes) and torch.equal(after[name][1], scale)


@pytest.mark.parametrize("encoding", checkpoint.ENCODINGS)
@pytest.mark.parametrize("quantization", [{}, {"quantizer": "ttq"}], ids=str)
def test_an_import_is_exported_again_to_the_same_bytes(
    tmp_path: Path, encoding: str, quantization: dict[str, Any]
) -> None:
    first = saved(tmp_path / "a", loaded(quantization=quantization), encoding=encoding)
    second = saved(tmp_path / "b", checkpoint.load(first), encoding=encoding)
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


def test_x08_the_file_holds_codes_and_scales_and_no_latent_weights(tmp_path: Path) -> None:
    source = loaded(quantization={"quantizer": "lsq"})
    folder = saved(tmp_path / "a", source)
    tensors = safetensors.torch.load_file(folder / PACKED)
    for name, (codes, _) in ternary_matrices(source.model).items():
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.weight_packed"].shape == (codes.shape[0], 64)
        assert tensors[f"{name}.weight_scale"].shape == codes.shape[:1]
    assert not any("quantizer" in name for name in tensors)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["progress"] == {"tokens": 77} and "detector" not in state


def test_trits_take_a_fifth_less_and_16_bit_embeddings_change_nothing_else(tmp_path: Path) -> None:
    source = loaded("hgrn", hidden_size=320)
    plain, small = pack(source.model), pack(source.model, "trit5", torch.bfloat16)
    assert small.tensors["embed_tokens.weight"].dtype == torch.bfloat16
    changed = {name for name in plain.tensors if not name.endswith("_packed")} - {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    assert all(torch.equal(plain.tensors[name], small.tensors[name]) for name in changed)
    wide = [
        name for name in plain.tensors if name.endswith("q_proj.weight_packed") or name.endswith("i_proj.weight_packed")
    ]
    assert wide and all(small.tensors[name].shape[1] == 64 for name in wide)
    folder = saved(tmp_path / "a", source, encoding="trit5", embedding=torch.bfloat16)
    found = checkpoint.load(folder).model.dense_tensors()["embed_tokens.weight"]
    assert torch.equal(found, source.model.tensors()["embed_tokens.weight"].bfloat16().float())


def test_a_packed_model_is_never_rounded_again(tmp_path: Path) -> None:
    source = loaded()
    again = checkpoint.load(saved(tmp_path / "a", source)).model
    expected = logits(source.model)
    again.set_mode(FULL_PRECISION)
    assert not torch.equal(logits(again), expected)
    again.set_mode(QuantizationMode())
    again.train()
    logits(again)
    assert torch.equal(logits(again.eval()), expected)
    for mode in (
        QuantizationMode(weights="int8"),
        QuantizationMode(granularity="row"),
        QuantizationMode(quantizer="twn"),
    ):
        with pytest.raises(SettingsError, match="latent weights are not there"):
            again.set_mode(mode)


def test_x09_packed_weights_are_neither_trained_nor_saved_as_a_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", loaded())
    with pytest.raises(CheckpointError, match=r"packed weights, from which training cannot go on\. Use the run's own"):
        checkpoint.open_checkpoint(folder)
    again = checkpoint.load(folder)
    with pytest.raises(SettingsError, match="cannot be trained or saved"):
        again.model.tensors()
    assert not any(layer.weight.requires_grad for layer in again.model.bit_linears().values())


@pytest.mark.parametrize("step", [2, 5, 9])
def test_layers_that_are_not_ternary_yet_stay_as_they_are(tmp_path: Path, step: int) -> None:
    quantization = {"progressive": True, "int8_until": 0.3, "partial_until": 0.6}
    source = loaded(quantization=quantization, state={"step": step, "total_steps": 10})
    stages = Stages(QuantizationSettings.from_mapping(quantization, "quantization"), 2, 10)
    stages.apply(source.model, step - 1)
    if step == 2:
        with pytest.raises(SettingsError, match="none of the model's layers is ternary"):
            pack(source.model)
        return
    assert len(ternary_matrices(source.model)) == (7 if step == 5 else 14)
    assert torch.equal(logits(checkpoint.load(saved(tmp_path / "a", source)).model), logits(source.model))


def test_a_layer_between_two_roundings_has_no_codes() -> None:
    quantization = {"progressive": True, "int8_until": 0.1, "partial_until": 0.2, "blend_steps": 5}
    source = loaded(quantization=quantization)
    Stages(QuantizationSettings.from_mapping(quantization, "quantization"), 2, 20).apply(source.model, 5)
    with pytest.raises(SettingsError, match=r"between two roundings.*blend_steps.*later checkpoint"):
        pack(source.model)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = {
    "version": (lambda t, m: m.update({"ternlm.version": "2"}), "has the version '2'; this version reads 1"),
    "encoding": (lambda t, m: m.update({"ternlm.encoding": "3bit"}), "has the encoding '3bit'"),
    "format": (lambda t, m: m.pop("ternlm.format"), "says nowhere that its weights are packed"),
    "shapes": (lambda t, m: m.update({"ternlm.shapes": "[1]"}), "does not say which shapes"),
    "size": (lambda t, m: m.update({"ternlm.shapes": m["ternlm.shapes"].replace("40", "41")}), "not those of its"),
    "missing": (lambda t, m: t.pop("model.norm.weight"), "lacks tensor 'model.norm.weight'"),
    "extra": (lambda t, m: t.update(more=torch.zeros(1)), "has the unknown tensor 'more'"),
    "code 3": (lambda t, m: t[Q + "_packed"].fill_(255), "2-bit value 3"),
    "codes": (lambda t, m: t[Q + "_packed"].fill_(0), "differ from their own sha256"),
    "scale": (lambda t, m: t[Q + "_scale"].neg_(), "no positive number"),
    "scale is nan": (lambda t, m: t[Q + "_scale"].fill_(torch.nan), "no positive number"),
    "type": (lambda t, m: t.update({Q + "_scale": t[Q + "_scale"].half()}), "shape .* and type float16"),
    "rows": (lambda t, m: t.update({Q + "_packed": t[Q + "_packed"][1:]}), "which its model does not take"),
}  # fmt: skip
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_packed_file_that_is_not_the_models_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "a", loaded())
    tensors, metadata = pack(loaded().model)
    change, message = DAMAGE[damage]
    change(tensors, metadata)
    content = b"".join(bytes(part) for part in serialize({n: t.contiguous() for n, t in tensors.items()}, metadata))
    _replace(folder, PACKED, content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_l01_a_flipped_bit_and_a_missing_file_are_noticed_before_anything_is_parsed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", loaded())
    content = bytearray((folder / PACKED).read_bytes())
    content[-5] ^= 4
    (folder / PACKED).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.packed\.safetensors.*sha256"):
        checkpoint.load(folder)
    (folder / PACKED).unlink()
    with pytest.raises(CheckpointError, match=r"lacks its file 'model\.packed\.safetensors'"):
        checkpoint.load(folder)


def test_settings_that_make_a_packed_layer_something_else_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", loaded())
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["weights"] = "int8"
    _replace(folder, "config.json", json.dumps(config).encode())
    with pytest.raises(CheckpointError, match="its settings do not make ternary"):
        checkpoint.load(folder)


def test_an_export_is_compared_with_its_source_before_it_exists(tmp_path: Path) -> None:
    facts = export(loaded(), tmp_path / "out", Choices(), card=lambda found: f"card of {found['bytes']}\n")
    assert facts["verification"]["largest_logit_difference"] == 0 and facts["verification"]["matrices"] == 14
    assert facts["activation_bits"] == 8 and facts["tokens_seen"] == 77
    assert facts["bytes"] == (tmp_path / "out" / PACKED).stat().st_size
    assert (tmp_path / "out" / "README.md").read_text() == f"card of {facts['bytes']}\n"
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == facts
    (tmp_path / "out" / "README.md").write_text("edited by its owner")
    checkpoint.verify(tmp_path / "out")


def test_x07_an_export_with_another_scale_is_noticed_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrunk(model: Any, tensors: Any, metadata: Any, path: Path) -> None:
        load_packed(model, {n: t * 0.7 if n == Q + "_scale" else t for n, t in tensors.items()}, metadata, path)

    monkeypatch.setattr("ternlm.checkpoint.loading.load_packed", shrunk)
    with pytest.raises(
        TernlmError, match=r"codes or scales of 'model\.layers\.1\.self_attn\.q_proj' came back changed"
    ):
        export(loaded(), tmp_path / "out", Choices())
    assert list(tmp_path.iterdir()) == []
    facts = export(loaded(), tmp_path / "out", Choices(verify=False))
    assert facts["verification"]["status"] == "skipped"


def test_a_full_disk_leaves_nothing_wherever_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, met = loaded(), 0
    for n in range(1, 200, 5):
        folder = tmp_path / str(n)
        folder.mkdir()
        with monkeypatch.context() as patch:
            fault, failed = Fault(patch.setattr, n, sticks=False), False
            try:
                export(source, folder / "out", Choices(verify=False), card=lambda found: "card")
            except StorageFault as error:
                failed = True
                assert "free disk space or choose another --output" in str(error)
        if not fault.met:
            break
        met += 1
        assert failed == (list(folder.iterdir()) == [])
        if not failed:  # some failures, such as that of a lock, are outlived
            checkpoint.load(folder / "out")
    assert met > 4 and not fault.met


def test_places_that_are_taken_or_belong_to_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(SettingsError, match="exists already; an export is never written over it"):
        export(loaded(), tmp_path / "there", Choices())
    (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    with pytest.raises(SettingsError, match="holds the checkpoints of a run"):
        export(loaded(), tmp_path / "checkpoints" / "packed", Choices())


def _replace(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its entry in the manifest, as somebody would who wants it to pass."""
    import hashlib

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal(manifest)}))
