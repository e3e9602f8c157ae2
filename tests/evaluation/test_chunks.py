"""Chunks of a text and of held-out text: where they begin, how long they are, what is counted, by hand."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from builders import tiny_bitnet, tiny_corpus, tiny_model
from ternlm.data.batch import Batch
from ternlm.errors import SettingsError
from ternlm.evaluation.analysis import held_out_batches
from ternlm.evaluation.chunks import (
    SCALARS,
    ChunkCounts,
    chunk_statistics,
    find_chunks,
    measure_chunks,
    with_separators,
)
from ternlm.evaluation.samples import sample_modes
from ternlm.evaluation.settings import EvaluationSettings
from ternlm.models import MODELS, LanguageModel
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()


class Cut(NamedTuple):
    boundary: Tensor
    probability: Tensor


class Cutter(LanguageModel):
    """Cuts behind spaces and line feeds, and inside of this behind line feeds alone."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = tiny_bitnet(vocab_size=256).settings
        self.weight = nn.Parameter(torch.zeros(1))
        self.was_training: list[bool] = []

    def chunkings(self, tokens: Tensor, lengths: Tensor | None = None) -> list[Cut]:
        self.was_training.append(self.training)
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=254)
        first = torch.zeros_like(tokens, dtype=torch.bool)
        first[:, 0] = True
        words = first | (before == 32) | (before == 10)
        lines = first | (before == 10)
        p = torch.where(words, 0.9, torch.where(tokens == ord("x"), 0.47, 0.2))
        return [Cut(words, p), Cut(lines, torch.where(words, torch.where(lines, 0.8, 0.52), math.nan))]

    def forward(self, *given: Any) -> Any:
        raise AssertionError("chunks need no logits")

    def initial_state(self, batch_size: int) -> Any:
        raise AssertionError

    def initialize(self, seed: int) -> None:
        raise AssertionError

    def blocks(self) -> Iterator[nn.Module]:
        return iter(())


def texts(stage: dict[str, Any]) -> list[str]:
    return [chunk["text"] for chunk in stage["chunks"]]


def test_a_text_is_cut_where_the_model_cuts_it_at_every_stage() -> None:
    found = find_chunks(Cutter(), BYTE, "The fox\nmet you.")
    words, lines = found["stages"]
    assert texts(words) == ["The ", "fox\n", "met ", "you."]
    assert texts(lines) == ["The fox\n", "met you."]
    assert [(chunk["start"], chunk["end"]) for chunk in words["chunks"]] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert [chunk["probability"] for chunk in words["chunks"]] == [None, *[pytest.approx(0.9)] * 3]
    assert words["probability"][4:7] == pytest.approx([0.9, 0.2, 0.47])
    assert lines["probability"][3:5] == [None, pytest.approx(0.52)]
    assert (found["bytes"], bytes.fromhex(found["hex"]).decode()) == (16, "The fox\nmet you.")
    assert "".join(texts(words)) == "".join(texts(lines)) == found["text"]
    json.dumps(found, allow_nan=False)


def test_chunks_are_made_of_bytes_and_a_character_may_be_cut() -> None:
    class Halves(Cutter):
        def chunkings(self, tokens: Tensor, lengths: Tensor | None = None) -> list[Cut]:
            boundary = torch.arange(tokens.shape[1])[None] % 3 == 0
            return [Cut(boundary, boundary.float())]

    (stage,) = find_chunks(Halves(), BYTE, "aé🙂b")["stages"]
    assert texts(stage) == ["a\\xc3", "\\xa9\\xf0\\x9f", "\\x99\\x82b"]
    raw = "aé🙂b".encode()
    assert [raw[chunk["start"] : chunk["end"]] for chunk in stage["chunks"]] == [raw[:2], raw[2:5], raw[5:]]


def test_a_model_without_chunks_and_a_text_without_characters_are_refused() -> None:
    with pytest.raises(SettingsError, match="'bitnet' does not cut"):
        find_chunks(tiny_bitnet(vocab_size=256), BYTE, "a")
    with pytest.raises(SettingsError, match="empty text"):
        find_chunks(Cutter(), BYTE, "")
    assert chunk_statistics(tiny_bitnet(vocab_size=256), [], BYTE) == {}


def test_a_sample_shows_its_cuts_and_bytes_that_are_no_text() -> None:
    made = Cutter()
    assert with_separators(made, BYTE, "The fox\nmet", list(b" you. \xf0")) == "The │fox\n║met │you. │\\xf0"
    assert with_separators(made, BYTE, "", list(b"a b")) == "a │b"
    assert with_separators(made, BYTE, "Hé", []) == "Hé"
    assert with_separators(made, BYTE, "", [254]) == with_separators(made, BYTE, "", []) == ""


@pytest.mark.skipif("hnet" not in MODELS, reason="there is no family that cuts")
def test_samples_of_a_hierarchical_model_are_shown_with_their_cuts() -> None:
    settings = EvaluationSettings(prompts=("The fox",), sample_tokens=5)
    rows = sample_modes(tiny_model("hnet", vocab_size=256), BYTE, settings, 0)
    assert len(rows) == 3
    for row in rows:
        assert row["chunked_text"].replace("│", "").replace("║", "").startswith("The fox")


def window(text: bytes) -> Batch:
    return Batch.from_windows(torch.tensor([[254, *text]]), 254)


def test_shares_are_those_counted_by_hand() -> None:
    words, lines = measure_chunks(Cutter(), [window(b"ax bb\n\nccc d?")], BYTE)  # the last byte is a target alone
    assert words["lengths"] == [0, 2, 0, 2, 1], "[BOS ax_], [bb/], [/], [ccc_], [d]"
    assert (words["number"], words["bytes_per_chunk"]) == (5, 12 / 5)
    assert (words["length_p50"], words["length_p90"], words["length_max"]) == (3, 4, 4)
    assert (words["whitespace_agreement"], words["whitespace_recall"]) == (1.0, 1.0)
    assert (words["word_agreement"], words["word_recall"]) == (3 / 4, 1.0), "between two line ends stands no word"
    assert words["near_half"] == pytest.approx(1 / 12), "one x, the first position is left out"
    assert words["mean_probability"] == pytest.approx((4 * 0.9 + 0.47 + 7 * 0.2) / 12)
    assert lines["lengths"] == [0, 1, 0, 0, 0, 1, 1], "[BOS ax_bb/], [/], [ccc_d]"
    assert lines["whitespace_agreement"] == 1.0
    assert lines["whitespace_recall"] == 2 / 4
    assert lines["near_half"] == 2 / 4, "only positions that the stage has"
    assert sum(words["histogram"]["counts"]) == 12


def test_boundaries_at_markers_count_as_starts_and_not_as_agreement() -> None:
    counts = ChunkCounts(BYTE)
    tokens = torch.tensor([[254, 97, 32, 255, 254, 98, 99]])
    boundary = torch.tensor([[1, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    counts.add(tokens, boundary, boundary.float())
    found = counts.as_dict()
    assert found["lengths"] == [0, 2, 1], "chunks of markers alone are none"
    assert found["whitespace_agreement"] == 0.0, "of b|c alone: the others touch a marker"
    assert found["whitespace_recall"] is None, "behind the space comes EOS"


def test_a_cut_at_the_space_in_front_of_a_word_finds_the_word() -> None:
    counts = ChunkCounts(BYTE)
    tokens = torch.tensor([[*b"ab cd efg hi"]])
    boundary = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    counts.add(tokens, boundary, boundary.float())
    found = counts.as_dict()
    assert found["whitespace_agreement"] == 1 / 3, "at e alone"
    assert found["word_agreement"] == 2 / 3, "not inside of efg"
    assert found["word_recall"] == 2 / 3, "hi is not found"


def test_statistics_do_not_depend_on_the_batches() -> None:
    rows = [bytes([*b"some words in a row ", 97 + number]) for number in range(5)]
    single = measure_chunks(Cutter(), [window(row) for row in rows], BYTE)
    together = Batch.from_windows(torch.tensor([[254, *row] for row in rows]), 254)
    assert measure_chunks(Cutter(), [together], BYTE) == single
    assert single[0]["length_max"] == 6


def test_statistics_of_nothing_are_none() -> None:
    found = ChunkCounts(BYTE).as_dict()
    assert (found["number"], found["lengths"]) == (0, [])
    assert all(found[name] is None for name in SCALARS)


def test_the_log_gets_flat_numbers_by_stage_and_the_model_stays_in_training() -> None:
    made = Cutter()
    found = chunk_statistics(made, [window(b"some words, no line")], BYTE)
    assert set(found) == {f"hnet/stage{stage}/{name}" for stage in (0, 1) for name in SCALARS}
    assert found["hnet/stage0/length_max"] == 7
    assert found["hnet/stage1/whitespace_agreement"] is None, "it does not cut"
    assert found["hnet/stage1/whitespace_recall"] == 0.0
    assert made.was_training == [False] and made.training


@pytest.mark.skipif("hnet" not in MODELS, reason="there is no family that cuts")
def test_a_hierarchical_model_is_measured_on_held_out_text(tmp_path: Any) -> None:
    made, prepared = tiny_model("hnet", vocab_size=256), tiny_corpus(tmp_path)
    batches = held_out_batches(made, prepared.corpus.split("validation"), BYTE, 16, 2, 64)
    found = chunk_statistics(made, batches, BYTE)
    assert 1 <= (found["hnet/stage0/bytes_per_chunk"] or 0) <= 16
    stages = find_chunks(made, BYTE, "Hé, a 🙂 fox.")["stages"]
    for stage in stages:
        starts = [chunk["start"] for chunk in stage["chunks"]]
        assert starts == sorted({0, *(at for at, p in enumerate(stage["probability"]) if p is not None and p > 0.5)})
    for outer, inner in pairwise(stages):
        assert {chunk["start"] for chunk in inner["chunks"]} <= {chunk["start"] for chunk in outer["chunks"]}
