"""Real processes and real signals: a killed, interrupted or pre-empted run goes on as if nothing had happened.

The child trains without end; the parent waits until some rows are on the disk and sends the signal. The
reference is a run of this process that was never stopped.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ternlm import checkpoint
from ternlm.run_directory import read_jsonl
from ternlm.tokenizers import ByteTokenizer

HANG_GUARD_S = 120


def train_and_signal(recipe: Path, run: Path, number: int, rows: int) -> subprocess.CompletedProcess[str]:
    """Start a run that would never end, and signal it after some rows."""
    words = ["train", str(recipe), "--run-id", run.name, "--steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "ternlm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    scalars, last = run / "metrics" / "scalars.jsonl", time.monotonic() + HANG_GUARD_S
    try:
        while not scalars.exists() or scalars.read_bytes().count(b"\n") < rows:
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < last, "the run wrote no rows"
            time.sleep(0.01)
        child.send_signal(number)
        out, err = child.communicate(timeout=HANG_GUARD_S)
    finally:
        child.kill()
        child.wait()
    return subprocess.CompletedProcess(words, child.returncode, out, err)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 75, "Preempted"), (signal.SIGKILL, -9, "")],
    ids=["ctrl-c", "sigterm", "kill-9"],
)
def test_l01_a_stopped_process_resumes_bit_for_bit(
    ternlm, recipe: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    run = tmp_path / "runs" / "stopped"
    child = train_and_signal(recipe, run, number, rows=8)
    assert child.returncode == code, child.stderr
    assert "Traceback" not in child.stderr
    newest = checkpoint.newest_valid(run / "checkpoints")
    step = int(newest.name.removeprefix("step_"))
    if word:
        said = child.stderr.strip().splitlines()[-1]
        assert said.startswith(f"{word}: ")
        assert f"saved at step {step}. Continue with: ternlm resume" in said
        assert read_jsonl(run / "metrics" / "scalars.jsonl")[-1]["step"] == step, "nothing was lost"
    end = step + 5
    resumed = ternlm("resume", "stopped", "--steps", end)
    assert resumed.code == 0, resumed.err
    assert ternlm("train", recipe, "--run-id", "whole", "--steps", end, "-q").code == 0
    finals = [tmp_path / "runs" / name / "checkpoints" / f"step_{end:06d}" for name in ("stopped", "whole")]
    states = [checkpoint.open_checkpoint(path)[2:] for path in finals]
    for kind in (0, 1):
        assert states[0][kind].keys() == states[1][kind].keys()
        assert all(torch.equal(states[0][kind][name], states[1][kind][name]) for name in states[0][kind])
    rows = [read_jsonl(tmp_path / "runs" / name / "metrics" / "scalars.jsonl") for name in ("stopped", "whole")]
    keys = ("step", "tokens_seen", "train/loss", "train/learning_rate", "train/weight_decay", "train/grad_norm")
    assert [[row[key] for key in keys] for row in rows[0]] == [[row[key] for key in keys] for row in rows[1]]
    assert not list((run / "checkpoints").glob(".*")), "no half-written checkpoint is left"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_during_preparation_keeps_what_is_done_and_makes_no_run(
    ternlm, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    encode = ByteTokenizer.encode_batch

    def interrupting(self: ByteTokenizer, texts: list[str]) -> list[list[int]]:
        os.kill(os.getpid(), number)
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", interrupting)
        outcome = ternlm("train", recipe, "--run-id", "r")
    assert outcome.code == code, outcome.err
    assert "Give the same command again" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "runs").exists()
    assert ternlm("train", recipe, "--run-id", "r", "-q").code == 0
