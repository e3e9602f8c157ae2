"""The verbs, one after the other, on a folder of text: what a first user does, without a download."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ternlm import checkpoint
from ternlm.recipes import recipe_names
from ternlm.run_directory import read_jsonl

VERBS = [
    [],
    ["demo"],
    ["train"],
    ["resume"],
    ["replay"],
    ["sweep"],
    ["experiment"],
    ["plan"],
    ["recipes"],
    ["evaluate"],
    ["eval"],
    ["compare"],
    ["calibrate"],
    ["generate"],
    ["chat"],
    ["fill"],
    ["inspect"],
    ["analyze"],
    ["status"],
    ["watch"],
    ["runs"],
    ["data"],
    ["data", "prepare"],
    ["data", "stats"],
    ["data", "verify"],
    ["data", "list"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["tokenizer", "encode"],
    ["doctor"],
]


def test_the_help_of_every_verb_works_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ternlm.cli import app\n"
        f"for verb in {VERBS!r}:\n"
        "    for flag in ('--help', '-h'):\n"
        "        try:\n            app([*verb, flag])\n"
        "        except SystemExit as ended:\n            assert not ended.code, (verb, ended.code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage:") == 2 * len(VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_fits_the_promise_of_few_flags(ternlm, verb: list[str]) -> None:
    outcome = ternlm(*verb, "--help")
    assert outcome.code == 0
    assert "Usage:" in outcome.out
    assert len(set(re.findall(r"--[a-z][a-z-]+", outcome.out))) <= 20


def test_the_version_is_printed(ternlm) -> None:
    outcome = ternlm("--version")
    assert (outcome.code, outcome.out.split()[0]) == (0, "ternlm")


def test_the_whole_way_from_text_to_text(ternlm, recipe: Path, texts: Path, tmp_path: Path) -> None:
    counted = json.loads(ternlm("data", "stats", texts, "--sequence-length", 16, "--json").out)
    assert counted["train"]["documents"] == 2
    assert counted["train"]["tokens"] == counted["train"]["bytes"] + 2 * 2

    planned = json.loads(ternlm("plan", recipe, "--json", "--steps", "10").out)
    assert planned["steps"] == 10

    trained = ternlm("train", recipe, "--run-id", "first", "seed=3", "sample_every_steps=6")
    assert trained.code == 0, trained.err
    assert "step 6/6" in trained.out
    assert "next: ternlm generate" in trained.out
    run = tmp_path / "runs" / "first"
    assert len(read_jsonl(run / "metrics" / "scalars.jsonl")) == 6
    origins = json.loads((run / "meta" / "config_origin.json").read_text())
    assert origins["training.seed"] == "command line"
    assert origins["model.hidden_size"] == f"file {recipe}"

    scored = ternlm("evaluate", "first", "--json", "--output", tmp_path / "score.json")
    record = json.loads(scored.out)
    assert record == json.loads((tmp_path / "score.json").read_text())
    last = read_jsonl(run / "eval" / "eval_results.jsonl")[-1]
    assert record["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert record["step"] == 6
    assert "bits per byte" in ternlm("eval", "first@best", "--data", texts / "b.md").out

    words = ["generate", "first", "-p", "The", "--samples", 2, "--max-new-tokens", 7, "--seed", 5, "--json"]
    first, second = ternlm(*words), ternlm(*words)
    assert first.out == second.out
    samples = [json.loads(line) for line in first.out.splitlines()]
    assert [sample["prompt"] for sample in samples] == ["The", "The"]
    assert all(len(sample["ids"]) <= 7 for sample in samples)
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\n")
    written = ternlm("generate", "first", "--prompt-file", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl")
    assert written.code == 0
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["One", "Two"]

    shown = json.loads(ternlm("inspect", "latest", "--json").out)
    assert shown["verified"] is True
    assert all(matrix["distinct_codes"] == 3 for matrix in shown["matrices"])
    assert len(shown["matrices"]) == 2 * 7
    assert "verified by sha256" in ternlm("inspect", "first", "--layers").out

    longer = ternlm("resume", "first", "--steps", "8")
    assert longer.code == 0, longer.err
    assert checkpoint.newest_valid(run / "checkpoints").name == "step_000008"
    branched = ternlm("train", "--resume-from", "first@6", "--run-id", "second", "--steps", "7", "lr=1e-4")
    assert branched.code == 0, branched.err
    assert len(read_jsonl(tmp_path / "runs" / "second" / "metrics" / "scalars.jsonl")) == 1


def test_a_trained_tokenizer_is_used_and_shown(ternlm, recipe: Path, texts: Path, tmp_path: Path) -> None:
    trained = ternlm("tokenizer", "train", texts, "--output", tmp_path / "bpe", "--vocab-size", 300)
    assert trained.code == 0, trained.err
    shown = ternlm("tokenizer", "encode", tmp_path / "bpe", "The fox met 3 hens.")
    assert "bytes per token" in shown.out
    assert ternlm("tokenizer", "train", texts, "--output", tmp_path / "bpe").code == 2, "never overwritten"
    used = ternlm("train", recipe, "--tokenizer", tmp_path / "bpe", "--run-id", "bpe", "--steps", 1, "-q")
    assert (used.code, used.out) == (0, ""), used.err
    assert json.loads(ternlm("inspect", "bpe", "--json").out)["vocab_size"] == 300


def test_recipes_are_listed_printed_and_planned(ternlm, tmp_path: Path) -> None:
    listed = ternlm("recipes").out
    assert all(name in listed for name in recipe_names())
    assert set(json.loads(ternlm("presets", "--json").out)) == set(recipe_names())
    printed = ternlm("recipes", "bitnet-1m").out
    (tmp_path / "copy.yaml").write_text(printed)
    plans = [json.loads(ternlm("plan", name, "--json").out) for name in ("bitnet-1m", tmp_path / "copy.yaml")]
    assert plans[0] == plans[1]
    chart = ternlm("plan", "bitnet-1m", "--picture", tmp_path / "lr.png")
    assert "learning rate" in chart.out
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert ternlm("train", "bitnet-1m", "--dry-run").out.splitlines()[0] == chart.out.splitlines()[0]
    assert not (tmp_path / "runs").exists()


def test_the_doctor_reports_and_says_what_comes_next(ternlm) -> None:
    report = json.loads(ternlm("doctor", "--json").out)
    assert report["python"]["ok"]
    assert report["torch"]["ok"]
    assert {"cpu", "gpu", "default", "compiler", "disk", "hub"} <= report.keys()
    if report["disk"]["ok"]:
        outcome = ternlm("doctor")
        assert outcome.code == 0
        assert "Next: ternlm demo" in outcome.out


def test_corpora_are_listed(ternlm) -> None:
    assert "stories" in json.loads(ternlm("data", "list", "--json").out)
    assert "tinystories" in ternlm("data", "list").out


def test_t13_flags_beat_the_environment_which_beats_the_file(
    ternlm, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERNLM__training__max_steps", "2")
    monkeypatch.setenv("TERNLM__training__seed", "9")
    monkeypatch.setenv("TERNLM__tracking__csv", "false")
    assert ternlm("train", recipe, "--run-id", "r", "--steps", "1", "-q").code == 0
    run = tmp_path / "runs" / "r"
    origins = json.loads((run / "meta" / "config_origin.json").read_text())
    assert origins["training.max_steps"] == "command line"
    assert origins["training.seed"] == origins["tracking.csv"] == "environment"
    assert origins["training.batch_size"] == f"file {recipe}"
    loaded = checkpoint.load(run / "checkpoints" / "step_000001")
    assert loaded.config["training"]["seed"] == 9
    assert not (run / "logs" / "training_log.csv").exists()
    assert ternlm("train", recipe, "--run-id", "s", "--steps", "1", "-q", "csv=true", "seed=1").code == 0
    assert (tmp_path / "runs" / "s" / "logs" / "training_log.csv").exists()


def test_a_seed_decides_everything(ternlm, recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert ternlm("train", recipe, "--run-id", name, "--seed", 5, "-q").code == 0
    models = [checkpoint.load(tmp_path / "runs" / n / "checkpoints" / "step_000006").model.tensors() for n in "ab"]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_chat_answers_commands_and_survives_mistakes(ternlm, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ternlm("train", recipe, "--run-id", "r", "--steps", 1, "-q")
    lines = iter(["/temp 0", "/temp hot", "/nonsense", "The fox", "/reset", "/settings", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    outcome = ternlm("chat", "r", "--max-new-tokens", 3)
    assert outcome.code == 0
    for part in ("temperature = 0.0", "unknown command '/nonsense'", "context cleared", "/topk"):
        assert part in outcome.out
