"""Perplexity per word: whose words, and of which part of the text."""

import math
from pathlib import Path
from typing import Any

import pytest
from texts import EchoModel, MemoryStream

from builders import tiny_corpus
from ternlm.data.wikitext import detokenize, page_words, pages
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.words import page_perplexity, word_perplexity
from ternlm.tokenizers import ByteTokenizer

ARTICLES = [" \n = One = \n\n Two @-@ three words , here . \n", " = Four = \n\n It 's all ( so far ) . \n \n"]
DOCUMENTS = ["one two  three\n", "\u00e9\U0001f642 naive", " four\tfive six "]


class Lossy(ByteTokenizer):
    lossless = False


def test_word_perplexity_divides_the_nats_of_the_text_by_its_words(tmp_path: Path) -> None:
    prepared = tiny_corpus(tmp_path, validation=DOCUMENTS)
    stream = prepared.corpus.split("validation")
    result = evaluate(EchoModel(), stream, prepared.tokenizer, 9, stride=4)  # type: ignore[arg-type]
    found = word_perplexity(result, stream, prepared.tokenizer)
    assert found["n_words"] == 3 + 2 + 3 and found["words"] == "whitespace"
    assert result.bpb is not None
    assert found["ppl_word"] == pytest.approx(2 ** (result.bpb * stream.bytes / 8), rel=1e-9)
    assert found["ppl_word"] == pytest.approx(math.exp(result.documents.nats.sum() / 8))  # type: ignore[union-attr]


def test_part_of_a_text_has_the_words_of_that_part() -> None:
    stream: Any = MemoryStream(DOCUMENTS)
    part: Any = evaluate(EchoModel(), stream, ByteTokenizer(), 9, max_tokens=40, stride=9)  # type: ignore[arg-type]
    assert len(part.documents.bytes) == 2
    assert word_perplexity(part, stream, ByteTokenizer())["n_words"] == 5
    assert word_perplexity(part, stream, Lossy()) == {"ppl_word": None, "n_words": None, "words": "whitespace"}
    whole: Any = evaluate(EchoModel(), stream, Lossy(), 9, stride=9)  # type: ignore[arg-type]
    assert word_perplexity(whole, stream, Lossy())["n_words"] == 8


def test_e03_an_unknown_token_hides_words() -> None:
    stream: Any = MemoryStream(DOCUMENTS)
    tokenizer = ByteTokenizer()
    tokenizer.unk_id = ord("x")
    stream.tokens[5] = ord("x")
    result = evaluate(EchoModel(), stream, tokenizer, 9, stride=9)  # type: ignore[arg-type]
    assert word_perplexity(result, stream, tokenizer)["ppl_word"] is None


def test_detokenized_pages_are_divided_by_the_words_that_they_had_before(tmp_path: Path) -> None:
    from ternlm.data.catalog import document_hash

    more = [*ARTICLES, " = Not scored = \n"]
    before = list(pages(more))[:2]
    scored = [detokenize(page) for page in before]
    stream: Any = MemoryStream(scored)
    stream.document_hashes[:] = [document_hash(text.encode()) for text in scored]
    result: Any = evaluate(EchoModel(), stream, ByteTokenizer(), 9, stride=9)  # type: ignore[arg-type]
    found = page_perplexity(result, stream, more)
    words, size = sum(map(page_words, before)), sum(len(page.encode()) for page in before)
    assert (found["n_words"], found["page_bytes"], found["words"]) == (words, size, "lm-eval")
    assert words > sum(len(page.split()) for page in scored)
    nats = result.documents.nats.sum()
    assert found["ppl_word"] == pytest.approx(math.exp(nats / words))
    assert found["page_bpb"] == pytest.approx(nats / (math.log(2) * size))
    others = page_perplexity(result, stream, ARTICLES[1:])
    assert (others["ppl_word"], others["page_bytes"], others["page_bpb"]) == (None, None, None)
