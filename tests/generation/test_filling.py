"""Filling gaps: candidates and probabilities as softmax has them, texts as they were written, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TRAIN, tiny_bitnet
from encoders import CLS, MASK, PIECES, SEP, SPECIAL, TableEncoder, table, wordpiece
from ternlm.errors import SettingsError
from ternlm.generation import fill, has_mask, require_causal
from ternlm.models import Output
from ternlm.tokenizers import ByteTokenizer, Tokenizer, train_bpe


class Listening(TableEncoder):
    """Keeps what it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits)
        self.read: list[list[int]] = []

    def forward(self, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Output:
        self.read += tokens.tolist()
        return super().forward(tokens, scored)


@pytest.fixture
def pieces(tmp_path: Path) -> Tokenizer:
    return wordpiece(tmp_path)


def saying(*words: str, vocabulary: list[str] = PIECES) -> Any:
    """A model that thinks of these tokens at every mask, the first most."""
    logits = torch.zeros(len(vocabulary), len(vocabulary))
    for place, word in enumerate(words):
        logits[:, vocabulary.index(word)] = 9.0 - place
    return Listening(logits)


def test_candidates_are_the_largest_probabilities_of_tokens_that_emit_text(pieces: Tokenizer) -> None:
    logits = table()
    (found,) = fill(Listening(logits), pieces, ["the [MASK] fox"], top=7)  # type: ignore[arg-type]
    allowed = logits[MASK].clone()
    allowed[: len(SPECIAL)] = -torch.inf
    expected = allowed.softmax(dim=-1).topk(7)
    assert [c.id for c in found.masks[0]] == expected.indices.tolist()
    assert [c.probability for c in found.masks[0]] == pytest.approx(expected.values.tolist(), rel=1e-5)
    entropy = -(allowed.softmax(dim=-1) * allowed.log_softmax(dim=-1))[len(SPECIAL) :].sum()
    assert found.entropies == pytest.approx([entropy.item()], rel=1e-5)


def test_every_spelling_of_the_mask_is_read_and_the_rest_is_text(pieces: Tokenizer) -> None:
    model = saying("fox")
    texts = ["The [MASK] met <mask>.", "[MASK]", "a_b: the <|mask|>"]
    found = fill(model, pieces, texts)
    assert [len(each.masks) for each in found] == [2, 1, 1]
    assert [each.filled for each in found[:2]] == ["The fox met fox.", "fox"]
    word = PIECES.index
    assert [CLS, word("the"), MASK, word("met"), MASK, word("."), SEP] in model.read
    assert [CLS, MASK, SEP] in model.read and all(row.count(MASK) in (1, 2) for row in model.read)
    assert [each.filled for each in fill(saying("hens"), pieces, ["red ___ ran"], mask_text="___")] == ["red hens ran"]
    with pytest.raises(SettingsError, match=r"holds no mask. Write ___ where"):
        fill(model, pieces, ["red [MASK] ran"], mask_text="___")


def test_a_piece_that_continues_a_word_is_joined_to_it(pieces: Tokenizer) -> None:
    (found,) = fill(saying("##ing", "fox"), pieces, ["the hens walk [MASK]."], top=2)
    assert found.filled == "the hens walking."
    assert [(c.text, c.continues) for c in found.masks[0]] == [("ing", True), ("fox", False)]


def test_with_spaces_in_the_tokens_a_gap_takes_the_space_before_it() -> None:
    bpe = train_bpe(TRAIN, 300, mask_token=True)
    vocabulary = [bpe.piece(i).decode("latin-1") for i in range(bpe.vocab_size)]
    model = saying(" fox", vocabulary=vocabulary)
    (found,) = fill(model, bpe, ["The red [MASK] ran."])
    assert found.filled == "The red fox ran."
    assert model.read == [[bpe.bos_id, *bpe.encode("The red"), bpe.mask_id, *bpe.encode(" ran."), bpe.eos_id]]
    assert has_mask("a <|mask|>") and not has_mask("a mask")


def test_texts_of_other_lengths_do_not_change_an_answer_and_no_row_is_padded(pieces: Tokenizer) -> None:
    texts = ["the [MASK]", "the red fox [MASK] the hens and ran", "the [MASK] fox", "[MASK] ran", "a [MASK]"]
    model = TableEncoder(table(), context=0.7)
    together = fill(model, pieces, texts)  # type: ignore[arg-type]
    assert sorted(shape for shape, _, _ in model.passes) == [(1, 5), (1, 10), (3, 4)]
    for text, found in zip(texts, together, strict=True):
        (alone,) = fill(model, pieces, [text])  # type: ignore[arg-type]
        assert alone.filled == found.filled
        assert [c.probability for c in alone.masks[0]] == pytest.approx([c.probability for c in found.masks[0]])


def test_the_mode_and_the_random_state_are_left_alone(pieces: Tokenizer) -> None:
    model, state = TableEncoder(table()).train(), torch.get_rng_state()
    fill(model, pieces, ["[MASK]"])  # type: ignore[arg-type]
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert [training for _, _, training in model.passes] == [False]


def test_mistakes_are_one_sentence_each(pieces: Tokenizer) -> None:
    model: Any = TableEncoder(table())
    with pytest.raises(SettingsError, match=r"'no gap' holds no mask\. Write \[MASK\]"):
        fill(model, pieces, ["a [MASK]", "no gap"])
    with pytest.raises(SettingsError, match="a text of 28 tokens is longer than the 24"):
        fill(model, pieces, ["the " * 25 + "[MASK]"])
    with pytest.raises(SettingsError, match="'byte' has no mask token"):
        fill(model, ByteTokenizer(), ["[MASK]"])
    with pytest.raises(SettingsError, match=r"'bitnet' continues text.*ternlm generate"):
        fill(tiny_bitnet(), pieces, ["[MASK]"])
    with pytest.raises(SettingsError, match="an empty text marks no gap"):
        fill(model, pieces, ["[MASK]"], mask_text="")
    with pytest.raises(SettingsError, match=r"'table' fills gaps.*ternlm fill"):
        require_causal(model)
