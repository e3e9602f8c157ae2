"""`ternlm analyze --chunks` as a user runs it, and the chunks in an analysis of held-out text."""

import json
from pathlib import Path
from typing import Any

import pytest

from ternlm.models import MODELS

TEXT = "Hé, the fox\nmet 你 and 🙂."
SMALL = ("--max-tokens", 64, "--repeats", 1, "--no-sensitivity", "--device", "cpu")

needs_hnet = pytest.mark.skipif("hnet" not in MODELS, reason="there is no family that cuts")


@pytest.fixture
def run(ternlm: Any, texts: Path, tmp_path: Path) -> str:
    """The name of a run of one step that cuts text twice."""
    (tmp_path / "cuts.yaml").write_text(
        "model: {family: hnet, d_model: [24, 32, 40], num_blocks: [[1, 0, 1], [1, 0, 1], [1]]}\n"
        f"data: {{source: {texts}, sequence_length: 16, validation_fraction: 0.1, test_fraction: 0}}\n"
        "training: {max_steps: 1, batch_size: 2, precision: fp32, device: cpu, threads: 1}\n"
        "tracking: {tensorboard: false}\nevaluation: {every_steps: 100000}\n"
    )
    outcome = ternlm("train", tmp_path / "cuts.yaml", "--run-id", "cuts", "--quiet")
    assert outcome.code == 0, outcome.err
    return "cuts"


@needs_hnet
def test_the_chunks_of_a_text_are_printed_and_written(ternlm: Any, run: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "chunks"
    outcome = ternlm("analyze", run, "--chunks", TEXT, "--output", folder, "--format", "both")
    assert outcome.code == 0, outcome.err
    assert {file.name for file in folder.iterdir()} == {"chunks.json", "chunks.html", "chunks.png", "chunks.svg"}
    record = json.loads((folder / "chunks.json").read_text())
    assert (record["text"], record["family"], len(record["stages"])) == (TEXT, "hnet", 2)
    shown = outcome.out.replace("│", "").replace("↵", "")
    assert "the fox\nmet" in shown and "stage 1" in shown
    assert json.loads(ternlm("analyze", run, "--chunks", TEXT, "--json").out) == record


@needs_hnet
def test_an_analysis_of_held_out_text_counts_chunks_as_well(ternlm: Any, run: str, tmp_path: Path) -> None:
    outcome = ternlm("analyze", run, *SMALL, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "words cut" in outcome.out
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [row["stage"] for row in record["chunks"]] == [0, 1]
    assert (tmp_path / "out" / "chunks.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_cut_is_one_sentence(ternlm: Any, recipe: Path) -> None:
    assert ternlm("train", recipe, "--run-id", "flat", "--steps", 1, "--quiet").code == 0
    outcome = ternlm("analyze", "flat", "--chunks", "a b")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "'bitnet' does not cut" in outcome.err
