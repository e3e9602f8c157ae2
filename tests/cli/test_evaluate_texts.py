"""`ternlm evaluate` and `ternlm compare` on WikiText, in windows that overlap, and on text that is not UTF-8."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RAW = "".join(f" \n = Article {n} = \n \n The {n} @-@ hen ran , and it 's well . \n" for n in range(1, 13))


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    return tmp_path / "wiki.test.raw"


@pytest.fixture
def run(ternlm, recipe: Path, tmp_path: Path) -> Path:
    outcome = ternlm("train", recipe, "--run-id", "r", "--steps", 2, "-q")
    assert outcome.code == 0, outcome.err
    return tmp_path / "runs" / "r"


def refused(outcome: Any, code: int, *parts: str) -> None:
    assert outcome.code == code, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
    assert "Traceback" not in outcome.err


def test_wikitext_is_scored_as_articles_pages_and_one_text(ternlm, run: Path, wiki: Path) -> None:
    found = {}
    for form in (None, "articles", "detokenized", "joined"):
        words = [] if form is None else ["--wikitext", form]
        outcome = ternlm("evaluate", "r", "--data", wiki, "--stride", 16, *words, "--json")
        assert outcome.code == 0, outcome.err
        found[form] = json.loads(outcome.out)
    assert found[None]["bpb"] == found["articles"]["bpb"]
    assert [row["documents"] for row in found.values()] == [12, 12, 12, 1]
    assert {row["protocol"] for row in found.values()} == {"sliding:16"}
    assert found["articles"]["n_bytes"] == len(RAW.encode())
    assert found["articles"]["n_words"] == found["joined"]["n_words"] == len(RAW.split())
    assert found["detokenized"]["n_words"] == len(RAW.split()) + 2 * 12
    assert found["detokenized"]["words"] == "lm-eval"
    assert found["detokenized"]["n_bytes"] < found["detokenized"]["page_bytes"] < len(RAW.encode())
    assert "words as lm-eval counts them" in ternlm(
        "evaluate", "r", "--data", wiki, "--stride", 16, "--wikitext", "detokenized"
    ).out  # fmt: skip


def test_windows_that_overlap_know_more_and_say_how_they_moved(ternlm, run: Path, wiki: Path) -> None:
    outcome = ternlm("evaluate", "r", "--data", wiki, "--stride", 4)
    assert outcome.code == 0, outcome.err
    assert "windows of 16 tokens moved by 4 through each document" in outcome.out
    assert "per word" in outcome.out
    compared = ternlm("compare", "r", "--data", wiki, "--stride", 4)
    assert compared.code == 0, compared.err
    assert "sliding:4" in compared.out and "windows that overlap" in compared.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--stride", 17), ("a stride of 17", "Give 1 to 16")),
        (("--stride", 4, "--protocol", "stream"), ("Leave one of them out",)),
        (("--data", "stories", "--wikitext", "joined"), ("data.wikitext=joined", "another corpus")),
        (("--limit", 3), ("--limit 3", "--max-tokens")),
        (("--tasks", "hellaswag", "--data", "stories"), ("--data is about a text",)),
        (("--tasks", "hellaswag", "--stride", 4), ("--stride is about a text",)),
        (("--tasks", "hellaswag,,arc_easy"), ("leaves a name empty",)),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(ternlm, run: Path, words: tuple, parts: tuple) -> None:
    refused(ternlm("evaluate", "r", *words), 2, "SettingsError: ", *parts)


@pytest.mark.parametrize("verb", ["evaluate", "compare", "analyze"])
def test_text_that_is_not_utf8_is_refused_with_an_option_that_the_verb_takes(
    ternlm, run: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("Caf\u00e9 hens ran. ".encode("latin-1") * 20)
    refused(ternlm(verb, "r", "--data", "latin.txt"), 3, "DataError: ", "latin.txt", "--encoding-errors replace")
    outcome = ternlm(verb, "r", "--data", "latin.txt", "--encoding-errors", "replace", "--json")
    assert outcome.code == 0, outcome.err


def test_a_tokenizer_is_trained_on_text_that_is_not_utf8_on_request(ternlm, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Caf\u00e9 hens ran. ".encode("latin-1") * 200)
    words = ("tokenizer", "train", "latin.txt", "--output", "out", "--vocab-size", 270)
    refused(ternlm(*words), 3, "--encoding-errors replace")
    assert ternlm(*words, "--encoding-errors", "replace").code == 0


def test_p05_tasks_without_the_package_name_the_command(ternlm, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(ternlm("evaluate", "r", "--tasks", "hellaswag"), 3, "pip install 'ternlm[eval]'")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the package, one that asks the model three things and computes no more."""
    calls: list[dict[str, Any]] = []

    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    class TaskManager:
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            self.all_tasks = ["hens", "words"]

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, **others: Any) -> dict[str, Any]:
        calls.append({"tasks": tasks, "limit": limit, **others})
        (chosen,) = model.loglikelihood([Request("The hen", " ran")])
        (rolling,) = model.loglikelihood_rolling([Request("The hen ran.")])
        (text,) = model.generate_until([Request("The", {"until": ["."], "max_gen_toks": 3})])
        results = {"hens": {"alias": "hens", "acc,none": float(chosen[1]), "acc_stderr,none": 0.25, "text": text}}
        results["words"] = {"alias": "words", "nats,none": rolling, "nats_stderr,none": "N/A", "nats,strict": 1.0}
        return {
            "results": {name: results[name] for name in tasks},
            "versions": dict.fromkeys(tasks, 2.0),
            "n-samples": {name: {"original": 9, "effective": limit or 9} for name in tasks},
            "n-shot": dict.fromkeys(tasks, 0),
        }

    package, model, api, tasks = (ModuleType(name) for name in ("lm_eval", "model", "api", "tasks"))
    package.simple_evaluate, tasks.TaskManager, model.LM = simple_evaluate, TaskManager, object  # type: ignore[attr-defined]
    for name, module in {"": package, ".tasks": tasks, ".api": api, ".api.model": model}.items():
        monkeypatch.setitem(sys.modules, "lm_eval" + name, module)
    monkeypatch.setattr("ternlm.evaluation.harness.version", lambda name: "0.0")
    return calls


def test_results_of_tasks_are_kept_with_the_run_and_join_earlier_ones(ternlm, run: Path, harness: list) -> None:
    outcome = ternlm("evaluate", "r", "--tasks", "hens", "--limit", 5, "--json", "--output", "score.json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record == json.loads(Path("score.json").read_text())
    row = record["tasks"]["hens"]
    assert (row["acc_stderr"], row["limit"], row["n_samples"], row["few_shot"]) == (0.25, 5, 5, 0)
    assert (row["sequence_length"], row["weights"], record["step"]) == (16, "quantized", 2)
    assert "alias" not in row and "text" not in row
    assert harness[0]["limit"] == 5
    second = ternlm("evaluate", "r", "--tasks", "words")
    assert second.code == 0, second.err
    kept = json.loads((run / "eval" / "lm_eval_000002.json").read_text())
    assert kept["tasks"].keys() == {"hens", "words"}
    assert kept["tasks"]["words"]["nats"] < 0 and kept["tasks"]["words"]["nats,strict"] == 1.0
    assert "nats_stderr" not in kept["tasks"]["words"]
    assert "lm_eval_000002.json" in second.out and "published" not in second.out
    assert "nats" in second.out and "version" not in second.out


def test_a_damaged_earlier_record_is_replaced(ternlm, run: Path, harness: list) -> None:
    (run / "eval" / "lm_eval_000002.json").write_text('{"tasks": 3}')
    assert ternlm("evaluate", "r", "--tasks", "hens,words", "--limit", 2).code == 0
    kept = json.loads((run / "eval" / "lm_eval_000002.json").read_text())
    assert kept["tasks"].keys() == {"hens", "words"}


def test_unknown_tasks_are_refused(ternlm, run: Path, harness: list) -> None:
    refused(ternlm("evaluate", "r", "--tasks", "hen"), 2, "no task 'hen'. Did you mean 'hens'?")
