"""The summary of a sweep: the runs' own numbers, hand-made means, spreads and ties, and files that can be read."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fake_run import fake_run, write_rows
from ternlm.report.sweep import Summary, compare, read_summary, short_key
from ternlm.report.sweep_picture import draw_summary, is_logarithmic, swept_number
from ternlm.report.sweep_text import as_csv, as_markdown, as_table, notes, write_files
from ternlm.run_directory import read_jsonl
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import End, SweepDirectory, SweepRecord

KEY = "optimizer.learning_rate"
PNG = b"\x89PNG"


def record_of(trials: list[Trial], metric: Any = "val/loss") -> SweepRecord:
    marks = {trial.id: "x" for trial in trials}
    return SweepRecord("s", "here", "what for", "bitnet-1m", {}, metric, {}, trials, marks, {})


def ended(sweep: SweepDirectory, trial: Trial, loss: float | None, state: str = "finished", code: int = 0) -> None:
    """A run of this trial, with a curve that ends at `loss`."""
    run = fake_run(sweep.path / trial.id, step=500, total=500, every=50, state=state, exit_code=code)
    steps = range(100, 501, 100)
    values = [] if loss is None else [loss + (500 - step) / 100 for step in steps]
    write_rows(
        run.evaluations,
        [
            {"step": step, "val/loss": value, "val/bpb": 2 * value, "val/accuracy": 1 / value}
            for step, value in zip(steps, values, strict=False)
        ],
    )


@pytest.fixture
def rates(tmp_path: Path) -> tuple[SweepDirectory, SweepRecord]:
    """Three learning rates, two seeds each; the largest diverged with one of them."""
    sweep = SweepDirectory(tmp_path / "rates")
    sweep.path.mkdir()
    arms = {"lr=0.001": [2.5, 2.7], "lr=0.002": [2.4, 2.5], "lr=0.004": [2.9, None]}
    trials = []
    for arm, losses in arms.items():
        for seed, loss in enumerate(losses):
            trial = Trial(f"{arm[3:]}-s{seed}", arm, seed, {KEY: float(arm[3:])})
            state, code = ("finished", 0) if loss is not None else ("diverged", 4)
            ended(sweep, trial, loss, state, code)
            trials.append(trial)
    return sweep, record_of(trials)


def test_means_spreads_and_ties_are_those_of_the_formula() -> None:
    found = compare({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0], "c": [7.0, 7.1, 7.2], "d": [5.0], "e": []}, "b")
    assert found.keys() == {"a", "b", "c", "d"}
    assert [found[name].rank for name in "abcd"] == [1, 2, 4, 3]
    assert (found["a"].mean, found["a"].spread, found["a"].difference) == (2.0, 1.0, -1.0)
    assert (found["a"].ties_base, found["a"].ties_best) == (True, None), "1 is below 2 x sqrt((1 + 1) / 2)"
    assert (found["b"].difference, found["b"].ties_base, found["b"].ties_best) == (None, None, True)
    assert (found["c"].difference, found["c"].ties_base) == (pytest.approx(4.1), False), "4.1 is above 2 x 0.71"
    assert (found["d"].spread, found["d"].ties_base, found["d"].ties_best) == (None, None, None), (
        "one seed says nothing"
    )


def test_the_boundary_of_a_tie_is_two_pooled_deviations() -> None:
    spread = {"base": [0.0, 2.0]}  # a standard deviation of sqrt(2), as that of the others
    near = compare({**spread, "x": [2.8, 4.8]}, "base")["x"]
    far = compare({**spread, "x": [2.9, 4.9]}, "base")["x"]
    assert (near.ties_base, far.ties_base) == (True, False), "2 sqrt(2) = 2.83 lies between 2.8 and 2.9"


def test_accuracy_is_better_when_higher() -> None:
    found = compare({"a": [0.5], "b": [0.6]}, "a", higher_is_better=True)
    assert (found["b"].rank, found["b"].difference) == (1, pytest.approx(0.1))


def test_the_summary_has_the_numbers_of_the_runs(rates: tuple[SweepDirectory, SweepRecord]) -> None:
    sweep, record = rates
    summary = read_summary(sweep, record)
    assert [arm.name for arm in summary.ranked] == ["lr=0.002", "lr=0.001", "lr=0.004"]
    for trial in summary.trials:
        rows = read_jsonl(sweep.path / trial.id / "eval" / "eval_results.jsonl")
        assert trial.value == (rows[-1]["val/loss"] if rows else None)
        assert trial.curve == [(row["step"], row["val/loss"]) for row in rows]
    first, second, third = summary.arms
    assert first.compared is not None and second.compared is not None and third.compared is not None
    assert (first.compared.mean, second.compared.difference) == (pytest.approx(2.6), pytest.approx(-0.15))
    assert (third.compared.mean, third.compared.spread, third.state) == (2.9, None, "1 finished, 1 diverged")
    by_bpb = read_summary(sweep, record._replace(metric="val/bpb"))
    assert by_bpb.arms[0].compared is not None
    assert by_bpb.arms[0].compared.mean == pytest.approx(5.2)
    by_accuracy = read_summary(sweep, record._replace(metric="val/accuracy"))
    assert by_accuracy.ranked[0].name == "lr=0.002"


def test_a_trial_that_has_not_ended_has_no_result_yet(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    trials = [Trial(name, name, None, {}) for name in ("stopped", "waiting", "refused", "limited")]
    record = record_of(trials)
    ended(sweep, trials[0], 2.0, "stopped", 130)
    ended(sweep, trials[3], 3.0, "stopped", 0)
    record.ends["refused"] = End(3, "DataError: gone")
    found = {trial.id: trial for trial in read_summary(sweep, record).trials}
    assert {name: (trial.state, trial.value) for name, trial in found.items()} == {
        "stopped": ("stopped", None), "waiting": ("waiting", None), "refused": ("failed", None),
        "limited": ("stopped", 3.0),
    }  # fmt: skip
    assert found["refused"].error == "DataError: gone"
    assert found["stopped"].curve, "what there is of it is drawn"


def printed(summary: Summary, ascii_only: bool = False) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(as_table(summary, ascii_only))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_table_is_ranked_and_marks_ties(rates: tuple[SweepDirectory, SweepRecord]) -> None:
    summary = read_summary(*rates)
    lines = [line.split() for line in printed(summary).splitlines()]
    assert lines[1][:7] == ["1", "lr=0.002", "learning_rate=0.002", "2.4500", "±", "0.0707", "-0.1500"]
    assert lines[1][7] == "~", "0.15 is below 2 x 0.112"
    assert lines[2][:2] == ["2=", "lr=0.001"]
    assert lines[3][-4:] == ["1", "finished,", "1", "diverged"]
    printed(summary, ascii_only=True).encode("ascii")
    assert "5 finished, 1 diverged" in notes(summary)[0]
    assert "base 'lr=0.001'" in notes(summary)[0]


def test_the_files_say_the_same_as_the_table(rates: tuple[SweepDirectory, SweepRecord]) -> None:
    sweep, record = rates
    summary = read_summary(sweep, record)
    write_files(sweep, summary)
    rows = list(csv.DictReader(io.StringIO(sweep.summary("csv").read_text())))
    assert [row["val/loss"] for row in rows] == ["2.5", "2.7", "2.4", "2.5", "2.9", ""]
    assert [row[KEY] for row in rows] == ["0.001", "0.001", "0.002", "0.002", "0.004", "0.004"]
    whole = json.loads(sweep.summary("json").read_text())
    assert [arm["mean"] for arm in whole["arms"]] == [pytest.approx(2.6), pytest.approx(2.45), 2.9]
    assert whole["arms"][1]["ties_base"] is True
    text = sweep.summary("md").read_text()
    assert "| 2.4500 ± 0.0707 | -0.1500 ~ |" in text
    assert text.count("\n| `") == 6


def test_texts_of_a_trial_cannot_break_the_files(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    record = record_of([Trial("a", "a | [red]b[/red]\nc", None, {"evaluation.prompts": ['x,\n"y"']})])
    record.ends["a"] = End(1, "bad | thing")
    summary = read_summary(sweep, record)
    lengths = {line.count("|") - line.count("\\|") for line in as_markdown(summary).splitlines() if line[:1] == "|"}
    assert lengths == {7 + 1, 7 + 1 + 1}, "seven columns of runs, eight of arms"
    (row,) = csv.DictReader(io.StringIO(as_csv(summary)))
    assert row["evaluation.prompts"] == 'x,\n"y"'
    assert "[red]b" in printed(summary)


def test_a_sweep_without_results_is_shown_and_draws_nothing(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    summary = read_summary(sweep, record_of([Trial("a", "a", None, {})]))
    assert "waiting" in printed(summary)
    assert draw_summary(sweep, summary) is False
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn_of_numbers_and_of_names(rates: tuple[SweepDirectory, SweepRecord], tmp_path: Path) -> None:
    sweep, record = rates
    assert draw_summary(sweep, read_summary(sweep, record))
    assert sweep.summary("png").read_bytes().startswith(PNG)
    numbers = sweep.summary("svg").read_text()
    assert KEY in numbers.replace("<!-- ", "")
    named = [trial._replace(settings={"model.norm_type": trial.arm}) for trial in record.trials]
    assert draw_summary(sweep, read_summary(sweep, record._replace(trials=named)))
    assert "lr=0.004" in sweep.summary("svg").read_text()
    assert not list(sweep.path.glob(".summary*"))


def test_one_number_is_told_from_several_and_from_words(rates: tuple[SweepDirectory, SweepRecord]) -> None:
    sweep, record = rates
    swept = swept_number(read_summary(sweep, record))
    assert swept is not None
    assert (swept.key, sorted(swept.values.values())) == (KEY, [1e-3, 2e-3, 4e-3])
    for settings in ({KEY: "fast"}, {KEY: 1e-3, "training.batch_size": 4}, {KEY: True}, {}):
        last = [*record.trials[:-1], record.trials[-1]._replace(arm="other", settings=settings)]
        assert swept_number(read_summary(sweep, record._replace(trials=last))) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-3, 2e-3, 4e-3], True),
        ([1, 9], True),
        ([1, 2, 3], False),
        ([0, 1, 10], False),
        ([1, 2], False),
        ([3], False),
    ],
)
def test_numbers_spread_by_factors_get_a_logarithmic_axis(values: list[float], expected: bool) -> None:
    assert is_logarithmic(values) is expected


def test_names_of_settings_are_short_where_they_stay_different() -> None:
    keys = {"training.batch_size", "evaluation.batch_size", "optimizer.learning_rate"}
    assert [short_key(key, keys) for key in sorted(keys)] == [
        "evaluation.batch_size", "learning_rate", "training.batch_size",
    ]  # fmt: skip
