"""The benchmark suite fits into its hour, names what is there, and ends what hangs together with its children."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from ternlm.recipes import recipe_names

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import suite  # noqa: E402 (a script beside the package)


def test_the_limits_add_up_to_an_hour_at_most() -> None:
    assert sum(benchmark.minutes for benchmark in suite.SUITE) <= 60


@pytest.mark.parametrize("benchmark", suite.SUITE, ids=lambda benchmark: benchmark.name)
def test_what_the_suite_names_is_there(benchmark: suite.Benchmark) -> None:
    script, *words = benchmark.words
    if script == "ternlm":
        assert words[1] in recipe_names()
    else:
        assert (ROOT / "benchmarks" / script).is_file()
    assert "{date}" in benchmark.result


def test_ratios_are_found_wherever_a_result_has_them() -> None:
    result = {
        "machine": {"threads": 1},
        "results": [
            {"model": "95m", "mode": "eager", "time_ratio": {"ternary": 1.07123}, "time_ratio_quartiles": [1, 2]}
        ],
        "alternating": {"cpu": {"ratio_of_sums": 0.96}, "ms": 3.0},
        "texts": [{"name": "novel", "gap_nats": 0.14}],
        "arms": {"full": {"schedule": {"min_lr_ratio": 0.1}}},
    }
    assert dict(suite.ratios(result)) == {
        "results 95m eager time_ratio ternary": 1.0712,
        "alternating cpu ratio_of_sums": 0.96,
        "texts novel gap_nats": 0.14,
    }


def test_a_benchmark_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    assert suite.limited([sys.executable, "-c", code], 5) == 124
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_a_line_of_history_is_written_also_for_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "HISTORY", tmp_path / "history.jsonl")
    (tmp_path / "good.py").write_text("open('good.json', 'w').write('{\"time_ratio\": 1.5}')")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    assert suite.run(suite.Benchmark("good", ("good.py",), "good.json", 1))
    assert not suite.run(suite.Benchmark("bad", ("bad.py",), "good.json", 1))
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(row["name"], row["exit_code"], row["ratios"]) for row in rows] == [
        ("good", 0, {"time_ratio": 1.5}),
        ("bad", 3, {}),
    ]
