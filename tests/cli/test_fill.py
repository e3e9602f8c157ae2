"""`ternlm fill` and `ternlm evaluate` on an encoder, and what they say to checkpoints and texts that do not fit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from builders import tiny_bitnet, tiny_data_settings
from encoders import PIECES, SPECIAL, TableEncoder, table, wordpiece
from ternlm.checkpoint import Loaded
from ternlm.data.preparation import prepare_data
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of an encoder, as far as the commands can tell."""
    data = tiny_data_settings(tmp_path / "texts")
    wordpiece(tmp_path / "tokenizer")
    made = prepare_data(data, TokenizerSettings(name=str(tmp_path / "tokenizer")))
    folder = tmp_path / "checkpoint"
    made.tokenizer.save(folder)
    config = {"data": data.model_dump(), "objective": {"name": "mlm", "mask_fraction": 0.3}}
    loads(monkeypatch, Loaded(TableEncoder(table()), made.tokenizer, config, {"step": 7}, folder))  # type: ignore[arg-type]
    return folder


def loads(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    monkeypatch.setattr("ternlm.checkpoint.resolve", lambda name, root: loaded.path)
    monkeypatch.setattr("ternlm.checkpoint.load", lambda path, device: loaded)


def test_a_text_is_filled_and_its_candidates_are_listed(encoder: Path, ternlm: Any) -> None:
    outcome = ternlm("fill", encoder, "the [MASK] fox met <mask>.", "--top", 3)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("the ") and "[MASK]" not in lines[0] and "mask 2" in lines[1]
    assert len(lines) == 5 and all(line.count("%") == 2 for line in lines[2:])


def test_json_has_one_object_per_text_from_arguments_and_file(encoder: Path, ternlm: Any, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("seven ??? ran\n\nthe ??? slept\n", encoding="utf-8")
    outcome = ternlm("fill", encoder, "??? ran", "--file", tmp_path / "lines.txt", "--mask-text", "???", "--json")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["text"] for row in rows] == ["??? ran", "seven ??? ran", "the ??? slept"]
    for row in rows:
        probabilities = [candidate["probability"] for candidate in row["masks"][0]]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert {candidate["text"] for candidate in row["masks"][0]} <= {piece.removeprefix("##") for piece in PIECES}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "there is no text to fill"),
        (("no gap",), "'no gap' holds no mask"),
        (("[MASK] " * 40,), "longer than the 24 that the model reads"),
        (("--file", "nowhere.txt"), "file 'nowhere.txt' cannot be read: No such file"),
        (("--file", "empty.txt"), "file 'empty.txt' holds no text"),
        (("--file", "latin.txt"), "file 'latin.txt' is not UTF-8 at byte 3"),
    ],
)
def test_texts_that_cannot_be_filled_are_refused(
    encoder: Path, ternlm: Any, arguments: tuple[str, ...], sentence: str
) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("caf\xe9 [MASK]".encode("latin-1"))
    outcome = ternlm("fill", encoder, *arguments)
    assert outcome.code == 2 and sentence in outcome.err and outcome.err.count("\n") == 1


def test_special_tokens_are_no_candidates_however_many_are_wanted(encoder: Path, ternlm: Any) -> None:
    outcome = ternlm("fill", encoder, "the [MASK]", "--top", 1000, "--json")
    (candidates,) = json.loads(outcome.out)["masks"]
    assert len(candidates) == len(PIECES) - len(SPECIAL) and all(candidate["text"] for candidate in candidates)


def test_only_a_line_feed_ends_a_text(encoder: Path, ternlm: Any, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("the [MASK] ran\x85and\x0cslept\r\nseven [MASK]\n".encode())
    outcome = ternlm("fill", encoder, "--file", tmp_path / "lines.txt", "--json")
    assert [json.loads(line)["text"] for line in outcome.out.split("\n") if line] == [
        "the [MASK] ran\x85and\x0cslept", "seven [MASK]"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sequence-length", 25), "--sequence-length 25 is longer than the 24 tokens that the model reads"),
        (("--sequence-length", 0), "Invalid value"),
        (("--batch-size", 0), "Invalid value"),
        (("--max-tokens", 0), "Invalid value"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(
    encoder: Path, ternlm: Any, arguments: tuple[object, ...], sentence: str
) -> None:
    outcome = ternlm("evaluate", encoder, *arguments)
    assert outcome.code == 2 and sentence in outcome.err and "Traceback" not in outcome.err


def test_an_encoder_is_evaluated_on_other_text_when_its_own_is_gone(encoder: Path, ternlm: Any, tmp_path: Path) -> None:
    (tmp_path / "texts").rename(tmp_path / "elsewhere")
    outcome = ternlm("evaluate", encoder, "--data", tmp_path / "elsewhere", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["unigram_loss"] is None


def test_help_shows_the_defaults_that_depend_on_the_run(ternlm: Any) -> None:
    assert "the run's own" in ternlm("evaluate", "--help").out
    assert "$TERNLM_RUNS_DIR or runs" in ternlm("fill", "--help").out
    assert "<mask> or <|mask|>" in ternlm("fill", "--help").out


def test_a_causal_checkpoint_cannot_fill_and_an_encoder_cannot_continue(
    encoder: Path, ternlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in (("generate", encoder, "-p", "x"), ("chat", encoder)):
        outcome = ternlm(*verb)
        assert outcome.code == 2 and "fills gaps in text" in outcome.err and "ternlm fill" in outcome.err
    loads(monkeypatch, Loaded(tiny_bitnet(vocab_size=256), ByteTokenizer(), {}, {"step": 1}, encoder))
    outcome = ternlm("fill", encoder, "a [MASK]")
    assert outcome.code == 2 and "ternlm generate" in outcome.err and outcome.err.count("\n") == 1


def test_evaluate_prints_the_masked_loss_with_its_baselines(encoder: Path, ternlm: Any) -> None:
    outcome = ternlm("evaluate", encoder, "--pll", 2)
    assert outcome.code == 0, outcome.err
    for text in ("per masked token", "reading [MASK]", "unigram loss", "uniform loss", "pseudo-likelihood"):
        assert text in outcome.out, text
    assert "bits per byte  " not in outcome.out and "hidden tokens, split validation" in outcome.out
    found: dict[str, Any] = json.loads(ternlm("evaluate", encoder, "--json").out)
    assert found["protocol"] == "masked" and found["bpb"] is None and len(found["mask_id"]) == 16
    assert found["uniform_loss"] == pytest.approx(math.log(len(PIECES))) and found["unigram_loss"] > 0
    again = json.loads(ternlm("evaluate", encoder, "--json", "--batch-size", 3).out)
    assert (again["mask_id"], again["n_targets"]) == (found["mask_id"], found["n_targets"])


def test_a_pseudo_likelihood_of_a_causal_model_is_refused(
    encoder: Path, ternlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(monkeypatch, Loaded(tiny_bitnet(vocab_size=256), ByteTokenizer(), {}, {"step": 1}, encoder))
    outcome = ternlm("evaluate", encoder, "--pll", 2)
    assert outcome.code == 2 and "--pll needs an encoder" in outcome.err
