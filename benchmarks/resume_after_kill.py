"""`kill -9` a training process at random moments, resume it each time, and compare with a run left alone.

    python benchmarks/resume_after_kill.py --kills 20

The two final checkpoints must hold bit-identical weights and optimizer state, and the logs the same losses.
Writes benchmarks/results/resume_after_kill-DATE.json; exits non-zero if anything differs.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("training.checkpoint_every_steps=5", "evaluation.every_steps=20", "evaluation.max_tokens=20000",
            "tracking.every_steps=1", "training.batch_size=4", "training.threads=1")  # fmt: skip


def main() -> None:
    """Run both trainings and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        subprocess.run(train(runs, "alone", arguments.steps), check=True)
        kills = kill_and_resume(runs, arguments)
        alone, killed = (fingerprint(runs / name, arguments.steps) for name in ("alone", "killed"))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "steps": arguments.steps, "kills": kills,
        "alone": alone, "killed": killed, "identical": alone == killed,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"resume_after_kill-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills, last completed steps {kills}")
    print("final weights, optimizer state and losses are", "identical" if alone == killed else "DIFFERENT")
    raise SystemExit(0 if alone == killed else 1)


def kill_and_resume(runs: Path, arguments: argparse.Namespace) -> list[int]:
    """Start, kill, resume, kill ... and finally let it finish; the last logged step at each kill."""
    draw = random.Random(arguments.seed)
    command, kills = train(runs, "killed", arguments.steps), []
    log = runs / "killed" / "metrics" / "scalars.jsonl"
    for _ in range(arguments.kills):
        size = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if draw.random() < 0.8:  # most kills fall into training, the others into start-up
            while process.poll() is None and not (log.exists() and log.stat().st_size > size):
                time.sleep(0.01)
        time.sleep(draw.uniform(0, 3))
        if process.poll() is not None:
            raise SystemExit(f"the run ended (code {process.returncode}) before kill {len(kills) + 1}; raise --steps")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(last_step(log))
        if (runs / "killed" / "meta" / "config.yaml").exists():
            command = [sys.executable, "-m", "ternlm", "resume", str(runs / "killed"), "--quiet"]
    subprocess.run(command, check=True)
    return kills


def train(runs: Path, name: str, steps: int) -> list[str]:
    """The command that starts a run."""
    return [
        sys.executable, "-m", "ternlm", "train", "bitnet-1m", "--quiet", "--steps", str(steps),
        "--run-id", name, "--runs-dir", str(runs), *SETTINGS,
    ]  # fmt: skip


def fingerprint(run: Path, steps: int) -> dict[str, str]:
    """Hashes of the final weights, the optimizer state, and all logged losses in order."""
    folder = run / "checkpoints" / f"step_{steps:06d}"
    rows = [json.loads(line) for line in (run / "metrics" / "scalars.jsonl").open()]
    losses = [[row["step"], row["train/loss"], row["tokens_seen"]] for row in rows]
    parts = {name: (folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}
    parts["losses"] = json.dumps(losses).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}


def last_step(log: Path) -> int:
    """The step of the last complete row."""
    if not log.exists():
        return 0
    rows = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return int(json.loads(rows[-1])["step"]) if rows else 0


if __name__ == "__main__":
    main()
