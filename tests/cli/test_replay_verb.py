"""`ternlm replay`: one command from an anomaly to a verdict and an exit code, and nothing left behind."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from ternlm.training.trainer import Trainer

EDGY = ["anomaly.window=8", "anomaly.min_values=8", "anomaly.spike_scale=1e-3", "anomaly.grace_steps=0"]


@pytest.fixture
def evidence(ternlm, recipe: Path, tmp_path: Path) -> Path:
    """The first spike of a run of 16 steps that takes normal gradients for spikes."""
    assert ternlm("train", recipe, "--run-id", "edgy", "--steps", 16, "-q", *EDGY).code == 0
    return sorted((tmp_path / "runs" / "edgy" / "anomalies").glob("step_*"))[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def step_of(evidence: Path) -> int:
    return int(evidence.name[5:11])


def test_evidence_is_named_by_folder_or_by_run_and_step(ternlm, evidence: Path, tmp_path: Path) -> None:
    before = tree(tmp_path / "runs")
    outcome = ternlm("replay", evidence)
    assert outcome.code == 0, outcome.err
    assert f"replaying step {step_of(evidence)}: " in outcome.err
    assert outcome.out.splitlines()[-1] == f"{evidence.name}: reproduced bit for bit"
    for shown in ("recorded", "the same", "loss", "gradient norm", "model.", ".weight"):
        assert shown in outcome.out
    for reference in ("latest", "edgy", tmp_path / "runs" / "edgy"):
        assert ternlm("replay", reference, "--step", step_of(evidence)).out == outcome.out
    assert ternlm("replay", evidence.relative_to(tmp_path)).out == outcome.out
    assert tree(tmp_path / "runs") == before


def test_a_narrow_terminal_hides_no_digit(ternlm, evidence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = json.loads(ternlm("replay", evidence, "--json").out)["replayed"]
    monkeypatch.setenv("COLUMNS", "50")
    table = ternlm("replay", evidence).out
    assert "…" not in table
    assert str(numbers["loss"]) in table


def test_what_is_not_reproduced_ends_with_1_and_the_reason(ternlm, evidence: Path) -> None:
    event = json.loads((evidence / "event.json").read_text())
    event["values"] |= {"loss": "nan", "grad_norm": "inf"}
    (evidence / "event.json").write_text(json.dumps(event))
    outcome = ternlm("replay", evidence)
    assert outcome.code == 1
    assert "nan" in outcome.out
    assert outcome.out.splitlines()[-1].endswith(": not reproduced")
    assert outcome.err.splitlines()[-1].startswith(f"TernlmError: step {step_of(evidence)} is not reproduced: ")
    outcome = ternlm("replay", evidence, "--json")
    assert outcome.code == 1
    strict = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["verdict"] == "not reproduced"
    assert strict["recorded"]["loss"] == "nan"
    assert strict["recorded"]["grad_norm"] == "inf"
    assert strict["likely_reason"] in outcome.err


def test_json_holds_every_number(ternlm, evidence: Path) -> None:
    found = json.loads(ternlm("replay", evidence, "--json").out)
    assert (found["verdict"], found["likely_reason"], found["same_batch"]) == ("reproduced bit for bit", None, True)
    assert found["recorded"] == found["replayed"]
    assert found["steps_replayed"] == found["step"] - (found["checkpoint"] or 0)
    assert len(found["replayed"]["gradient_norms"]) > 10


def test_what_cannot_be_replayed_is_one_sentence(ternlm, evidence: Path, texts: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for words, code, part in (
        (["nowhere"], 3, "no run 'nowhere'"),
        (["edgy"], 2, f"--step N; run 'edgy' holds evidence of: {evidence.name}"),
        (["edgy", "--step", 3], 3, f"holds no evidence of step 3. There is: {evidence.name}"),
        ([runs / "edgy" / "anomalies" / "step_000003_loss_spike"], 3, "is no evidence of a run"),
        ([runs / "edgy" / "checkpoints" / "step_000003"], 3, "no run"),
    ):
        outcome = ternlm("replay", *words)
        assert (outcome.code, outcome.out) == (code, ""), words
        assert len(outcome.err.splitlines()) == 1
        assert part in outcome.err
    elsewhere = shutil.copytree(evidence, tmp_path / "anomalies" / evidence.name)
    assert ternlm("replay", elsewhere).code == 3, "its run is not there"
    (evidence / "batch.json").write_text("{")
    outcome = ternlm("replay", evidence)
    assert (outcome.code, outcome.err.count("\n")) == (3, 1)
    shutil.copytree(elsewhere, evidence, dirs_exist_ok=True)
    shutil.rmtree(texts)
    outcome = ternlm("replay", evidence)
    assert (outcome.code, "Traceback" in outcome.err) == (3, False)
    assert str(texts) in outcome.err


def test_ctrl_c_leaves_quietly_and_nothing_behind(
    ternlm, evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    seen: list[int] = []

    def interrupted(*_: object) -> None:
        seen.append(len(list((tmp_path / "scratch").iterdir())))
        raise KeyboardInterrupt

    before = tree(tmp_path / "runs")
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    outcome = ternlm("replay", evidence)
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err
    assert seen == [1]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert tree(tmp_path / "runs") == before
