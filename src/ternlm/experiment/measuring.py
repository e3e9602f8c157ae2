"""What is measured of a trained model at the end of an experiment, and the text that it writes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ternlm.experiment.definition import GenerationSettings, MeasurementSettings

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import Corpus, TokenStream
    from ternlm.generation import SamplingSettings

_SHOWN = 5  # texts that the results repeat
_CUT_BYTES = 600  # of the held-out text whose chunks are drawn
_COUNTED_TOKENS = 100_000  # of held-out text whose chunks are counted


def measure(
    loaded: "Loaded",
    corpus: "Corpus",
    splits: tuple[str, ...],
    settings: MeasurementSettings,
    batch_size: int,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Loss, bits per byte and accuracies on each split, with an interval and what baselines reach.

    Args:
        loaded: The model, with the quantized weights of its last update.
        corpus: The experiment's data.
        splits: Names of the splits.
        settings: How it is measured.
        batch_size: Windows per forward pass; has no effect on the result.
        check: Called now and then; may raise to stop.
    """
    return {name: _measured(loaded, corpus, corpus.split(name), settings, batch_size, check) for name in splits}


def find_cuts(loaded: "Loaded", stream: "TokenStream", length: int) -> tuple[list[Any], dict[str, Any]] | None:
    """Where a hierarchical model cuts held-out text.

    Args:
        loaded: The model.
        stream: The held-out text.
        length: Tokens per window.

    Returns:
        Statistics of each stage over many windows, and all chunks of the beginning of the text as `report.chunk_page`
        takes them; None where the model has no chunks.
    """
    from ternlm.evaluation.analysis import held_out_batches
    from ternlm.evaluation.chunks import find_chunks, has_chunks, measure_chunks

    model, tokenizer = loaded.model, loaded.tokenizer
    if not has_chunks(model):
        return None
    batches = held_out_batches(model, stream, tokenizer, length, 8, _COUNTED_TOKENS)
    text = tokenizer.decode([int(token) for token in stream.read(0, min(len(stream), _CUT_BYTES))])
    shown = {"family": model.settings.family, "step": loaded.state["step"]}
    return measure_chunks(model, batches, tokenizer), shown | find_chunks(model, tokenizer, text)


def write_texts(
    loaded: "Loaded", prompts: tuple[str, ...], settings: GenerationSettings, check: Callable[[], None]
) -> tuple[dict[str, Any], list[str], str]:
    """Continuations of the prompts, taken in turn.

    Returns:
        Means and shares over all of them, the first few texts, and all of them as a file to read.
    """
    from ternlm.evaluation.generations import Summary, generate_measured
    from ternlm.generation import numbered

    count = len(prompts) if settings.samples is None else settings.samples
    requests = list(numbered((prompts[place % len(prompts)] for place in range(count)), sampling_of(settings)))
    summary, texts, parts = Summary(), [], []
    for place, (sample, metrics, _) in enumerate(generate_measured(loaded.model, loaded.tokenizer, requests), start=1):
        check()
        summary.add(sample.finished, metrics)
        texts.append(sample.prompt + sample.text)
        parts.append(f"=== Sample {place} ===\nPrompt: {sample.prompt}\nGenerated:\n{sample.text}\n\n")
    return summary.as_dict(), texts[:_SHOWN], "".join(parts)


def sampling_of(settings: GenerationSettings) -> "SamplingSettings":
    """How tokens are chosen.

    Raises:
        SettingsError: A value breaks its rule.
    """
    from ternlm.generation import SamplingSettings

    return SamplingSettings.from_mapping(settings.sampling, "generation")


def _measured(
    loaded: "Loaded",
    corpus: "Corpus",
    stream: "TokenStream",
    settings: MeasurementSettings,
    batch_size: int,
    check: Callable[[], None],
) -> dict[str, Any]:
    from ternlm.evaluation.baselines import text_baselines, token_counts
    from ternlm.evaluation.comparison import record_of
    from ternlm.evaluation.evaluate import evaluate
    from ternlm.evaluation.masked import masked_baselines, masking_of
    from ternlm.evaluation.protocols import end_of_whole_documents

    model, tokenizer, most = loaded.model, loaded.tokenizer, settings.measured_tokens
    length, masking = loaded.config["data"]["sequence_length"], masking_of(loaded.model, loaded.config)
    result = evaluate(model, stream, tokenizer, length, batch_size, most, check, masking, settings.protocol)
    record = {"bpb_ci95": None} | record_of(result)
    if not settings.baselines:
        return record
    train = corpus.split("train") if "train" in corpus.splits else None
    if masking is not None:
        counts = None if train is None else token_counts(train, tokenizer.vocab_size)
        return record | masked_baselines(stream, counts, tokenizer, length, masking, most)
    last = end_of_whole_documents(stream, most)
    return record | {"baselines": text_baselines(stream, tokenizer, last, train, check)}
