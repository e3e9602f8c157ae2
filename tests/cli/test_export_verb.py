"""`ternlm export`: a folder that the other verbs read, with a card; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(ternlm: Any, recipe: Path) -> str:
    """A transformer that was trained for six steps."""
    trained = ternlm("train", recipe, "--run-id", "six", "evaluation.every_steps=6", "-q")
    assert trained.code == 0, trained.err
    return "six"


def test_a_packed_folder_is_read_by_the_other_verbs(ternlm: Any, run: str, texts: Path, tmp_path: Path) -> None:
    outcome = ternlm("export", run, "--output", "out", "--license", "mit")
    assert outcome.code == 0, outcome.err
    assert "loaded again with ternlm: largest difference of a logit 0 " in outcome.out
    assert "next: ternlm generate out" in outcome.out
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n") and "# out" in text and str(tmp_path) not in text
    assert "| loss |" in text and "| step | 6 |" in text and "of 'texts'" in text
    for words in (["evaluate", "--data", texts / "a.txt", "--json"], ["generate", "--prompt", "The", "--greedy"]):
        of_run, of_export = (ternlm(words[0], where, *words[1:]) for where in (run, "out"))
        assert of_run.code == 0 and of_export.code == 0, of_export.err
        if words[0] == "evaluate":
            first, second = json.loads(of_run.out), json.loads(of_export.out)
            assert first["loss"] == second["loss"] and first["bpb"] == second["bpb"]
        else:
            assert of_run.out == of_export.out
    assert "at most 3 distinct codes" in ternlm("inspect", "out").out


def test_an_export_of_an_export_has_the_same_weights(ternlm: Any, run: str, tmp_path: Path) -> None:
    assert ternlm("export", f"{run}@3", "--output", "one").code == 0
    outcome = ternlm("export", "one", "--output", "two", "--json")
    facts = json.loads(outcome.out)
    assert facts["step"] == 3 and facts["verification"]["status"] == "passed"
    weights = [(tmp_path / name / "model.packed.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume", "out"], "no run 'out'"),
        (["analyze", "out"], "holds packed weights"),
        (["calibrate", "out", "--output", "other"], "cannot be trained or saved as a checkpoint"),
        (["export", "out", "--to", "hf", "--output", "other"], "--to packed and --to hf-packed take it"),
        (["export", "six", "--output", "out"], "'out' exists already"),
        (["export", "six", "--output", "runs/six/checkpoints/other"], "holds the checkpoints of a run"),
        (["export", "six", "--output", "other", "--license", "my licence"], "--license 'my licence' is no plain word"),
        (["export", "nothing", "--output", "other"], "no run 'nothing'"),
    ],
)
def test_what_cannot_be_done_with_packed_weights_is_one_sentence(
    ternlm: Any, run: str, tmp_path: Path, words: list[str], message: str
) -> None:
    assert ternlm("export", run, "--output", "out", "--no-verify").code == 0
    outcome = ternlm(*words)
    assert outcome.code in (2, 3) and message in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert not (tmp_path / "other").exists()


def test_a_folder_for_transformers_holds_what_it_needs(ternlm: Any, run: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    outcome = ternlm("export", run, "--to", "hf-packed", "--output", "out", "--name", "Fox")
    assert outcome.code == 0, outcome.err
    assert "with activations not rounded" in outcome.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "export.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert "# Fox" in (tmp_path / "out" / "README.md").read_text()


def test_a_full_precision_run_is_exported_for_transformers_only(ternlm: Any, recipe: Path, tmp_path: Path) -> None:
    plain = ("quantization.weights=none", "quantization.activations=none")
    assert ternlm("train", recipe, "--run-id", "plain", *plain, "-q").code == 0
    refused = ternlm("export", "plain", "--output", "out")
    assert refused.code == 2 and "full-precision transformer with --to hf" in refused.err
    assert ternlm("export", "plain", "--to", "hf", "--output", "out", "--no-verify").code == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
