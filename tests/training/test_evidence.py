"""Evidence of an anomaly: complete, readable, bounded, equal to what the model held, and harmless to the run."""

import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from builders import Fault, tiny_bitnet, tiny_corpus
from ternlm.data.batch import Batch
from ternlm.data.loader import Loader
from ternlm.data.windows import CausalWindows
from ternlm.errors import EnvironmentFault
from ternlm.files import from_json
from ternlm.models import FULL_PRECISION, QuantizationMode
from ternlm.ops.packing import unpack_2bit
from ternlm.training import evidence as module
from ternlm.training.anomaly import Event
from ternlm.training.evidence import Situation, codes_sha256, dump, gradient_norms, read_evidence
from ternlm.training.objective import ObjectiveSettings, loss_sums

EVENT = Event(
    "loss_spike", 812, "warning", "the loss (9.1) is above 3.4.", "update", {"loss": 9.1, "grad_norm": 2.5}, True
)
FILES = {"event.json", "batch.json", "layers.json", "top20.json", "codes.safetensors", "rng.json"}
COUNTER = 57


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    prepared = tiny_corpus(tmp_path_factory.mktemp("corpus"))
    return Loader(prepared.corpus.split("train"), 5, CausalWindows(16, prepared.tokenizer.bos_id), 3)


@pytest.fixture
def situation(loader: Loader, tmp_path: Path) -> Situation:
    return situation_of(loader, tmp_path)


def situation_of(loader: Loader, tmp_path: Path, mode: QuantizationMode | None = None) -> Situation:
    """A model with the gradients of one batch, some of whose targets are not scored."""
    model = tiny_bitnet(vocab_size=256, mode=mode or QuantizationMode())
    targets = loader.batch(COUNTER).targets.clone()
    targets[1, 3:9] = targets[4, 0] = -100
    batch = Batch(loader.batch(COUNTER).tokens, targets)
    sums = loss_sums(model(batch.tokens), batch.targets, ObjectiveSettings())
    (sums.objective / batch.num_targets).backward()
    return Situation(model, tiny_corpus(tmp_path).tokenizer, batch, loader, COUNTER, micro_batch_size=2)


def silent(sentence: str) -> None:
    raise AssertionError(sentence)


def written(anomalies: Path, situation: Situation, event: Event = EVENT) -> Path:
    folder = dump(anomalies, event, situation, silent)
    assert folder is not None
    return folder


def load(folder: Path, name: str) -> Any:
    """Strict JSON: NaN would be refused."""
    return from_json((folder / f"{name}.json").read_bytes())


def test_the_folder_is_named_by_step_and_event_and_holds_every_file(situation: Situation, tmp_path: Path) -> None:
    folder = written(tmp_path / "run" / "anomalies", situation)
    assert folder == tmp_path / "run" / "anomalies" / "step_000812_loss_spike"
    assert {path.name for path in folder.iterdir()} == FILES
    assert list(folder.parent.iterdir()) == [folder]
    event = load(folder, "event")
    assert {name: event[name] for name in EVENT.row()} == EVENT.row()
    assert (event["step"], event["values"]) == (EVENT.step, EVENT.values)
    assert event["left_out"] == []
    assert event["torch"] == torch.__version__


def test_the_batch_is_there_with_its_text_and_the_windows_it_was_read_from(
    situation: Situation, tmp_path: Path
) -> None:
    batch = load(written(tmp_path / "a", situation), "batch")
    assert [row["tokens"] for row in batch["rows"]] == situation.batch.tokens.tolist()
    assert [row["targets"] for row in batch["rows"]] == situation.batch.targets.tolist()
    assert [row["text"] for row in batch["rows"]] == [
        situation.tokenizer.decode(tokens) for tokens in situation.batch.tokens.tolist()
    ]
    assert batch["counter"] == COUNTER
    loader = situation.loader
    assert {window["epoch"] for window in batch["windows"]} == {COUNTER // loader.windows_per_epoch}
    for row, window in zip(batch["rows"], batch["windows"], strict=True):
        assert loader.stream.read(window["start"], window["start"] + 16).tolist() == row["tokens"]
        again = window["epoch"] * loader.windows_per_epoch + window["index"]
        assert loader.starts(again, 1) == [window["start"]]


def test_losses_of_rows_and_the_highest_targets_are_those_of_the_same_weights(
    situation: Situation, tmp_path: Path
) -> None:
    folder = written(tmp_path / "a", situation)
    with torch.no_grad():
        logits = situation.model(situation.batch.tokens).logits.double()
    targets = situation.batch.targets
    expected = []
    for row, position in (targets != -100).nonzero().tolist():
        nll = -torch.log_softmax(logits[row, position], -1)[targets[row, position]].item()
        expected.append((nll, row, position))
    for row, values in enumerate(load(folder, "batch")["rows"]):
        assert values["loss"] == pytest.approx(np.mean([nll for nll, r, _ in expected if r == row]), rel=1e-5)
    expected.sort(reverse=True)
    top = load(folder, "top20")
    assert [(entry["row"], entry["position"]) for entry in top] == [(row, place) for _, row, place in expected[:20]]
    for entry, (nll, row, position) in zip(top, expected, strict=False):
        assert entry["nll"] == pytest.approx(nll, rel=1e-4)
        assert entry["token"] == targets[row, position]
        assert entry["text"] == situation.tokenizer.decode([entry["token"]])


def test_norms_are_those_of_the_unclipped_gradient_and_bad_elements_are_counted(
    situation: Situation, tmp_path: Path
) -> None:
    parameter = situation.model.get_parameter("model.layers.1.mlp.down.weight")
    layers = load(written(tmp_path / "a", situation), "layers")
    gradients = {name: p.grad for name, p in situation.model.named_parameters() if p.grad is not None}
    total = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    assert layers.keys() == gradients.keys()
    assert math.sqrt(sum(layer["gradient_norm"] ** 2 for layer in layers.values())) == pytest.approx(total, rel=1e-5)
    assert all(layer["non_finite_gradients"] == layer["non_finite_weights"] == 0 for layer in layers.values())
    weight = layers["model.layers.1.mlp.down.weight"]["weight_norm"]
    assert weight == pytest.approx(parameter.detach().norm().item(), rel=1e-5)
    assert parameter.grad is not None
    parameter.grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    parameter.data.view(-1)[5] = math.nan
    layers = load(written(tmp_path / "a", situation), "layers")
    bad = layers["model.layers.1.mlp.down.weight"]
    assert (bad["non_finite_gradients"], bad["non_finite_weights"], bad["gradient_norm"]) == (3, 1, "nan")
    assert sum(layer["non_finite_gradients"] for layer in layers.values()) == 3


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_the_packed_codes_are_the_codes_of_the_model(loader: Loader, tmp_path: Path, granularity: str) -> None:
    mode = QuantizationMode.from_mapping({"granularity": granularity, "group_size": 8})
    situation = situation_of(loader, tmp_path, mode)
    folder = written(tmp_path / "a", situation)
    expected = {
        f"{name.rpartition('.')[0]}.{matrix}": pair
        for name, layer in situation.model.bit_linears().items()
        for matrix, pair in layer.matrices().items()
    }
    with safe_open(folder / "codes.safetensors", "pt") as file:
        columns = json.loads(file.metadata()["columns"])
        assert columns.keys() == expected.keys()
        assert "model.layers.0.self_attn.q_proj" in columns
        for name, (codes, scale) in expected.items():
            assert torch.equal(unpack_2bit(file.get_tensor(f"{name}.codes"), columns[name]), codes)
            assert torch.equal(file.get_tensor(f"{name}.scale"), scale)
    assert load(folder, "event")["codes_sha256"] == codes_sha256(situation.model)


def test_the_sum_of_the_codes_changes_with_one_code_and_with_one_scale(situation: Situation) -> None:
    model = situation.model
    before = codes_sha256(model)
    assert codes_sha256(tiny_bitnet(vocab_size=256)) == before
    weight = model.get_parameter("model.layers.0.mlp.down.weight")
    with torch.no_grad():
        weight.mul_(1 + 2**-10)
    assert codes_sha256(model) != before, "a scale"
    with torch.no_grad():
        weight.div_(1 + 2**-10)
        weight[0, 0] = -10 * weight[0, 0].sign() * weight.abs().mean()
    assert codes_sha256(model) != before


def test_a_model_without_ternary_matrices_has_no_codes_to_keep(loader: Loader, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", situation_of(loader, tmp_path, FULL_PRECISION))
    assert {path.name for path in folder.iterdir()} == FILES - {"codes.safetensors"}
    assert load(folder, "event")["left_out"] == []


def test_the_state_of_every_generator_is_there(situation: Situation, tmp_path: Path) -> None:
    torch.manual_seed(5), random.seed(6), np.random.seed(7)
    rng = load(written(tmp_path / "a", situation), "rng")
    assert rng["seed"] == 3
    state = torch.tensor(list(bytes.fromhex(rng["torch"])), dtype=torch.uint8)
    assert torch.equal(state, torch.get_rng_state())
    assert tuple(np.frombuffer(bytes.fromhex(rng["python"]), "<u4").tolist()) == random.getstate()[1]
    assert bytes.fromhex(rng["numpy"]["words"]) == np.random.get_state(legacy=True)[1].astype("<u4").tobytes()


def test_writing_evidence_changes_nothing_of_the_training(situation: Situation, tmp_path: Path) -> None:
    model = situation.model
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(tmp_path / "a", situation)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
    model.eval()
    written(tmp_path / "a", situation)
    assert not model.training


def test_the_extra_forward_pass_keeps_nothing_for_a_backward_pass(situation: Situation, tmp_path: Path) -> None:
    seen = []
    situation.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    written(tmp_path / "a", situation)
    assert seen == [False] * 3, "rows two by two, as memory allows"


def test_every_file_and_both_folders_reach_the_disk(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronized, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronized.append(real(descriptor)))
    written(tmp_path / "a", situation)
    assert len(synchronized) == len(FILES) + 2


def test_evidence_of_nan_is_strict_json_and_reads_back(situation: Situation, tmp_path: Path) -> None:
    event = EVENT._replace(name="nan_inf_loss", values={"loss": math.nan, "grad_norm": math.inf})
    with torch.no_grad():
        situation.model.get_parameter("model.norm.weight").fill_(math.inf)
    folder = written(tmp_path / "a", situation, event)
    found = read_evidence(folder)
    assert math.isnan(found.loss)
    assert found.grad_norm == math.inf
    assert load(folder, "top20")[0]["nll"] == "nan"


def test_what_was_written_reads_back(situation: Situation, tmp_path: Path) -> None:
    found = read_evidence(written(tmp_path / "a", situation))
    assert (found.step, found.counter, found.loss, found.grad_norm) == (812, COUNTER, 9.1, 2.5)
    assert found.gradient_norms == gradient_norms(situation.model)
    assert found.codes_sha256 == codes_sha256(situation.model)
    assert found.tokens == situation.batch.tokens.tolist()
    assert found.event["event"] == "loss_spike"


def test_what_does_not_fit_is_left_out_in_order_and_named(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {path.name: path.stat().st_size for path in written(tmp_path / "a", situation).iterdir()}
    fixed = sum(whole[name] for name in ("rng.json", "layers.json", "top20.json"))
    rows = load(tmp_path / "a" / "step_000812_loss_spike", "batch")["rows"]
    text = sum(len(json.dumps(row["text"])) for row in rows)
    for room, left_out in (
        (fixed + whole["batch.json"] + 10, ["codes"]),
        (fixed + whole["batch.json"] - text, ["codes", "text"]),
        (fixed, ["codes", "text", "tokens", "targets"]),
    ):
        monkeypatch.setattr(module, "_ROOM", room)
        folder = written(tmp_path / "a", situation)
        assert load(folder, "event")["left_out"] == left_out
        assert (folder / "codes.safetensors").exists() == ("codes" not in left_out)
        batch = load(folder, "batch")
        assert len(batch["windows"]) == 5
        for row in batch["rows"]:
            assert row.keys() == {"tokens", "targets", "text", "loss"} - set(left_out)
        assert read_evidence(folder).codes_sha256 == codes_sha256(situation.model)
        kept = [[]] * 5 if "tokens" in left_out else situation.batch.tokens.tolist()
        assert read_evidence(folder).tokens == kept


def test_the_limit_of_a_folder_is_fifty_megabytes() -> None:
    assert module.MOST_BYTES == 50_000_000
    assert module._ROOM < module.MOST_BYTES


@pytest.mark.parametrize("sticks", [False, True])
def test_a_full_disk_ends_neither_the_run_nor_older_evidence(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticks: bool
) -> None:
    failures = 0
    for n in range(1, 100):
        anomalies = tmp_path / str(n)
        older = written(anomalies, situation, EVENT._replace(step=7))
        said: list[str] = []
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            folder = dump(anomalies, EVENT, situation, said.append)
        if not fault.met:
            break
        failures += folder is None
        assert len(said) == (folder is None)
        for path in anomalies.glob("step_*"):
            assert {file.name for file in path.iterdir()} == FILES, "whole or not there"
            read_evidence(path)
        if not sticks:
            assert not [path for path in anomalies.iterdir() if path.name.startswith(".")]
        again = written(anomalies, situation)
        assert set(anomalies.iterdir()) == {older, again}
        shutil.rmtree(anomalies)
    else:
        raise AssertionError("the fault is always met")
    assert failures > 10


def test_the_sentence_about_a_full_disk_names_event_folder_and_reason(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        Fault(patch.setattr, 3, sticks=False)
        assert dump(tmp_path / "a", EVENT, situation, said.append) is None
    assert len(said) == 1
    for part in ("loss_spike at step 812", "step_000812_loss_spike", "No space left"):
        assert part in said[0]


def test_evidence_of_the_same_step_and_event_is_replaced(situation: Situation, tmp_path: Path) -> None:
    first = written(tmp_path / "a", situation)
    second = written(tmp_path / "a", situation, EVENT._replace(values={"loss": 5.0, "grad_norm": 1.0}))
    assert first == second
    assert read_evidence(second).loss == 5.0
    assert list((tmp_path / "a").iterdir()) == [second]


def test_a_batch_that_the_model_cannot_read_is_evidence_as_well(situation: Situation, tmp_path: Path) -> None:
    tokens = situation.batch.tokens.clone()
    tokens[2, 3] = 999
    broken = replace(situation, batch=Batch(tokens, situation.batch.targets))
    folder = written(tmp_path / "a", broken)
    assert {path.name for path in folder.iterdir()} == FILES - {"top20.json"}
    assert load(folder, "event")["left_out"] == ["losses of single targets (IndexError)"]
    assert load(folder, "batch")["rows"][2]["tokens"][3] == 999


def test_no_failure_of_any_kind_reaches_the_run(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(type(situation.tokenizer), "decode", lambda *_: 1 / 0)
    assert dump(tmp_path / "a", EVENT, situation, said.append) is None
    assert "ZeroDivisionError" in said[0]
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("name", ["event.json", "batch.json", "layers.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"step": NaN}', b"[" * 100_000, b"\xff"])
def test_damaged_evidence_is_one_clear_error(
    situation: Situation, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = written(tmp_path / "a", situation)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    if name == "layers.json" and content == b"{}":
        assert read_evidence(folder).gradient_norms == {}
        return
    with pytest.raises(EnvironmentFault, match="evidence"):
        read_evidence(folder)
