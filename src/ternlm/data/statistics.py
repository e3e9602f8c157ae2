"""The numbers people want to see of a prepared corpus before they train on it."""

from typing import Any

from ternlm.data.corpus import Corpus, TokenStream
from ternlm.data.sampler import windows_per_epoch


def statistics(corpus: Corpus, sequence_length: int) -> dict[str, dict[str, Any]]:
    """Counts per split.

    Args:
        corpus: A prepared corpus.
        sequence_length: Targets per training window, T.

    Returns:
        For each split that holds documents: documents, bytes, words, tokens (markers included), bytes per
        token (markers not counted as tokens), tokens of the median and longest document, and windows of T.
    """
    return {name: _split_statistics(corpus, corpus.split(name), sequence_length) for name in corpus.splits}


def _split_statistics(corpus: Corpus, stream: TokenStream, sequence_length: int) -> dict[str, Any]:
    lengths = sorted(int(n) for n in _lengths(stream))
    described = corpus.manifest["tokenizer"]
    marks = (described["bos_id"] is not None) + (described["eos_id"] is not None)
    text_tokens = len(stream) - marks * stream.documents
    return {
        "documents": stream.documents,
        "bytes": stream.bytes,
        "words": stream.words,
        "tokens": len(stream),
        "bytes_per_token": stream.bytes / max(text_tokens, 1),
        "median_document_tokens": lengths[len(lengths) // 2],
        "longest_document_tokens": stream.longest_document,
        "sequences": windows_per_epoch(len(stream), sequence_length),
        "eval_id": stream.eval_id,
    }


def _lengths(stream: TokenStream) -> Any:
    ends = stream.document_ends
    return ends - [0, *ends[:-1]]
