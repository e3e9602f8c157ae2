"""`ternlm benchmark`: what training and inference cost, models and other people's layers side by side."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ternlm.cli.benchmark_models import candidate_of, most_tokens, with_data
from ternlm.cli.options import Json, ProgressLine, RunsDir, print_json
from ternlm.cli.output import write_output
from ternlm.errors import EnvironmentFault, SettingsError

if TYPE_CHECKING:
    import torch

    from ternlm.benchmark.candidate import Candidate
    from ternlm.benchmark.suite import Options

_DEFAULT = ("bitnet-95m", "bitnet-95m:full", "tinyllama-1.1b")


def benchmark(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="RECIPE, RECIPE:full (its full-precision twin), a run or checkpoint, tinyllama-1.1b, or a folder or "
            "hub name of a Hugging Face model.",
            show_default=" ".join(_DEFAULT),
        ),
    ] = None,
    only: Annotated[
        Literal["training", "inference"] | None, typer.Option(help="Measure one of both.", show_default="both")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Other ternary layers in our network: published, transformers, torchao, onebitllms.")
    ] = "all",
    data: Annotated[
        str | None, typer.Option(help="Text that models read, and whose epochs are counted.", show_default="random ids")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per training step.")] = 2,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of each.", show_default="512, or what all models take")
    ] = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read before the first is written.", show_default="256, or what all take"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens written.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks for training.")] = False,
    repeats: Annotated[int, typer.Option(min=2, help="Steps of each model that count; half as many texts.")] = 12,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Download no weights.")] = False,
    process_memory: Annotated[
        bool, typer.Option("--process-memory/--no-process-memory", help="Also of a process of its own, on the CPU.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for benchmark.json, .html and .md.")] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Time training steps and inference of any models, in turns, and compare them with the first full-precision one.

    Examples:  ternlm benchmark bitnet-10m bitnet-10m:full --only training
    |  ternlm benchmark latest tinyllama-1.1b --threads 1 --output bench
    """
    from ternlm.benchmark.suite import measure
    from ternlm.device import choose_device, set_up
    from ternlm.training.interruption import Interruption

    target = choose_device(device)
    set_up(target, threads)
    line, interruption, skipped = ProgressLine(), Interruption(), list[str]()
    with interruption.watched():
        found = [candidate_of(word, runs_dir, random_weights) for word in models or _DEFAULT]
        _require_unlike(found)
        found = _with_peers(found, peers, target, skipped)
        options = _options(target, only, found, batch_size, sequence_length, compiled, prompt_length, new_tokens)
        options.repeats, options.process_memory = repeats, process_memory
        if data is not None:
            found, options.tokens = with_data(found, data, options)
        record = measure(found, options, interruption.check, line.say)
    record["skipped"] = skipped + record["skipped"]
    if as_json:
        print_json(record)
    else:
        _print(record)
    if output is not None:
        _write_folder(output, record)
        typer.echo(f"record and page in {output}", err=as_json)
    if not record["models"]:
        raise EnvironmentFault("nothing was measured: " + " ".join(record["skipped"]))


def _require_unlike(candidates: "list[Candidate]") -> None:
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"model '{name}' is given twice. Give each once.")


def _with_peers(
    candidates: "list[Candidate]", names: str, device: "torch.device", skipped: list[str]
) -> "list[Candidate]":
    """Peers in the first ternary model of ours behind our own; a sentence for each that cannot be compared."""
    from ternlm.benchmark.peers import PEERS, require_peer

    words = [] if names == "none" else list(PEERS) if names == "all" else [name.strip() for name in names.split(",")]
    first = next((each for each in candidates if each.quantization.get("weights") == "ternary"), None)
    made = []
    for word in words if first is not None else ():
        try:
            require_peer(word, device)
        except EnvironmentFault as error:
            skipped.append(str(error))
            continue
        made.append(first.with_peer(word))  # type: ignore[union-attr]
    own = [each for each in candidates if each.kind != "hugging_face"]
    return [*own, *made, *(each for each in candidates if each.kind == "hugging_face")]


def _options(
    device: "torch.device",
    only: str | None,
    candidates: "list[Candidate]",
    batch_size: int,
    sequence_length: int | None,
    compiled: bool,
    prompt_length: int | None,
    new_tokens: int,
) -> "Options":
    """How to measure.

    Raises:
        SettingsError: A model does not take so many tokens.
    """
    from ternlm.benchmark.subject import Work
    from ternlm.benchmark.suite import Options

    limits = {each.name: limit for each in candidates if (limit := most_tokens(each)) is not None}
    longest = min(limits.values(), default=math.inf)
    length = sequence_length or int(min(512, longest))
    prompt = prompt_length or int(max(min(256, longest - new_tokens), 1))
    for option, asked in (
        ("--sequence-length", length),
        ("--prompt-length + --new-tokens", prompt + new_tokens),
    ):
        is_asked = only != ("inference" if option == "--sequence-length" else "training")
        if is_asked and asked > longest:
            name = min(limits, key=lambda each: limits[each])
            raise SettingsError(f"{option} = {asked} exceeds the {longest} tokens that '{name}' takes. Lower it.")
    return Options(
        device=device,
        training=only != "inference",
        inference=only != "training",
        work=Work(batch_size, length, compiled),
        prompt_length=prompt,
        new_tokens=new_tokens,
    )


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console

    from ternlm.report.benchmark import WIDTH, benchmark_tables, sentences

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    for table in benchmark_tables(record):
        console.print(table)
        console.print()
    for sentence in sentences(record):
        console.print(sentence, markup=False, soft_wrap=True)


def _write_folder(folder: Path, record: dict[str, Any]) -> None:
    from ternlm.files import to_json
    from ternlm.report.benchmark import benchmark_sections, subtitle
    from ternlm.report.markdown import markdown
    from ternlm.report.page import html_page

    sections = benchmark_sections(record)
    write_output(folder / "benchmark.json", to_json(record))
    write_output(folder / "benchmark.md", markdown("Benchmark", subtitle(record), sections).encode())
    write_output(folder / "benchmark.html", html_page("Benchmark", subtitle(record), sections).encode())
