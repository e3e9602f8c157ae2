"""What users get wrong: one clear sentence on stderr, the right exit code, nothing created and nothing lost."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ternlm import checkpoint
from ternlm.checkpoint.manifest import seal
from ternlm.tokenizers import train_bpe


def refused(outcome: Any, code: int, *parts: str) -> None:
    """One sentence of the expected kind, and no traceback."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    sentences = [line for line in outcome.err.splitlines() if line.strip()]
    assert sentences
    assert len(sentences[-1]) < 600
    for part in parts:
        assert part in outcome.err, (part, outcome.err)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(ternlm, recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of one step."""
    assert ternlm("train", recipe, "--run-id", "r", "--steps", 4, "-q").code == 0
    return tmp_path / "runs" / "r"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizer.learning_rat=1"], ["'optimizer.learning_rat'", "Did you mean 'optimizer.learning_rate'?"]),
        (["learnin_rate=1"], ["Did you mean 'optimizer.learning_rate'?"]),
        (["lr=-1"], ["optimizer.learning_rate=-1", "above 0"]),
        (["--lr", "fast"], ["optimizer.learning_rate='fast'", "not a number"]),
        (["--steps", "1.5"], ["training.max_steps='1.5'", "whole number"]),
        (["max_steps=.inf"], ["training.max_steps=inf"]),
        (["sequence_length=4096"], ["max_position_embeddings=24"]),
        (["precision=fp16", "hidden_act=relu2"], ["relu2", "bf16"]),
        (["vocab_size=300"], ["model.vocab_size or tokenizer.vocab_size"]),
        (["x=1=2"], ["unknown setting 'x'"]),
        (["prompts=[1"], ["malformed"]),
        (["every_steps=0"], ["several sections"]),
        (["tracking.every_steps=0"], ["tracking.every_steps"]),
        (["--device", "gpu9"], ["unknown device 'gpu9'"]),
        (["bitnet-1m"], ["two recipes"]),
        (["--run-id", "../x"], ["not a plain name"]),
        (["hidden_size=25"], ["hidden_size=25"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_t12_a_wrong_setting_is_one_sentence_and_nothing_is_created(
    ternlm, recipe: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    before = tree(tmp_path)
    refused(ternlm("train", recipe, *words), 2, "SettingsError: ", *parts)
    assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train"], 2),
        (["train", "bitnet-1"], 2),
        (["train", "missing.yaml"], 2),
        (["plan"], 2),
        (["plan", "nonsense"], 2),
        (["recipes", "nonsense"], 2),
        (["nonsense"], 2),
        (["train", "bitnet-1m", "--nonsense"], 2),
        (["generate"], 2),
        (["resume", "nowhere"], 3),
        (["evaluate", "nowhere"], 3),
        (["generate", "latest", "-p", "x"], 3),
        (["inspect", "nowhere@best"], 3),
        (["chat", "nowhere"], 3),
        (["data", "stats", "missing.txt"], 3),
        (["data", "prepare", "missing/*.txt"], 3),
        (["tokenizer", "encode", "./missing", "text"], 3),
        (["tokenizer", "train", "missing.txt", "--output", "out"], 3),
        (["train", "bitnet-1m", "--data", "missing.txt"], 3),
        (["train", "bitnet-1m", "--resume-from", "nowhere"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_exist_is_one_sentence(ternlm, tmp_path: Path, words: list[str], code: int) -> None:
    refused(ternlm(*words), code)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def test_a_misspelled_recipe_is_answered(ternlm) -> None:
    refused(ternlm("train", "bitnet-95"), 2, "Did you mean 'bitnet-95m'?")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["holds"]),
        (b" \n\n ", []),
        (b"caf\xe9 au lait " * 200, ["UTF-8"]),
        (b"too short", ["window"]),
    ],
    ids=["empty", "blank", "latin-1", "short"],
)
def test_a_corpus_that_cannot_be_used_is_one_sentence_and_makes_no_run(
    ternlm, recipe: Path, texts: Path, tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    shutil.rmtree(texts)
    texts.mkdir()
    (texts / "only.txt").write_bytes(content)
    refused(ternlm("train", recipe, "--run-id", "r"), 3, "DataError: ", *parts)
    assert not (tmp_path / "runs").exists()


def test_bytes_that_are_not_utf8_can_be_replaced_on_request(ternlm, recipe: Path, texts: Path) -> None:
    (texts / "c.txt").write_bytes(b"caf\xe9 " * 100)
    refused(ternlm("train", recipe, "-q"), 3, "c.txt")
    assert ternlm("train", recipe, "-q", "encoding_errors=replace").code == 0


def test_an_empty_folder_is_one_sentence(ternlm, recipe: Path, texts: Path) -> None:
    shutil.rmtree(texts)
    texts.mkdir()
    refused(ternlm("train", recipe), 3, str(texts))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "edited", "removed"])
def test_l11_a_damaged_checkpoint_is_named_and_the_run_falls_back(
    ternlm, trained: Path, name: str, damage: str
) -> None:
    newest = trained / "checkpoints" / "step_000004"
    file = newest / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-7] if damage == "truncated" else content[:-7] + b"~" + content[-6:])
    for verb in ("evaluate", "inspect", "generate"):
        refused(ternlm(verb, newest), 3, "CheckpointError: ", name)
    assert json.loads(ternlm("inspect", "r", "--json").out)["step"] == 3
    resumed = ternlm("resume", "r")
    assert resumed.code == 0
    assert "continuing from" in resumed.out
    assert json.loads(ternlm("inspect", newest, "--json").out)["step"] == 4


def test_the_wrong_tokenizer_is_refused_everywhere(ternlm, trained: Path, texts: Path, tmp_path: Path) -> None:
    train_bpe([(texts / "a.txt").read_text()], 280).save(tmp_path / "bpe")
    refused(ternlm("evaluate", "r", "--tokenizer", tmp_path / "bpe"), 3, "TokenizerError: ", "Leave --tokenizer out")
    outcome = ternlm("train", "--resume-from", "r@4", "--tokenizer", tmp_path / "bpe", "--run-id", "s")
    refused(outcome, 3, "TokenizerError: ")
    assert not (tmp_path / "runs" / "s").exists()
    newest = trained / "checkpoints" / "step_000004"
    manifest = json.loads((newest / "manifest.json").read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (tmp_path / "bpe" / name).read_bytes()
        (newest / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = seal(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    refused(ternlm("generate", "r@4", "-p", "x"), 3, "CheckpointError: ", "tokenizer")


def test_a_folder_that_cannot_be_written_is_one_sentence(ternlm, recipe: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    below = tmp_path / "file" / "below"
    refused(ternlm("train", recipe, "--runs-dir", below), 3, "EnvironmentFault: ", "--runs-dir")
    refused(ternlm("tokenizer", "train", texts, "--output", below, "--vocab-size", 300), 3, "TokenizerError: ")
    refused(ternlm("plan", "bitnet-1m", "--picture", below / "a.png"), 2, "SettingsError: ")
    assert ternlm("train", recipe, "-q", "--run-id", "r").code == 0
    refused(ternlm("evaluate", "r", "--output", below / "a.json"), 3, "EnvironmentFault: ", "--output")
    refused(ternlm("generate", "r", "--output", below / "a.txt"), 3, "EnvironmentFault: ", "--output")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_cache_that_cannot_be_written_is_one_sentence(
    ternlm, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(ternlm("train", recipe), 3, "DataError: ", "data.cache")
    refused(ternlm("train", recipe, "--tokenizer", "train", "tokenizer.vocab_size=300"), 3)
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_kept(ternlm, recipe: Path, trained: Path) -> None:
    before = tree(trained)
    refused(ternlm("train", recipe, "--run-id", "r"), 2, "exists already", "ternlm resume")
    refused(ternlm("resume", "r", "lr=1"), 2, "cannot change", "--resume-from")
    refused(ternlm("resume", "r", "max_stepz=9"), 2, "Did you mean 'training.max_steps'?")
    refused(ternlm("resume", "r", "seed"), 2, "section.name=value")
    assert tree(trained) == before


def test_no_loadable_checkpoint_stops_a_resume(ternlm, trained: Path) -> None:
    for step in checkpoint.steps(trained / "checkpoints"):
        (trained / "checkpoints" / f"step_{step:06d}" / "manifest.json").write_text("{}")
    refused(ternlm("resume", "r", "--steps", 9), 3, "CheckpointError: ", "damaged")


def test_changed_source_files_stop_a_resume_and_touched_ones_do_not(
    ternlm, recipe: Path, texts: Path, trained: Path
) -> None:
    content = (texts / "a.txt").read_text()
    (texts / "a.txt").write_text(content)
    assert ternlm("resume", "r", "--steps", 5).code == 0
    (texts / "a.txt").write_text(content.replace("fox", "fux"))
    refused(ternlm("resume", "r", "--steps", 6), 3, "CheckpointError: ", "not what")


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--max-new-tokens", "0"],
        ["--samples", "0"],
        ["--prompt-file", "missing.txt"],
        ["--device", "tpu"],
        ["--repetition-penalty", "0"],
    ],
    ids=" ".join,
)
def test_wrong_sampling_settings_are_refused(ternlm, trained: Path, words: list[str]) -> None:
    refused(ternlm("generate", "r", "-p", "x", *words), 2)


def test_an_unknown_split_is_refused(ternlm, trained: Path) -> None:
    refused(ternlm("evaluate", "r", "--split", "dev"), 2, "train, validation, test or all")
    refused(ternlm("evaluate", "r", "--split", "test"), 3, "test split")
