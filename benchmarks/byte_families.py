"""Flat, hierarchical and transformer byte models and their full-precision twins on the same novels, in bits per byte.

    python benchmarks/byte_families.py --books FOLDER --wikitext FILE --held-out pride_and_prejudice.txt

Every arm of `byte_families.yaml` reads the same bytes in the same order, once. Learning rate and initial range of each
arm come from a sweep over short runs, each with its own complete schedule, chosen by the loss on held-out parts of the
training novels; the held-out novel and WikiText-2 are scored once, with the chosen model. Novels are cut at ends of
paragraphs into documents of about 16 kB, WikiText into its articles.

Finished runs in `--runs` are not trained again. Writes benchmarks/results/byte_families-DATE.json and prints a table.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from turns import ratios, take_turns

from ternlm import checkpoint
from ternlm.data.hub import wikitext_articles
from ternlm.data.preparation import prepare_data
from ternlm.data.settings import DataSettings
from ternlm.models import LanguageModel
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tokenizers import TokenizerSettings
from ternlm.training.objective import ObjectiveSettings, loss_sums
from ternlm.training.optimizer import OptimizerSettings, build_optimizer

HERE = Path(__file__).parent
DOCUMENT_BYTES = 16_000
ROWS, LENGTH = 8, 512
WEIGHTS = {"ternary": "ternary", "full precision": "none"}
RECURRENT = ("hgrn", "hnet")
TEXTS = {"novel": "held-out novel", "wikitext": "WikiText-2"}


class Arm(NamedTuple):
    """One model: its family, and how its weights are kept."""

    family: str
    weights: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt novels")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 valid, raw")
    parser.add_argument("--held-out", default="pride_and_prejudice.txt", help="the novel never trained on")
    parser.add_argument("--steps", type=int, default=760, help="updates of 4,096 bytes; 760 read the novels once")
    parser.add_argument("--sweep-steps", type=int, default=190)
    parser.add_argument("--max-bytes", type=int, default=400_000, help="scored of each text, in whole documents")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/byte_families"))
    options = parser.parse_args()
    definition = yaml.safe_load((HERE / "byte_families.yaml").read_text())
    write_texts(options)
    prepare(options, definition)
    arms = [Arm(family, weights) for family in definition["families"] for weights in definition["points"]]
    chosen = sweep(options, definition, arms)
    jobs = [(arm, chosen[arm]["point"], options.steps) for arm in arms]
    finished = dict(zip(arms, train_all(options, definition, jobs), strict=True))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__, "seeds": 1, "steps": options.steps, "sweep_steps": options.sweep_steps,
        "held_out_novel": options.held_out,
        "arms": [
            {"family": arm.family, "weights": arm.weights, **chosen[arm], **described(finished[arm])} for arm in arms
        ],
        "texts": {name: compare(options, name, finished, "block") for name in TEXTS},
        "streamed": {name: compare(options, name, finished, "stream") for name in TEXTS},
        "training_step": step_times(finished, options.runs / "text" / "novel.txt"),
    }  # fmt: skip
    file = HERE / "results" / f"byte_families-{result['date']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"\nwritten to {file}")


def write_texts(options: argparse.Namespace) -> None:
    """The training folder and the two held-out files, documents divided by separators."""
    folder = options.runs / "text"
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for book in sorted(options.books.glob("*.txt")):
        is_held_out = book.name == options.held_out
        target = folder / "novel.txt" if is_held_out else folder / "train" / book.name
        write_documents(target, parts_of(book.read_text(encoding="utf-8")))
    lines = options.wikitext.read_text(encoding="utf-8").splitlines(keepends=True)
    write_documents(folder / "wikitext.txt", wikitext_articles(lines))


def prepare(options: argparse.Namespace, definition: dict[str, Any]) -> None:
    """The training bytes, once, before several runs ask for them."""
    shared = definition["shared"]
    values = {name[5:]: value for name, value in shared.items() if name.startswith("data.")}
    data = DataSettings.from_mapping(values | {"source": str(options.runs / "text" / "train")}, "data")
    prepared = prepare_data(data, TokenizerSettings(name=shared["tokenizer.name"]))
    print(f"{len(prepared.corpus.split('train')):,} bytes to train on", flush=True)


def write_documents(target: Path, documents: Iterable[str]) -> None:
    """Write a file of documents, unless it is there: prepared data are known by the time of their files."""
    text = "\n<|endoftext|>\n".join(documents)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def parts_of(text: str) -> list[str]:
    """A novel cut at ends of paragraphs."""
    parts, part = [], ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        part += paragraph + "\n\n"
        if len(part.encode()) >= DOCUMENT_BYTES:
            parts.append(part)
            part = ""
    return [*parts, part] if part.strip() else parts


def sweep(options: argparse.Namespace, definition: dict[str, Any], arms: list[Arm]) -> dict[Arm, dict[str, Any]]:
    """The best point of each arm, and what every point reached."""
    jobs = [
        (arm, tuple(point), options.sweep_steps)
        for arm in arms
        for point in definition["points"][arm.weights][arm.family]
    ]
    losses = [validation_loss(run) for run in train_all(options, definition, jobs)]
    found: dict[Arm, dict[str, Any]] = {}
    for (arm, point, _), loss in zip(jobs, losses, strict=True):
        row = {"learning_rate": point[0], "initializer_range": point[1], "validation_loss": loss}
        found.setdefault(arm, {"sweep": []})["sweep"].append(row)
        print(f"{arm.family}, {arm.weights}: rate {point[0]:g}, range {point[1]:g} -> {loss:.4f} nats", flush=True)
    for row in found.values():
        best = min(row["sweep"], key=lambda point: point["validation_loss"])
        row["point"] = (best["learning_rate"], best["initializer_range"])
    return found


def train_all(
    options: argparse.Namespace, definition: dict[str, Any], jobs: list[tuple[Arm, tuple[float, float], int]]
) -> list[RunDirectory]:
    """Complete runs, some at a time, in the order of the jobs."""
    with ThreadPoolExecutor(options.parallel) as pool:
        return list(pool.map(lambda job: train(options, definition, *job), jobs))


def train(
    options: argparse.Namespace, definition: dict[str, Any], arm: Arm, point: tuple[float, float], steps: int
) -> RunDirectory:
    """One complete run, unless it is there already."""
    rate, initial_range = point
    name = f"{arm.family}-{WEIGHTS[arm.weights]}-{rate:g}-{initial_range:g}-{steps}"
    run = RunDirectory(options.runs / name)
    if (run.checkpoints / "final").exists():
        return run
    family = definition["families"][arm.family]
    settings = definition["shared"] | family["settings"] | {
        "quantization.weights": WEIGHTS[arm.weights], "model.initializer_range": initial_range,
        "data.source": options.runs / "text" / "train", "evaluation.every_steps": steps,
        "training.checkpoint_every_steps": steps, "training.threads": 1,
    }  # fmt: skip
    words = [f"{key}={json.dumps(value) if not isinstance(value, Path) else value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "ternlm", "train", family["recipe"], "--quiet", "--run-id", name, "--runs-dir",
               str(options.runs), "--steps", str(steps), "--learning-rate", str(rate), *words]  # fmt: skip
    subprocess.run(command, check=True)
    return run


def validation_loss(run: RunDirectory) -> float:
    return float(read_jsonl(run.evaluations)[-1]["val/loss"])


def described(run: RunDirectory) -> dict[str, Any]:
    """What a finished run has cost, and reached on held-out parts of the novels it was trained on."""
    last = read_jsonl(run.scalars)[-1]
    chunks = {name: value for name, value in last.items() if name.startswith("hnet/")}
    return {
        "run": run.id, "validation_loss": validation_loss(run), "bytes_trained_on": last["tokens_seen"],
        "train_seconds": last["wall_s"], "bytes_per_second": last["tokens_seen"] / last["wall_s"], **chunks,
    }  # fmt: skip


def compare(options: argparse.Namespace, text: str, finished: dict[Arm, RunDirectory], protocol: str) -> dict[str, Any]:
    """The arms and baselines on one held-out text, as `ternlm compare` has it, models by the names of their runs."""
    runs = [run for arm, run in finished.items() if protocol == "block" or arm.family in RECURRENT]
    command = [
        sys.executable, "-m", "ternlm", "compare", *(str(run.path) for run in runs), "--protocol", protocol,
        "--data", str(options.runs / "text" / f"{text}.txt"), "--max-bytes", str(options.max_bytes), "--json",
        *(["--baselines"] if protocol == "block" else []),
    ]  # fmt: skip
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result["models"] = {model["name"].partition("@")[0]: model for model in result["models"]}
    return result


def step_times(finished: dict[Arm, RunDirectory], text: Path, rounds: int = 7) -> list[dict[str, Any]]:
    """CPU seconds of one training step of every finished model on the same held-out bytes, taken in turns.

    Trained models, because the arithmetic of a hierarchical one depends on where it cuts.
    """
    torch.set_num_threads(1)
    raw = torch.tensor(list(text.read_bytes()[: ROWS * (LENGTH + 1)])).view(ROWS, LENGTH + 1)
    loaded = {arm: checkpoint.load(checkpoint.newest_valid(run.checkpoints)) for arm, run in finished.items()}
    cpu, _ = take_turns({str(arm): training_step(found.model, raw) for arm, found in loaded.items()}, 2, rounds)
    base = str(Arm("hgrn", "ternary"))
    return [
        {
            "family": arm.family, "weights": arm.weights, "cpu_ms": 1e3 * statistics.median(cpu[str(arm)]),
            "bytes_per_second": ROWS * LENGTH / statistics.median(cpu[str(arm)]),
            "ratio_to_ternary_hgrn": statistics.median(ratios(cpu, str(arm), base)),
        }
        for arm in finished
    ]  # fmt: skip


def training_step(model: LanguageModel, raw: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and optimizer, at a rate so small that the model stays what it is."""
    optimizer = build_optimizer(model.train(), OptimizerSettings(learning_rate=1e-9))

    def step() -> None:
        sums = loss_sums(model(raw[:, :-1]), raw[:, 1:], ObjectiveSettings())
        (sums.objective / raw[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def show(result: dict[str, Any]) -> None:
    """The result as a table: bits per byte, and what the arms have cost."""
    texts = result["texts"]
    head = ["", "parameters", "rate, range", "s", *(TEXTS[name] for name in texts), *(f"{n}, stream" for n in texts)]
    rows = [head]
    for arm in result["arms"]:
        run = arm["run"]
        cells = [texts[name]["models"][run] for name in texts]
        streamed = [result["streamed"][name]["models"].get(run) for name in texts]
        rows.append([
            f"{arm['family']}, {arm['weights']}", f"{cells[0]['parameters']:,}",
            "{:g}, {:g}".format(*arm["point"]), f"{arm['train_seconds']:.0f}",
            *(f"{cell['bpb']:.4f}" for cell in cells),
            *("-" if cell is None else f"{cell['bpb']:.4f}" for cell in streamed),
        ])  # fmt: skip
    for name in ("unigram", "3-gram", "4-gram", "5-gram", "gzip", "xz"):
        rows.append(
            [name, "", "", "", *(f"{texts[text]['baselines'][name]:.4f}" for text in texts), *("" for _ in texts)]
        )
    for row in rows:
        print("".join(f"{cell:<26}" if column == 0 else f"{cell:>17}" for column, cell in enumerate(row)))
    for step in result["training_step"]:
        print(f"{step['family']}, {step['weights']}: {step['bytes_per_second']:,.0f} bytes/s of one thread, "
              f"{step['ratio_to_ternary_hgrn']:.2f} of the time of ternary hgrn")  # fmt: skip


if __name__ == "__main__":
    main()
