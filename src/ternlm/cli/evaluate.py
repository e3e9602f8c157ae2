"""`ternlm evaluate`: loss, perplexity, bits per byte and accuracies on any text; of an encoder, of hidden tokens."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ternlm.cli.options import (
    Checkpoint,
    Device,
    EncodingErrors,
    Json,
    RunsDir,
    Stride,
    WikiText,
    print_json,
    token_stream,
)
from ternlm.cli.output import write_output
from ternlm.cli.scoring import baselines_of, how_read, require_readable, training_text, word_perplexity_of
from ternlm.cli.tasks import evaluate_on_tasks, require_tasks_alone
from ternlm.errors import SettingsError


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(help="Corpus name, file, folder, glob, hf:owner/name.", show_default="the run's own"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, validation, test, or all.", show_default="all of a local --data, else validation"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Must be the checkpoint's own; default.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window.", show_default="the run's")
    ] = None,
    protocol: Annotated[
        Literal["block", "stream"],
        typer.Option(help="block: windows side by side; stream: memory carried through each document."),
    ] = "block",
    stride: Stride = None,
    wikitext: WikiText = None,
    encoding_errors: EncodingErrors = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass; no effect on the result.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score whole documents within so many tokens.")] = None,
    pll: Annotated[
        int | None, typer.Option(min=1, help="Of an encoder, also mask each token of N documents once; slow.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also uniform, unigram, n-grams of bytes, gzip and xz on the same text.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of a text, tasks of lm-evaluation-harness: wikitext,lambada_openai,... or .yaml."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of --tasks, the first N documents of each.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on held-out text, with its quantized weights.

    Of a causal model every target is scored once, in windows or with --protocol stream document by document. An encoder
    is scored on the tokens that a mask hides, the same ones every time.

    Example:  ternlm evaluate latest --data wikitext-2 --split test --wikitext joined --sequence-length 256
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.errors import TokenizerError
    from ternlm.evaluation.baselines import token_counts
    from ternlm.evaluation.comparison import record_of
    from ternlm.evaluation.evaluate import evaluate as score
    from ternlm.evaluation.masked import masked_baselines, masking_of, pseudo_likelihood
    from ternlm.run_directory import runs_root
    from ternlm.tokenizers import load_tokenizer
    from ternlm.training.interruption import Interruption

    texts = {
        "--data": data, "--split": split, "--stride": stride, "--wikitext": wikitext, "--max-tokens": max_tokens,
        "--encoding-errors": encoding_errors, "--pll": pll, "--baselines": baselines or None,
        "--protocol": None if protocol == "block" else protocol,
    }  # fmt: skip
    require_tasks_alone(tasks, limit, texts)
    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    if tokenizer is not None and load_tokenizer(tokenizer).fingerprint != loaded.tokenizer.fingerprint:
        raise TokenizerError(
            f"tokenizer '{tokenizer}' is not the one '{loaded.path}' was trained with "
            f"('{loaded.tokenizer.name}'). Leave --tokenizer out."
        )
    if pll is not None and loaded.model.is_causal:
        raise SettingsError("--pll needs an encoder; the likelihood of a causal model is its loss. Leave --pll out.")
    if baselines and not loaded.model.is_causal:
        raise SettingsError("--baselines code whole texts; those of an encoder are printed always. Leave it out.")
    require_readable(loaded, sequence_length)
    if tasks is not None:
        evaluate_on_tasks(loaded, tasks.split(","), sequence_length, batch_size, limit, output, as_json)
        return
    stream = token_stream(loaded, data, split, encoding_errors, wikitext)
    model, known, trained_on = loaded.model, loaded.tokenizer, loaded.config["data"]
    length, masking = sequence_length or trained_on["sequence_length"], masking_of(model, loaded.config)
    record = {"checkpoint": str(loaded.path), "step": loaded.state["step"], "data": data or trained_on["source"]}
    check = (interruption := Interruption()).check
    with interruption.watched():
        result = score(model, stream, known, length, batch_size, max_tokens, check, masking, protocol, stride)
        record |= record_of(result)
        if masking is None:
            record |= word_perplexity_of(loaded, result, stream, (data, split, encoding_errors, wikitext))
        if baselines:
            record["baselines"] = baselines_of(loaded, stream, max_tokens, check)
        if masking is not None:
            train = training_text(loaded)
            counts = None if train is None else token_counts(train, known.vocab_size)
            record |= masked_baselines(stream, counts, known, length, masking, max_tokens)
        if pll is not None:
            record |= pseudo_likelihood(model, stream, known, length, pll, batch_size, check).as_dict()
    if as_json:
        print_json(record)
    else:
        _print(record)
    if output is not None:  # behind what is printed, so that a full disk does not cost the result
        from ternlm.files import to_json

        write_output(output, to_json(record))


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    unit, is_masked = record["perplexity_unit"], record["protocol"] == "masked"
    rows = [] if is_masked else [_bits_row(record)]
    rows += [
        ("loss", f"{record['loss']:.4f}", "nats per target"),
        ("perplexity", f"{record['perplexity']:.3f}", f"per {unit}"),
    ]
    if record.get("ppl_word") is not None:
        counted = "words" if record["words"] == "whitespace" else "words as lm-eval counts them"
        decimals = 3 if record["ppl_word"] < 1e3 else 0
        rows.append(("", f"{record['ppl_word']:,.{decimals}f}", f"per word, {record['n_words']:,} {counted}"))
    among = f"top-5 {record['top5_accuracy']:.2%}, top-10 {record['top10_accuracy']:.2%}"
    rows.append(("accuracy", f"{record['accuracy']:.2%}", among))
    rows += _masked_rows(record) if is_masked else []
    computed = f"({record['dtype']}, {record['weights']} weights)"
    if is_masked:
        rows.append(("targets", f"{record['n_targets']:,}", f"hidden tokens, split {record['split']}"))
        rows.append(("speed", f"{record['tokens_per_sec']:,.0f}", f"tokens/s {computed}"))
    else:
        documents = f"{record['documents']:,} document{'s' * (record['documents'] != 1)}"
        texts = f"bytes in {documents}, {record['n_targets']:,} targets, split {record['split']}"
        rows.append(("text", "-" if record["n_bytes"] is None else f"{record['n_bytes']:,}", texts))
        speed = record["bytes_per_sec"]
        rows.append(("speed", "-" if speed is None else f"{speed:,.0f}", f"bytes/s {computed}"))
    rows += [("", "", ""), *_baseline_rows(record["baselines"])] if "baselines" in record else []
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(f"{record['checkpoint']} on '{record['data']}'", markup=False, soft_wrap=True)
    console.print(table)


def _bits_row(record: dict[str, Any]) -> tuple[str, str, str]:
    how = how_read(record["protocol"], record["sequence_length"])
    if record["bpb"] is None:
        return "bits per byte", "-", "an unknown token hides text"
    sure = "" if record["bpb_ci95"] is None else "95 %: {:.4f} to {:.4f}; ".format(*record["bpb_ci95"])
    return "bits per byte", f"{record['bpb']:.4f}", sure + how


def _baseline_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Bits per byte of what knows less than a model, the weakest first."""
    from ternlm.report.comparison import baseline_name

    rows = []
    for name, bits in found.items():
        if name != "ngram_training_bytes":
            detail = f"bits per byte: {baseline_name(name)}"
            rows.append(
                (name, "-" if bits is None else f"{bits:.4f}", detail if bits is not None else "not known here")
            )
    return rows


def _masked_rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Accuracy by what the model read, and what models without context reach on the same targets."""
    shown = {"mask": "[MASK]", "random": "a random token", "kept": "the token itself"}
    rows = [
        (f"  reading {text}", f"{record[f'{kind}_accuracy']:.2%}", "accuracy")
        for kind, text in shown.items()
        if record[f"{kind}_accuracy"] is not None
    ]
    for name, text in (("unigram", "token frequencies alone"), ("uniform", "nothing known")):
        loss, accuracy = record[f"{name}_loss"], record[f"{name}_accuracy"]
        if loss is None:
            rows.append((f"{name} loss", "-", "the training text is not prepared here"))
        else:
            rows.append((f"{name} loss", f"{loss:.4f}", f"nats per target, accuracy {accuracy:.2%}: {text}"))
    if "pll" in record:
        per_byte = "" if record["pll_per_byte"] is None else f", {record['pll_per_byte']:.4f} bits per byte"
        detail = f"nats per token{per_byte}, {record['pll_tokens']:,} tokens of {record['pll_documents']:,} documents"
        rows.append(("pseudo-likelihood", f"{record['pll']:.4f}", detail))
    return rows
