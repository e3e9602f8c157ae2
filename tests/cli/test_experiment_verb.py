"""`ternlm experiment`, and the data verbs beside it, as a user types them."""

import json
from pathlib import Path

import pytest

EXPERIMENT = """\
experiment_name: small
description: of the verb
model: {hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
        intermediate_size: 40, max_position_embeddings: 24}
data: {source: %s, sequence_length: 16, validation_fraction: 0.2, test_fraction: 0.2}
training: {max_steps: 4, batch_size: 4, precision: fp32, device: cpu, threads: 1, checkpoint_every_steps: 2}
tracking: {every_steps: 1, tensorboard: false}
evaluation: {every_steps: 2}
generation: {prompts: [Story], samples: 2, max_new_tokens: 5}
"""


@pytest.fixture
def file(tmp_path: Path, texts: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT % texts, encoding="utf-8")
    return path


def test_every_stage_is_said_once_and_its_result_shown(ternlm, file: Path) -> None:
    outcome = ternlm("experiment", file)
    assert outcome.code == 0, outcome.err
    for number, stage in enumerate(("prepare", "train", "evaluate", "generate"), start=1):
        assert f"[{number}/4] {stage}" in outcome.out
    assert "letters and symbols: Latin" in outcome.out
    assert "bytes per token" in outcome.out
    assert "test bits per byte" in outcome.out
    assert "without a network, on test: uniform 8.000" in outcome.out
    summary = json.loads(Path("runs/small/experiment_summary.json").read_text(encoding="utf-8"))
    assert f"{summary['results']['test']['bpb']:.4f}" in outcome.out


def test_json_and_quiet_print_that_alone(ternlm, file: Path) -> None:
    printed = json.loads(ternlm("experiment", file, "--json").out)
    assert (printed["experiment"], printed["state"]) == ("small", "finished")
    assert ternlm("experiment", file, "-q").out == ""


def test_options_and_assignments_reach_run_and_measurement(ternlm, file: Path) -> None:
    words = ("--max-samples", 2, "--steps", 3, "--seed", 8, "--name", "other", "--json",
             "eval.splits=[validation]", "generation.samples=1", "optimizer.learning_rate=1e-3")  # fmt: skip
    printed = json.loads(ternlm("experiment", file, *words).out)
    config = printed["config"]
    assert (config["data"]["max_documents"], config["training"]["max_steps"], config["training"]["seed"]) == (2, 3, 8)
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert "validation" in printed["results"]
    assert "test" not in printed["results"]
    assert printed["results"]["generation"]["samples"] == 1
    assert Path("runs/other/experiment_summary.json").exists()


def test_the_command_line_says_where_it_goes_before_the_file_does(ternlm, file: Path, tmp_path: Path) -> None:
    with file.open("a", encoding="utf-8") as text:
        text.write("output: {directory: inside}\n")
    for words, folder in (
        ((), "inside"),
        (("--name", "other"), "runs/other"),
        (("--runs-dir", "there"), "there/small"),
        (("--name", "other", "output.directory=both"), "both"),
    ):
        outcome = ternlm("experiment", file, "-q", *words)
        assert outcome.code == 0, outcome.err
        assert Path(folder, "experiment_summary.json").exists()


def test_a_dry_run_shows_the_plan_and_creates_nothing(ternlm, file: Path) -> None:
    outcome = ternlm("experiment", file, "--dry-run")
    assert outcome.code == 0
    assert "parameters" in outcome.out
    assert not Path("runs").exists()


def test_what_was_translated_is_said_before_anything_else(ternlm, tmp_path: Path, texts: Path) -> None:
    model = {"model_type": "simplified_slm", "hidden_size": 24, "num_hidden_layers": 1, "use_cache": True}
    values = {
        "experiment_name": "theirs",
        "model": {"params": model, "type": "flat"},
        "data": {"dataset": str(texts), "max_seq_length": 16, "val_ratio": 0.2, "test_ratio": 0.2},
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 2},
        "evaluation": {"num_generation_samples": 1, "generation_max_tokens": 4},
        "hardware": {"device": "cpu"},
    }
    (tmp_path / "theirs.json").write_text(json.dumps(values))
    outcome = ternlm("experiment", tmp_path / "theirs.json", "training.precision=fp32")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("note: model.use_cache is left out")
    assert "2 sequences x 2 passes: training.batch_size=4 per step" in outcome.out


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "no experiment given"),
        (("nothing",), 2, "unknown experiment 'nothing'"),
        (("absent.yaml",), 2, "settings file 'absent.yaml' cannot be read"),
        (("hgrn-nano",), 2, "'hgrn-nano' is a recipe and no experiment. Train it with: ternlm train hgrn-nano"),
        (("small.yaml", "generation.temprature=1"), 2, "generation.temprature"),
        (("small.yaml", "generation.temprature=1", "--dry-run"), 2, "generation.temprature"),
        (
            ("small.yaml", "evaluation.splits=test"),
            2,
            "evaluation.splits='test' is refused: must be a list in brackets",
        ),
        (("small.yaml", "--name", "a/b"), 2, "'a/b' is not a plain name"),
        (("small.yaml", "--max-samples", "0"), 2, "data.max_documents"),
    ],
)
def test_mistakes_are_one_sentence(ternlm, file: Path, words: tuple[str, ...], code: int, sentence: str) -> None:
    outcome = ternlm("experiment", *words)
    assert outcome.code == code
    assert sentence in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_recipes_lists_experiments_and_prints_one(ternlm) -> None:
    listed = ternlm("recipes").out
    assert "stories-hgrn" in listed[listed.index("\nexperiments\n") :]
    assert ternlm("recipes", "stories-hgrn").out.startswith("description:")


def test_data_verbs_report_what_was_no_text(ternlm, texts: Path) -> None:
    (texts / "c.txt").write_bytes(b"caf\xe9 and \xff")
    refused = ternlm("data", "stats", texts)
    assert refused.code == 3
    assert "c.txt is not UTF-8: byte 0xe9 at offset 3, the first of 2" in refused.err
    for handling, done in (("replace", "read as U+FFFD"), ("skip", "left out")):
        outcome = ternlm("data", "stats", texts, "--encoding-errors", handling)
        assert outcome.code == 0
        assert "1 document held 2 invalid UTF-8 sequences" in outcome.out
        assert done in outcome.out
        counted = json.loads(ternlm("data", "stats", texts, "--encoding-errors", handling, "--json").out)
        assert counted["train"]["invalid_bytes"]["sequences"] == 2
        assert counted["train"]["scripts"]["Latin"] > 0.9


def test_max_samples_limits_training_as_well(ternlm, recipe: Path) -> None:
    outcome = ternlm("train", recipe, "--max-samples", 1, "-q", "--run-id", "one")
    assert outcome.code == 0, outcome.err
    config = json.loads(Path("runs/one/meta/config.json").read_text(encoding="utf-8"))
    assert config["data"]["max_documents"] == 1
