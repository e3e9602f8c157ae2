"""Provenance: everything needed to do a run again is on disk before its first step, and no secret is."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import ternlm
from builders import tiny_corpus, tiny_settings
from ternlm.errors import DataError, EnvironmentFault
from ternlm.files import to_json
from ternlm.run_directory import RunDirectory
from ternlm.training import provenance
from ternlm.training.masking import is_secret, masked, readable
from ternlm.training.settings import RunSettings

GIT = [
    "git",
    "-c",
    "user.name=a",
    "-c",
    "user.email=a@b",
    "-c",
    "init.defaultBranch=trunk",
    "-c",
    "commit.gpgsign=false",
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "demo-1")
    made.ensure_writable()
    return made


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    return tiny_settings(tmp_path_factory.mktemp("data"), training={"seed": 7})


def sittings(run: RunDirectory) -> list[dict[str, Any]]:
    content = json.loads(run.provenance.read_bytes())
    assert (content["schema"], content["run_id"]) == (1, "demo-1")
    return list(content["sittings"])


# Sittings


def test_l12_a_sitting_holds_integer_seeds_versions_machine_and_settings(
    run: RunDirectory, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ternlm", "train", "demo", "--steps", "5", "--tokenizer", "byte"])
    provenance.record(run, settings, first_step=0)
    (sitting,) = sittings(run)
    assert sitting["seeds"] == {"run": 7, "initial_weights": 7, "data_order": 7, "samples": 7}
    assert sitting["command_line"] == ["ternlm", "train", "demo", "--steps", "5", "--tokenizer", "byte"]
    assert sitting["config_sha256"] == hashlib.sha256(to_json(settings.model_dump(mode="json"))).hexdigest()
    assert (sitting["ternlm"], sitting["python"]) == (ternlm.__version__, platform.python_version())
    assert sitting["packages"]["numpy"].count(".") == 2
    assert {"torch", "safetensors", "tokenizers", "pydantic"} <= sitting["packages"].keys()
    hardware = sitting["hardware"]
    assert hardware["cores"] == os.cpu_count()
    assert hardware["cpu"]
    assert abs(hardware["ram_gb"] * 2**30 - psutil.virtual_memory().total) < 2**27
    assert sitting["torch"]["version"] == torch.__version__
    assert sitting["torch"]["threads"] == torch.get_num_threads()
    assert sitting["torch"]["deterministic"] is False
    assert sitting["first_step"] == 0
    assert abs(datetime.fromisoformat(sitting["started_at"]).timestamp() - datetime.now().timestamp()) < 3600
    assert sitting["started_at"].endswith("Z")


def test_every_start_adds_a_sitting_and_every_stop_closes_the_last(run: RunDirectory, settings: RunSettings) -> None:
    provenance.record(run, settings, first_step=0)
    provenance.record_stop(run, "preempted", 75, "SIGTERM arrived; saved at step 4.", step=4)
    provenance.record(run, settings, first_step=4)
    first, second = sittings(run)
    assert (first["state"], first["exit_code"], first["last_step"]) == ("preempted", 75, 4)
    assert first["reason"] == "SIGTERM arrived; saved at step 4."
    assert first["stopped_at"] >= first["started_at"]
    assert second["first_step"] == 4
    assert "state" not in second, "a process that was killed leaves its sitting open"
    provenance.record(run, settings, first_step=4)
    provenance.record_stop(run, "finished", 0, None, step=9)
    *_, killed, third = sittings(run)
    assert "exit_code" not in killed
    assert (third["state"], third["exit_code"], third["reason"], third["last_step"]) == ("finished", 0, None, 9)
    assert not list(run.provenance.parent.glob(".*")), "replaced in one piece"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sittings": 3}', b'{"sittings": [3]}', b'{"sittings": NaN}'])
def test_a_damaged_file_is_kept_beside_and_stops_nothing(
    run: RunDirectory, settings: RunSettings, content: bytes
) -> None:
    run.provenance.write_bytes(content)
    provenance.record(run, settings, first_step=3)
    provenance.record_stop(run, "finished", 0, None, step=5)
    note, last = sittings(run)
    assert "damaged" in note["note"]
    assert (last["first_step"], last["last_step"]) == (3, 5)
    assert (run.provenance.parent / "provenance.damaged.json").read_bytes() == content


def test_a_stop_without_a_start_is_recorded_too(run: RunDirectory) -> None:
    provenance.record_stop(run, "failed", 1, "no idea", step=0)
    assert [sitting["state"] for sitting in sittings(run)] == ["failed"]


def test_a_folder_that_cannot_be_written_is_one_sentence(
    run: RunDirectory, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    for act in (
        lambda: provenance.record(run, settings, 0),
        lambda: provenance.record_stop(run, "failed", 1, None, 0),
        lambda: provenance.record_data(run, Data()),
    ):
        with pytest.raises(EnvironmentFault, match="No space left"):
            act()


# Git


def git(folder: Path, *words: str) -> str:
    return subprocess.run([*GIT, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def work_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    try:
        git(folder, "init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (folder / "a.txt").write_text("one\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    monkeypatch.chdir(folder)
    return folder


def test_the_state_of_a_work_tree_is_its_commit_branch_and_changes(work_tree: Path) -> None:
    commit = git(work_tree, "rev-parse", "HEAD")
    state = provenance._git_state(work_tree)
    assert state == {"commit": commit, "branch": "trunk", "dirty": False, "diff_sha256": None}
    (work_tree / "new.txt").write_text("unknown to git\n")
    assert provenance._git_state(work_tree) == {**state, "dirty": True}
    (work_tree / "a.txt").write_text("two\n")
    changed = provenance._git_state(work_tree)
    assert changed is not None
    assert changed["dirty"]
    assert len(changed["diff_sha256"]) == 64
    (work_tree / "a.txt").write_text("three\n")
    again = provenance._git_state(work_tree)
    assert again is not None
    assert again["diff_sha256"] != changed["diff_sha256"]
    git(work_tree, "checkout", "-f", "--detach")
    detached = provenance._git_state(work_tree)
    assert detached is not None
    assert (detached["branch"], detached["commit"]) == (None, commit)


def test_a_work_tree_without_a_commit_has_none(tmp_path: Path, work_tree: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init")
    (empty / "a").touch()
    assert provenance._git_state(empty) == {"commit": None, "branch": "trunk", "dirty": True, "diff_sha256": None}


def test_a_package_installed_inside_somebody_elses_work_tree_is_not_taken_for_its_content(work_tree: Path) -> None:
    installed = work_tree / "venv" / "ternlm"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert provenance._git_state(installed, "__init__.py") is None
    assert provenance._git_state(work_tree, "a.txt") is not None


def test_no_git_no_work_tree_and_a_git_that_hangs_are_null(
    run: RunDirectory, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    assert provenance._git_state(tmp_path) is None
    monkeypatch.setattr(provenance, "GIT_PATIENCE_S", 0.2)
    for script in ("", "#!/bin/sh\nexec sleep 60\n", "#!/bin/sh\nexit 3\n"):
        program = tmp_path / "bin" / "git"
        program.write_text(script)
        program.chmod(0o755 if script else 0o644)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin" if script else str(tmp_path / "bin"))
        provenance.record(run, settings, 0)
        assert sittings(run)[-1]["git"] == {"ternlm": None, "working_directory": None}


def test_a_work_tree_cannot_make_git_start_a_program(work_tree: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(0o755)
    git(work_tree, "config", "core.fsmonitor", str(trap))
    git(work_tree, "config", "diff.external", str(trap))
    git(work_tree, "config", "diff.x.textconv", str(trap))
    (work_tree / ".gitattributes").write_text("* diff=x\n")
    (work_tree / "a.txt").write_text("two\n")
    assert provenance._git_state(work_tree) is not None
    assert not (tmp_path / "sprung").exists()
    git(work_tree, "status")
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_the_surroundings_of_a_git_hook_do_not_mislead(
    work_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert provenance._git_state(work_tree) is not None


# Secrets

PLANTED = {
    "HF_TOKEN": "hf_plantedplantedplanted1",
    "WANDB_API_KEY": "0123456789abcdef0123planted2",
    "AWS_SECRET_ACCESS_KEY": "wJalr/planted3+EXAMPLEKEY",
    "MY_DATABASE_PASSWORD": "planted4 with space",
    "TERNLM_TOKEN": "planted5planted5",
    "UNLISTED": "planted6planted6",
}
COMMAND = [
    "/home/somebody/bin/ternlm", "train", "demo", "--steps", "5", "max_tokens=2B", "model.num_key_value_heads=2",
    "data.source=https://alice:pw-planted@example.org/x?a=1&access_token=q-planted#f", "--hub-token", "a-planted",
    "--api-key=b-planted", "password=c-planted", "--header", "Authorization: Bearer d-planted", "-k",
    "s3://e:f-planted/with/slash@bucket", f"--name=x-{PLANTED['WANDB_API_KEY']}-y", '{"secret": "g-planted"}',
    "hf_" + "h" * 10 + "planted" + "i" * 10, "tokenizer.name=train", "--hub-token", "--looks-like-a-flag-planted",
]  # fmt: skip


def test_s07_no_planted_secret_is_in_any_file(
    run: RunDirectory, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERNLM_RUNS_DIR", f"/data/{PLANTED['HF_TOKEN']}")
    monkeypatch.setenv("TERNLM__tokenizer__name", "byte")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(sys, "argv", COMMAND)
    provenance.record(run, settings, 0)
    reason = f"download of https://u:{PLANTED['UNLISTED']}@host failed with {PLANTED['MY_DATABASE_PASSWORD']}"
    provenance.record_stop(run, "failed", 3, reason, 0)
    provenance.record_data(run, Data(source="https://alice:pw-planted@example.org/x?sig=q-planted"))
    written = [file for file in run.path.rglob("*") if file.is_file()]
    assert {run.provenance, run.data_fingerprint} <= set(written)
    for file in written:
        assert b"planted" not in file.read_bytes()
    (sitting,) = sittings(run)
    assert sitting["command_line"][:7] == ["~/bin/ternlm", *COMMAND[1:7]], "what is no secret is kept"
    assert sitting["command_line"][7] == "data.source=https://***@example.org/x?a=1&access_token=***"
    assert sitting["command_line"][-3] == "tokenizer.name=train"
    assert sitting["environment"]["TERNLM_RUNS_DIR"] == "/data/***"
    assert sitting["environment"]["TERNLM__tokenizer__name"] == "byte"
    assert sitting["environment"]["OMP_NUM_THREADS"] == "1"
    assert sitting["environment"]["TERNLM_TOKEN"] == "***"
    assert sitting["environment"].keys().isdisjoint({"HF_TOKEN", "UNLISTED", "PATH", "HOME"})


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "HF_TOKEN",
        "hub-token",
        "api_key",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "PASSWORD",
        "passwd",
        "credentials",
    ],
)
def test_names_that_hold_secrets_are_known(name: str) -> None:
    assert is_secret(name)


def test_no_setting_of_a_run_is_taken_for_a_secret(settings: RunSettings) -> None:
    for section, values in settings.model_dump().items():
        for name in values:
            assert not is_secret(f"{section}.{name}")
            assert masked([f"{section}.{name}=1", "next"]) == [f"{section}.{name}=1", "next"]


def test_texts_without_secrets_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/bob")
    for text in ("the basic idea", "https://example.org/a@main?b=c", "hf:owner/name:config", "a=b", "/home/bobby/x"):
        assert readable(text) == text
    assert readable("/home/bob") == "~"
    assert readable("data=/home/bob/x") == "data=~/x"
    assert readable("not \udcff UTF-8").isprintable()


# Data


class Data:
    """Prepared data of one split and two shards; any part can be changed."""

    def __init__(self, source: str = "stories", read: int = 2, **changed: Any) -> None:
        self.source, self.read, self.changed = source, read, changed

    @property
    def fingerprint(self) -> str:
        return str(self.changed.get("fingerprint", "f" * 64))

    def describe(self) -> Mapping[str, Any]:
        shards = [{"file": f"shard-{i:05d}.bin", "tokens": 500 + i, "sha256": str(i) * 64} for i in range(self.read)]
        splits = {"train": {"documents": self.read, "tokens": 500 * self.read, "bytes": 9, "shards": shards}}
        described = {
            "source": self.source,
            "revision": "main",
            "tokenizer": {"name": "byte", "fingerprint": "a" * 64},
            "splits": splits | {"validation": {"documents": 1, "tokens": 5, "bytes": 5, "shards": []}},
        }
        return described | {name: value for name, value in self.changed.items() if name in described}

    def first_tokens(self, n: int = 1000) -> list[int]:
        return [*range(self.changed.get("shift", 0), n)][: self.changed.get("length", n)]


def test_d05_the_fingerprint_of_the_data_is_complete_before_the_first_step(run: RunDirectory) -> None:
    provenance.record_data(run, Data())
    found = json.loads(run.data_fingerprint.read_bytes())
    assert found["schema"] == 1
    assert found["first_token_ids"] == list(range(1000))
    raw = b"".join(token.to_bytes(4, "little") for token in range(1000))
    assert found["first_token_ids_sha256"] == hashlib.sha256(raw).hexdigest()
    assert found["source"] == "stories"
    assert found["tokenizer"] == {"name": "byte", "fingerprint": "a" * 64}
    assert [shard["sha256"] for shard in found["splits"]["train"]["shards"]] == ["0" * 64, "1" * 64]
    before = run.data_fingerprint.read_bytes()
    provenance.record_data(run, Data())
    assert run.data_fingerprint.read_bytes() == before


def test_d05_real_prepared_data_fit_and_are_compared(run: RunDirectory, tmp_path: Path) -> None:
    prepared = tiny_corpus(tmp_path / "a").corpus
    provenance.record_data(run, prepared)
    provenance.record_data(run, prepared)
    found = json.loads(run.data_fingerprint.read_bytes())
    stream = prepared.split("train")
    assert found["first_token_ids"] == [int(token) for token in stream.read(0, min(1000, len(stream)))]
    other = tiny_corpus(tmp_path / "b", train=[f"Another story {i}." for i in range(60)]).corpus
    with pytest.raises(DataError, match=r"first_token_ids_sha256.*train shard"):
        provenance.record_data(run, other)


ONE_SHARD_CHANGED = {
    "train": {"shards": [{"file": "x.bin", "sha256": "0" * 64}, {"file": "y.bin", "sha256": "9" * 64}]},
    "validation": {"shards": []},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": "stdlib"}, "source was stories, is stdlib"),
        ({"revision": None}, "revision was main, is None"),
        ({"tokenizer": {"name": "byte", "fingerprint": "b" * 64}}, "tokenizer fingerprint was aaaaaaaaaaaa, is bbbb"),
        ({"tokenizer": {}}, "tokenizer name was byte, is None"),
        ({"fingerprint": "e" * 64}, "fingerprint was ffffffffffff, is eeeeeeeeeeee"),
        ({"shift": 1}, "first_token_ids_sha256 was"),
        ({"length": 999}, "first_token_ids_sha256 was"),
        ({"splits": {"train": {"shards": []}}}, "splits were train, validation, are train"),
        ({"splits": ONE_SHARD_CHANGED}, r"train shard shard-00001\.bin \(1 in all\)"),
    ],
)
def test_other_data_than_at_the_start_are_refused_by_name(run: RunDirectory, changed: Any, message: str) -> None:
    provenance.record_data(run, Data())
    before = run.data_fingerprint.read_bytes()
    with pytest.raises(DataError, match=message) as caught:
        provenance.record_data(run, Data(**changed))
    assert caught.value.exit_code == 3
    assert "--resume-from" in str(caught.value)
    assert run.data_fingerprint.read_bytes() == before


@pytest.mark.parametrize(("then", "now"), [(0, 2), (1, 5), (3, 1)])
def test_a_stream_that_was_read_further_is_the_same_stream(run: RunDirectory, then: int, now: int) -> None:
    provenance.record_data(run, Data(read=then))
    provenance.record_data(run, Data(read=now))


def drop(name: str) -> Callable[[Path], Any]:
    def edit(file: Path) -> None:
        content = json.loads(file.read_bytes())
        del content[name]
        file.write_text(json.dumps(content))

    return edit


DAMAGE: list[Callable[[Path], Any]] = [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"[]"),
    lambda file: file.write_bytes(b'{"splits": 3}'),
    lambda file: file.write_bytes(b'{"a": 1, "a": 2}'),
    lambda file: (file.unlink(), file.mkdir()),
    drop("splits"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_fingerprint_is_refused_with_the_way_out(run: RunDirectory, damage: Callable[[Path], Any]) -> None:
    provenance.record_data(run, Data())
    damage(run.data_fingerprint)
    with pytest.raises(DataError, match=r"dataset_fingerprint\.json.*damaged.*Delete it"):
        provenance.record_data(run, Data())


# Machine


def test_gpus_are_asked_for_without_using_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    closed: list[bool] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(True))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"GPU {handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=80 * 2**30))
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "555.1")
    both = [{"name": f"GPU {i}", "memory_gb": 80.0, "driver": "555.1"} for i in range(2)]
    assert provenance.hardware()["gpus"] == both

    def refuse(*args: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", refuse)
    assert provenance.hardware()["gpus"] == []
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert provenance.hardware()["gpus"] == []
    assert closed == [True, True]
