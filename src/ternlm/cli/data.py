"""`ternlm data`: prepare a corpus, count it, and list what there is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Json, prepare_with_bar, print_json

if TYPE_CHECKING:
    from ternlm.data.corpus import Corpus
    from ternlm.tokenizers import Tokenizer

app = typer.Typer(help="Prepare, count and list corpora.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(help="Corpus name, file, folder, glob, or hf:owner/name[:config].", show_default=False),
]
TokenizerName = Annotated[str, typer.Option("--tokenizer", help="byte, train, a path, or a hub name.")]
VocabSize = Annotated[int, typer.Option(help="Ids of a trained tokenizer.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence, to count sequences.")]
Column = Annotated[str, typer.Option(help="Column of Parquet and JSONL files that holds the text.")]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Stop the training split here, e.g. 2B.")]
Documents = Annotated[str | None, typer.Option("--max-documents", "--max-samples", help="Read at most so many.")]
Encoding = Annotated[str, typer.Option("--encoding-errors", help="strict, replace or skip, for what is not UTF-8.")]


@app.command()
def prepare(
    source: Source,
    tokenizer: TokenizerName = "byte",
    vocab_size: VocabSize = 4096,
    sequence_length: Length = 256,
    tokens: Tokens = None,
    max_documents: Documents = None,
    text_column: Column = "text",
    encoding_errors: Encoding = "strict",
) -> None:
    """Tokenize a corpus once into memory-mapped shards; stopped half-way, it goes on from there.

    Training does this by itself when needed.
    """
    given = {
        "source": source, "text_column": text_column, "encoding_errors": encoding_errors,
        "sequence_length": sequence_length, "max_tokens": tokens, "max_documents": max_documents,
    }  # fmt: skip
    show_statistics(*_prepare(given, tokenizer, vocab_size), sequence_length)
    typer.echo(f"next: ternlm train bitnet-1m --data {source} --tokenizer {tokenizer}")


@app.command()
def stats(
    source: Source,
    tokenizer: TokenizerName = "byte",
    vocab_size: VocabSize = 4096,
    sequence_length: Length = 256,
    tokens: Tokens = None,
    max_documents: Documents = None,
    text_column: Column = "text",
    encoding_errors: Encoding = "strict",
    as_json: Json = False,
) -> None:
    """Count documents, bytes, tokens and sequences of each split, preparing the corpus if needed."""
    given = {
        "source": source, "text_column": text_column, "encoding_errors": encoding_errors,
        "sequence_length": sequence_length, "max_tokens": tokens, "max_documents": max_documents,
    }  # fmt: skip
    prepared = _prepare(given, tokenizer, vocab_size)
    if as_json:
        print_json(_counted(*prepared, sequence_length))
    else:
        show_statistics(*prepared, sequence_length)


@app.command()
def verify(
    source: Source,
    tokenizer: TokenizerName = "byte",
    vocab_size: VocabSize = 4096,
    tokens: Tokens = None,
    max_documents: Documents = None,
    text_column: Column = "text",
    encoding_errors: Encoding = "strict",
) -> None:
    """Compare every shard of a prepared corpus with its sha256; every run does so when it starts."""
    given = {
        "source": source, "text_column": text_column, "encoding_errors": encoding_errors,
        "max_tokens": tokens, "max_documents": max_documents,
    }  # fmt: skip
    corpus, _ = _prepare(given, tokenizer, vocab_size)
    corpus.verify()
    typer.echo(f"{corpus.directory}: every file is what was prepared")


@app.command("list")
def list_corpora(as_json: Json = False) -> None:
    """List the corpora known by name."""
    from ternlm.data import CORPORA

    if as_json:
        print_json({name: entry.description for name, entry in CORPORA.items()})
        return
    width = max(map(len, CORPORA))
    for name, entry in CORPORA.items():
        typer.echo(f"{name:<{width}}  {entry.description} ({entry.license}; {entry.size})")
    typer.echo("\nAlso: a file, a folder, a glob of .txt .md .jsonl .parquet, or hf:owner/name[:config].")


def _prepare(given: dict[str, Any], tokenizer: str, vocab_size: int) -> "tuple[Corpus, Tokenizer]":
    from ternlm.data import DataSettings
    from ternlm.data.corpus import Corpus
    from ternlm.tokenizers import TokenizerSettings

    settings = DataSettings.from_mapping(given, "data")
    named = TokenizerSettings.from_mapping({"name": tokenizer, "vocab_size": vocab_size}, "tokenizer")
    prepared = prepare_with_bar(settings, named)
    assert isinstance(prepared.corpus, Corpus)  # only runs stream
    return prepared.corpus, prepared.tokenizer


def show_statistics(corpus: "Corpus", tokenizer: "Tokenizer", sequence_length: int) -> None:
    """Print what a prepared corpus holds: counts per split, writing systems, and bytes that were no text."""
    from rich.console import Console
    from rich.table import Table

    from ternlm.data import statistics
    from ternlm.data.decoding import describe_invalid
    from ternlm.data.scripts import script_mix

    counted = statistics(corpus, sequence_length)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in counted:
        table.add_column(name, justify="right")
    for key in next(iter(counted.values())):
        values = [split[key] for split in counted.values()]
        table.add_row(key.replace("_", " "), *map(_cell, values))
    typer.echo(f"{corpus.directory}  (tokenizer {tokenizer.name})")
    Console(highlight=False).print(table)
    mix = [f"{script} {share:.1%}" for script, share in script_mix(corpus.split("train"), tokenizer).items()]
    if mix:
        typer.echo(f"letters and symbols: {', '.join(mix[:8])}{', ...' if len(mix) > 8 else ''}")
    invalid = corpus.invalid_bytes()
    if invalid is not None:
        typer.echo(describe_invalid(invalid))


def _counted(corpus: "Corpus", tokenizer: "Tokenizer", sequence_length: int) -> dict[str, Any]:
    from ternlm.data import statistics
    from ternlm.data.scripts import script_mix

    counted: dict[str, Any] = statistics(corpus, sequence_length)
    counted["train"]["scripts"] = script_mix(corpus.split("train"), tokenizer)
    counted["train"]["invalid_bytes"] = corpus.invalid_bytes()
    return counted


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value[:12]
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
