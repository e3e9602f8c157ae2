"""What the verbs that score checkpoints share: what a model can read, and what stands beside its bits per byte."""

from typing import TYPE_CHECKING, Any

from ternlm.cli.options import prepare_with_bar, text_settings
from ternlm.errors import DataError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import TokenStream
    from ternlm.evaluation.evaluate import EvaluationResult


def require_readable(loaded: "Loaded", sequence_length: int | None) -> None:
    """Refuse windows that are longer than what a model can read.

    Raises:
        SettingsError: They are.
    """
    settings, model = loaded.model.settings, loaded.model
    if sequence_length is not None and not model.is_recurrent and sequence_length > settings.max_position_embeddings:
        raise SettingsError(
            f"--sequence-length {sequence_length:,} is longer than the "
            f"{settings.max_position_embeddings:,} tokens that the model reads. Give that or less."
        )


def training_text(loaded: "Loaded") -> "TokenStream | None":
    """The text a model was trained on, or None if that is not prepared here."""
    from ternlm.data import DataSettings, default_directory, load_corpus

    settings = DataSettings.from_mapping(loaded.config["data"], "data")
    try:
        directory = default_directory(settings, loaded.tokenizer)
        return None if settings.stream or not directory.is_dir() else load_corpus(directory).split("train")
    except DataError:  # an evaluation does not fail for a number beside it
        return None


def baselines_of(
    loaded: "Loaded", stream: "TokenStream", max_tokens: int | None, check: "Callable[[], None]"
) -> dict[str, Any]:
    """Bits per byte of simple models and compressors on the text that a model is scored on."""
    from ternlm.evaluation.baselines import text_baselines
    from ternlm.evaluation.protocols import end_of_whole_documents

    last = end_of_whole_documents(stream, max_tokens)
    return text_baselines(stream, loaded.tokenizer, last, training_text(loaded), check)


def word_perplexity_of(
    loaded: "Loaded", result: "EvaluationResult", stream: "TokenStream", text: tuple[Any, ...]
) -> dict[str, Any]:
    """Perplexity per word of a causal model; `text` is what `token_stream` took besides the checkpoint."""
    from ternlm.evaluation.baselines import document_texts
    from ternlm.evaluation.words import page_perplexity, word_perplexity
    from ternlm.tokenizers import TokenizerSettings

    settings, split = text_settings(loaded, *text)
    if settings.wikitext != "detokenized":
        return word_perplexity(result, stream, loaded.tokenizer)
    # prepared as bytes and not read from the source again, which may be out of reach by now
    before = prepare_with_bar(settings.model_copy(update={"wikitext": "articles"}), TokenizerSettings())
    raw = before.corpus.split(split)
    articles = (article.decode() for article in document_texts(raw, before.tokenizer, raw.documents))
    return page_perplexity(result, stream, articles)


def how_read(protocol: str, sequence_length: int) -> str:
    """A protocol for people."""
    windows = f"windows of {sequence_length:,} tokens"
    if protocol.startswith("sliding:"):
        return f"{windows} moved by {int(protocol.partition(':')[2]):,} through each document"
    return windows if protocol == "block" else f"memory carried through each document in {windows}"
