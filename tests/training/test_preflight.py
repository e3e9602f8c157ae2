"""Ten steps with everything on: they pass where all is well, and each check fails for its own reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import tiny_corpus, tiny_settings
from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import Resolved
from ternlm.training import preflight as module
from ternlm.training.preflight import Check, preflight


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def values(tmp_path: Path, **sections: dict[str, Any]) -> Resolved:
    base = {
        "schedule": {"name": "two_stage_continuous", "warmup_steps": 375},
        "training": {"max_steps": 400_000, "checkpoint_every_steps": 2000},
        "evaluation": {"every_steps": 1000, "sample_every_steps": 1000},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return Resolved(tiny_settings(tmp_path, **merged).model_dump(mode="json"), {})


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> tuple[RunDirectory, list[Check]]:
    folder = tmp_path_factory.mktemp("passed")
    run = RunDirectory(folder / "run")
    return run, preflight(values(folder), run, lambda settings, path: prepared)


def test_a_run_of_days_is_rehearsed_in_ten_steps_and_a_resume(passed: tuple[RunDirectory, list[Check]]) -> None:
    run, checks = passed
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 13
    assert {5, 6, 10, 11} <= set(checkpoint.steps(run.checkpoints)), "both sides of the boundary, and the resume"


def corrupted(file: Path, change: Callable[[bytes], bytes]) -> Callable[[RunDirectory], None]:
    def corrupt(run: RunDirectory) -> None:
        path = run.path / file
        path.write_bytes(change(path.read_bytes()))

    return corrupt


def without_last_row(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def without_first_row(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[1:])


def with_other_rate(content: bytes) -> bytes:
    rows = [json.loads(line) for line in content.splitlines()]
    rows[3]["train/learning_rate"] *= 1.001
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


DAMAGE: dict[str, Callable[[RunDirectory], None]] = {
    "end": corrupted(Path("status.json"), lambda content: content.replace(b'"finished"', b'"failed"')),
    "provenance": corrupted(Path("meta/provenance.json"), lambda content: b"{}"),
    "data": corrupted(Path("meta/dataset_fingerprint.json"), lambda content: b"[]"),
    "losses": corrupted(Path("metrics/scalars.jsonl"), without_last_row),
    "rates": corrupted(Path("metrics/scalars.jsonl"), with_other_rate),
    "ternary codes": corrupted(Path("metrics/ternary.jsonl"), lambda content: b""),
    "system": corrupted(Path("metrics/system.jsonl"), lambda content: b""),
    "evaluations": corrupted(Path("eval/eval_results.jsonl"), without_first_row),
    "samples": corrupted(Path("samples/samples.jsonl"), without_first_row),
    "spreadsheets": corrupted(Path("logs/training_log.csv"), without_last_row),
    "TensorBoard": lambda run: [file.unlink() for file in run.tensorboard.iterdir()][:0] or None,
    "checkpoints": corrupted(Path("checkpoints/step_000005/config.json"), lambda content: content + b" "),
    "reloaded model": corrupted(Path("checkpoints/step_000010/model.safetensors"), lambda content: content[:-1]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_check_fails_for_its_own_reason(
    name: str, tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = module._checks

    def damaged(run: RunDirectory, *rest: Any) -> Any:
        DAMAGE[name](run)
        return checks(run, *rest)

    monkeypatch.setattr(module, "_checks", damaged)
    found = preflight(values(tmp_path), RunDirectory(tmp_path / "run"), lambda settings, path: prepared)
    failed = {check.name for check in found if not check.passed}
    assert name in failed
    assert len(failed) <= 2
