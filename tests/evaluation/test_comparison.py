"""Rank, intervals, and the memory of models, on numbers that can be followed by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts import EchoModel, MemoryStream

from builders import random_tokens, tiny_bitnet, tiny_corpus, tiny_model
from ternlm.errors import DataError, SettingsError
from ternlm.evaluation.bootstrap import FEWEST_DOCUMENTS, RESAMPLES, interval, resampled_bpb
from ternlm.evaluation.comparison import Contender, compare, end_within_bytes, require_comparable
from ternlm.evaluation.evaluate import DocumentScores, evaluate
from ternlm.evaluation.memory import state_bytes
from ternlm.models import MODELS
from ternlm.tokenizers import ByteTokenizer

LN2 = math.log(2)
DOCUMENTS = [f"Document {number}, " + "word " * (number % 7) for number in range(23)]
BYTES = np.array([len(text) for text in DOCUMENTS])


def nats(bits: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).standard_normal(len(BYTES))
    return BYTES * LN2 * (bits + noise * draws)


@pytest.fixture(scope="module")
def measured() -> Any:
    return evaluate(EchoModel(), MemoryStream(DOCUMENTS), ByteTokenizer(), 9)  # type: ignore[arg-type]


def contender(measured: Any, name: str, values: np.ndarray, text_id: str = "same", **facts: Any) -> Contender:
    documents = DocumentScores(values, BYTES, text_id)
    result = replace(measured, bpb=float(values.sum() / (LN2 * BYTES.sum())), documents=documents)
    return Contender(name, f"runs/{name}", "bitnet", 7, 100, 10, 8, 64, replace(result, **facts))


def test_resampled_numbers_are_those_of_texts_made_of_the_drawn_documents() -> None:
    found = resampled_bpb(np.stack([nats(2.0), nats(3.0, 0.5)]), BYTES, seed=5)
    assert found is not None
    assert found.shape == (2, RESAMPLES)
    assert found[0] == pytest.approx(np.full(RESAMPLES, 2.0))  # every document costs the same per byte
    drawn = np.random.default_rng(5).integers(0, len(BYTES), len(BYTES))
    assert found[1, 0] == pytest.approx(nats(3.0, 0.5)[drawn].sum() / (LN2 * BYTES[drawn].sum()))
    low, high = interval(found[1])
    assert ((found[1] < low).mean(), (found[1] > high).mean()) == (pytest.approx(0.025), pytest.approx(0.025))


def test_resampling_is_a_function_of_its_seed_and_leaves_the_global_draws_alone() -> None:
    before = np.random.get_state()[1].copy()
    first, again = (resampled_bpb(nats(2.0, 1.0)[None], BYTES) for _ in range(2))
    assert first is not None
    assert again is not None
    assert np.array_equal(first, again)
    assert np.array_equal(before, np.random.get_state()[1])


def test_few_documents_give_no_interval(measured: Any) -> None:
    few = FEWEST_DOCUMENTS - 1
    assert resampled_bpb(nats(2.0)[None, :few], BYTES[:few]) is None
    assert resampled_bpb(nats(2.0)[None, : few + 1], BYTES[: few + 1]) is not None


def test_models_are_ranked_and_ties_are_marked(measured: Any) -> None:
    shared = nats(0.0, 0.4, seed=1)  # what is hard is hard for all
    rows = compare([
        contender(measured, "worst", nats(2.5) + shared),
        contender(measured, "best", nats(2.0) + shared),
        contender(measured, "close", nats(2.001, 0.05, seed=2) + shared),
    ])["models"]  # fmt: skip
    by_name = {row["name"]: row for row in rows}
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert rows[-1]["name"] == "worst"
    assert {row["name"]: row["ties_best"] for row in rows if row["rank"] > 1}["worst"] is False
    assert by_name["best"]["ties_best"] != by_name["close"]["ties_best"]
    low, high = by_name["worst"]["difference_ci95"]
    assert low <= by_name["worst"]["difference"] <= high
    alone = by_name["worst"]["bpb_ci95"]
    assert high - low < 0.5 * (alone[1] - alone[0])  # the same documents for both: much surer of the difference


def test_equal_models_differ_by_exactly_nothing(measured: Any) -> None:
    rows = compare([contender(measured, name, nats(2.0, 0.3)) for name in "ab"])["models"]
    assert rows[1]["difference"] == 0.0
    assert rows[1]["difference_ci95"] == (0.0, 0.0)
    assert rows[1]["ties_best"]


def test_a_model_whose_bits_cannot_be_told_comes_last(measured: Any) -> None:
    rows = compare([
        contender(measured, "unknown", nats(1.0), bpb=None, n_bytes=None), contender(measured, "known", nats(5.0))
    ])["models"]  # fmt: skip
    assert [(row["name"], row["rank"]) for row in rows] == [("known", 1), ("unknown", None)]
    assert rows[1]["bytes_per_sec"] is None


def test_other_documents_are_refused(measured: Any) -> None:
    with pytest.raises(DataError, match=r"'b' and 'a' were scored on different documents, 23 .* Name one text"):
        compare([contender(measured, "a", nats(2.0)), contender(measured, "b", nats(2.0), text_id="other")])


def test_an_encoder_is_refused() -> None:
    require_comparable(tiny_bitnet(), "x")
    with pytest.raises(SettingsError, match="'x' is an encoder \\('qdyt'\\)"):
        require_comparable(tiny_model("qdyt"), "x")


def test_a_limit_in_bytes_is_the_same_text_for_every_tokenizer() -> None:
    stream: Any = MemoryStream(["abc", "defgh", "i"])
    ends = [end_within_bytes(stream, limit) for limit in (None, 1, 3, 7, 8, 9, 100)]
    assert ends == [15, 5, 5, 5, 12, 15, 15]


def test_the_memory_of_attention_is_a_cache_for_the_longest_text() -> None:
    attention = tiny_bitnet()
    settings: Any = attention.settings
    per_position = 2 * settings.num_key_value_heads * (settings.hidden_size // settings.num_attention_heads) * 4
    cache = settings.num_hidden_layers * (settings.max_position_embeddings + 1) * per_position
    assert state_bytes(attention, random_tokens(9)) == cache + 8  # and how many tokens it holds
    assert attention.training


@pytest.mark.parametrize("family", [name for name, family in MODELS.items() if family.model.is_recurrent])
def test_h09_a_recurrent_memory_has_one_size_for_texts_of_any_length(family: str) -> None:
    model = tiny_model(family)
    sizes = {state_bytes(model, random_tokens(length)) for length in (1, 9, 90, 300)}
    assert len(sizes) == 1
    assert sizes.pop() > 0


def test_the_memory_of_a_model_is_measured_without_touching_it() -> None:
    model = tiny_bitnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_bytes(model, random_tokens(5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_document_scores_are_those_of_the_prepared_text(tmp_path: Path) -> None:
    prepared = tiny_corpus(tmp_path, validation=DOCUMENTS)
    stream = prepared.corpus.split("validation")
    result = evaluate(tiny_bitnet(vocab_size=256), stream, prepared.tokenizer, 16)
    assert result.documents is not None
    assert result.documents.bytes.tolist() == stream.document_bytes.tolist()
    assert len(result.documents.nats) == stream.documents == len(DOCUMENTS)
    assert result.n_bytes == result.documents.bytes.sum()
