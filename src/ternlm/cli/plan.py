"""`ternlm plan`: what a run will cost, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Json, RecipeAndSettings, print_json, resolve_recipe, split_recipe
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.settings.resolve import Resolved
    from ternlm.training.plan import Plan
    from ternlm.training.settings import RunSettings


def plan(
    recipe: RecipeAndSettings = None,
    data: Annotated[str | None, typer.Option(help="Corpus name, file, folder, glob, or hf:owner/name.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps; replaces other limits.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens; replaces other limits.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw learning rate and weight decay to this .png or .svg.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Count parameters, tokens, arithmetic, memory, disk and packed size, and show the learning rate."""
    name, assignments = split_recipe(recipe)
    if name is None:
        raise SettingsError("no recipe given. Try 'ternlm plan bitnet-95m', or 'ternlm recipes' for the list.")
    flags = {
        "data.source": data, "training.batch_size": batch_size, "training.max_steps": steps,
        "training.max_tokens": tokens,
    }  # fmt: skip
    show_plan(resolve_recipe(name, flags, assignments), as_json, picture, name)


def show_plan(resolved: "Resolved", as_json: bool, picture: Path | None = None, title: str = "") -> None:
    """Print a plan, and draw its schedule if a file is given."""
    from ternlm.training.launch import settings_from
    from ternlm.training.plan import draw_schedule

    settings = settings_from(resolved)
    made = plan_of(settings)
    if as_json:
        print_json(made.as_dict())
    else:
        _print(made, settings)
    if picture is not None:
        try:
            draw_schedule(made, picture, title)
        except (OSError, ValueError) as error:
            raise SettingsError(f"picture '{picture}' cannot be written: {error}.") from None
        typer.echo(f"picture: {picture}", err=as_json)


def plan_of(settings: "RunSettings") -> "Plan":
    """What a run will cost, with what is known of its data before they are prepared."""
    from ternlm.training.plan import make_plan

    return make_plan(*with_prepared(settings))


def with_prepared(settings: "RunSettings") -> tuple["RunSettings", int | None]:
    """Vocabulary and epoch length, without preparing anything that is not there yet."""
    from ternlm.data import default_directory, load_corpus
    from ternlm.data.preparation import trained_directory
    from ternlm.data.sampler import windows_per_epoch
    from ternlm.errors import TernlmError
    from ternlm.tokenizers import load_tokenizer

    name, size, windows = settings.tokenizer.name, settings.model.vocab_size, None
    if name == "train" and not settings.data.stream:
        kept = trained_directory(settings.data, settings.tokenizer)
        name = str(kept) if (kept / "tokenizer.json").exists() else name
    if name == "train":
        size = size or settings.tokenizer.vocab_size
    else:
        try:
            tokenizer = load_tokenizer(name)
        except TernlmError:
            if size is None:
                raise
            tokenizer = None  # a model of known vocabulary can be planned without its tokenizer's files
        if tokenizer is not None:
            size = size or tokenizer.vocab_size
            directory = default_directory(settings.data, tokenizer)
            if (directory / "manifest.json").exists():
                stream = load_corpus(directory).split("train")
                made = settings.windows(tokenizer)
                windows = windows_per_epoch(len(stream), made.stride, made.overlap)
    model = settings.model.model_copy(update={"vocab_size": size})
    return settings.model_copy(update={"model": model}), windows


def _print(made: "Plan", settings: "RunSettings") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    kind: str = (
        "full precision (the twin)" if settings.quantization.weights == "none" else settings.quantization.weights
    )
    if made.integer and kind == "ternary":
        kind = f"{made.ternary - made.integer:,} of them ternary in the end"
    rows: list[tuple[str, str, str]] = [
        ("parameters", f"{made.parameters:,}", settings.model.family),
        ("  in BitLinear", f"{made.ternary:,}", kind),
        ("  embedding, head", f"{made.embedding:,}", _embedding_note(settings)),
        ("  everything else", f"{made.other:,}", _remainder_note(settings)),
        ("steps", f"{made.steps:,}", f"{settings.training.batch_size} x {settings.data.sequence_length} tokens each"),
        ("tokens", f"{made.tokens:,}", f"{made.tokens_per_parameter:.1f} per parameter"),
        ("arithmetic", f"{made.flops:.2e}", "floating-point operations"),
        ("memory: state", _size(made.state_bytes), "weights, gradients, Adam, codes"),
        *([("memory: teacher", _size(made.teacher_bytes), "its weights")] if made.teacher_bytes else []),
        ("memory: activations", _size(made.activation_bytes_estimate),
         f"estimate for {settings.training.first_micro_batch_size()} sequences at a time"),
        ("checkpoint", _size(made.checkpoint_bytes), f"{_size(made.disk_bytes)} with those kept"),
        ("packed model", _size(made.packed_bytes), "codes at 2 bits, the rest in bfloat16"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    for first, last, name in made.stages:
        table.add_row(f"  {name}", f"{first:,} - {last:,}", "steps")
    console = Console(highlight=False)
    console.print(table)
    console.print()
    for line in _curve(made):
        console.print(line, markup=False)


def _embedding_note(settings: "RunSettings") -> str:
    bits = getattr(settings.model, "embedding_bits", None)
    rounded = bits is not None and bits <= 8 and settings.quantization.weights != "none"
    return f"rows of {bits} and {getattr(settings.model, 'lm_head_bits', bits)} bits" if rounded else "full precision"


def _remainder_note(settings: "RunSettings") -> str:
    routers = "routers, " if settings.model.family == "hnet" else ""
    attention = "attention, " if getattr(settings.model, "innermost_use_attention", False) else ""
    return f"full precision: {routers}{attention}norms, scales, biases"


def _curve(made: "Plan", width: int = 60, height: int = 8) -> list[str]:
    """The learning rate as a small text chart, with its values at the marks."""
    schedule, last = made.schedule, made.steps - 1
    rates = [schedule.learning_rate(round(i * last / (width - 1))) for i in range(width)]
    top = schedule.peak
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for row in range(height, 0, -1):
        filled = (min(max(rate / top * height - (row - 1), 0.0), 1.0) for rate in rates)
        label = f"{top:.2e}" if row == height else ""
        lines.append(f"{label:>9} " + "".join(blocks[round(8 * share)] for share in filled))
    marks: list[dict[str, Any]] = made.as_dict()["rates"]
    named = [f"  step {m['step']:>9,}  {m['learning_rate']:.3g}, decay {m['weight_decay']:.3g}" for m in marks]
    return ["learning rate", *lines, *named]


def _size(count: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f} B"
