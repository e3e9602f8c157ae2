"""`ternlm report`, and the report that is written when a run ends, whatever its end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fake_run import fake_run
from ternlm.cli import report as verb
from ternlm.errors import Diverged, Interrupted
from ternlm.run_directory import RunDirectory, read_jsonl

NAMES = ["report.html", "report.json", "report.md"]
WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Blocked())
from ternlm.cli import main
main()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return fake_run(tmp_path / "runs" / "one", step=300, total=400)


@pytest.fixture
def reports_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERNLM__tracking__report")


def written(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("report.*"))


def touch(run: RunDirectory) -> None:
    """What every run does when it begins: its status is replaced, and its settings say that a report is wanted."""
    run.config.write_text(json.dumps({"model": {"family": "bitnet"}, "tracking": {"report": True}}))
    new = run.status.with_suffix(".new")
    new.write_text(run.status.read_text())
    os.utime(new, ns=(1, 1))
    new.replace(run.status)


def test_a_report_is_a_page_markdown_and_the_numbers_of_the_run(ternlm, run: RunDirectory) -> None:
    outcome = ternlm("report", "one")
    assert outcome.code == 0, outcome.err
    assert written(run.path) == NAMES
    assert "report.html" in outcome.out
    record = json.loads((run.path / "report.json").read_text())
    last = read_jsonl(run.evaluations)[-1]
    assert record["runs"][0]["evaluations"][-1]["val/loss"] == last["val/loss"]
    page, text = (run.path / "report.html").read_text(), (run.path / "report.md").read_text()
    assert "<title>one</title>" in page
    assert text.startswith("# one\n")
    assert f"{last['val/bpb']:.3f}" in page
    assert f"{last['val/bpb']:.3f}" in text


def test_a_second_report_replaces_the_first(ternlm, run: RunDirectory) -> None:
    assert ternlm("report", run.path).code == ternlm("report", "latest").code == 0
    assert written(run.path) == NAMES


def test_several_runs_stand_side_by_side_in_a_folder_of_their_own(ternlm, run: RunDirectory, tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "two", step=200, total=400)
    assert ternlm("report", "one", "two").code == 0
    assert written(tmp_path / "report") == NAMES
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h1>2 runs: one, two</h1>" in page
    assert written(run.path) == []


def test_one_run_given_twice_is_refused(ternlm, run: RunDirectory) -> None:
    outcome = ternlm("report", "one", run.path)
    assert outcome.code == 2
    assert "given twice" in outcome.err


def test_a_run_that_is_not_there_is_one_sentence(ternlm, run: RunDirectory) -> None:
    outcome = ternlm("report", "three")
    assert outcome.code == 3
    assert "no run 'three'" in outcome.err


def test_json_prints_the_numbers_and_writes_nothing_unless_told_where(
    ternlm, run: RunDirectory, tmp_path: Path
) -> None:
    outcome = ternlm("report", "one", "--json")
    assert json.loads(outcome.out)["runs"][0]["id"] == "one"
    assert written(run.path) == []
    outcome = ternlm("report", "one", "--json", "--output", tmp_path / "x")
    assert json.loads(outcome.out)["runs"][0]["id"] == "one"
    assert written(tmp_path / "x") == NAMES


def test_the_runs_of_a_sweep_are_found_by_its_name(ternlm, tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "lr"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    assert ternlm("report", "lr").code == 3
    for name in ("a", "b"):
        fake_run(sweep / name, step=100, total=100)
    assert ternlm("report", "lr", "--output", tmp_path / "x" / "y").code == 0
    assert [one["id"] for one in json.loads((tmp_path / "x" / "y" / "report.json").read_text())["runs"]] == ["a", "b"]


def test_a_twin_has_its_name_as_title_and_its_report_in_its_folder(ternlm, tmp_path: Path) -> None:
    twin = tmp_path / "runs" / "gap"
    for name in ("ternary", "full"):
        fake_run(twin / name, step=100, total=100)
    (twin / "twin.json").write_text("{}")
    assert ternlm("report", "gap").code == 0
    assert "<h1>gap: ternary against full precision</h1>" in (twin / "report.html").read_text()
    assert ternlm("report", "gap", twin / "full").code == 2


def test_a_folder_that_takes_no_files_is_one_sentence(ternlm, run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = ternlm("report", "one", "--output", tmp_path / "file" / "x")
    assert outcome.code == 3
    assert "cannot be written" in outcome.err


def test_a_report_needs_no_torch(run: RunDirectory, tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "report", "one"], cwd=tmp_path, capture_output=True,
                           text=True, timeout=120, check=False)  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert written(run.path) == NAMES


def test_an_empty_run_and_one_that_lost_its_files_have_a_report(ternlm, tmp_path: Path) -> None:
    (tmp_path / "runs" / "empty" / "meta").mkdir(parents=True)
    assert ternlm("report", "empty").code == 0
    (tmp_path / "runs" / "bare").mkdir()
    assert ternlm("report", "runs/bare").code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not a run")
    assert ternlm("report", "other").code == 3, "nothing is written among the files of others"
    run = fake_run(tmp_path / "runs" / "lost", step=300, total=400)
    for file in [file for file in run.path.rglob("*") if file.is_file()]:
        file.write_bytes(b'{"step": "x", "val/loss": [1]}\n\xff\xfe{"step"')
    assert ternlm("report", "lost").code == 0
    assert written(run.path) == NAMES


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_ends_with_its_report(ternlm, recipe: Path, tmp_path: Path, reports_wanted: None, quiet: bool) -> None:
    outcome = ternlm("train", recipe, "--run-id", "r", *(["--quiet"] if quiet else []))
    assert outcome.code == 0, outcome.err
    assert written(tmp_path / "runs" / "r") == NAMES
    assert ("report.html" in outcome.out) is not quiet
    record = json.loads((tmp_path / "runs" / "r" / "report.json").read_text())
    assert record["runs"][0]["status"]["state"] == "finished"
    assert (tmp_path / "runs" / "r" / "eval" / "alignment.json").is_file()


def test_a_run_that_goes_on_ends_with_a_new_report(ternlm, recipe: Path, tmp_path: Path) -> None:
    assert ternlm("train", recipe, "--run-id", "r").code == 0
    assert written(tmp_path / "runs" / "r") == []
    assert ternlm("resume", "r", "--steps", "8", "tracking.report=true").code == 0
    assert json.loads((tmp_path / "runs" / "r" / "report.json").read_text())["runs"][0]["status"]["step"] == 8


def test_no_report_where_none_is_wanted(ternlm, recipe: Path, tmp_path: Path, reports_wanted: None) -> None:
    assert ternlm("train", recipe, "--run-id", "r", "tracking.report=false").code == 0
    assert ternlm("resume", "r", "--steps", "8").code == 0
    assert written(tmp_path / "runs" / "r") == []


def test_a_run_that_was_refused_leaves_the_report_of_the_one_before(
    ternlm, recipe: Path, tmp_path: Path, reports_wanted: None
) -> None:
    assert ternlm("train", recipe, "--run-id", "r").code == 0
    page = tmp_path / "runs" / "r" / "report.html"
    page.write_text("mine")
    assert ternlm("train", recipe, "--run-id", "r").code == 2
    assert ternlm("resume", "r").code == 0, "it is complete already"
    assert page.read_text() == "mine"


def test_a_report_that_fails_changes_nothing_about_the_run(
    ternlm, recipe: Path, tmp_path: Path, reports_wanted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr("ternlm.report.page.html_page", broken)
    outcome = ternlm("train", recipe, "--run-id", "r")
    assert outcome.code == 0
    assert "report not written: no ink. Later: ternlm report" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "runs" / "r" / "report.html").exists()


def test_the_report_of_a_run_that_diverged_is_written_and_it_still_counts_as_diverged(run: RunDirectory) -> None:
    with pytest.raises(Diverged), verb.reported(run, quiet=True):
        touch(run)
        raise Diverged("loss is nan")
    assert written(run.path) == NAMES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_report_and_not_the_run(
    run: RunDirectory, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("ternlm.report.record.read_record", interrupted)
    with verb.reported(run, quiet=False):
        touch(run)
    assert "report not written. Later: ternlm report" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_who_stops_a_run_does_not_wait_for_its_model_to_be_checked(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[RunDirectory] = []
    monkeypatch.setattr(verb, "check_model", checked.append)
    with pytest.raises(Interrupted), verb.reported(run, quiet=True):
        touch(run)
        raise Interrupted("stopped.")
    assert written(run.path) == NAMES
    assert checked == []
