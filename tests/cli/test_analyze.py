"""`ternlm analyze` as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--max-tokens", 200, "--repeats", 1, "--device", "cpu")
PICTURES = {"occupancy", "scales", "weights", "activations", "sensitivity", "time"}


@pytest.fixture
def run(ternlm: Any, recipe: Path) -> str:
    """The name of a run of six steps."""
    assert ternlm("train", recipe, "--run-id", "seen", "--quiet").code == 0
    return "seen"


def test_an_analysis_fits_a_screen_and_says_where_to_look(ternlm: Any, run: str) -> None:
    outcome = ternlm("analyze", run, *SMALL)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) <= 25
    assert "step 6" in lines[0] and "ternary weights" in lines[0]
    assert any(line.startswith("weights at 0") for line in lines)
    assert any(line.startswith("loss ") and "in full precision" in line for line in lines)


def test_an_earlier_checkpoint_and_every_row_can_be_asked_for(ternlm: Any, run: str) -> None:
    outcome = ternlm("analyze", f"{run}@3", *SMALL, "--full", "--backward", "--no-sensitivity")
    assert outcome.code == 0, outcome.err
    assert "step 3" in outcome.out
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.mlp.gate_up", "block 1", "backward"):
        assert name in outcome.out
    assert "in full precision" not in outcome.out


def test_json_is_all_that_is_printed(ternlm: Any, run: str) -> None:
    outcome = ternlm("analyze", run, *SMALL, "--json")
    record = json.loads(outcome.out)
    assert (record["step"], record["family"], record["weights"]) == (6, "bitnet", ["ternary"])
    assert record["tokens"] == 192
    assert len(record["matrices"]) == 14
    assert len(record["sensitivity"]["layers"]) == 8


def test_a_folder_gets_data_tables_and_pictures(ternlm: Any, run: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    outcome = ternlm("analyze", run, *SMALL, "--output", folder, "--format", "both")
    assert outcome.code == 0, outcome.err
    tables = {"matrices", "sites", "stream", "sensitivity", "time"}
    expected = {"analysis.json", *(f"{name}.csv" for name in tables)}
    expected |= {f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == expected
    assert json.loads((folder / "analysis.json").read_text())["step"] == 6
    assert len((folder / "matrices.csv").read_text().splitlines()) == 15
    assert (folder / "time.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_is_one_sentence(ternlm: Any, run: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = ternlm("analyze", run, *SMALL, "--no-sensitivity", "--output", tmp_path / "file")
    assert outcome.code == 3
    assert outcome.err.strip().endswith("Choose another --output.")


def test_a_full_precision_twin_is_said_to_be_one(ternlm: Any, recipe: Path) -> None:
    twin = ("quantization.weights=none", "quantization.activations=none")
    assert ternlm("train", recipe, "--run-id", "twin", "--quiet", *twin).code == 0
    outcome = ternlm("analyze", "twin", *SMALL)
    assert outcome.code == 0, outcome.err
    assert "Nothing is quantized" in outcome.out
    assert "full-precision weights" in outcome.out


def test_another_text_can_be_read(ternlm: Any, run: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Another fox met other hens. " * 40)
    record = json.loads(ternlm("analyze", run, *SMALL, "--data", tmp_path / "other.txt", "--json").out)
    assert (record["data"], record["split"]) == (str(tmp_path / "other.txt"), "train")
