"""Weights & Biases: what the real package writes offline, read back from its file; and stubs that misbehave.

The package lives in a child process, so a stub is a package on PYTHONPATH. No test needs a network.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ternlm
from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.run_directory import RunDirectory
from ternlm.tracking import Trackers, TrackingSettings, build_trackers
from ternlm.tracking import wandb as wandb_tracking
from ternlm.tracking.wandb import WandbTracker, chosen_mode, flat, init_arguments

GUARD_S = 90.0

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed: pip install 'ternlm[wandb]'"
)

FACTS: dict[str, Any] = {
    "model": {"family": "bitnet", "hidden_size": 24},
    "data": {"source": "/somewhere/my_texts/", "splits": ["train", "validation"]},
    "total_parameters": 1_234_567,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def nobodys_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables, no key and no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "home").mkdir()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "demo-1")
    run.create()
    return run


def records(file: Path) -> Iterator[Any]:
    """The messages in a `.wandb` file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


class Written:
    """What one session wrote."""

    def __init__(self, file: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step_metric: dict[str, str] = {}
        for record in records(file):
            if record.HasField("run"):
                self.run = record.run
            elif record.HasField("history"):
                items = record.history.item
                self.rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
            elif record.HasField("metric"):
                self.step_metric[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        self.config = {update.key: json.loads(update.value_json) for update in self.run.config.update}

    def values(self, name: str) -> list[Any]:
        return [(row["step"], row[name]) for row in self.rows if name in row]


def sessions(run: RunDirectory) -> list[Path]:
    return sorted(run.wandb.glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


@needs_wandb
def test_every_row_fact_tag_and_note_is_in_the_packages_own_file_and_a_resumed_run_continues_it(
    run: RunDirectory, tmp_path: Path
) -> None:
    settings = TrackingSettings(wandb="offline", wandb_tags=("mine", "bitnet"), wandb_notes="first try")
    said: list[str] = []
    tracker = WandbTracker(run, settings, FACTS, "offline", said.append)
    tracker.log(
        "train", {"step": 5, "tokens_seen": 90, "time": 1e9, "train/loss": 1.5, "train/bpb": None, "eta_s": 2.0}
    )
    tracker.log("eval", {"step": 5, "val/loss": 1.75, "protocol": "window"})
    tracker.log("ternary", {"step": 5, "ternary/layers.0.self_attn.q_proj/frac_zero": 0.25})
    tracker.log("system", {"step": 4, "system/gpu0/util": 50.0, "perf/mfu": float("nan")})
    for mode in ("greedy", "typical"):
        tracker.log("sample", {"step": 5, "mode": mode, "prompt": "<b>One", "generated_text": " day\n</pre>\ud83d"})
    tracker.log("event", {"step": 6, "event": "loss_spike", "severity": "warning", "message": "Up.", "action": "kept"})
    assert tracker.describe() == "wandb offline (buffering)"
    tracker.close()

    (file,) = sessions(run)
    assert said == [f"wandb is offline. Send the rows later with: wandb sync {file.parent}"]
    written = Written(file)
    assert (written.run.project, written.run.display_name, written.run.notes) == ("ternlm", "demo-1", "first try")
    version = f"ternlm-{ternlm.__version__}"
    assert list(written.run.tags) == ["bitnet", "1.2M", "my_texts", version, "mine"]
    assert {name: value for name, value in written.config.items() if name != "_wandb"} == {
        "model.family": "bitnet", "model.hidden_size": 24, "data.source": "/somewhere/my_texts/",
        "data.splits": ["train", "validation"], "total_parameters": 1_234_567, "device": "cpu",
    }  # fmt: skip
    assert written.step_metric == {"*": "step"}
    assert written.values("train/loss") == [(5, 1.5)]
    assert written.values("tokens_seen") == [(5, 90)]
    assert written.values("eta_s") == [(5, 2.0)]
    assert written.values("val/loss") == [(5, 1.75)]
    assert written.values("ternary/layers.0.self_attn.q_proj/frac_zero") == [(5, 0.25)]
    assert written.values("system/gpu0/util") == [(4, 50.0)], "an earlier step is no reason to drop a row"
    assert written.values("event/loss_spike") == [(6, "warning: Up.")]
    assert not [row for row in written.rows if "train/bpb" in row or "protocol" in row]
    ((step, path),) = written.values("sample/text/path")
    text = (file.parent / "files" / path).read_text()
    assert step == 5
    assert all(part in text for part in ("greedy: &lt;b&gt;One", "typical: &lt;b&gt;One", " day\n&lt;/pre&gt;?"))

    resumed = WandbTracker(run, TrackingSettings(wandb="offline"), FACTS, "offline", said.append)
    resumed.log("train", {"step": 7, "train/loss": 1.25})
    resumed.close()
    again = Written(sessions(run)[-1])
    assert len(sessions(run)) == 2
    assert again.run.run_id == written.run.run_id == (run.wandb / "run_id").read_text().strip()
    assert again.values("train/loss") == [(7, 1.25)]
    assert not [path for path in run.wandb.rglob("*") if path.is_symlink()]
    assert not list((tmp_path / "home").rglob("*.table.json"))


@needs_wandb
@pytest.mark.parametrize("reason", ["API key", "connection refused"])
def test_l10_online_without_key_or_network_becomes_offline_with_one_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        if reason != "API key":
            monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(wandb_tracking, "INIT_TIMEOUT_S", 1.0)
        said: list[str] = []
        tracker = WandbTracker(run, TrackingSettings(), {}, "online", said.append)
        tracker.log("train", {"step": 1, "train/loss": 1.5})
        tracker.close()
    (sentence,) = said
    assert sentence.startswith("wandb is offline (")
    assert reason in sentence
    assert Written(sessions(run)[-1]).values("train/loss") == [(1, 1.5)]


STUB = """
import os, sys, time
LOG = os.environ["STUB_LOG"]
def note(text):
    with open(LOG, "a") as file:
        file.write(text + "\\n")
class Settings:
    def __init__(self, **values): pass
class Run:
    offline, url, dir = False, "http://here/run", "/somewhere/files"
    def define_metric(self, *args, **options): pass
    def log(self, values):
        {log}
        note(f"log {{values['step']}}")
    def finish(self, exit_code=0):
        {finish}
        note(f"finish {{exit_code}}")
def init(mode, **options):
    print("noise that is no answer")
    note(f"init {{mode}} {{os.getpid()}}")
    {init}
    return Run()
"""


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None = None, **actions: str) -> Path:
    """Put a package called wandb before the real one; returns the file in which it notes its calls."""
    package = tmp_path / "stub" / "wandb"
    package.mkdir(parents=True)
    actions = {"init": "pass", "log": "pass", "finish": "pass"} | actions
    (package / "__init__.py").write_text(STUB.format(**actions) if text is None else text)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    notes = tmp_path / "calls"
    notes.touch()
    monkeypatch.setenv("STUB_LOG", str(notes))
    return notes


def calls(notes: Path) -> list[str]:
    return [re.sub(r"(init \w+) \d+", r"\1", line) for line in notes.read_text().splitlines()]


def wait_until_noted(notes: Path, call: str) -> None:
    deadline = time.monotonic() + GUARD_S
    while call not in calls(notes):
        assert time.monotonic() < deadline, f"no '{call}' in {calls(notes)}"
        time.sleep(0.02)


def test_a_good_package_is_online_and_neither_its_noise_nor_its_exit_hooks_are_waited_for(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = stub(tmp_path, monkeypatch, init="import atexit; atexit.register(note, 'hook')")
    said: list[str] = []
    tracker = WandbTracker(run, TrackingSettings(), {}, "online", said.append)
    tracker.log("train", {"step": 1})
    tracker.close()
    assert calls(notes) == ["init online", "log 1", "finish 0"]
    assert said == ["wandb is online: http://here/run"]
    assert tracker.describe() == "wandb online http://here/run"


def test_ctrl_c_and_sigterm_are_for_training_and_not_for_the_child(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = stub(tmp_path, monkeypatch)
    tracker = WandbTracker(run, TrackingSettings(), {}, "online", print)
    child = int(notes.read_text().split()[-1])
    assert os.getsid(child) != os.getsid(0)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    tracker.log("train", {"step": 1})
    tracker.close()
    assert calls(notes) == ["init online", "log 1", "finish 0"]


def test_l10_a_package_that_refuses_online_and_offline_is_off_with_its_reason(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = stub(tmp_path, monkeypatch, init="raise ValueError('no\\nmood')")
    with pytest.raises(EnvironmentFault, match=r"^no mood$"):
        WandbTracker(run, TrackingSettings(), {}, "online", print)
    assert calls(notes) == ["init online", "init offline"]


def test_l10_a_package_that_never_answers_is_given_up(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = stub(tmp_path, monkeypatch, init="time.sleep(1000) if mode == 'online' else None")
    monkeypatch.setattr(wandb_tracking, "START_TIMEOUT_S", 5.0)
    said: list[str] = []
    tracker = WandbTracker(run, TrackingSettings(), {}, "online", said.append)
    tracker.close()
    assert calls(notes) == ["init online", "init offline", "finish 0"]
    assert "ended with code -9" in said[0]


@pytest.mark.parametrize("action", ["raise ConnectionError('gone')", "os._exit(3)"])
def test_l10_a_package_that_fails_or_dies_later_is_switched_off_and_the_rows_on_disk_go_on(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    notes = stub(tmp_path, monkeypatch, log=f"if values['step'] == 2: note('bad'); {action}")
    said: list[str] = []
    together = Trackers(build_trackers(run, TrackingSettings(wandb="online"), 0, said.append), said.append)
    for step in (1, 2):
        together.log("train", {"step": step})
    wait_until_noted(notes, "bad")
    for step in range(3, 30):
        together.log("train", {"step": step})
    together.close()
    assert calls(notes) == ["init online", "log 1", "bad"]
    (sentence,) = [sentence for sentence in said if "switched off" in sentence]
    assert ("gone" if "gone" in action else "ended with code 3") in sentence
    assert "wandb off: " in (together.describe() or "")
    assert len(run.scalars.read_text().splitlines()) == 29


@pytest.mark.parametrize("text", ["", "raise ImportError('no')"])
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    stub(tmp_path, monkeypatch, text)
    with pytest.raises(EnvironmentFault, match=r"pip install 'ternlm\[wandb\]'"):
        WandbTracker(run, TrackingSettings(), {}, "online", print)


TRAINING = """
import os, sys
from pathlib import Path
from ternlm.run_directory import RunDirectory
from ternlm.tracking import Trackers, TrackingSettings, build_trackers
settings = TrackingSettings(wandb="online", tensorboard=False)
run = RunDirectory(Path(sys.argv[1]))
trackers = Trackers(build_trackers(run, settings, 0, print), print)
trackers.log("train", {"step": 1})
"""


def until_noted(call: str) -> str:
    """A line for `TRAINING` that waits until the stub has got so far."""
    return f"import time\nwhile {call!r} not in open(os.environ['STUB_LOG']).read(): time.sleep(0.02)\n"


@pytest.mark.parametrize(("stuck", "last_call"), [("init", "init online"), ("log", "stuck"), ("finish", "log 1")])
def test_l10_a_package_that_blocks_for_ever_does_not_keep_the_process_from_ending(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str, last_call: str
) -> None:
    notes = stub(tmp_path, monkeypatch, **{stuck: "note('stuck'); time.sleep(1000)"})
    script = TRAINING + until_noted(last_call) + "trackers._active[-1].close(0.5)\ntrackers.close()\n"
    result = subprocess.run(
        [sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, timeout=GUARD_S, check=True
    )
    os.kill(int(notes.read_text().split()[2]), signal.SIGKILL)  # it would leave by itself after FAREWELL_S
    assert "wandb is left behind: not finished within 0.5 s" in result.stdout
    assert "stuck" in calls(notes)
    assert len(run.scalars.read_text().splitlines()) == 1


def test_l10_training_that_was_killed_is_reported_as_failed(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = stub(tmp_path, monkeypatch)
    script = TRAINING + until_noted("log 1") + "os.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", script, str(run.path)], timeout=GUARD_S, check=False)
    wait_until_noted(notes, "finish 1")
    assert calls(notes) == ["init online", "log 1", "finish 1"]


@pytest.mark.parametrize(
    ("setting", "variables", "mode"),
    [
        (None, {}, "disabled"),
        (None, {"WANDB_PROJECT": "p"}, "online"),
        (None, {"WANDB_MODE": "offline", "WANDB_PROJECT": "p"}, "offline"),
        (None, {"WANDB_MODE": "disabled", "WANDB_PROJECT": "p"}, "disabled"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_MODE": "online", "WANDB_PROJECT": "p"}, "disabled"),
    ],
)
def test_the_mode_is_the_setting_else_what_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, setting: Any, variables: dict[str, str], mode: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert chosen_mode(TrackingSettings(wandb=setting)) == mode


def test_an_unknown_mode_in_the_environment_is_one_sentence_and_no_tracker(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(SettingsError, match="WANDB_MODE=sometimes"):
        chosen_mode(TrackingSettings())
    said: list[str] = []
    assert len(build_trackers(run, TrackingSettings(tensorboard=False), 0, said.append)) == 2
    assert said == ["tracker 'wandb' is off: WANDB_MODE=sometimes is none of online, offline and disabled. "
                    "Training goes on."]  # fmt: skip


def test_variables_of_the_package_fill_what_the_settings_leave_open(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.wandb.mkdir()
    variables = {"PROJECT": "p", "NAME": "n", "TAGS": "a, b", "NOTES": "s", "RUN_ID": "i", "RESUME": "must", "DIR": "d"}
    plain = init_arguments(run, TrackingSettings(), {})
    assert (plain["project"], plain["name"], plain["resume"]) == ("ternlm", "demo-1", "allow")
    assert (plain["notes"], plain["tags"]) == (None, [f"ternlm-{ternlm.__version__}"])
    assert Path(plain["dir"]) / "wandb" == run.wandb
    assert plain["id"] == init_arguments(run, TrackingSettings(), {})["id"]
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    filled = init_arguments(run, TrackingSettings(), {})
    assert [filled[name] for name in ("project", "name", "notes", "id")] == list("pnsi")
    assert (filled["resume"], filled["dir"]) == ("must", "d")
    assert filled["tags"][1:] == ["a", "b"]
    asked = TrackingSettings(wandb_project="P", wandb_name="N", wandb_tags=("A",), wandb_notes="S")
    chosen = init_arguments(run, asked, {})
    assert [chosen[name] for name in ("project", "name", "notes")] == list("PNS")
    assert chosen["tags"][1:] == ["A"]
    monkeypatch.delenv("WANDB_RUN_ID")
    assert init_arguments(run, asked, {})["id"] == "i", "the id stays in the folder"


def test_tags_are_short_and_come_once(run: RunDirectory) -> None:
    run.wandb.mkdir()
    facts = {"model.family": "bitnet", "data.source": "hf:someone/" + "x" * 99}
    tags = init_arguments(run, TrackingSettings(wandb_tags=("bitnet", " ", "long" * 30)), facts)["tags"]
    assert tags == ["bitnet", "x" * 64, f"ternlm-{ternlm.__version__}", ("long" * 30)[:64]]


def test_nested_facts_become_names_with_dots() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2, {"e": 3}]}, "f": None}) == {"a.b.c": 1, "a.d": [2, {"e": 3}], "f": None}
