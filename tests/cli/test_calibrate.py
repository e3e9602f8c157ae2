"""`ternlm calibrate`: a new checkpoint that every verb reads, and an old one that stays what it was."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from builders import TRAIN, VALIDATION
from ternlm import checkpoint
from ternlm.cli.calibrate import training_text
from ternlm.errors import Interrupted, SettingsError
from ternlm.evaluation import calibration

SETTINGS = """\
model: {family: qdyt, hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 40,
        max_position_embeddings: 24, qdyt_groups: 8, qdyt_alpha_warmup_steps: 2}
tokenizer: {name: train, vocab_size: 280, mask_token: true}
objective: {name: mlm}
data: {source: %s, validation_path: %s, validation_fraction: 0, test_fraction: 0, sequence_length: 16}
training: {max_steps: 6, batch_size: 4, precision: fp32, device: cpu, threads: 1, checkpoint_every_steps: 3}
schedule: {name: constant, warmup_steps: 2, weight_decay_until: 1}
tracking: {every_steps: 1, tensorboard: false}
evaluation: {every_steps: 100000}
"""


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run(ternlm: Any, tmp_path: Path) -> Path:
    """A masked encoder that was trained for six steps."""
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(TRAIN), encoding="utf-8")
    (tmp_path / "held.txt").write_text("\n<|endoftext|>\n".join(VALIDATION), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(SETTINGS % (tmp_path / "train.txt", tmp_path / "held.txt"))
    trained = ternlm("train", tmp_path / "tiny.yaml", "--run-id", "encoder", "-q")
    assert trained.code == 0, trained.err
    return tmp_path / "runs" / "encoder"


def test_m08_a_calibrated_checkpoint_is_written_and_the_source_is_untouched(
    ternlm: Any, run: Path, tmp_path: Path
) -> None:
    before, output = contents(run), tmp_path / "out" / "calibrated"
    outcome = ternlm("calibrate", "encoder", "--output", output, "--batches", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert contents(run) == before
    record = json.loads((output / "calibration.json").read_text())
    assert json.loads(outcome.out) == {"checkpoint": str(output), **record}
    assert record["batches"] == 3 and record["method"] == "exact" and record["step"] == 6
    assert record["kept"] == (record["after"]["loss"] <= record["before"]["loss"])
    assert "calibration.json" in checkpoint.verify(output)["files"]

    old, new = checkpoint.load(run / "checkpoints" / "step_000006"), checkpoint.load(output)
    sites = calibration.static_sites(new.model)
    assert sites and all(bool(site.frozen) for site in sites.values())
    for name, site in sites.items():
        now = record["scales"][name]["measured" if record["kept"] else "before"]
        assert site.rho.flatten().tolist() == now, name
    tensors = old.model.tensors()
    changed = {name for name, tensor in new.model.tensors().items() if not torch.equal(tensor, tensors[name])}
    assert changed <= {f"{name}.{kind}" for name in sites for kind in ("rho", "frozen")}
    assert new.config == old.config
    assert {name: value for name, value in new.state.items() if name != "calibration"} == old.state
    assert new.state["calibration"]["before"]["loss"] == record["before"]["loss"]

    scored = json.loads(ternlm("evaluate", output, "--json").out)
    assert scored["loss"] == pytest.approx(min(record["before"]["loss"], record["after"]["loss"]), rel=1e-6)
    trained = json.loads(ternlm("evaluate", "encoder", "--json").out)
    assert trained["loss"] == pytest.approx(record["before"]["loss"], rel=1e-6)
    assert json.loads(ternlm("inspect", output, "--json").out)["verified"] is True
    assert ternlm("fill", output, "The [MASK] fox").code == 0


def test_training_on_from_a_calibrated_checkpoint_moves_no_scale(ternlm: Any, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "calibrated"
    assert ternlm("calibrate", run, "--output", output, "--batches", 2, "--method", "ema").code == 0
    more = ternlm("train", "--resume-from", output, "--run-id", "more", "--steps", 9, "-q")
    assert more.code == 0, more.err
    before, after = checkpoint.load(output), checkpoint.load(tmp_path / "runs" / "more" / "checkpoints" / "step_000009")
    assert after.state["step"] == 9
    sites = calibration.static_sites(after.model)
    for name, site in calibration.static_sites(before.model).items():
        assert torch.equal(sites[name].rho, site.rho) and bool(sites[name].frozen), name


def test_the_result_is_told_in_words(ternlm: Any, run: Path, tmp_path: Path) -> None:
    outcome = ternlm("calibrate", "encoder@3", "--output", tmp_path / "calibrated", "--data", tmp_path / "train.txt")
    assert outcome.code == 0, outcome.err
    assert "validation loss" in outcome.out and f"next: ternlm evaluate {tmp_path / 'calibrated'}" in outcome.out
    assert json.loads((tmp_path / "calibrated" / "calibration.json").read_text())["step"] == 3


def test_an_interruption_leaves_nothing_behind(
    ternlm: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)

    def stopped(*args: Any, **options: Any) -> Any:
        raise Interrupted("stopped.")

    monkeypatch.setattr(calibration, "_measure", stopped)
    assert ternlm("calibrate", "encoder", "--output", tmp_path / "out" / "calibrated").code == 130
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_and_nothing_is_made(ternlm: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    held = tmp_path / "held.txt"
    for words, sentence in (
        (["--output", tmp_path / "there"], "exists already"),
        (["--output", run / "checkpoints" / "step_000007"], "holds the checkpoints of a run"),
        (["--output", tmp_path / "out", "--method", "mean"], "method 'mean' does not exist"),
        (["--output", tmp_path / "out", "--data", held], "100% of the documents"),
    ):
        outcome = ternlm("calibrate", "encoder", *words)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert sentence in outcome.err.splitlines()[-1], outcome.err
        assert not (tmp_path / "out").exists()


def test_a_model_that_scales_each_token_has_nothing_to_calibrate(ternlm: Any, recipe: Path, tmp_path: Path) -> None:
    assert ternlm("train", recipe, "--run-id", "causal", "--steps", 1, "-q").code == 0
    outcome = ternlm("calibrate", "causal", "--output", tmp_path / "out")
    assert outcome.code == 2 and "there is nothing to calibrate" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_streamed_its_text_is_asked_for_some(tmp_path: Path) -> None:
    streamed: Any = SimpleNamespace(config={"data": {"stream": True}}, path=tmp_path)
    with pytest.raises(SettingsError, match=r"trained on a stream.*--data FILE"):
        training_text(streamed, None, None)  # type: ignore[arg-type]
