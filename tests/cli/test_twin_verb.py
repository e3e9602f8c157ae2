"""`ternlm twin`: both arms are ordinary runs on the same tokens, the gap is theirs, and what went wrong is said."""

import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from builders import TRAIN
from ternlm.run_directory import read_jsonl

HANG_GUARD_S = 120
QUICK = ("--no-timing", "evaluation.every_steps=3", "evaluation.max_tokens=none")
HELD_OUT = "\n<|endoftext|>\n".join(
    f"Held-out story {n}: a fox met {n} hens, and they sang all day." for n in range(13)
)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """A text of thirteen documents that nothing is trained on."""
    (tmp_path / "novel.txt").write_text(HELD_OUT)
    return tmp_path / "novel.txt"


def settings_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "meta" / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ternary", "data.source=x"], ["--ternary data.source=x", "both arms have the same"]),
        (["--twin", "training.batch_size=5"], ["--twin training.batch_size=5", "both arms have the same"]),
        (["--twin", "seed=5"], ["--twin training.seed=5"]),
        (["--ternary", "steps=5"], ["unknown setting"]),
        (["--ternary", "training.max_steps=5"], ["--ternary training.max_steps=5"]),
        (["--ternary", "model.hidden_size=32"], ["--ternary model.hidden_size=32"]),
        (["--ternary", "tokenizer.name=train"], ["--ternary tokenizer.name=train"]),
        (["--twin", "quantization.weights=ternary"], ["the twin rounds nothing"]),
        (["quantization.weights=none"], ["full precision already"]),
        (["--learning-rates", "1e-3,2e-3,3e-3,4e-3,5e-3"], ["5 learning rates are too many"]),
        (["--learning-rates", "1e-3,x"], ["learning_rates"]),
        (["--twin-learning-rates", "1e-3,1e-3"], ["each given once"]),
        (["--learning-rates", "1e-3,2e-3", "--sweep-share", "0.1"], ["0.2 to 1 of the budget"]),
        (["--seeds", "0,0"], ["each given once"]),
        (["--seeds", "0,1", "seed=3"], ["--seeds both say the seed"]),
        (["--text", "a=novel.txt", "--text", "a=b.txt"], ["two texts are called 'a'"]),
        (["--text", "=novel.txt"], ["write NAME=PATH"]),
        (["--ptq", "quantization.quantizer=lsq"], ["Leave --ptq out"]),
        (["--run-id", "../x"], ["not a plain name"]),
    ],
    ids=lambda value: " ".join(value)[:48] if isinstance(value, list) else None,
)
def test_a_wrong_twin_is_one_sentence_and_nothing_is_created(
    ternlm, recipe: Path, novel: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    outcome = ternlm("twin", recipe, *words)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err
    assert not (tmp_path / "runs").exists()


def test_the_training_text_is_no_held_out_text(ternlm, recipe: Path, texts: Path, tmp_path: Path) -> None:
    outcome = ternlm("twin", recipe, "--text", f"seen={texts / 'b.md'}", *QUICK, "data.validation_fraction=0.001")
    assert outcome.code == 3, outcome
    assert "text 'seen' is not held out: " in outcome.err
    assert "b.md' is training data" in outcome.err
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(TRAIN))
    (tmp_path / "copy.txt").write_text(f"An own story.\n<|endoftext|>\n{TRAIN[3]}\n<|endoftext|>\n{TRAIN[8]}")
    words = ("--data", "stories.txt", "--text", "copy.txt", "data.validation_fraction=0.001")
    outcome = ternlm("twin", recipe, *words, *QUICK)
    assert outcome.code == 3, outcome
    assert "text 'copy' is not held out: 2 of its 3 documents are in the training data" in outcome.err
    assert not list((tmp_path / "runs").glob("*/*/meta"))


def test_a_masked_objective_without_a_mask_token_is_refused_before_anything_is_trained(ternlm, tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(TRAIN))
    words = ("--data", "stories.txt", "--steps", "3", "tokenizer.name=byte", "model.vocab_size=null", *QUICK)
    outcome = ternlm("twin", "qdyt-4m", *words)
    assert outcome.code == 2, outcome
    assert "mask" in outcome.err
    assert not list((tmp_path / "runs").glob("*/*/meta"))


def test_a_dry_run_shows_the_runs_and_the_sum_of_their_plans(ternlm, recipe: Path, tmp_path: Path) -> None:
    words = ("twin", recipe, "--steps", 20, "--learning-rates", "1e-3,4e-3", "--seeds", "3,4", "--dry-run")
    listed = json.loads(ternlm(*words, "--json").out)
    assert [(run["id"], run["steps"], run["learning_rate"]) for run in listed["runs"]] == [
        ("ternary-rate-0.001", 5, 1e-3),
        ("ternary-rate-0.004", 5, 4e-3),
        ("ternary-s3", 20, None),
        ("full-s3", 20, 2e-3),
        ("ternary-s4", 20, None),
        ("full-s4", 20, 2e-3),
    ]
    assert listed["total"]["tokens"] == sum(run["tokens"] for run in listed["runs"]) == (2 * 5 + 4 * 20) * 4 * 16
    assert "the best above" in ternlm(*words).out
    assert not (tmp_path / "runs").exists()


def test_a_recipes_twin_settings_are_those_of_the_full_precision_arm_alone(ternlm, recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "twin: {optimizer.learning_rate: 0.00017, model.initializer_range: 0.07}\n")
    outcome = ternlm("twin", recipe, "--dry-run", "--json", "lr=3e-3", "--twin", "grad_clip=2")
    assert "learning_rate=0.003 is the ternary arm's; the twin has 0.00017." in outcome.err
    runs = json.loads(outcome.out)["runs"]
    assert [run["learning_rate"] for run in runs] == [3e-3, 0.00017]
    assert runs[0]["settings"] == {}
    assert runs[1]["settings"] == {
        "quantization.weights": "none",
        "quantization.activations": "none",
        "optimizer.learning_rate": 0.00017,
        "model.initializer_range": 0.07,
        "training.grad_clip": 2,
    }


def test_e12_both_arms_are_trained_on_the_same_tokens_and_the_gap_is_theirs(
    ternlm, recipe: Path, novel: Path, tmp_path: Path
) -> None:
    words = ("twin", recipe, *QUICK, "--text", f"novel={novel}", "--ptq", "--twin", "lr=3e-3", "--run-id", "t")
    outcome = ternlm(*words)
    assert outcome.code == 0, outcome
    folder = tmp_path / "runs" / "t"
    ternary, full = (settings_of(folder / arm) for arm in ("ternary", "full"))
    assert (ternary["quantization"]["weights"], full["quantization"]["weights"]) == ("ternary", "none")
    assert full["optimizer"]["learning_rate"] == 3e-3
    found = json.loads((folder / "comparison.json").read_text())
    assert {row["setting"] for row in found["differs"]} == {
        "quantization.weights",
        "quantization.activations",
        "optimizer.learning_rate",
    }
    for text, data in (("validation", ()), ("novel", ("--data", novel))):
        told = [json.loads(ternlm("evaluate", f"t/{arm}", *data, "--json").out) for arm in ("ternary", "full")]
        row = next(each for each in found["texts"] if each["name"] == text)
        assert row["gap_nats"] == pytest.approx(told[0]["loss"] - told[1]["loss"], abs=1e-9)
        assert row["gap_bpb"] == pytest.approx(told[0]["bpb"] - told[1]["bpb"], abs=1e-9)
        assert row["after"]["full"]["perplexity"] == pytest.approx(told[1]["perplexity"])
        assert row["rounded"]["loss"] != row["after"]["full"]["loss"]
    assert row["documents"] == 13
    kept = json.loads((folder / "scores" / "full--novel.json").read_text())["by_document"]
    assert sum(kept["nats"]) / sum(kept["targets"]) == pytest.approx(told[1]["loss"])
    assert sum(kept["text_nats"]) / (math.log(2) * sum(kept["bytes"])) == pytest.approx(told[1]["bpb"])
    assert row["gap_nats_ci95"][0] <= row["gap_nats"] <= row["gap_nats_ci95"][1]
    assert f"{row['gap_nats']:+.4f}" in outcome.out
    assert outcome.out.count("is untuned") == 2, "one learning rate is not a tuned arm"
    for page in ("report.html", "report.md"):
        assert f"{row['gap_nats']:+.4f}" in (folder / page).read_text()

    kept = [*folder.glob("scores/*.json"), *folder.glob("*/status.json"), *folder.glob("*/checkpoints/*/*.json")]
    before = {file: file.stat().st_mtime_ns for file in kept}
    again = ternlm(*words, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["texts"] == found["texts"]
    assert {file: file.stat().st_mtime_ns for file in kept} == before, "nothing is trained or scored twice"
    assert ternlm(*words, "lr=7e-3").code == 2, "other settings are another twin"
    assert sorted(re.findall(r"^(t/\S*) ", ternlm("runs").out, re.MULTILINE)) == ["t/full", "t/ternary"]
    assert ternlm("status", "t/full", "--json").code == 0


@pytest.mark.slow
def test_each_arms_rate_is_chosen_by_the_validation_loss_of_its_own_complete_schedules(
    ternlm, recipe: Path, tmp_path: Path
) -> None:
    words = ("--steps", 8, "--learning-rates", "1e-9,4e-3", "--twin-learning-rates", "2e-3,1e-9,1e-8", "--seeds", "5,6")
    outcome = ternlm("twin", recipe, *QUICK, *words, "--sweep-share", 0.5, "--run-id", "t", "--json")
    assert outcome.code == 0, outcome.err
    found, folder = json.loads(outcome.out), tmp_path / "runs" / "t"
    for arm, points in (("ternary", 2), ("full", 3)):
        tuning = found["arms"][arm]["tuning"]
        losses = {}
        for point in tuning["points"]:
            run = folder / point["id"]
            losses[point["learning_rate"]] = read_jsonl(run / "eval" / "eval_results.jsonl")[-1]["val/loss"]
            assert (settings_of(run)["training"]["max_steps"], settings_of(run)["training"]["seed"]) == (4, 5)
            assert settings_of(run)["schedule"]["warmup_steps"] == 1, "the warm-up is as short as the run"
        assert len(losses) == points
        assert tuning["chosen"] == min(losses, key=losses.__getitem__)
        assert tuning["edge"] == "highest"
        for seed in (5, 6):
            trained = settings_of(folder / f"{arm}-s{seed}")
            assert trained["optimizer"]["learning_rate"] == tuning["chosen"]
            assert (trained["training"]["max_steps"], trained["training"]["seed"]) == (8, seed)
    text = found["texts"][0]
    gaps = [row["gap_nats"] for row in text["seeds"]]
    assert text["gap_nats"] == pytest.approx(sum(gaps) / 2)
    assert text["spread_nats"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2**0.5)
    assert "highest that was tried" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_an_arm_that_diverges_is_reported_with_its_exit_code_and_no_gap(ternlm, recipe: Path, tmp_path: Path) -> None:
    words = ("--steps", 40, "grad_clip=0", "--twin", "lr=1e30", "--run-id", "t")
    outcome = ternlm("twin", recipe, *QUICK, *words)
    assert outcome.code == 4, outcome
    assert "full-precision arm: full diverged" in outcome.err
    folder = tmp_path / "runs" / "t"
    found = json.loads((folder / "comparison.json").read_text())
    assert [found["arms"][arm]["runs"][0]["state"] for arm in ("ternary", "full")] == ["finished", "diverged"]
    assert found["texts"][0]["gap_nats"] is None
    assert found["texts"][0]["after"]["ternary"]["loss"] > 0
    assert "diverged" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_l01_a_twin_that_was_interrupted_goes_on_where_it_stopped(ternlm, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "t"
    rows = folder / "full" / "metrics" / "scalars.jsonl"

    def interrupt() -> None:
        last = time.monotonic() + HANG_GUARD_S
        while time.monotonic() < last and (not rows.exists() or rows.read_bytes().count(b"\n") < 5):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    outcome = ternlm("twin", recipe, *QUICK, "--steps", 600, "evaluation.every_steps=9999", "--run-id", "t")
    assert outcome.code == 130, outcome
    assert f"ternlm twin --resume {Path('runs/t')}" in outcome.err
    assert not (folder / "comparison.json").exists()
    before = (folder / "ternary" / "status.json").read_bytes()
    outcome = ternlm("twin", "--resume", "t", "--json")
    assert outcome.code == 0, outcome.err
    assert (folder / "ternary" / "status.json").read_bytes() == before, "what was finished is not touched"
    assert [row["step"] for row in read_jsonl(rows)] == list(range(1, 601))
    assert json.loads(outcome.out)["texts"][0]["gap_nats"] is not None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no recipe given"),
        (["--resume", "nothing"], 3, "no twin 'nothing'"),
        (["bitnet-1m", "--resume", "x"], 2, "takes no settings"),
        (["bitnet-1", "--dry-run"], 2, "Did you mean 'bitnet-1m'?"),
    ],
)
def test_what_is_missing_is_one_sentence(ternlm, words: list[str], code: int, message: str) -> None:
    outcome = ternlm("twin", *words)
    assert outcome.code == code, outcome
    assert message in outcome.err


def test_epochs_of_a_tokenizer_trained_here_can_be_planned_once_it_is_prepared(ternlm, tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(TRAIN * 9))
    words = ("bitnet-10m", "--data", "stories.txt", "--epochs", "3", "--dry-run", "tokenizer.vocab_size=270")
    assert "needs the prepared data" in ternlm("twin", *words, "data.sequence_length=16").err
    prepared = ternlm("data", "prepare", "stories.txt", "--tokenizer", "train", "--vocab-size", "270")
    assert prepared.code == 0, prepared
    outcome = ternlm("twin", *words, "data.sequence_length=16")
    assert outcome.code == 0, outcome
    assert "2 runs from bitnet-10m" in outcome.out
