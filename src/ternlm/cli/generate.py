"""`ternlm generate`: continue prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternlm.cli.options import Checkpoint, Device, Json, RunsDir
from ternlm.errors import EnvironmentFault, SettingsError

if TYPE_CHECKING:
    from ternlm.generation import Sample


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="One prompt per line.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write here: .jsonl rows, else plain text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Continue one or several prompts with a trained model.

    Example:  ternlm generate latest -p "Once upon a time" --samples 3
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.generation import SamplingSettings, require_causal
    from ternlm.generation import generate as continue_prompts
    from ternlm.run_directory import runs_root

    prompts = list(prompt or []) + (_read_prompts(prompt_file) if prompt_file is not None else [])
    settings = SamplingSettings.from_mapping({
        "max_new_tokens": max_new_tokens, "temperature": 0.0 if greedy else temperature, "top_k": top_k,
        "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed,
    })  # fmt: skip
    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    require_causal(loaded.model)
    repeated = [text for text in prompts or [""] for _ in range(samples)]
    results = continue_prompts(loaded.model, loaded.tokenizer, repeated, settings)
    is_jsonl = as_json or (output is not None and output.suffix == ".jsonl")
    text = _as_jsonl(results) if is_jsonl else _as_text(results)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"'{output}' cannot be written: {error.strerror}. Choose another --output.") from None
    typer.echo(f"{len(results)} continuations written to {output}")


def _read_prompts(file: Path) -> list[str]:
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"prompt file '{file}' cannot be read: {error}. Check the path.") from None
    if not prompts:
        raise SettingsError(f"prompt file '{file}' holds no prompt. Write one per line.")
    return prompts


def _as_text(results: list["Sample"]) -> str:
    texts = [f"{result.prompt}{result.text}".rstrip("\n") for result in results]
    return ("\n" + "-" * 40 + "\n").join(texts) + "\n"


def _as_jsonl(results: list["Sample"]) -> str:
    import json

    return "".join(json.dumps(result._asdict(), ensure_ascii=False) + "\n" for result in results)
