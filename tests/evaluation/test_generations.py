"""Many continuations in batches, and the numbers on them: bytes that are text, repetition, means over all."""

import json
from typing import Any

import pytest
import torch

from builders import tiny_bitnet
from ternlm.evaluation.generations import Summary, byte_counts, generate_measured, repetition
from ternlm.generation import SamplingSettings, generate, numbered
from ternlm.models import FULL_PRECISION, LanguageModel
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
SETTINGS = SamplingSettings(temperature=1.0, max_new_tokens=9, seed=3)
PROMPTS = ["The fox", "a", "The fox", "Hé, a longer one", "a"]


def model() -> LanguageModel:
    """A model whose distribution is far from uniform, and from one-hot."""
    made = tiny_bitnet(mode=FULL_PRECISION, vocab_size=256, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_what_is_drawn_depends_neither_on_the_batch_nor_on_being_measured(batch_size: int) -> None:
    made = model()
    found = [each.sample for each in generate_measured(made, BYTE, numbered(PROMPTS, SETTINGS), batch_size)]
    assert found == generate(made, BYTE, PROMPTS, SETTINGS)
    assert found[0].ids != found[2].ids, "equal prompts in different batches have draws of their own"


def test_prompts_are_read_as_they_are_needed() -> None:
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield "The"

    results = generate_measured(model(), BYTE, numbered(endless(), SETTINGS), 3)
    for _ in range(4):
        next(results)
    assert asked == 6


def test_no_prompts_give_no_continuations() -> None:
    assert list(generate_measured(model(), BYTE, [])) == []
    assert generate(model(), BYTE, [], SETTINGS) == []


@pytest.mark.parametrize(
    ("raw", "valid", "strict", "invalid"),
    [
        ("naïve 🙂".encode(), True, True, 0),
        ("naïve 🙂".encode()[:-1], True, False, 0),
        ("naïve 🙂".encode()[:-3], True, False, 0),
        (b"", True, True, 0),
        (b"na\xc3ve", False, False, 1),
        (b"\x80", False, False, 1),
        (b"\xc0\xaf", False, False, 2),
        (b"\xed\xa0\x80", False, False, 3),
        ("🙂".encode()[:3] + b"a", False, False, 3),
        (b"\xffab\xc3", False, False, 1),
    ],
)
def test_bytes_of_no_character_are_counted_and_only_the_last_one_may_be_cut_off(
    raw: bytes, valid: bool, strict: bool, invalid: int
) -> None:
    assert byte_counts(raw) == {
        "total_bytes": len(raw), "utf8_valid": valid, "utf8_strict": strict, "invalid_bytes": invalid,
    }  # fmt: skip


def test_repetition_of_known_texts() -> None:
    assert repetition([1, 1, 1, 2, 1, 2]) == {
        "total_tokens": 6,
        "unique_tokens": 2,
        "max_repetition": 4,
        "repetition_frac": 4 / 6,
        "distinct_1": 2 / 6,
        "distinct_2": 3 / 5,
        "distinct_3": 4 / 4,
        "seq_rep_4": 0,
        "longest_run": 3,
    }
    looping = repetition([1, 2, 3] * 5)
    assert (looping["seq_rep_4"], looping["distinct_3"], looping["longest_run"]) == (1 - 3 / 12, 3 / 13, 1)
    short = repetition([5, 5, 6])
    assert (short["distinct_3"], short["seq_rep_4"]) == (1, None)


def of_bytes(raw: bytes, finished: bool, entropy: float) -> tuple[bool, dict[str, Any]]:
    return finished, {"mean_entropy": entropy, "mean_entropy_10": entropy, **repetition(list(raw)), **byte_counts(raw)}


def test_a_summary_weighs_every_continuation_alike_and_bytes_by_their_number() -> None:
    summary = Summary()
    for each in (of_bytes(b"aab\xff", True, 1.0), of_bytes(b"", True, 2.0), of_bytes("é".encode()[:1], False, 6.0)):
        summary.add(*each)
    found = summary.as_dict()
    assert (found["samples"], found["tokens"], found["bytes"]) == (3, 5, 5)
    assert found["finished"] == pytest.approx(2 / 3)
    assert found["avg_generation_length"] == pytest.approx(5 / 3)
    assert (found["utf8_validity"], found["utf8_strict"]) == pytest.approx((2 / 3, 1 / 3))
    assert found["invalid_byte_rate"] == pytest.approx(1 / 5)
    assert found["mean_entropy"] == pytest.approx(3.0)
    assert found["repetition_frac"] == pytest.approx((0.5 + 1.0) / 2), "the empty text has no share"
    assert found["seq_rep_4"] == 0.0
    assert found["distinct_2"] == 1.0
    assert found["tokens_per_sec"] == pytest.approx(5 / found["seconds"])


def test_a_summary_of_nothing_has_no_shares() -> None:
    found = Summary().as_dict()
    assert found["samples"] == 0
    assert found["utf8_validity"] is found["invalid_byte_rate"] is found["mean_entropy"] is None


def test_measured_numbers_are_those_of_the_continuation_and_json_values() -> None:
    for sample, metrics, candidates in generate_measured(model(), BYTE, numbered(PROMPTS, SETTINGS), 2):
        assert metrics["total_tokens"] == len(sample.ids)
        assert metrics["total_bytes"] == sum(index not in (254, 255) for index in sample.ids)
        assert metrics["unique_tokens"] == len(set(sample.ids))
        assert metrics["mean_entropy"] > 0
        assert len(candidates) == min(10, len(sample.ids) + sample.finished)
        json.dumps(metrics)
