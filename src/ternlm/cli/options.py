"""What several verbs share: options, and the way from recipe, files and flags to settings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ternlm.errors import Interrupted, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import TokenStream
    from ternlm.data.preparation import Prepared
    from ternlm.data.settings import DataSettings
    from ternlm.data.wikitext import WikiTextForm
    from ternlm.settings.resolve import Layer, Resolved
    from ternlm.tokenizers import TokenizerSettings

RunsDir = Annotated[
    str | None, typer.Option("--runs-dir", help="Where runs live.", show_default="$TERNLM_RUNS_DIR or runs")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any other setting.", show_default=False)
]
RecipeAndSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [KEY=VALUE]...",
        help="A recipe or a .yaml/.json file, then any settings.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EncodingErrors = Annotated[
    Literal["strict", "replace", "skip"] | None,
    typer.Option(help="For what is not UTF-8: refuse it, read it as U+FFFD, leave it out.", show_default="the run's"),
]
WikiText = Annotated[
    Literal["articles", "detokenized", "joined"] | None,
    typer.Option(
        help="How WikiText becomes documents; detokenized: as lm-eval, joined: as GPTQ.", show_default="articles"
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Move windows by so many tokens through each document and score only the last ones."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Checkpoint = Annotated[
    str,
    typer.Argument(help="A checkpoint folder, or a run: path, name, latest, RUN@best, RUN@500.", show_default=False),
]

_LIMITS = ("max_steps", "max_tokens", "max_epochs")


def flag_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were given, by dotted setting; one limit on the length of a run replaces the others."""
    values = {name: value for name, value in flags.items() if value is not None}
    if any(f"training.{limit}" in values for limit in _LIMITS):
        values = {f"training.{limit}": None for limit in _LIMITS} | values
    return values


def resolve_recipe(
    recipe: str | None, flags: Mapping[str, Any], assignments: list[str] | None, below: Sequence["Layer"] = ()
) -> "Resolved":
    """Recipe, environment, flags and assignments, merged in this order, on top of what lies `below`.

    Raises:
        SettingsError: The recipe or a setting is unknown.
    """
    from ternlm.recipes import load_recipe
    from ternlm.settings.resolve import Layer, environment_overrides, parse_overrides
    from ternlm.training.settings import resolve_settings

    layers = list(below)
    if recipe is not None:
        loaded = load_recipe(recipe)
        layers.append(Layer(loaded.origin, loaded.values))
        for note in loaded.notes:
            typer.echo(f"note: {note}.", err=True)
    layers.append(Layer("environment", environment_overrides()))
    layers.append(Layer("command line", flag_values(flags)))
    layers.append(Layer("command line", parse_overrides(assignments or [])))
    return resolve_settings(layers)


def split_recipe(words: list[str] | None) -> tuple[str | None, list[str]]:
    """``[RECIPE] key=value ...`` taken apart.

    Raises:
        SettingsError: There are two recipes.
    """
    recipes = [word for word in words or [] if "=" not in word]
    if len(recipes) > 1:
        raise SettingsError(f"two recipes given: '{recipes[0]}' and '{recipes[1]}'. Settings are written key=value.")
    return (recipes[0] if recipes else None), [word for word in words or [] if "=" in word]


def prepare_with_bar(data: "DataSettings", tokenizer: "TokenizerSettings", folder: "Path | None" = None) -> "Prepared":
    """Prepare a corpus with a progress line; Ctrl-C and SIGTERM keep what is done.

    Args:
        data, tokenizer: What is prepared.
        folder: Where a streamed corpus keeps its blocks.
    """
    from ternlm.data.preparation import prepare_data
    from ternlm.training.interruption import Interruption

    interruption, line = Interruption(), ProgressLine()
    with interruption.watched():
        try:
            stopped = lambda: interruption.received is not None  # noqa: E731
            return prepare_data(data, tokenizer, line.progress, stopped, line.say, folder, verify=folder is not None)
        except Interrupted as error:
            raise interruption.error(str(error)) from None
        finally:
            line.close()


def token_stream(
    loaded: "Loaded",
    data: str | None,
    split: str | None,
    encoding_errors: str | None = None,
    wikitext: "WikiTextForm | None" = None,
) -> "TokenStream":
    """The held-out tokens a checkpoint is measured on, prepared with its own tokenizer.

    Args:
        loaded: The checkpoint.
        data: A corpus, file or folder; None takes the run's own data, a stream's held-out documents included.
        split: ``train``, ``validation``, ``test``, ``all``; None takes all of local `data`, else validation.
        encoding_errors: What happens to bytes that are not UTF-8; None as the run was set.
        wikitext: How WikiText becomes documents.

    Raises:
        SettingsError: There is no such split, or the text is not WikiText.
    """
    from ternlm.data.corpus import load_corpus
    from ternlm.tokenizers import TokenizerSettings

    settings, split = text_settings(loaded, data, split, encoding_errors, wikitext)
    held_out = loaded.path.parent.parent / "stream" / "validation"
    if data is None and loaded.config["data"].get("stream") and split == "validation" and held_out.is_dir():
        return load_corpus(held_out).split("validation")
    prepared = prepare_with_bar(settings, TokenizerSettings(name=str(loaded.path)))
    return prepared.corpus.split(split)


def text_settings(
    loaded: "Loaded",
    data: str | None,
    split: str | None,
    encoding_errors: str | None = None,
    wikitext: "WikiTextForm | None" = None,
) -> "tuple[DataSettings, str]":
    """The settings that `token_stream` prepares, and the split of theirs that it takes."""
    from ternlm.data.catalog import is_local
    from ternlm.data.settings import DataSettings

    if split not in (None, "train", "validation", "test", "all"):
        raise SettingsError(f"split '{split}' does not exist. Use train, validation, test or all.")
    values = dict(loaded.config["data"])
    if encoding_errors is not None:
        values["encoding_errors"] = encoding_errors
    if data is not None or wikitext is not None:
        values["wikitext"] = wikitext
    if data is not None:
        values |= {
            "source": data,
            "validation_path": None,
            "test_path": None,
            "max_documents": None,
            "max_tokens": None,
        }
        split = split or ("all" if is_local(data) else "validation")
    values["stream"] = False
    if split == "all":
        values |= {"validation_fraction": 0.0, "test_fraction": 0.0}
    return DataSettings.from_mapping(values, "data"), "train" if split == "all" else split or "validation"


def read_lines(file: "Path", noun: str) -> list[str]:
    """The lines of a text file, without a byte order mark.

    Args:
        file: Where it lies.
        noun: What sentences call it.

    Raises:
        SettingsError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    except OSError as error:
        raise SettingsError(f"{noun} '{file}' cannot be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{noun} '{file}' is not UTF-8 at byte {error.start:,}. Convert it first.") from None


class ProgressLine:
    """A moving line on a terminal, one line every ten seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._status: Any = None
        self._printed_s = 0.0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, progress: Any) -> None:
        line = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.bytes / 1e6:,.1f} MB"
        if self.console.is_terminal:
            if self._status is None:
                self._status = self.console.status(line)
                self._status.start()
            self._status.update(line)
        elif progress.elapsed_s - self._printed_s >= 10:
            self._printed_s = progress.elapsed_s
            self.say(line)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def print_json(value: Mapping[str, Any]) -> None:
    """A mapping as JSON on stdout."""
    import json

    typer.echo(json.dumps(value, indent=1))
