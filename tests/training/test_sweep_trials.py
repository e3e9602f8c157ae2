"""Running trials, with small processes in the place of training: in order, side by side, stopped, failed."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ternlm.errors import Interrupted, Preempted
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import End, SweepDirectory, SweepRecord
from ternlm.training.sweep_trials import TrialRunner, pending

HANG_GUARD_S = 30

ENDS = """
def end(state, code):
    (run / "status.json").write_text(json.dumps({"state": state, "exit_code": code, "error": None}))
    sys.exit(code)
"""
HEAD = f"import json, os, pathlib, signal, sys, time\nrun = pathlib.Path(sys.argv[1])\nrun.mkdir(exist_ok=True)\n{ENDS}"
FINISH = "end('finished', 0)"
WAIT_FOR_SIGNAL = """
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
(run / "ready").touch()
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
(run / "signals").write_text(json.dumps(seen))
end('stopped', 130)
"""


class Scripted(TrialRunner[SweepRecord]):
    """A runner whose trials are scripts, by name."""

    scripts: dict[str, str]

    def command(self, trial: Trial) -> list[str]:
        return [sys.executable, "-c", HEAD + self.scripts[trial.id], str(self.folder.run(trial).path)]


Make = Callable[..., Scripted]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A runner of these scripts."""

    def build(parallel: int = 1, **scripts: str) -> Scripted:
        sweep = SweepDirectory(tmp_path / "s")
        sweep.path.mkdir()
        trials = [Trial(name, name, None, {}) for name in scripts]
        marks = dict.fromkeys(scripts, "x")
        record = SweepRecord("s", "here", "", "bitnet-1m", {}, "val/loss", {}, trials, marks, {})
        runner = Scripted(sweep, record, parallel)
        runner.scripts = scripts
        return runner

    return build


def when(condition: Callable[[], bool], deed: Callable[[], object]) -> None:
    """Do something from another thread as soon as a condition holds."""

    def wait() -> None:
        last = time.monotonic() + HANG_GUARD_S
        while time.monotonic() < last and not condition():
            time.sleep(0.01)
        deed()

    threading.Thread(target=wait, daemon=True).start()


def test_trials_run_one_after_the_other_and_their_ends_are_kept(make: Make) -> None:
    order = "with (run.parent / 'order').open('a') as f: f.write(run.name)\n"
    fail = "print('at first', file=sys.stderr)\nprint('Broken: for good', file=sys.stderr)\nend('failed', 3)"
    runner = make(a=order + FINISH, b=order + fail, c=order + "end('diverged', 4)", d=order + FINISH)
    told: list[tuple[str, int]] = []
    runner._ended = lambda trial, end: told.append((trial.id, end.code))
    runner.run(runner.record.trials)
    assert (runner.folder.path / "order").read_text() == "abcd"
    assert told == [("a", 0), ("b", 3), ("c", 4), ("d", 0)]
    kept = runner.folder.read()
    assert kept.ends["b"] == End(3, "Broken: for good")
    assert [path.name for path in runner.folder.path.glob("*.log")] == ["b.log"], "only where something was said"
    assert pending(runner.folder, kept, retry_failed=False) == []
    assert [trial.id for trial in pending(runner.folder, kept, retry_failed=True)] == ["b"]


def test_a_trial_sees_the_environment_without_settings_and_writes_no_report(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERNLM__training__batch_size", "3")
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    runner = make(a="(run / 'env').write_text(json.dumps(dict(os.environ)))\n" + FINISH)
    runner.run(runner.record.trials)
    seen = json.loads((runner.folder.path / "a" / "env").read_text())
    assert {name: seen[name] for name in seen if name.startswith("TERNLM__")} == {"TERNLM__tracking__report": "false"}
    assert (seen["WANDB_RUN_GROUP"], seen["WANDB_NAME"]) == ("mine", "s/a")


def test_trials_side_by_side_meet_and_share_cores_and_gpus(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = """
(run.parent / f"here-{run.name}").touch()
gpu = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]
(run / "gpu").write_text(json.dumps(gpu))
while len(list(run.parent.glob("here-*"))) < 2:
    time.sleep(0.01)
"""
    runner = make(parallel=2, a=meet + FINISH, b=meet + FINISH, c=FINISH)
    runner.run(runner.record.trials)
    assert {name: end.code for name, end in runner.record.ends.items()} == {"a": 0, "b": 0, "c": 0}
    gpus = [json.loads((runner.folder.path / name / "gpu").read_text()) for name in "ab"]
    assert [gpu for gpu, _ in gpus] == ["4", "7"]
    assert {threads for _, threads in gpus} == {str(max((os.cpu_count() or 1) // 2, 1))}


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_l01_a_signal_is_passed_on_once_and_what_waits_is_not_begun(
    make: Make, number: signal.Signals, error: type[Exception]
) -> None:
    runner = make(a=FINISH, b=WAIT_FOR_SIGNAL, c=FINISH)
    when((runner.folder.path / "b" / "ready").exists, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error, match=r"1 of 3 trials are done.*ternlm sweep --resume"):
        runner.run(runner.record.trials)
    assert json.loads((runner.folder.path / "b" / "signals").read_text()) == [number]
    assert not (runner.folder.path / "c").exists()
    assert [trial.id for trial in pending(runner.folder, runner.folder.read(), retry_failed=False)] == ["b", "c"]


def test_no_process_is_left_behind_when_the_sweep_itself_fails(make: Make) -> None:
    runner = make(parallel=2, a=WAIT_FOR_SIGNAL, b="time.sleep(0.2)\n" + FINISH)

    def fail(trial: Trial, end: End) -> None:
        while not (runner.folder.path / "a" / "ready").exists():
            time.sleep(0.01)
        raise ZeroDivisionError

    runner._ended = fail
    with pytest.raises(ZeroDivisionError):
        runner.run(runner.record.trials)
    assert json.loads((runner.folder.path / "a" / "signals").read_text()) == [signal.SIGTERM]
    assert runner.folder.read().ends["a"].code == 130
