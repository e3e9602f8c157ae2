"""`ternlm generate` as a user runs it: files in batches, metrics, text as it is written, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from ternlm import checkpoint

SHORT = ("--max-new-tokens", 6, "--device", "cpu")


@pytest.fixture
def run(ternlm: Any, recipe: Path) -> str:
    """The name of a run of one step."""
    assert ternlm("train", recipe, "--run-id", "told", "--steps", 1, "--quiet").code == 0
    return "told"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_rows_in_its_order_whatever_the_batch(
    ternlm: Any, run: str, tmp_path: Path
) -> None:
    prompts = [f"Prompt {number % 5} é" for number in range(11)]
    (tmp_path / "prompts.txt").write_text("\r\n".join(prompts) + "\n\n", encoding="utf-8")
    for size in (3, 16):
        words = ("--prompt-file", tmp_path / "prompts.txt", "--samples", 2, "--batch-size", size)
        outcome = ternlm("generate", run, *SHORT, *words, "--output", tmp_path / f"{size}.jsonl")
        assert outcome.code == 0, outcome.err
        assert "22 continuations written" in outcome.out
        assert "tokens/s" in outcome.err and "bytes/s" in outcome.err
    found = rows(tmp_path / "3.jsonl")
    assert found == rows(tmp_path / "16.jsonl")
    assert [row["prompt"] for row in found] == [prompt for prompt in prompts for _ in range(2)]
    assert len({tuple(row["ids"]) for row in found if row["prompt"] == prompts[0]}) > 1
    assert set(found[0]) == {"prompt", "text", "ids", "finished"}


def test_rows_of_json_hold_prompts_of_several_lines(ternlm: Any, run: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo", "id": 7}\n\n{"prompt": ""}\n')
    outcome = ternlm("generate", run, *SHORT, "--prompt-file", tmp_path / "p.jsonl", "--json")
    assert [json.loads(line)["prompt"] for line in outcome.out.splitlines()] == ["one\ntwo", ""]


def test_metrics_are_in_the_rows_on_the_screen_and_in_a_file(ternlm: Any, run: str, tmp_path: Path) -> None:
    words = ("-p", "a", "-p", "b", "--samples", 2, "--metrics", "--output", tmp_path / "out.jsonl")
    outcome = ternlm("generate", run, *SHORT, *words)
    assert outcome.code == 0, outcome.err
    found, overall = rows(tmp_path / "out.jsonl"), json.loads((tmp_path / "out.metrics.json").read_text())
    assert overall["samples"] == len(found) == 4
    assert overall["tokens"] == sum(len(row["ids"]) for row in found)
    assert overall["utf8_validity"] == sum(row["utf8_valid"] for row in found) / 4
    shown = {line.split()[0]: line.split()[1] for line in outcome.err.splitlines() if line.startswith(("utf8", "mean"))}
    assert shown["utf8_validity"] == f"{overall['utf8_validity']:.1%}"
    assert shown["mean_entropy"] == f"{overall['mean_entropy']:.3f}"


def test_streamed_text_is_the_text_that_is_generated_otherwise(ternlm: Any, run: str) -> None:
    words = ("-p", "The fox", "-p", "Hé", "--samples", 2, "--seed", 4)
    whole, streamed = ternlm("generate", run, *SHORT, *words), ternlm("generate", run, *SHORT, *words, "--stream")
    assert streamed.code == 0, streamed.err
    assert streamed.out == whole.out
    assert "bytes/s" in streamed.err


def test_g06_streamed_characters_are_whole(ternlm: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "aé🙂b".encode()
    monkeypatch.setattr("ternlm.generation.stream", lambda model, tokenizer, request: iter(said + said[3:5]))
    pieces: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text="", **options: pieces.append(text))
    assert ternlm("generate", run, *SHORT, "-p", "x", "--stream").code == 0
    assert pieces[:12] == ["x", "a", "", "é", "", "", "", "🙂", "b", "", "", "\ufffd"]


def test_a_prompt_that_is_no_text_is_read_with_replacement_characters(ternlm: Any, run: str) -> None:
    outcome = ternlm("generate", run, *SHORT, "-p", "a\udcff", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["prompt"] == "a\ufffd"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8 at byte 0"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("rows.jsonl", b'{"prompt": 3}\n', "line 1"),
        ("rows.jsonl", b"{", 'text "prompt"'),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_one_sentence(
    ternlm: Any, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = ternlm("generate", "nowhere", "--prompt-file", tmp_path / name)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert words in outcome.err


def test_what_cannot_be_streamed_or_written_is_one_sentence(ternlm: Any, run: str, tmp_path: Path) -> None:
    for flag in (("--json",), ("--metrics",), ("--output", tmp_path / "x")):
        assert ternlm("generate", run, "-p", "a", "--stream", *flag).code == 2
    outcome = ternlm("generate", run, *SHORT, "-p", "a", "--output", tmp_path / "missing" / "x.jsonl")
    assert outcome.code == 3
    assert outcome.err.strip().endswith("Choose another --output.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_sentence(ternlm: Any, run: str) -> None:
    outcome = ternlm("generate", run, *SHORT, "-p", "a", "--output", "/dev/full")
    assert (outcome.code, len(outcome.err.strip().splitlines())) == (3, 1)
    assert "'/dev/full' cannot be written: No space left on device" in outcome.err


@pytest.mark.parametrize(("name", "line"), [("prompts.txt", "Hé"), ("prompts.jsonl", '{"prompt": "Hé"}')])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(
    ternlm: Any, run: str, tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / name).write_text(line + "\n", encoding="utf-8-sig")
    outcome = ternlm("generate", run, *SHORT, "--prompt-file", tmp_path / name, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["prompt"] == "Hé"


def test_a_chat_reads_what_was_said_once(ternlm: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    load = checkpoint.load

    def watched(*arguments: Any) -> Any:
        loaded = load(*arguments)
        loaded.model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
        return loaded

    lines = iter(["/temp 0", "Hi", " yo", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("ternlm.checkpoint.load", watched)
    outcome = ternlm("chat", run, "--max-new-tokens", 3)
    assert outcome.code == 0
    assert outcome.err.count("bytes/s") == 3
    assert read == [3, 1, 1, 1 + 3, 1, 1, 1, 1, 1]
