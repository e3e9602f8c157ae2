"""Every command printed in README.md and docs/guide.md is run here, in order, as a new user would type it.

Only sizes change: the model is made tiny through the environment, and long runs become a few steps.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ternlm import cli

ROOT = Path(__file__).parent.parent
TINY = {
    "TERNLM__model__hidden_size": "32",
    "TERNLM__model__num_hidden_layers": "1",
    "TERNLM__model__num_attention_heads": "2",
    "TERNLM__model__num_key_value_heads": "1",
    "TERNLM__model__intermediate_size": "48",
    "TERNLM__data__sequence_length": "32",
    "TERNLM__training__batch_size": "2",
    "TERNLM__training__threads": "1",
}
SHORTER = {"FOLDER_OR_FILE": "my_texts", "1000": "3", "200": "3", "400": "5", "3e-4": "3e-4"}


def documented(page: str) -> list[str]:
    """The lines of the page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with some text, small models, and a cache of its own."""
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for number in range(120):
        (texts / f"{number:03}.txt").write_text(f"Text {number}: the cat {number % 7} sat on mat {number % 5}.\n" * 6)
    (tmp_path / "prompts.txt").write_text("The cat\nText\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("TERNLM_RUNS_DIR",):
        monkeypatch.delenv(name, raising=False)
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", words)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_documented_ternlm_command_succeeds(
    page: str, new_user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [line for line in documented(page) if line.startswith("ternlm")]
    assert len(commands) >= 5
    for command in commands:
        words = [SHORTER.get(word, word) for word in shlex.split(command.replace("--epochs 3", "--steps 5"))]
        if words == ["ternlm", "demo"]:
            continue  # run on its own below
        assert run(words, monkeypatch) == 0, f"{command}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), f"'{command}' printed nothing"


def test_the_demo_trains_measures_and_draws(
    new_user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ternlm.data.stories.DEFAULT_COUNTS", {"train": 300, "validation": 20, "test": 20})
    monkeypatch.setenv("TERNLM__evaluation__max_tokens", "5000")
    assert run(["ternlm", "demo", "--steps", "2"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown
    assert "next: ternlm chat" in shown
    (picture,) = new_user.glob("runs/demo-*/loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_documented_make_target_exists() -> None:
    lines = [line for page in ("README.md", "CONTRIBUTING.md") for line in documented(page)]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
