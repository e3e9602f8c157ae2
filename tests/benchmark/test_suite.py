"""The whole measurement: groups that fit into memory, what is left out, the verb, and its page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ternlm.benchmark import suite
from ternlm.benchmark.candidate import Candidate
from ternlm.benchmark.process import train_apart
from ternlm.benchmark.subject import Work
from ternlm.cli.benchmark_models import candidate_of
from ternlm.errors import SettingsError
from ternlm.report.benchmark import benchmark_sections, benchmark_tables, sentences

SHAPE: dict[str, Any] = {
    "family": "bitnet", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32,
}  # fmt: skip
TERNARY = Candidate("ternary", "own", model=SHAPE, quantization={"weights": "ternary"}, epoch_tokens=900)
FULL = Candidate("full", "own", model=SHAPE, quantization={"weights": "none", "activations": "none"})


def options(**values: Any) -> suite.Options:
    given: dict[str, Any] = {"work": Work(2, 9), "prompt_length": 7, "new_tokens": 3, "repeats": 2, "warmup": 1}
    return suite.Options(torch.device("cpu"), **{**given, "process_memory": False, **values})


def groups(sizes: dict[str, int], room: float) -> list[list[str]]:
    candidates = [Candidate(name, "own") for name in sizes]
    return [[each.name for each in group] for group in suite.groups_of(candidates, sizes, room, "base")]


def test_models_that_fit_are_measured_together_with_the_base_first() -> None:
    assert groups({"a": 3, "base": 2, "b": 4}, 10) == [["base", "a", "b"]]


def test_each_group_has_the_base_where_there_is_room_for_it() -> None:
    assert groups({"a": 7, "base": 2, "b": 6, "c": 9}, 10) == [["base", "a"], ["base", "b"], ["c"]]


def test_a_record_has_a_row_for_each_model_and_the_page_shows_them() -> None:
    record = suite.measure([TERNARY, FULL], options())
    assert json.loads(json.dumps(record)) == record
    assert record["base"] == "full"
    assert {row["name"] for row in record["training"]["rows"]} == {"ternary", "full"}
    by_name = {row["name"]: row for row in record["training"]["rows"]}
    assert by_name["ternary"]["epoch_s"] == pytest.approx(900 / by_name["ternary"]["tokens_per_sec"])
    assert by_name["full"]["epoch_s"] is None
    assert by_name["ternary"]["interleaved"]
    assert [table.row_count for table in benchmark_tables(record)] == [2, 2]
    titles = [section.title for section in benchmark_sections(record)]
    assert titles == ["In short", "Training", "Inference", "Models", "How it was measured"]
    assert "random ids" in sentences(record)[0]


def test_what_does_not_fit_is_trained_in_smaller_batches_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Work(4, 31)
    needed = FULL.training_bytes(Work(1, 31))
    monkeypatch.setattr(suite, "available_bytes", lambda device: int(needed / suite._USABLE) + 2**12)
    record = suite.measure([FULL], options(work=asked, inference=False))
    assert record["training"]["rows"][0]["rows"] < 4
    assert "instead of 4 x 31" in record["skipped"][0]
    monkeypatch.setattr(suite, "available_bytes", lambda device: 2**12)
    record = suite.measure([FULL], options(work=asked, inference=False))
    assert record["training"] is None
    assert "was not trained" in record["skipped"][0]


def test_a_model_too_large_beside_the_base_is_trained_apart_and_its_ratio_has_no_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite, "groups_of", lambda candidates, *rest: [[each] for each in candidates])
    record = suite.measure([FULL, TERNARY], options(inference=False))
    full, ternary = record["training"]["rows"]
    assert (full["interleaved"], ternary["interleaved"]) == (True, False)
    assert ternary["ratio"]["low"] is None
    expected = ternary["step_cpu_ms"]["median"] / full["step_cpu_ms"]["median"]
    assert ternary["ratio"]["median"] == pytest.approx(expected)
    assert any("memory did not suffice" in sentence for sentence in sentences(record))


def test_a_process_that_comes_to_grief_is_no_exception() -> None:
    broken = Candidate("broken", "checkpoint", folder="no/such/folder")
    task = {"device": "cpu", "threads": 1, "work": (1, 8), "warmup": 1, "repeats": 2, "tokens": None}
    assert train_apart(broken, task) is None


def test_a_recipe_and_its_twin_are_two_models() -> None:
    ternary, full = (candidate_of(word, None, True) for word in ("bitnet-1m", "bitnet-1m:full"))
    assert (ternary.is_quantized, full.is_quantized) == (True, False)
    assert ternary.model == full.model
    assert ternary.name == "bitnet-1m"
    assert Candidate.from_dict(json.loads(json.dumps(ternary.as_dict()))) == ternary


def test_the_reference_is_its_real_shape() -> None:
    transformers = pytest.importorskip("transformers")
    one = candidate_of("tinyllama-1.1b", None, True)
    values = {**one.model} if one.model.get("hidden_size") else {}
    if not values:
        pytest.skip("its configuration is in the local cache")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_100_048_384
    assert not one.is_trained
    assert "random weights" in one.notes[0]


def test_prompts_fit_models_whose_context_is_short_unless_they_are_asked_for() -> None:
    from ternlm.cli.benchmark import _options

    cpu, small = torch.device("cpu"), [candidate_of("bitnet-1m", None, True)]
    assert _options(cpu, None, small, 1, None, False, None, 64).prompt_length == 256 - 64
    free = [candidate_of("hgrn-nano", None, True)]
    assert _options(cpu, None, free, 1, None, False, None, 64).prompt_length == 256
    assert _options(cpu, None, free, 1, 999, False, 600, 64).prompt_length == 600, (
        "a recurrence reads texts of any length"
    )
    with pytest.raises(SettingsError, match="exceeds the 256 tokens"):
        _options(cpu, None, small, 1, None, False, 256, 64)


def test_the_verb_writes_a_record_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from ternlm.cli import app

    words = ["bitnet-1m", "bitnet-1m:full", "--peers", "published", "--sequence-length", "16", "--prompt-length", "8"]
    words += ["--new-tokens", "2", "--repeats", "2", "--batch-size", "1", "--no-process-memory"]
    outcome = CliRunner().invoke(app, ["benchmark", *words, "--threads", "1", "--output", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert "bitnet-1m / published" in outcome.stdout
    record = json.loads((tmp_path / "benchmark.json").read_bytes())
    assert len(record["training"]["rows"]) == 3
    assert len(record["inference"]["rows"]) == 2
    assert "bitnet-1m / published" in (tmp_path / "benchmark.html").read_text()
    assert (tmp_path / "benchmark.md").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-model"], "no recipe"),
        (["bitnet-1m:half"], "no variant 'half'"),
        (["bitnet-1m", "bitnet-1m"], "given twice"),
        (["bitnet-1m", "--sequence-length", "999"], "exceeds the 256 tokens"),
        (["bitnet-1m", "--peers", "nobody"], "peer 'nobody' is unknown"),
    ],
)
def test_a_wrong_word_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ternlm.cli import app
    from ternlm.errors import TernlmError

    outcome = CliRunner().invoke(app, ["benchmark", *words, "--runs-dir", str(tmp_path)])
    assert isinstance(outcome.exception, TernlmError)
    assert said in str(outcome.exception)
