"""The files of a run: created once, locked by one process, found by name, and readable after a torn write."""

import json
import os
import time
from pathlib import Path

import pytest

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.run_directory import (
    RunDirectory,
    append_jsonl,
    check_run_id,
    find_run,
    new_run_id,
    read_jsonl,
    runs_root,
)


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.create()
    run.config.write_text("{}")
    return run


def test_a_new_run_has_all_its_folders_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a")
    run.create()
    names = {"meta", "checkpoints", "metrics", "eval", "samples", "logs"}
    assert {path.name for path in run.path.iterdir()} == names
    assert not any(path.is_file() for path in run.path.rglob("*"))


def test_an_existing_run_is_never_reused_silently(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with pytest.raises(SettingsError, match="ternlm resume"):
        run.create()


def test_a_path_below_a_file_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault, match="--runs-dir"):
        RunDirectory(tmp_path / "file" / "run").create()
    assert (tmp_path / "file").read_text() == "x"


def test_one_process_trains_in_a_run_at_a_time_and_the_lock_is_freed_after(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with run.locked(), pytest.raises(EnvironmentFault, match="another process"), run.locked():
        pass
    with run.locked():
        pass
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        pass


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"step": 1, "text": 'é\u2028\n"quoted"', "value": 0.1}, {"step": 2, "value": None}]
    for row in rows:
        append_jsonl(tmp_path / "rows.jsonl", row)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_l08_a_torn_last_line_and_lines_that_are_no_objects_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    whole = json.dumps({"step": 3, "text": "é" * 9}, ensure_ascii=False).encode() + b"\n"
    for end in range(len(whole)):
        file.write_bytes(b'{"step": 1}\nnot json\n7\n[1]\nnull\n\xff\xfe\n{"step": 2}\n' + whole[:end])
        assert [row["step"] for row in read_jsonl(file)] == [1, 2]
    file.write_bytes(b"")
    assert read_jsonl(file) == []


def test_l08_an_absurdly_nested_line_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"[" * 100_000 + b"\n" + b'{"step": 2}\n')
    assert read_jsonl(file) == [{"step": 2}]


def test_rows_after_the_resumed_step_are_cut_and_torn_lines_with_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for file in (run.scalars, run.evaluations, run.samples):
        file.write_text("".join(f'{{"step": {step}}}\n' for step in (9, 10, 11, 100)) + '{"step": 1')
    run.training_csv.write_text("step,loss\n9,1.5\n10,1.4\n11,1.3\n100,1.2\n1")
    run.evaluation_csv.write_text("step,loss\n9,1.5\n")
    run.cut_after(10)
    for file in (run.scalars, run.evaluations, run.samples):
        assert [row["step"] for row in read_jsonl(file)] == [9, 10]
        assert file.read_bytes().endswith(b"\n")
    assert run.training_csv.read_text() == "step,loss\n9,1.5\n10,1.4\n"
    assert run.evaluation_csv.read_text() == "step,loss\n9,1.5\n"
    before = run.scalars.read_bytes()
    run.cut_after(10)
    assert run.scalars.read_bytes() == before


def test_rows_without_a_usable_step_are_cut_and_the_rest_keeps_its_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.scalars.write_bytes(
        b'{"step": 1,  "a": "\\u00e9"}\n{"step": "x"}\n{"step": null}\n{"step": [2]}\n{"step": NaN}\n'
    )
    run.training_csv.write_bytes(b"step,loss\n1,2\n\xff\xfe,3\n,4\nnan,5\n")
    run.cut_after(5)
    assert run.scalars.read_bytes() == b'{"step": 1,  "a": "\\u00e9"}\n'
    assert run.training_csv.read_bytes() == b"step,loss\n1,2\n"


def test_cutting_a_run_without_files_creates_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.cut_after(0)
    assert not run.scalars.exists()
    assert not run.training_csv.exists()


def test_a_run_is_found_by_path_name_prefix_and_as_latest(tmp_path: Path) -> None:
    first = make_run(tmp_path / "demo-1").path
    second = make_run(tmp_path / "demo-2").path
    other = make_run(tmp_path / "nano").path
    now = time.time()
    for age, path in enumerate((second, other, first)):
        os.utime(path / "meta", (now - age * 100, now - age * 100))
    (tmp_path / "not-a-run").mkdir()
    assert find_run(str(first), tmp_path / "elsewhere").path == first
    assert find_run("demo-1", tmp_path).path == first
    assert find_run("na", tmp_path).path == other
    assert find_run("latest", tmp_path).path == second
    with pytest.raises(EnvironmentFault, match=r"newest runs: demo-1, nano, demo-2\)"):
        find_run("absent", tmp_path)


@pytest.mark.parametrize(("name", "message"), [("demo", "several"), ("nothing", "no run"), ("not-a-run", "no run")])
def test_an_unclear_name_is_refused_with_the_candidates(tmp_path: Path, name: str, message: str) -> None:
    for run in ("demo-1", "demo-2"):
        make_run(tmp_path / run)
    (tmp_path / "not-a-run").mkdir()
    with pytest.raises(EnvironmentFault, match=message) as caught:
        find_run(name, tmp_path)
    assert "demo-2" in str(caught.value)


def test_an_exact_name_wins_over_longer_ones(tmp_path: Path) -> None:
    for name in ("a", "ab", "abc"):
        make_run(tmp_path / name)
    assert find_run("ab", tmp_path).id == "ab"


def test_no_runs_at_all_is_one_sentence(tmp_path: Path) -> None:
    for reference in ("latest", "x"):
        with pytest.raises(EnvironmentFault):
            find_run(reference, tmp_path / "missing")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/tmp", "-x", ".hidden", "a b", "a\x00", "é", "a\n"])
def test_a_run_id_is_one_plain_folder_name(name: str) -> None:
    with pytest.raises(SettingsError, match="plain name"):
        check_run_id(name)


def test_generated_ids_are_plain_and_do_not_collide() -> None:
    ids = {new_run_id("bitnet-1m") for _ in range(50)}
    assert len(ids) > 45
    assert all(check_run_id(name) == name and name.startswith("bitnet-1m-") for name in ids)


def test_where_runs_live_is_flag_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERNLM_RUNS_DIR", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("TERNLM_RUNS_DIR", "/somewhere")
    assert runs_root() == Path("/somewhere")
    assert runs_root("here") == Path("here")
