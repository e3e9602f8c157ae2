"""What ternary weights cost in quality on real text, against the full-precision twin.

Both arms have the same network, tokens in the same order, and evaluation; each has its own learning rate and
initial range, since these mean different things to weights that are rounded and to weights that are not. They are
chosen from a sweep in which every point, written RATE:RANGE, runs its own complete schedule. Selection uses the
validation split; the held-out book and WikiText-2 valid are scored with the chosen model of each arm.

    python benchmarks/books_gap.py --books DIR --wikitext FILE --held-out pride_and_prejudice.txt

Finished runs in `--runs` are not trained again. Writes benchmarks/results/books_gap-DATE.json and prints a table.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ARMS = {"ternary": "ternary", "full precision": "none"}


def main() -> None:
    """Sweep both arms, score the best of each, and write the result."""
    arguments = _arguments()
    training = arguments.runs / "books"
    training.mkdir(parents=True, exist_ok=True)
    for book in sorted(arguments.books.glob("*.txt")):
        if book.name != arguments.held_out:
            shutil.copy2(book, training)
    result = compare(arguments, training, arguments.runs)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"books_gap-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"\nwritten to {file}")


def compare(arguments: argparse.Namespace, training: Path, runs: Path) -> dict[str, Any]:
    """Train every point of both sweeps and score the best point of each arm."""
    arms: dict[str, Any] = {}
    for arm, weights in ARMS.items():
        points = []
        for point in arguments.ternary if arm == "ternary" else arguments.full:
            rate, initial_range = map(float, point.split(":"))
            run = runs / f"{weights}-{rate:g}-{initial_range:g}"
            if not (run / "checkpoints" / "final").exists():
                train(arguments, training, run, weights, rate, initial_range)
            evaluations = [json.loads(line) for line in (run / "eval" / "eval_results.jsonl").open()]
            loss = evaluations[-1]["val/loss"]
            points.append(
                {"learning_rate": rate, "initial_range": initial_range, "validation_loss": loss, "run": str(run)}
            )
            print(f"{arm}: learning rate {rate:g}, range {initial_range:g} -> validation loss {loss:.4f}", flush=True)
        best = min(points, key=lambda point: point["validation_loss"])
        run = best["run"]
        for point in points:
            point.pop("run")
        arms[arm] = {
            "sweep": points,
            "learning_rate": best["learning_rate"],
            "initial_range": best["initial_range"],
            "held_out_book": score(run, arguments.books / arguments.held_out),
            "wikitext2_valid": score(run, arguments.wikitext),
        }
    gaps = {
        text: {
            "nats_per_token": arms["ternary"][text]["loss"] - arms["full precision"][text]["loss"],
            "bits_per_byte": arms["ternary"][text]["bpb"] - arms["full precision"][text]["bpb"],
        }
        for text in ("held_out_book", "wikitext2_valid")
    }
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": settings(arguments),
        "held_out_book": arguments.held_out,
        "arms": arms,
        "gap": gaps,
    }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings shared by both arms, on top of the recipe bitnet-12m."""
    return {
        "model.hidden_size": 256,
        "model.num_hidden_layers": 6,
        "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2,
        "model.intermediate_size": 1024,
        "model.embedding_init_std": 0.039,
        "tokenizer.name": "train",
        "tokenizer.vocab_size": 4096,
        "data.sequence_length": 256,
        "training.batch_size": 8,
        "training.max_steps": arguments.steps,
        "training.seed": 0,
        "schedule.name": "linear",
        "schedule.warmup_steps": 50,
        "evaluation.every_steps": arguments.steps,
        "training.checkpoint_every_steps": arguments.steps,
    }


def train(
    arguments: argparse.Namespace, data: Path, run: Path, weights: str, rate: float, initial_range: float
) -> None:
    """One complete run."""
    shared = {name: value for name, value in settings(arguments).items() if name != "training.max_steps"}
    command = [
        sys.executable, "-m", "ternlm", "train", "bitnet-12m", "--quiet", "--data", str(data), "--run-id", run.name,
        "--runs-dir", str(run.parent), "--steps", str(arguments.steps), "--learning-rate", str(rate),
        f"quantization.weights={weights}", f"model.initializer_range={initial_range}",
        *(f"{name}={value}" for name, value in shared.items()),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def score(run: str, text: Path) -> dict[str, Any]:
    """Loss and bits per byte of the last checkpoint of a run on a whole file."""
    command = [sys.executable, "-m", "ternlm", "evaluate", run, "--data", str(text), "--json"]
    record = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kept = ("loss", "perplexity", "bpb", "accuracy", "n_targets", "n_bytes")
    return {name: record[name] for name in kept}


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"\n{'':18}{'learning rate':>14}{'held-out book':>22}{'WikiText-2 valid':>22}")
    for arm, values in result["arms"].items():
        cells = [f"{values[t]['loss']:.4f} / {values[t]['bpb']:.4f}" for t in ("held_out_book", "wikitext2_valid")]
        print(f"{arm:18}{values['learning_rate']:>14g}{cells[0]:>22}{cells[1]:>22}")
    cells = [f"{gap['nats_per_token']:+.4f} / {gap['bits_per_byte']:+.4f}" for gap in result["gap"].values()]
    print(f"{'gap':18}{'':14}{cells[0]:>22}{cells[1]:>22}   (nats per token / bits per byte)")
    if any(not math.isfinite(gap["nats_per_token"]) for gap in result["gap"].values()):
        raise SystemExit("a loss is not finite")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt novels")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 valid, raw")
    parser.add_argument("--held-out", default="pride_and_prejudice.txt", help="the novel never trained on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/books_gap"), help="where the runs go")
    parser.add_argument("--ternary", nargs="+", default=["2e-3:0.12", "4e-3:0.12", "8e-3:0.12"], metavar="RATE:RANGE")
    parser.add_argument("--full", nargs="+", default=["1e-3:0.02", "2e-3:0.02", "4e-3:0.02"], metavar="RATE:RANGE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
