"""Fixtures for the whole suite."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and tokenizers beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data with real texts and tokenizers is not here")
    return SHARED_DATA.resolve()


@pytest.fixture(autouse=True)
def _no_report_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tests end without a report, which would draw thirty charts each; tests of it switch it on."""
    monkeypatch.setenv("TERNLM__tracking__report", "false")
