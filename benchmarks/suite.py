"""Every benchmark that fits into an hour on two cores, one after the other, and a line of history for each.

    python benchmarks/suite.py [NAME ...]

The limits add up to an hour. Each benchmark writes its own dated result as it does alone; beside these, one line per
benchmark is appended to results/history.jsonl: date, commit, machine, seconds, exit code, and every ratio and gap
of its result, so that a change over months can be drawn without reading old files. Exits with 1 if a benchmark failed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from training_step import machine

HERE = Path(__file__).parent
HISTORY = HERE / "results" / "history.jsonl"
THREADS = 1
SETTINGS = ("optimizer", "schedule", "settings", "same", "differs")


class Benchmark(NamedTuple):
    """One part of the suite.

    Attributes:
        name: Its line in the history.
        words: A script of this folder and its arguments, or a verb of ternlm.
        result: The JSON file that it writes, from this folder; ``{date}`` is today.
        minutes: After so long it is stopped.
    """

    name: str
    words: tuple[str, ...]
    result: str
    minutes: float


SUITE = (
    Benchmark("training_step", ("training_step.py", "--modes", "eager", "--steps", "8"),
              "results/training_step-{date}.json", 8),
    Benchmark("recurrence", ("recurrence.py", "--lengths", "512,1024,2048", "--repeats", "5"),
              "results/recurrence-{date}.json", 5),
    Benchmark("hgrn_step", ("hgrn_step.py", "--modes", "eager", "--steps", "8"), "results/hgrn_step-{date}.json", 5),
    Benchmark("qdyt_step", ("qdyt_step.py", "--models", "small", "--modes", "eager", "--steps", "8"),
              "results/qdyt_step-{date}.json", 5),
    Benchmark("instrumentation", ("instrumentation.py", "--steps", "300"),
              "results/instrumentation-bitnet-1m-{date}.json", 8),
    Benchmark("peers", ("ternlm", "benchmark", "bitnet-10m", "bitnet-10m:full", "--peers", "all", "--output",
                        "results/peers-{date}"), "results/peers-{date}/benchmark.json", 12),
    Benchmark("twin", ("ternlm", "twin", "bitnet-1m", "--steps", "300", "--runs-dir", "results/runs", "--run-id",
                       "twin-{date}"), "results/runs/twin-{date}/comparison.json", 15),
)  # fmt: skip


def main() -> None:
    """Run the benchmarks that are named, or all."""
    known = {benchmark.name: benchmark for benchmark in SUITE}
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        raise SystemExit(f"no benchmark '{unknown[0]}'. There are: {', '.join(known)}.")
    failed = [name for name in sys.argv[1:] or known if not run(known[name])]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(benchmark: Benchmark) -> bool:
    """Run one benchmark and write its line; whether it succeeded."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"\n== {benchmark.name} (at most {benchmark.minutes:g} min)", flush=True)
    started = time.monotonic()
    code = limited(command(benchmark, today), 60 * benchmark.minutes)
    result = HERE / benchmark.result.format(date=today)
    is_new = code == 0 and result.is_file()
    row = {
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "name": benchmark.name, "commit": commit(),
        "seconds": round(time.monotonic() - started), "exit_code": code, "machine": machine(THREADS),
        "load": round(os.getloadavg()[0], 1), "ratios": dict(ratios(json.loads(result.read_text()))) if is_new else {},
    }  # fmt: skip
    with HISTORY.open("a") as history:
        history.write(json.dumps(row) + "\n")
    print(f"== {benchmark.name}: {row['seconds']} s, exit code {code}", flush=True)
    return is_new


def command(benchmark: Benchmark, today: str) -> list[str]:
    """What is executed."""
    words = [word.format(date=today) for word in benchmark.words]
    return [sys.executable, "-m", *words] if words[0] == "ternlm" else [sys.executable, *words]


def limited(words: list[str], seconds: float) -> int:
    """Run a command and all that it starts for so long at most; its exit code, 124 if the time was up."""
    process = subprocess.Popen(words, cwd=HERE, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def commit() -> str | None:
    """The commit that is measured, with a mark if files have changed since; None outside of a repository."""
    words = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(words, cwd=HERE, check=False, capture_output=True, text=True)
    return found.stdout.strip() or None


def ratios(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number under a key that speaks of a ratio or a gap, by a path in words: ``95m eager time_ratio ternary``.

    Settings of learning rates have such names as well, and are passed over.
    """
    if isinstance(value, list):
        for number, item in enumerate(value):
            named = isinstance(item, dict) and [str(item[key]) for key in ("model", "name", "mode") if key in item]
            yield from ratios(item, f"{path} {' '.join(named or [str(number)])}".strip())
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in SETTINGS:
                yield from ratios(item, f"{path} {key}".strip())
    elif isinstance(value, int | float) and ("ratio" in path or "gap" in path) and "quartile" not in path:
        yield path, round(value, 4)


if __name__ == "__main__":
    main()
