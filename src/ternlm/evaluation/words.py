"""Perplexity per word: what one evaluation costs, divided by words instead of tokens, so that tokenizers drop out.

    ppl_word = exp(NLL_text / words)

NLL_text are the nats of all targets that emit text, which EOS does not. Which words are counted is part of the number:
those of the scored text between whitespace, or, of detokenized WikiText, those that lm-evaluation-harness counts, which
are words of the text before it was detokenized.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ternlm.data.catalog import document_hash
from ternlm.data.corpus import TokenStream
from ternlm.data.wikitext import detokenize, page_words, pages
from ternlm.evaluation.baselines import document_texts
from ternlm.evaluation.evaluate import EvaluationResult
from ternlm.tokenizers import Tokenizer


def word_perplexity(result: EvaluationResult, stream: TokenStream, tokenizer: Tokenizer) -> dict[str, Any]:
    """Perplexity per whitespace-separated word of a causal model.

    Args:
        result: Its evaluation.
        stream, tokenizer: What was scored, and the tokenizer that made it.

    Returns:
        `ppl_word`, `n_words` and `words` (``whitespace``); numbers are None where an unknown token hides text, and
        where part of the text was scored and a lossy tokenizer hides its words.
    """
    assert result.documents is not None, "an encoder's losses are no code of the text"
    count = len(result.documents.bytes)
    words: int | None = None
    if count == stream.documents:
        words = stream.words
    elif tokenizer.lossless:
        words = sum(len(raw.decode("utf-8", "replace").split()) for raw in document_texts(stream, tokenizer, count))
    return _per_word(result, words) | {"words": "whitespace"}


def page_perplexity(result: EvaluationResult, stream: TokenStream, articles: Iterable[str]) -> dict[str, Any]:
    """Perplexity per word and byte of detokenized WikiText, as lm-evaluation-harness's task `wikitext` defines them.

    Args:
        result: The evaluation of detokenized pages, in windows of T moved by T (protocol ``sliding:T``) if the numbers
            are to be those of the harness.
        stream: What was scored.
        articles: Those that its pages were made of, in their order; they may include more.

    Returns:
        `ppl_word`, `n_words`, `words` (``lm-eval``: words and bytes are those of the pages before they were
        detokenized), `page_bytes` and `page_bpb` (the harness's `bits_per_byte`); numbers are None where an unknown
        token hides text, and where the articles are not those of the stream.
    """
    assert result.documents is not None, "an encoder's losses are no code of the text"
    words = size = found = 0
    hashes = stream.document_hashes[: len(result.documents.bytes)].tolist()
    for page in pages(articles):
        if found < len(hashes) and document_hash(detokenize(page).encode()) == hashes[found]:
            found += 1
            words += page_words(page)
            size += len(page.encode())
    is_whole = found == len(hashes)
    per_word = _per_word(result, words if is_whole else None)
    nats = float(result.documents.nats.sum())
    page_bpb = None if per_word["ppl_word"] is None else nats / (math.log(2) * size)
    return per_word | {"words": "lm-eval", "page_bytes": size if is_whole else None, "page_bpb": page_bpb}


def _per_word(result: EvaluationResult, words: int | None) -> dict[str, Any]:
    if words is None or result.bpb is None or result.documents is None:
        return {"ppl_word": None, "n_words": words}
    exponent = float(np.sum(result.documents.nats)) / words
    return {"ppl_word": math.exp(min(exponent, 700.0)), "n_words": words}
