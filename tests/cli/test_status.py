"""`ternlm status` and `ternlm runs`: one look, a live view that ends with the run, and a table that nothing breaks."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_run import TIME, fake_run, training_row, write_rows
from ternlm.run_directory import RunDirectory, append_jsonl

HERE = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
HANG_GUARD_S = 60.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose process is this one."""
    return fake_run(tmp_path / "runs" / "demo-1", step=300, total=400, **HERE)


def change(run: RunDirectory, **fields: Any) -> None:
    new = run.status.with_suffix(".new")
    new.write_text(json.dumps(json.loads(run.status.read_text()) | fields))
    new.replace(run.status)


class Meanwhile:
    """Stands in for `time.sleep`: while a watcher sleeps, the run goes on by one of the given deeds."""

    def __init__(self, *deeds: Callable[[], Any]) -> None:
        self.deeds, self.asked = list(deeds), []

    def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        self.deeds.pop(0)()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_one_look_shows_the_run_and_what_to_do_next(ternlm, run: RunDirectory) -> None:
    outcome = ternlm("status")
    assert (outcome.code, outcome.err) == (0, "")
    for shown in ("demo-1", "training", "300/400", "75.0 %", "ternlm status runs/demo-1 --watch"):
        assert shown in outcome.out
    assert "\x1b[" not in outcome.out
    for reference in ("latest", "demo", "demo-1", run.path):
        assert ternlm("status", reference).out.splitlines()[0] == outcome.out.splitlines()[0]


def test_json_has_the_keys_of_the_status_file_and_more(ternlm, run: RunDirectory) -> None:
    outcome = ternlm("status", "demo-1", "--json")
    status = json.loads(outcome.out)
    assert set(json.loads(run.status.read_text())) - set(status) == {"process_started"}
    assert (status["state"], status["alive"], status["step"], status["progress"]) == ("training", True, 300, 0.75)
    assert status["checkpoints"] == [250]
    assert status["val"]["step"] == 250
    run.status.unlink()
    assert list(json.loads(ternlm("status", "demo-1", "--json").out)) == list(status)


@pytest.mark.parametrize("extra", [(), ("--json",), ("--watch",)])
def test_a_run_that_does_not_exist_is_an_environment_fault(ternlm, run: RunDirectory, extra: tuple[str, ...]) -> None:
    outcome = ternlm("status", "nothing", *extra)
    assert (outcome.code, outcome.out) == (3, "")
    assert "no run 'nothing'" in outcome.err
    assert ternlm("status", "--runs-dir", "elsewhere", *extra).code == 3


def test_what_is_left_of_a_run_can_be_looked_at(ternlm, tmp_path: Path) -> None:
    (tmp_path / "runs" / "torn" / "metrics").mkdir(parents=True)
    outcome = ternlm("status", "torn")
    assert outcome.code == 0
    assert "damaged" in outcome.out
    assert json.loads(ternlm("status", "torn", "--json").out)["state"] == "damaged"
    assert ternlm("status", "torn", "--watch").code == 0


def test_neither_command_needs_torch(run: RunDirectory) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ternlm.cli import app\n"
        "for words in ('status', 'status --json', 'status --watch', 'watch', 'runs', 'runs --json'):\n"
        "    try:\n        app(words.split())\n"
        "    except SystemExit as ended:\n        assert not ended.code, words\n"
    )
    change(run, state="finished")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_terminal_without_utf_8_gets_ascii(run: RunDirectory) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-m", "ternlm", "status"], capture_output=True, env=environment, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.isascii()
    assert b"###" in result.stdout


def test_watching_into_a_file_prints_one_line_per_change_until_the_run_ends(
    ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile = Meanwhile(
        lambda: None,
        lambda: change(run, step=310, loss=1.5),
        lambda: change(run, updated_at="2027-01-15T08:00:01Z"),
        lambda: change(run, state="evaluating"),
        lambda: change(run, state="finished", step=400, exit_code=0, next_command="ternlm generate runs/demo-1"),
    )
    monkeypatch.setattr(time, "sleep", meanwhile)
    outcome = ternlm("status", "--watch", "--interval", 0.5)
    assert (outcome.code, outcome.err, meanwhile.deeds) == (0, "", [])
    assert meanwhile.asked == [0.5] * 5
    words = [line.split("  ") for line in outcome.out.splitlines()]
    assert [(row[1], row[2]) for row in words] == [
        ("training", "step 300/400"), ("training", "step 310/400"), ("evaluating", "step 310/400"),
        ("finished", "step 400/400"),
    ]  # fmt: skip
    assert "loss 1.5000" in words[1]


def test_watching_as_json_prints_one_object_per_change(
    ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", Meanwhile(lambda: change(run, state="stopped", exit_code=130)))
    states = [json.loads(line)["state"] for line in ternlm("status", "--watch", "--json").out.splitlines()]
    assert states == ["training", "stopped"]


def test_watching_on_a_terminal_redraws_in_place_with_charts_and_ends_with_the_run(
    ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "100", "LINES": "50", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)

    def one_more_row() -> None:
        import random

        append_jsonl(run.scalars, training_row(301, 400, random.Random(0)) | {"time": TIME + 9})

    def ends() -> None:
        change(run, state="finished", step=400, updated_at="2027-01-15T08:01:00Z")

    monkeypatch.setattr(time, "sleep", Meanwhile(one_more_row, ends))
    outcome = ternlm("watch")
    assert outcome.code == 0
    assert "\x1b[?1049h" not in outcome.out, "the scrollback is kept"
    assert outcome.out.count("\x1b[1A") > 20, "the next picture goes over the last one"
    for shown in ("300/400", "301/400", "400/400", "finished", "tokens/s", "Ctrl-C leaves"):
        assert shown in outcome.out
    assert any("⠤" in line for line in outcome.out.splitlines())
    assert "Ctrl-C leaves" not in outcome.out.splitlines()[-1]


def test_a_folder_deleted_while_it_is_watched_ends_the_watch(
    ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", Meanwhile(lambda: run.path.rename(run.path.with_name("moved"))))
    outcome = ternlm("status", "--watch")
    assert outcome.code == 3
    assert "is gone" in outcome.err


def test_a_run_whose_process_dies_is_lost_and_ends_the_watch(
    ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", Meanwhile(lambda: change(run, pid=2**22 + 1)))
    lines = ternlm("status", "--watch").out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["training", "lost"]


def test_ctrl_c_leaves_without_a_word(ternlm, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", Meanwhile(interrupt))
    outcome = ternlm("status", "--watch")
    assert (outcome.code, outcome.err) == (0, "")


def test_ctrl_c_on_a_real_terminal_ends_with_0_and_gives_the_terminal_back(run: RunDirectory) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    command = [sys.executable, "-m", "ternlm", "status", "--watch"]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    signal.signal(signal.SIGINT, inherited)
    os.close(slave)
    seen = b""
    try:
        while b"Ctrl-C leaves" not in seen:
            seen += os.read(master, 65536)
        child.send_signal(signal.SIGINT)
        guard = threading.Timer(HANG_GUARD_S, child.kill)
        guard.start()
        with suppress(OSError):  # how the end of a terminal shows; one that nobody reads would hold its writer up
            while more := os.read(master, 65536):
                seen += more
        assert child.wait() == 0
        guard.cancel()
    finally:
        child.kill()
        child.wait()
        os.close(master)
    assert b"Traceback" not in seen
    assert seen.rindex(b"\x1b[?25h") > seen.index(b"\x1b[?25l"), "the cursor is shown again"


def test_runs_are_listed_with_the_newest_last(ternlm, tmp_path: Path, run: RunDirectory) -> None:
    runs = tmp_path / "runs"
    fake_run(runs / "zz-old", step=400, total=400, state="finished")
    os.utime(runs / "zz-old" / "meta", (1, 1))
    lines = ternlm("runs").out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "val", "loss", "(bpb)", "tokens/s", "updated", "size"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["zz-old", "finished", "400/400"], ["demo-1", "training", "300/400"],
    ]  # fmt: skip
    assert "(1.100)" in lines[2]
    assert lines[-1] == "next: ternlm status runs/demo-1"
    assert ternlm("status").out.startswith("demo-1"), "the last one is what latest means"
    listed = json.loads(ternlm("runs", "--json").out)["runs"]
    assert [(row["run_id"], row["state"]) for row in listed] == [("zz-old", "finished"), ("demo-1", "training")]


def test_damaged_folders_are_listed_as_such(ternlm, tmp_path: Path, run: RunDirectory) -> None:
    runs = tmp_path / "runs"
    (runs / "empty").mkdir()
    (runs / "torn" / "metrics").mkdir(parents=True)
    write_rows(runs / "torn" / "metrics" / "scalars.jsonl", [{"step": 3}])
    (runs / "no-status" / "meta").mkdir(parents=True)
    (runs / "no-status" / "meta" / "config.json").write_text("{")
    (runs / "\x1b[31mred").mkdir()
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "a-file").touch()
    (runs / ".hidden").mkdir()
    outcome = ternlm("runs")
    assert outcome.code == 0, outcome.err
    table = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines()[1:-2]}
    assert table == {
        "empty": "damaged", "torn": "damaged", "no-status": "unknown", ".[31mred": "damaged", "demo-1": "training",
    }  # fmt: skip


def test_no_runs_are_no_error(ternlm, tmp_path: Path) -> None:
    for given in ((), ("--runs-dir", tmp_path)):
        outcome = ternlm("runs", *given)
        assert outcome.code == 0
        assert "there are no runs" in outcome.out
    assert json.loads(ternlm("runs", "--json").out) == {"runs_dir": "runs", "runs": []}


@pytest.mark.parametrize(("width", "columns"), [(60, 4), (80, 6), (120, 8)])
def test_the_table_gives_up_columns_before_it_wraps(
    ternlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, columns: int
) -> None:
    fake_run(tmp_path / "runs" / "demo-20261120-153401-ab12", step=300, total=400, **HERE)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    head, row = re.sub(r"\x1b\[[0-9;]*m", "", ternlm("runs").out).splitlines()[:2]
    assert max(len(head), len(row)) <= width
    assert len(head.replace("val loss (bpb)", "val").split()) == columns
    assert "demo-20261120" in row
    assert "300/400" in row
