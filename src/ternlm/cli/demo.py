"""`ternlm demo`: the whole way on generated stories, in a few minutes, without a download."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import RunsDir, prepare_with_bar, resolve_recipe

if TYPE_CHECKING:
    from ternlm.training.trainer import Trainer

PROMPT = '"What a sunny day!"'


def demo(
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Train a small ternary model on generated stories, and look at what it learned.

    Shows text before and after, held-out bits per byte beside a baseline and the corpus's own
    entropy, and draws the loss curve.
    """
    from ternlm.cli.report import reported
    from ternlm.data.stories import entropy_floor
    from ternlm.device import choose_device, set_up
    from ternlm.run_directory import RunDirectory, new_run_id, runs_root
    from ternlm.training import launch, provenance
    from ternlm.training.trainer import Trainer

    flags = {"training.max_steps": steps, "training.seed": seed, "training.device": device}
    resolved = resolve_recipe("demo", flags, [])
    settings = launch.settings_from(resolved)
    set_up(choose_device(settings.training.device), settings.training.threads)
    typer.echo("1 data      short stories from a seeded grammar, written by ternlm itself")
    prepared = prepare_with_bar(settings.data, settings.tokenizer)
    settings = launch.with_vocab_size(settings, prepared)
    train, held_out = prepared.corpus.split("train"), prepared.corpus.split("validation")
    floor = entropy_floor("validation").bits_per_byte
    typer.echo(
        f"            {train.documents:,} stories ({train.bytes / 1e6:.1f} MB) to train on, "
        f"{held_out.documents:,} others to test on; their entropy is {floor:.3f} bits per byte"
    )
    run = RunDirectory(runs_root(runs_dir) / new_run_id("demo"))
    run.create()
    with reported(run, quiet=False), launch.begun(run, settings, resolved.origins) as status:
        trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, run, status=status)
        provenance.record(run, settings, 0)
        provenance.record_data(run, prepared.corpus)
        counts = trainer.model.parameter_counts()
        typer.echo(
            f"2 model     transformer with {counts.ternary:,} ternary weights and {counts.embedding + counts.other:,} "
            f"others, on bytes\n3 before    {_sample(trainer)}"
        )
        typer.echo(f"4 train     {trainer.total_steps} steps, run folder {run.path}")
        trainer.run()
        typer.echo(f"5 after     {_sample(trainer)}")
        _report(trainer, floor)
    typer.echo(
        f"\nnext: ternlm chat {run.path}\n      ternlm generate {run.path} -p 'One rainy day,' --samples 3\n"
        f"      ternlm inspect {run.path} --layers\n"
        "      ternlm train bitnet-1m --data FOLDER_OF_TEXT --steps 1000"
    )


def _sample(trainer: "Trainer") -> str:
    from ternlm.generation import SamplingSettings, generate

    settings = SamplingSettings(max_new_tokens=600, temperature=0.4, seed=trainer.settings.training.seed)
    (sample,) = generate(trainer.model, trainer.tokenizer, [PROMPT], settings)
    text = "".join(c if c.isprintable() or c == "\n" else "." for c in sample.prompt + sample.text).strip()
    return text.replace("\n", "\n            ")


def _report(trainer: "Trainer", floor: float) -> None:
    from ternlm.evaluation.baselines import token_counts, unigram_bpb

    train, held_out = (trainer.corpus.split(name) for name in ("train", "validation"))
    baseline = unigram_bpb(held_out, token_counts(train, trainer.tokenizer.vocab_size), trainer.tokenizer)
    bpb = trainer.progress.last_evaluation["bpb"]
    picture = trainer.run_directory.path / "loss.png"
    draw_loss(trainer.run_directory, floor, picture)
    typer.echo(
        f"6 held out  {bpb:.3f} bits per byte; letter frequencies alone give {baseline:.3f}, no model can do "
        f"better than {floor:.3f} ({bpb / floor:.2f} times the floor)\n7 picture   {picture}"
    )


def draw_loss(run: Any, floor: float, file: Path) -> None:
    """Training and held-out bits per byte over steps, with the entropy of the corpus as a line."""
    from matplotlib.figure import Figure

    from ternlm.run_directory import read_jsonl

    train, held_out = read_jsonl(run.scalars), read_jsonl(run.evaluations)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in train], [row["train/bpb"] for row in train], label="training batches")
    axes.plot([row["step"] for row in held_out], [row["val/bpb"] for row in held_out], "o", label="held-out stories")
    axes.axhline(floor, color="grey", linestyle="--", label=f"entropy of the corpus, {floor:.2f}")
    axes.set(
        xlabel="optimizer step",
        ylabel="bits per byte",
        title="A ternary model learns stories",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
