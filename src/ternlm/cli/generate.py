"""`ternlm generate`: continue prompts, one as it is written or a file of them in batches."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ternlm.cli.options import Checkpoint, Device, Json, RunsDir, read_lines
from ternlm.cli.output import unwritable, write_output
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.generation import Request, Sample

_SEPARATOR = "\n" + "-" * 40 + "\n"


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeatable.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='One prompt per line; in .jsonl, rows with a "prompt".')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write here: .jsonl rows, else plain text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations per prompt.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Continuations written together; no effect on what they are.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print each character as soon as it is whole.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Valid UTF-8, repetition, entropy, length.")] = False,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Continue one or several prompts with a trained model. Speed is reported on stderr.

    Example:  ternlm generate latest -p "Once upon a time" --samples 3
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.generation import SamplingSettings, numbered, require_causal
    from ternlm.run_directory import runs_root
    from ternlm.tokenizers.interface import readable

    prompts = [readable(text) for text in prompt or []]
    prompts += _read_prompts(prompt_file) if prompt_file is not None else []
    settings = SamplingSettings.from_mapping({
        "max_new_tokens": max_new_tokens, "temperature": 0.0 if greedy else temperature, "top_k": top_k,
        "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed,
    })  # fmt: skip
    if stream and (as_json or metrics or output is not None):
        raise SettingsError("--stream prints text as it is written. Leave out --json, --metrics and --output, or it.")
    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    require_causal(loaded.model)
    requests = numbered((text for text in prompts or [""] for _ in range(samples)), settings)
    if stream:
        _print_as_written(loaded, requests)
        return
    is_jsonl = as_json or (output is not None and output.suffix == ".jsonl")
    with _opened(output) as file:
        found = _write_all(loaded, requests, batch_size, Writer(file, is_jsonl, metrics), output)
    if output is not None:
        typer.echo(f"{found['samples']:,} continuations written to {output}")
    if metrics:
        _show_metrics(found, output)
    typer.echo(speed(found["tokens"], found["bytes"], found["seconds"]), err=True)


class Writer:
    """Writes continuations as they come: rows of JSON, or texts with a line between them.

    Args:
        file: Where to.
        is_jsonl: Rows or texts.
        with_metrics: Whether rows hold what was measured.
    """

    def __init__(self, file: TextIO, is_jsonl: bool, with_metrics: bool) -> None:
        self._file, self._is_jsonl, self._with_metrics = file, is_jsonl, with_metrics
        self.written = 0

    def write(self, sample: "Sample", metrics: dict[str, Any]) -> None:
        """Write one, whole."""
        if self._is_jsonl:
            import json

            row = sample._asdict() | (metrics if self._with_metrics else {})
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            text = f"{sample.prompt}{sample.text}".rstrip("\n")
            self._file.write((_SEPARATOR if self.written else "") + text)
        self.written += 1

    def finish(self) -> None:
        """End the last line."""
        if self.written and not self._is_jsonl:
            self._file.write("\n")
        self._file.flush()


def speed(tokens: int, n_bytes: int, seconds: float) -> str:
    """How fast text was generated, in one line."""
    per_second = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, {n_bytes / max(seconds, 1e-9):,.0f} bytes/s"
    return f"{tokens:,} tokens, {n_bytes:,} bytes in {seconds:,.1f} s: {per_second}"


def _write_all(
    loaded: "Loaded", requests: Iterable["Request"], batch_size: int, writer: Writer, output: Path | None
) -> dict[str, Any]:
    """Generate and write everything; what was written before an interruption stays."""
    from rich.console import Console

    from ternlm.evaluation.generations import Summary, generate_measured

    summary, console = Summary(), Console(stderr=True, highlight=False)
    try:
        with console.status("generating") as line:
            for sample, metrics, _ in generate_measured(loaded.model, loaded.tokenizer, requests, batch_size):
                writer.write(sample, metrics)
                summary.add(sample.finished, metrics)
                line.update(f"{writer.written:,} continuations")
        found = summary.as_dict()
        writer.finish()
    except OSError as error:
        if output is None:
            raise
        raise unwritable(output, error) from None
    return found


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """The file, or stdout."""
    import sys

    if output is None:
        yield sys.stdout
        return
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(output, error) from None
    try:
        yield file
    finally:
        try:
            file.close()  # writes what is left of the last rows
        except OSError as error:
            raise unwritable(output, error) from None


def _print_as_written(loaded: "Loaded", requests: Iterable["Request"]) -> None:
    from ternlm.generation import stream
    from ternlm.generation.decode import encode_prompt

    tokenizer, tokens, n_bytes, seconds = loaded.tokenizer, 0, 0, 0.0
    for number, request in enumerate(requests):
        typer.echo((_SEPARATOR if number else "") + request.prompt, nl=False)
        decoder, begun = tokenizer.stream(encode_prompt(tokenizer, request.prompt)), time.perf_counter()
        for token in stream(loaded.model, tokenizer, request):
            typer.echo(decoder.feed(token), nl=False)
            tokens, n_bytes = tokens + 1, n_bytes + len(tokenizer.piece(token))
        seconds += time.perf_counter() - begun
        typer.echo(decoder.finish(), nl=False)
    typer.echo()
    typer.echo(speed(tokens, n_bytes, seconds), err=True)


def _read_prompts(file: Path) -> list[str]:
    lines = read_lines(file, "prompt file")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise SettingsError(f"prompt file '{file}' holds no prompt. Write one per line.")
    if file.suffix == ".jsonl":
        return [_prompt_of_row(file, number, line) for number, line in numbered]
    return [line.removesuffix("\r") for _, line in numbered]


def _prompt_of_row(file: Path, number: int, line: str) -> str:
    import json

    from ternlm.tokenizers.interface import readable

    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise SettingsError(
            f"line {number:,} of prompt file '{file}' is no JSON object with a text \"prompt\". "
            'Write {"prompt": "..."}, or give the file another ending than .jsonl.'
        )
    return readable(row["prompt"])


def _show_metrics(found: dict[str, Any], output: Path | None) -> None:
    """A table on stderr, and beside the output a file with the same numbers."""
    from rich.console import Console
    from rich.table import Table

    from ternlm.files import to_json

    shares = ("finished", "utf8_validity", "utf8_strict", "invalid_byte_rate", "repetition_frac", "seq_rep_4")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in found.items():
        if name in ("seconds", "tokens_per_sec", "bytes_per_sec"):
            continue
        form = "," if isinstance(value, int) else ".1%" if name in shares else ".3f"
        table.add_row(name, "-" if value is None else format(value, form))
    Console(stderr=True, highlight=False).print(table)
    if output is not None:
        beside = output.with_suffix(".metrics.json")
        write_output(beside, to_json(found))
        typer.echo(f"metrics written to {beside}")
