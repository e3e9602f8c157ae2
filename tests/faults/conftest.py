"""The marker of the fault tests, and their summary.

The summary is printed at the end as a Markdown table. ``TERNLM_FAULTS_SUMMARY=FILE`` also writes it as JSON.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from harness import Clock, Row, table

collect_ignore_glob = ["test_*.py"] if sys.platform == "win32" else []

ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: kills and errors do not depend on the disk, and fsync is free there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ternlm-faults-", dir=memory) as name:
        yield Path(name)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The test's line of the summary, filled in by the test."""
    made, clock = Row(request.node.name.removeprefix("test_").replace("_", " ")), Clock()
    yield made
    made.seconds = round(clock(), 1)
    request.config.stash[ROWS].append(made)
    print(made.line())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(table(rows))
    if rows and (file := os.environ.get("TERNLM_FAULTS_SUMMARY")):
        Path(file).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
