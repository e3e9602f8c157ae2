"""What each part of a small `qdyt` encoder is worth on real text, beside full-precision twins and a unigram model.

    python benchmarks/qdyt_ablation.py --wikitext VALID --books FOLDER --held-out TEST --tokenizer FOLDER

Trained on: the articles of a WikiText file and the novels of a folder. Held out: the articles of another WikiText file.

Trains the arms of `qdyt_ablation.yaml` with `ternlm sweep` (again and again the same command goes on where it was
stopped), then scores the last checkpoint of every arm that is finished on the first articles of the held-out text, on
the same hidden tokens. Differences to the arm `base` are paired: their standard error is that of the difference token
by token, so it says how surely the two models differ on this text, not how two training seeds would.

Writes benchmarks/results/qdyt_ablation-DATE.json.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ternlm import checkpoint
from ternlm.data.corpus import TokenStream
from ternlm.data.hub import wikitext_articles
from ternlm.data.masking import MaskingSettings
from ternlm.data.preparation import prepare_data
from ternlm.data.settings import DataSettings
from ternlm.evaluation.analysis import held_out_batches
from ternlm.evaluation.baselines import token_counts
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.masked import masked_baselines, masking_of
from ternlm.evaluation.sensitivity import target_losses
from ternlm.evaluation.untouched import untouched
from ternlm.files import from_json
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tokenizers import TokenizerSettings
from ternlm.training.settings import RunSettings

HERE = Path(__file__).parent
MOST_TOKENS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", required=True, type=Path, help="wiki.valid.tokens of WikiText-2, to train on")
    parser.add_argument("--books", required=True, type=Path, help="folder of novels, to train on")
    parser.add_argument("--held-out", required=True, type=Path, help="wiki.test.tokens of WikiText-2, to score")
    parser.add_argument("--tokenizer", required=True, help="folder with vocab.txt of an uncased BERT")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--score-only", action="store_true", help="do not train; score what is finished")
    options = parser.parse_args()
    sweep = Path(options.runs_dir) / "ablation"
    if not options.score_only:
        text = Path(options.runs_dir) / "text"
        write_text(text, options.wikitext, options.books, options.held_out)
        words = [f"data.source={text / 'train'}", f"data.validation_path={text / 'held_out.txt'}",
                 f"tokenizer.name={options.tokenizer}"]  # fmt: skip
        words += ["--parallel", str(options.parallel), "--runs-dir", options.runs_dir, "--sweep-id", sweep.name]
        command = [sys.executable, "-m", "ternlm", "sweep", str(HERE / "qdyt_ablation.yaml"), *words]
        subprocess.run(command, check=True)
    result = score(sweep)
    file = HERE / "results" / f"qdyt_ablation-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    print(f"written: {file}")


def write_text(text: Path, wikitext: Path, books: Path, held_out: Path) -> None:
    """The training folder and the held-out file, with articles as documents of their own."""
    (text / "train").mkdir(parents=True, exist_ok=True)
    for source, target in ((wikitext, text / "train" / "wikitext.txt"), (held_out, text / "held_out.txt")):
        articles = wikitext_articles(source.read_text(encoding="utf-8").splitlines(keepends=True))
        target.write_text("\n<|endoftext|>\n".join(articles), encoding="utf-8")
    for book in sorted(books.glob("*.txt")):
        shutil.copy2(book, text / "train" / book.name)


def score(sweep: Path) -> dict[str, Any]:
    """All finished arms on the held-out text, and what they have in common."""
    torch.set_num_threads(2)
    arms: list[dict[str, Any]] = []
    base: torch.Tensor | None = None
    common: dict[str, Any] = {}
    for trial in from_json((sweep / "sweep.json").read_bytes())["trials"]:
        run = RunDirectory(sweep / trial["id"])
        if not (run.checkpoints / "final").exists():
            continue
        loaded = checkpoint.load(checkpoint.resolve(f"{run.path}@final", sweep))
        masking = masking_of(loaded.model, loaded.config)
        assert masking is not None
        corpus = prepare_data(DataSettings.from_mapping(loaded.config["data"], "data"),
                              TokenizerSettings(name=str(loaded.path))).corpus  # fmt: skip
        stream, length = corpus.split("validation"), loaded.config["data"]["sequence_length"]
        with torch.no_grad(), untouched(loaded.model):
            batches = held_out_batches(loaded.model, stream, loaded.tokenizer, length, 16, MOST_TOKENS, masking)
            losses = target_losses(loaded.model, batches, lambda: None)
        found = evaluate(loaded.model, stream, loaded.tokenizer, length, 16, MOST_TOKENS, masking=masking)
        base = losses if base is None else base
        change = losses - base
        rows = read_jsonl(run.scalars)
        arms.append({
            "arm": trial["arm"], "settings": trial["settings"],
            "loss": found.loss, "perplexity": found.perplexity, "accuracy": found.accuracy,
            "top5_accuracy": found.top5_accuracy, "top10_accuracy": found.top10_accuracy,
            "mask_accuracy": found.mask_accuracy, "random_accuracy": found.random_accuracy,
            "kept_accuracy": found.kept_accuracy,
            "loss_minus_base": float(change.mean()),
            "standard_error": float(change.std()) / math.sqrt(len(change)),
            "train_seconds": rows[-1]["wall_s"], "learning_rate": loaded.config["optimizer"]["learning_rate"],
            "parameters": loaded.model.parameter_counts().total,
        })  # fmt: skip
        if not common:
            counts = token_counts(corpus.split("train"), loaded.tokenizer.vocab_size)
            common = {
                "targets": found.n_targets, "held_out_bytes": stream.bytes, "mask_id": found.mask_id,
                "train_tokens_in_corpus": len(corpus.split("train")), "tokens_trained_on": rows[-1]["tokens_seen"],
                "steps": rows[-1]["step"], "ternary_parameters": loaded.model.parameter_counts().ternary,
                "baselines": masked_baselines(stream, counts, loaded.tokenizer, length, masking, MOST_TOKENS),
                "boundaries": boundaries(run, stream, masking),
            }  # fmt: skip
        print(f"{trial['arm']}: {found.loss:.4f} nats, {found.accuracy:.2%}", flush=True)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__, "seeds": 1, **common, "arms": arms,
    }  # fmt: skip


def boundaries(run: RunDirectory, stream: TokenStream, masking: MaskingSettings) -> list[dict[str, float]]:
    """The loss of the weights at each stage boundary, rounded as before it and as after it."""
    found = []
    settings = RunSettings.from_mapping(from_json(run.config.read_bytes()))
    stages = settings.stages(settings.total_steps())
    for step in stages.boundaries():
        loaded = checkpoint.load(checkpoint.folder(run.checkpoints, step))
        losses = {}
        for name, update in (("before", step - 1), ("after", step)):
            stages.apply(loaded.model, update)
            length = settings.data.sequence_length
            losses[name] = evaluate(
                loaded.model, stream, loaded.tokenizer, length, 16, MOST_TOKENS // 4, masking=masking
            ).loss
        found.append({"step": step, **losses, "jump": losses["after"] - losses["before"]})
    return found


def print_table(result: dict[str, Any]) -> None:
    """The table of benchmarks/README.md."""
    baselines = result["baselines"]
    print("| arm | loss | minus base | accuracy | top 5 | top 10 |\n|---|---|---|---|---|---|")
    for arm in result["arms"]:
        print(f"| {arm['arm']} | {arm['loss']:.3f} | {arm['loss_minus_base']:+.3f} +- {arm['standard_error']:.3f} | "
              f"{arm['accuracy']:.1%} | {arm['top5_accuracy']:.1%} | {arm['top10_accuracy']:.1%} |")  # fmt: skip
    for edge in result["boundaries"]:
        print(f"stage boundary at step {edge['step']}: {edge['before']:.4f} -> {edge['after']:.4f} nats")
    print(f"| unigram | {baselines['unigram_loss']:.3f} | | {baselines['unigram_accuracy']:.1%} | | |")


if __name__ == "__main__":
    main()
