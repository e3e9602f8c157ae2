"""What a report knows of runs: all of what is on disk, nothing that is not, and no exception whatever lies there."""

import json
import math
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_run import TIME, fake_run, write_rows
from ternlm.report import spread, ternary
from ternlm.report.blocks import Chart, Section
from ternlm.report.markdown import markdown
from ternlm.report.page import html_page
from ternlm.report.papers import papers
from ternlm.report.record import read_record
from ternlm.report.sections import sections
from ternlm.report.size import tensor_shapes
from ternlm.report.spread import curve, evenly, spread_rows, thinned
from ternlm.run_directory import RunDirectory

CONFIG = {
    "model": {"family": "bitnet", "vocab_size": 256, "num_key_value_heads": 2, "num_attention_heads": 4,
              "norm_layout": "subln", "hidden_act": "silu"},
    "quantization": {"weights": "ternary", "activations": "int8", "quantizer": "absmean", "granularity": "tensor"},
    "optimizer": {"name": "adamw", "learning_rate": 1.2e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "schedule": {"name": "linear"}, "training": {"max_steps": 5000}, "tokenizer": {"name": "byte"},
}  # fmt: skip
MATRICES = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
GARBAGE = [b"", b"{", b"[]", b"null", b'{"a": 1', b"\x00" * 70, b'"text"', b"\xff\xfe\n", b"[" * 50_000, b"1e999\n",
           b'{"step": 1e999}\n{"step": -3}\n{"step": "x"}\n{"step": NaN}\n[3]\n', b'{"sittings": {}}',
           b'{"rows": [{"verdict": []}, 5], "step": "x", "parameters": 7}', b'{"\\ud800": "\\ud800"}\n']  # fmt: skip
VALUES = [None, "x", -1, 1e308, -1e308, True, [], {}, [[]], {"name": []}, 10**400, "\ud800", "\x1b[31m<b>", 0, 2**60]


def header(shapes: dict[str, list[int]]) -> bytes:
    """A safetensors file without its tensors."""
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    content = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(content).to_bytes(8, "little") + content


def full_run(path: Path, step: int = 300, total: int = 400, **status: Any) -> RunDirectory:
    """A run with every file that a report reads."""
    run = fake_run(path, step, total, every=10, **({"host": "elsewhere", "updated_at": None} | status))
    run.config.write_text(json.dumps({**CONFIG, "training": {"max_steps": total}}))
    run.config_origin.write_text(json.dumps({"model.family": "recipe tiny", "optimizer.learning_rate": "command line"}))
    run.provenance.write_text(json.dumps({"sittings": [{
        "started_at": "2027-01-15T07:00:00Z", "command_line": ["ternlm", "train", "tiny"], "first_step": 0,
        "git": {"ternlm": {"commit": "a" * 40, "dirty": True}}, "hardware": {"cpu": "box", "cores": 3, "gpus": []},
        "packages": {"numpy": "2"}, "seeds": {"run": 5}, "torch": {"threads": 3},
    }]}))  # fmt: skip
    run.data_fingerprint.write_text(json.dumps({
        "source": "stories", "fingerprint": "f" * 64, "first_token_ids": [1] * 1000, "tokenizer": {"name": "byte"},
        "splits": {"train": {"documents": 7, "tokens": 900, "bytes": 880, "shards": []}},
    }))  # fmt: skip
    write_rows(run.ternary, [
        {"step": at, **{f"ternary/{name}/{key}": 0.3 + at / 1e4 for name in (*MATRICES, "all")
                        for key in ("frac_neg", "frac_zero", "frac_pos", "flip_rate", "scale")}}
        for at in range(100, step + 1, 100)
    ])  # fmt: skip
    shapes = {"model.embed_tokens.weight": [256, 8], **{f"model.{name}.weight": [16, 8] for name in MATRICES}}
    for folder in run.checkpoints.glob("step_*"):
        (folder / "model.safetensors").write_bytes(header(shapes))
        (folder / "manifest.json").write_text('{"files": {"model.safetensors": {}}}')
    (run.checkpoints / "last").write_text("step_000250\n")
    rows = [{"part": "norms", "definition": "d", "run": "r", "verdict": "differs", "source": "s"}]
    run.alignment.write_text(json.dumps({"step": 250, "checkpoint": "step_000250",
                                                                 "rows": rows}))  # fmt: skip
    return run


def rendered(*runs: RunDirectory) -> str:
    """The report as Markdown, made of a record that is strict JSON."""
    record = read_record(runs, now=TIME + 9)
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again == record
    return markdown("title", "subtitle", sections(record))


def drawn(parts: list[Section]) -> int:
    """How many charts could be drawn."""
    charts = [block for part in parts for block in part.blocks if isinstance(block, Chart)]
    for chart in charts:
        chart.draw()
    return len(charts)


def test_a_run_is_read_in_full(tmp_path: Path) -> None:
    (run,) = read_record([full_run(tmp_path / "run", state="finished")], now=TIME)["runs"]
    assert (run["id"], run["name"], run["is_running"]) == ("run", "run", False)
    assert run["config"]["model"]["family"] == "bitnet"
    assert run["changed"][1] == {"setting": "optimizer.learning_rate", "value": 1.2e-3, "origin": "command line"}
    assert run["curves"]["train/loss"][0][0] == 10
    assert [point[0] for point in run["curves"]["perf/tokens_per_sec"]] == list(range(10, 301, 10))
    assert [row["step"] for row in run["evaluations"]] == [250]
    assert run["stages"] == [{"step": 10, "stage": 1, "name": None}, {"step": 200, "stage": 2, "name": "full ternary"}]
    assert run["event_counts"] == {"loss_spike": 1}, "the start is no anomaly"
    assert run["data"]["splits"] == {"train": {"documents": 7, "tokens": 900, "bytes": 880}}
    assert "first_token_ids" not in run["data"]
    assert run["parameters"] == {"total": 256 * 8 + 2 * 128, "ternary": 256, "embedding": None, "scales": 2,
                                 "packed_bytes": 2 * 16 * 256 // 4 + 2 * 4 + 2 * 256 * 8,
                                 "source": "checkpoints/step_000250/model.safetensors"}  # fmt: skip
    assert run["checkpoints"][0]["pointers"] == ["last"]
    assert run["checkpoints"][0]["has_manifest"]
    assert run["ternary"]["matrices"] == list(MATRICES)
    assert run["ternary"]["values"]["scale"] == [[0.31, 0.32, 0.33]] * 2
    assert {row["part"] for row in run["alignment"]["rows"]} > {"norms", "learning rate", "weight decay"}


def test_e10_every_number_of_the_summary_is_one_of_a_file(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", state="finished", elapsed_seconds=61.0)
    write_rows(run.evaluations, [
        {"step": 100, "val/loss": 2.5, "val/bpb": 3.61, "val/perplexity": 12.18, "perplexity_unit": "byte"},
        {"step": 300, "val/loss": 1.23456, "val/bpb": 1.78109, "val/perplexity": 3.437, "perplexity_unit": "byte"},
    ])  # fmt: skip
    text = rendered(run)
    assert "1.781 bits per byte (perplexity 3.44 per byte, step 300) *from eval/eval_results.jsonl*" in text
    assert "the loss fell from 2.5000 nats per byte at step 100 to 1.2346 at step 300" in text
    assert "2,304 parameters, 256 of them ternary" in text
    assert "33.0 % of the ternary weights are 0" in text
    assert "norms" in text
    assert "ln" not in text.split("## Training", maxsplit=1)[0]
    write_rows(run.evaluations, [{"step": 300, "val/loss": 1.5, "val/bpb": 2.0, "perplexity_unit": "byte"}])
    assert "2.000 bits per byte" in rendered(run), "other numbers, other text"


def test_several_runs_are_shown_side_by_side_with_what_differs(tmp_path: Path) -> None:
    one, other = (full_run(tmp_path / name / "run", state="finished") for name in ("a", "b"))
    changed = json.loads(other.config.read_text())
    changed["optimizer"]["learning_rate"] = 7e-4
    del changed["schedule"]
    other.config.write_text(json.dumps(changed))
    record = read_record([one, other, RunDirectory(tmp_path / "none")], now=TIME)
    assert [run["name"] for run in record["runs"]] == ["a/run", "b/run", "none"]
    differing = {row["setting"]: row["values"] for row in record["differences"]}
    assert differing["optimizer.learning_rate"] == [1.2e-3, 7e-4, None]
    assert differing["schedule.name"] == ["linear", None, None]
    same = read_record([one, one], now=TIME)
    assert same["differences"] == []
    assert [run["name"] for run in same["runs"]] == ["a/run", "a/run (2)"]
    parts = sections(record)
    titles = [part.title for part in parts]
    assert titles == ["Side by side", "Curves", "Settings that differ", "Against the paper", "a/run", "b/run", "none",
                      "Papers"]  # fmt: skip
    assert drawn(parts) > 10
    text = markdown("", "", parts)
    assert "Not finished is none (missing); its numbers are not final." in text
    assert "| optimizer.learning_rate | 0.0012 | 0.0007 | null |" in text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "finished", "step": 400}, "The run is finished."),
        ({"state": "diverged", "reason": "3 roll-backs did not help"}, "The training diverged: the loss rose"),
        ({"state": "failed", "error": "TypeError: no"}, "with an error. Reason: TypeError: no. It made 300 of 400"),
        ({"state": "out_of_memory"}, "because memory ran out"),
        ({"state": "stopped"}, "was stopped before its end and can be continued. It made 300 of 400 steps."),
        ({"state": "preempted"}, "The machine was taken"),
        ({"state": "training", "host": os.uname().nodename, "pid": 2**22 + 1}, "is gone and said nothing"),
        ({"state": "training", "updated_at": "2027-01-15T08:00:00Z"}, "The run is still going (training), 75 % are"),
        ({"state": "paused"}, "The run is still going (paused), 75 % are done"),
    ],
)
def test_how_a_run_ended_is_said_first(tmp_path: Path, status: dict[str, Any], said: str) -> None:
    text = rendered(full_run(tmp_path / "run", **status))
    assert said in text.split("## Training", maxsplit=1)[0]


def test_honest_failure_in_words(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", state="finished")
    assert "There was one evaluation, at step 250" in rendered(run)
    run.evaluations.unlink()
    text = rendered(run)
    assert "never evaluated on held-out text. The loss on its training text" in text
    assert "**training loss:**" in text
    for file in (run.scalars, run.ternary, run.events):
        file.unlink()
    text = rendered(run)
    assert "Nothing was logged: there is no result." in text
    assert "No training step is in the log." in text
    write_rows(run.evaluations, [
        {"step": 10, "val/loss": 5.0}, {"step": 20, "val/loss": 5.6, "val/train_gap": 0.4, "val/perplexity": None}
    ])  # fmt: skip
    text = rendered(run)
    assert "rose from 5.0000" in text
    assert "lowest at step 10 (5.0000) and has risen by 0.600 since" in text
    assert "0.400 nats above the training loss" in text
    assert "A model that knows nothing has 5.5452: this one has learned nothing." in text


def test_anomalies_are_counted_and_marked(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", state="diverged")
    rows = [{"step": at, "event": "loss_spike", "severity": "warning", "message": "high", "action": "skip"}
            for at in range(1, 301)]  # fmt: skip
    write_rows(run.events, [*rows, {"step": 301, "event": "divergence", "severity": "error", "message": "<b>no</b>"}])
    record = read_record([run], now=TIME)
    assert record["runs"][0]["event_counts"] == {"loss_spike": 300, "divergence": 1}
    assert len(record["runs"][0]["events"]) == 200
    parts = sections(record)
    text = markdown("", "", parts)
    assert "301 in all: 300 x loss_spike and 1 x divergence. The table shows 60 of them" in text
    page = html_page("", "", parts)
    assert "<b>no</b>" not in page
    assert len(page) < 1_500_000


def test_a_missing_or_empty_folder_is_a_report_that_says_so(tmp_path: Path) -> None:
    assert "The folder of the run does not exist." in rendered(RunDirectory(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    text = rendered(RunDirectory(tmp_path / "empty"))
    assert "lacks the settings of the run" in text
    assert "Nothing was logged" in text
    assert "There are no runs." in rendered()
    RunDirectory(tmp_path / "made").ensure_writable()
    assert "Nothing was logged" in rendered(RunDirectory(tmp_path / "made"))


def test_a_checkpoint_that_was_cut_short_is_said_to_be(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    folder = run.checkpoints / "step_000250"
    files = {"model.safetensors": {"bytes": (folder / "model.safetensors").stat().st_size}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert "cut short" not in rendered(run)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "cut short" in rendered(run)
    (folder / "model.safetensors").unlink()
    assert "cut short" in rendered(run)


FILES: list[Callable[[RunDirectory], Path]] = [
    lambda run: run.status, lambda run: run.config, lambda run: run.config_origin, lambda run: run.provenance,
    lambda run: run.data_fingerprint, lambda run: run.scalars, lambda run: run.ternary, lambda run: run.system,
    lambda run: run.events, lambda run: run.evaluations, lambda run: run.samples,
    lambda run: run.alignment, lambda run: run.checkpoints / "best",
    lambda run: run.checkpoints / "step_000250" / "model.safetensors",
    lambda run: run.checkpoints / "step_000250" / "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(FILES)))
def test_garbage_in_the_place_of_any_file_costs_only_what_it_held(tmp_path: Path, place: int) -> None:
    run = full_run(tmp_path / "run")
    file = FILES[place](run)
    for content in GARBAGE:
        file.write_bytes(content)
        assert "## Summary" in rendered(run)
    file.unlink()
    assert "## Summary" in rendered(run)
    os.mkfifo(file)
    assert "## Summary" in rendered(run)
    file.unlink()
    file.symlink_to(file)
    assert "## Summary" in rendered(run)
    file.unlink()
    (file / "inside").mkdir(parents=True)
    assert "## Summary" in rendered(run)


@pytest.mark.parametrize("place", range(12))
def test_values_of_any_type_in_any_row_are_read_as_unknown(tmp_path: Path, place: int) -> None:
    run = full_run(tmp_path / "run")
    file, noise = FILES[place](run), random.Random(place)
    whole = file.read_text()
    for _ in range(30):
        lines = whole.splitlines() if file.suffix == ".jsonl" else [whole]
        for _ in range(3):
            number = noise.randrange(len(lines))
            lines[number] = json.dumps(spoiled(json.loads(lines[number]), noise))
        file.write_text("\n".join(lines) + "\n")
        assert "## Summary" in rendered(run)
        assert "## Side by side" in rendered(run, run)


def spoiled(value: Any, noise: random.Random) -> Any:
    """The value with garbage in one place of it, at any depth."""
    if isinstance(value, dict) and value and noise.random() < 0.9:
        name = noise.choice([*value])
        return {**value, name: spoiled(value[name], noise)}
    if isinstance(value, list) and value and noise.random() < 0.7:
        place = noise.randrange(len(value))
        return [*value[:place], spoiled(value[place], noise), *value[place + 1 :]]
    return noise.choice(VALUES)


def test_l08_a_run_that_was_resumed_shows_what_counts(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"step": step, "x": step} for step in (1, 2, 3, 4, 2, 3)] + [{"x": 5}, {"step": 2.0, "x": 9}])
    assert [(row["step"], row["x"]) for row in spread_rows(file)] == [(1, 1), (2, 9)]
    with file.open("a") as stream:
        stream.write('{"step": 7, "x": 7')
    assert [row["step"] for row in spread_rows(file)] == [1, 2]


@pytest.mark.parametrize("length", [1, 90, 4000])
def test_a_large_file_is_read_at_places_all_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(spread, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(spread, "_PLACES", 32)
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"step": step, "text": "x" * length} for step in range(3000)])
    steps = [row["step"] for row in spread_rows(file)]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 2999)
    assert 30 <= len(steps) <= 33
    assert max(after - before for before, after in pairwise(steps)) < 120


def test_a_large_file_of_nothing_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_LONGEST_ROW", 4096)
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.truncate(1 << 34)
        stream.seek(1 << 34)
        stream.write(b'\n{"step": 3}\n')
    assert spread_rows(file) == [{"step": 3}]


def test_thinning_keeps_ends_and_peaks() -> None:
    points = [[float(step), math.sin(step / 90)] for step in range(5000)]
    points[1234][1], points[3210][1] = 9.0, -9.0
    kept = thinned(points, 100)
    assert len(kept) <= 102
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[1234] in kept
    assert points[3210] in kept
    assert kept == sorted(kept)
    rows = [{"step": step, "x": value} for step, value in enumerate([1.0, None, math.inf, "x", True, 2.0])]
    assert curve(rows, "x") == [[0, 1.0], [5, 2.0]]
    assert [row["step"] for row in evenly(rows, 3)] == [0, 2, 5]


def test_the_statistics_of_a_long_run_of_a_deep_model_stay_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ternary, "_MOST_CELLS", 240)
    run = full_run(tmp_path / "run")
    names = [f"layers.{layer}.mlp.up_proj" for layer in range(24)]
    write_rows(run.ternary, [{"step": step, **{f"ternary/{name}/scale": step for name in [*names, "all"]}}
                             for step in range(1, 400)])  # fmt: skip
    found = read_record([run], now=TIME)["runs"][0]["ternary"]
    assert (found["steps"][0], found["steps"][-1], len(found["steps"])) == (1, 399, 60)
    assert found["matrix_count"] == 24
    assert len(found["matrices"]) == len(found["values"]["scale"]) == 4
    assert found["values"]["scale"][3] == found["steps"]


def test_samples_are_shown_from_early_to_late(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    write_rows(run.samples, [
        {"step": step, "prompt": prompt, "mode": mode, "generated_text": f"text of {step}", "mean_entropy": 1.5}
        for step in (*range(10, 300, 10), 150, 160) for prompt in ("A", "B") for mode in ("greedy", "typical")
    ])  # fmt: skip
    rows = read_record([run], now=TIME)["runs"][0]["samples"]
    assert sorted({row["step"] for row in rows}) == [10, 40, 70, 100, 130, 160], "290 came before the resume at 150"
    text = rendered(run)
    assert "Step 10, typical, mean entropy 1.50 nats" in text
    assert "Btext of 160" in text


def test_papers_are_those_of_the_parts_that_are_used() -> None:
    used = {paper["address"][-10:] for paper in papers(CONFIG)}
    assert {"2402.17764", "2305.13245", "2210.06423", "1711.05101"} <= used
    assert not used & {"2109.08668", "2502.16982", "1612.01064", "2311.04823", "1810.04805", "2203.05740"}
    changed = {**CONFIG, "optimizer": {"name": "muon"}, "quantization": {**CONFIG["quantization"], "qdrop": 0.2}}
    changed["model"] = {**CONFIG["model"], "hidden_act": "relu2", "num_key_value_heads": 4}
    other = {paper["address"][-10:] for paper in papers(changed)}
    assert {"2502.16982", "2109.08668", "2203.05740"} <= other
    assert "2305.13245" not in other
    twin = papers({**CONFIG, "quantization": {"weights": "none"}})
    assert not {"2402.17764", "2310.11453", "2407.12327"} & {paper["address"][-10:] for paper in twin}
    assert papers({}) == []


def test_results_of_tasks_stand_beside_the_evaluations(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    task = {"acc": 0.4312, "acc_stderr": 0.0123, "n_samples": 500, "limit": 500, "few_shot": 0, "version": 1.0}
    run.task_results(250).write_text(json.dumps({"tasks": {"hellaswag": task, "broken": 5, "odd": {"acc": "x"}}}))
    run.task_results(9).write_text("{")
    rows = read_record([run], now=TIME)["runs"][0]["tasks"]
    assert [row["task"] for row in rows] == ["hellaswag", "broken", "odd"]
    assert rows[0]["metrics"] == {"acc": 0.4312}
    text = rendered(run)
    assert "| hellaswag | 250 | acc | 0.4312 ± 0.012 | 500 | first 500 |" in text
    assert "*from eval/lm_eval_000250.json*" in text
    run.evaluations.unlink()
    assert "hellaswag" in rendered(run)


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**40])
def test_a_header_of_any_length_is_no_reason_to_read_it(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert tensor_shapes(tmp_path / "x") == {}
    (tmp_path / "x").write_bytes(header({"a": [3, 5], "b": [-1], "c": []}))
    assert tensor_shapes(tmp_path / "x") == {"a": [3, 5], "c": []}


def test_a_comparison_with_full_precision_is_taken_along_if_it_is_one(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    assert read_record([run], tmp_path, now=TIME)["twin"] is None
    (tmp_path / "comparison.json").write_text('{"texts": 5, "arms": {}}')
    record = read_record([run], tmp_path, now=TIME)
    assert record["twin"] == {}
    assert "comparison.json is damaged" in markdown("", "", sections(record)), "a gap that is lost is not passed over"
    (tmp_path / "comparison.json").write_text('{"texts": [], "arms": {}, "x": NaN}')
    assert read_record([run], tmp_path, now=TIME)["twin"] == {"texts": [], "arms": {}, "x": None}


def test_every_chart_of_a_whole_report_can_be_drawn_and_has_words(tmp_path: Path) -> None:
    parts = sections(read_record([full_run(tmp_path / "run")], now=TIME))
    assert drawn(parts) >= 9
    for part in parts:
        for block in part.blocks:
            if isinstance(block, Chart):
                assert block.alt.endswith(".")
                assert block.source
