"""Running verbs in this process, as `main` runs them, and a small folder of text to run them on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from builders import TRAIN
from ternlm.cli import main


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Ternlm = Callable[..., Outcome]

SETTINGS = """\
model: {hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
        intermediate_size: 40, max_position_embeddings: 24}
data: {source: %s, sequence_length: 16, validation_fraction: 0.2, test_fraction: 0}
training: {max_steps: 6, batch_size: 4, precision: fp32, device: cpu, threads: 1, checkpoint_every_steps: 3}
schedule: {name: constant, warmup_steps: 2, weight_decay_until: 1}
tracking: {every_steps: 1, tensorboard: false}
evaluation: {every_steps: 100000, sample_tokens: 5}
"""


@pytest.fixture(autouse=True)
def _private_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and runs go to the test's own folder, no setting comes from outside, and no run ends with a report."""
    import os

    for name in [name for name in os.environ if name.startswith("TERNLM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TERNLM__tracking__report", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def ternlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ternlm:
    """Run `ternlm ARGUMENTS` and return its exit code and what it printed."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["ternlm", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with two text files of a few kilobytes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(TRAIN), encoding="utf-8")
    (folder / "b.md").write_text("\n\n".join(TRAIN[:20]) + "\n\nNaïve 🙂 end.\n", encoding="utf-8")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, texts: Path) -> Path:
    """A settings file of a run of a few seconds on that folder."""
    (tmp_path / "tiny.yaml").write_text(SETTINGS % texts)
    return tmp_path / "tiny.yaml"
