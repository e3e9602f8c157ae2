"""`ternlm tokenizer`: train one, and try one."""

from pathlib import Path
from typing import Annotated

import typer

from ternlm.cli.options import EncodingErrors
from ternlm.errors import DataError, SettingsError

app = typer.Typer(help="Train or try a tokenizer.", no_args_is_help=True)


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="Corpus name, file, folder, glob, or hf:owner/name.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, special tokens included.")] = 4096,
    text_column: Annotated[str, typer.Option(help="Column of Parquet and JSONL files.")] = "text",
    encoding_errors: EncodingErrors = None,
    mask_token: Annotated[bool, typer.Option("--mask-token", help="Add one, for masked language models.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on the training split of a corpus."""
    from ternlm.data import DataSettings, open_corpus
    from ternlm.tokenizers import TokenizerSettings, train_bpe

    if (output / "tokenizer.json").exists():
        raise SettingsError(f"'{output}' holds a tokenizer already. Choose another --output.")
    size = TokenizerSettings.from_mapping({"name": "train", "vocab_size": vocab_size}, "tokenizer").vocab_size
    settings = DataSettings.from_mapping(
        {"source": data, "text_column": text_column, "encoding_errors": encoding_errors or "strict"}, "data"
    )
    tokenizer = train_bpe(open_corpus(settings, "train"), size, mask_token=mask_token)
    tokenizer.save(output)
    sample = next(iter(open_corpus(settings, "train")), "")[:100_000]
    if not sample:
        raise DataError(f"'{data}' holds no text. Choose another corpus.")
    per_token = len(sample.encode()) / max(len(tokenizer.encode(sample)), 1)
    typer.echo(f"{output}: {tokenizer.vocab_size:,} ids, {per_token:.2f} bytes per token on the first document")
    recipe = "qdyt-25m" if mask_token else "bitnet-12m"
    typer.echo(f"next: ternlm train {recipe} --data {data} --tokenizer {output}")


@app.command()
def encode(
    tokenizer: Annotated[str, typer.Argument(help="byte, a path, or a hub name.", show_default=False)],
    text: Annotated[str, typer.Argument(help="Text to encode.", show_default=False)],
) -> None:
    """Show how a tokenizer cuts a text."""
    from ternlm.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    ids = loaded.encode(text)
    for index in ids:
        typer.echo(f"{index:>7}  {loaded.piece(index).decode('utf-8', errors='backslashreplace')!r}")
    typer.echo(f"{len(ids)} tokens, {len(text.encode()) / max(len(ids), 1):.2f} bytes per token")
