"""`ternlm compare`, and the protocol and baselines of `ternlm evaluate`, on runs of a few steps."""

import csv
import json
from pathlib import Path

import pytest


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """Thirty short files, so that documents can be drawn again."""
    folder = tmp_path / "story"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"Fox {number} met {number % 7} hens." + " And ran." * (number % 3))
    return folder


@pytest.fixture
def runs(ternlm, recipe: Path, tmp_path: Path) -> list[str]:
    """A transformer, its full-precision twin, a recurrent model, and one of trained tokens."""
    recurrent = recipe.read_text().replace(
        "model: {hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,\n"
        "        intermediate_size: 40, max_position_embeddings: 24}",
        "model: {family: hgrn, hidden_size: 24, num_hidden_layers: 2}",
    )
    assert "hgrn" in recurrent
    (tmp_path / "recurrent.yaml").write_text(recurrent)
    trained = {
        "ternary": (recipe,),
        "twin": (recipe, "quantization.weights=none", "quantization.activations=none"),
        "recurrent": (tmp_path / "recurrent.yaml",),
        "tokens": (recipe, "tokenizer.name=train", "tokenizer.vocab_size=300"),
    }
    for name, words in trained.items():
        outcome = ternlm("train", *words, "--run-id", name, "--steps", 2, "-q")
        assert outcome.code == 0, outcome.err
    return [*trained]


def test_models_of_any_family_and_tokenizer_are_ranked_on_one_text(ternlm, runs: list[str], story: Path) -> None:
    outcome = ternlm("compare", *runs, "--data", story, "--baselines", "--output", "out", "--format", "both", "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    models = record["models"]
    assert sorted(row["name"] for row in models) == sorted(f"{name}@2" for name in runs)
    assert [row["rank"] for row in models] == [1, 2, 3, 4]
    assert [row["bpb"] for row in models] == sorted(row["bpb"] for row in models)
    assert {row["n_bytes"] for row in models if row["perplexity_unit"] == "byte"} == {record["bytes"]}
    by_name = {row["name"]: row for row in models}
    assert by_name["twin@2"]["weights"] == "full"
    assert by_name["recurrent@2"]["family"] == "hgrn"
    assert by_name["recurrent@2"]["state_bytes"] < by_name["ternary@2"]["state_bytes"]
    assert all(row["bpb_ci95"][0] < row["bpb"] < row["bpb_ci95"][1] for row in models)
    assert record["baselines"]["uniform"] == 8.0
    assert all(8 > record["baselines"][name] > 0 for name in ("unigram", "3-gram", "5-gram", "gzip", "xz"))
    assert record == json.loads(Path("out/comparison.json").read_text())
    assert len(list(csv.DictReader(Path("out/comparison.csv").read_text().splitlines()))) == 4 + 7
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/comparison.svg").stat().st_size > 0

    scored = json.loads(ternlm("evaluate", "ternary", "--data", story, "--json").out)
    assert scored["bpb"] == pytest.approx(by_name["ternary@2"]["bpb"], abs=1e-9)
    assert scored["bpb_ci95"] == pytest.approx(by_name["ternary@2"]["bpb_ci95"], abs=1e-9)
    assert scored["documents"] == record["documents"] == 30


def test_the_table_and_a_limit_in_bytes(ternlm, runs: list[str], story: Path) -> None:
    shown = ternlm("compare", "tokens", "recurrent", "--data", story, "--max-bytes", 200)
    assert shown.code == 0, shown.err
    assert "recurrent@2" in shown.out
    record = json.loads(ternlm("compare", "tokens", "recurrent", "--data", story, "--max-bytes", 200, "--json").out)
    assert 0 < record["bytes"] <= 200
    assert {row["n_bytes"] for row in record["models"]} <= {record["bytes"], record["bytes"] - 1}


def test_a_stream_carries_the_memory_in_evaluate_and_compare(ternlm, runs: list[str], story: Path) -> None:
    words = ("--data", story, "--protocol", "stream", "--json")
    first = json.loads(ternlm("evaluate", "recurrent", *words, "--sequence-length", 5, "--batch-size", 7).out)
    second = json.loads(ternlm("evaluate", "recurrent", *words, "--sequence-length", 900).out)
    assert first["protocol"] == "stream"
    assert first["n_targets"] == second["n_targets"] == first["n_bytes"] + 30
    assert first["loss"] == pytest.approx(second["loss"], abs=2e-2)  # rounded activations may move by one code
    refused = ternlm("compare", "recurrent", "ternary", "--data", story, "--protocol", "stream")
    assert refused.code == 2
    assert "remembers no more than these" in refused.err


def test_evaluate_shows_bits_per_byte_first_and_what_knows_less(ternlm, runs: list[str], story: Path) -> None:
    outcome = ternlm("evaluate", "ternary", "--data", story, "--baselines")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1].startswith("bits per byte")
    for name in ("uniform", "unigram", "3-gram", "5-gram", "gzip", "xz"):
        assert f"\n{name} " in outcome.out
    assert (
        json.loads(ternlm("evaluate", "ternary", "--data", story, "--baselines", "--json").out)["baselines"]["xz"] > 0
    )


def test_mistakes_are_answered_in_one_sentence(ternlm, runs: list[str], story: Path, texts: Path) -> None:
    twice = ternlm("compare", "ternary", "twin", "ternary@2", "--data", story)
    assert (twice.code, "are the same checkpoint" in twice.err) == (2, True)
    assert ternlm("compare", "ternary", "nothing", "--data", story).code == 3
    (story.parent / "in_the_way").touch()
    for verb in (("compare", "ternary", "twin"), ("evaluate", "ternary")):
        unwritten = ternlm(*verb, "--data", story, "--output", story.parent / "in_the_way" / "x")
        assert (unwritten.code, "Choose another --output" in unwritten.err) == (3, True)
        assert "documents" in unwritten.out, "what was computed is shown all the same"
    too_long = ternlm("compare", "ternary", "recurrent", "--data", story, "--sequence-length", 99)
    assert (too_long.code, "longer than the 24 tokens" in too_long.err) == (2, True)


def test_runs_on_different_texts_are_not_compared(ternlm, recipe: Path, story: Path) -> None:
    for name, words in (("one", ()), ("other", (f"data.source={story}",))):
        assert ternlm("train", recipe, *words, "--run-id", name, "--steps", 1, "-q").code == 0
    refused = ternlm("compare", "one", "other")
    assert (refused.code, "Name one text for all with --data" in refused.err) == (3, True)
    assert ternlm("compare", "one", "other", "--data", story).code == 0
