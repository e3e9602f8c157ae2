"""Reading into a memory: a recurrent model reads a token once, any other its context; interruptions lose nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import tiny_bitnet, tiny_model
from ternlm.generation import GrowingText, Request, SamplingSettings, generate, stream
from ternlm.generation import reader as module
from ternlm.generation.decode import encode_prompt
from ternlm.generation.reader import Reader
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, Output
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
GREEDY = SamplingSettings(temperature=0, max_new_tokens=30)


class Rolling(LanguageModel):
    """Says a byte that depends on every byte before it, from a memory of one number; 8 positions are only a hint."""

    is_recurrent = True

    def __init__(self) -> None:
        super().__init__()
        self.settings = tiny_bitnet(vocab_size=256, max_position_embeddings=8).settings
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, int]] = []
        self.read = 0

    def forward(
        self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None, scored: Tensor | None = None
    ) -> Output:
        self.calls.append(tuple(tokens.shape))  # type: ignore[arg-type]
        lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
        self.read += int(lengths.sum())
        state, logits = state.clone(), torch.zeros(*tokens.shape, 256)
        for row, length in enumerate(lengths.tolist()):
            for t in range(length):
                state[row] = (state[row] * 31 + tokens[row, t] + 7) % 251
                logits[row, t, state[row]] = 9.0
        return Output(logits if scored is None else logits[scored], state, {})

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, dtype=torch.int64)

    def initialize(self, seed: int) -> None:
        pass

    def blocks(self) -> Iterator[torch.nn.Module]:
        return iter(())


def said(prompt: str, number: int) -> list[int]:
    """What `Rolling` says after a prompt, by hand."""
    state, spoken = 1, list[int]()
    for token in encode_prompt(BYTE, prompt):
        state = (state * 31 + token + 7) % 251
    for _ in range(number):
        spoken.append(state)
        state = (state * 31 + state + 7) % 251
    return spoken


def test_a_recurrent_model_reads_every_token_once_however_long_the_text() -> None:
    made, prompt = Rolling(), "longer than eight positions"
    (sample,) = generate(made, BYTE, [prompt], GREEDY)
    assert sample.ids == said(prompt, 30)
    assert made.read == 1 + len(prompt) + 30 - 1


@pytest.mark.parametrize("piece", [1, 3, 5, 64])
def test_a_long_prompt_is_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    made, prompts = Rolling(), ["a", "", "eleven text", "a prompt of middle length"]
    samples = generate(made, BYTE, prompts, GREEDY)
    assert [sample.ids for sample in samples] == [said(prompt, 30) for prompt in prompts]
    longest = 1 + len(prompts[3])
    assert [shape[1] for shape in made.calls] == [
        *(min(piece, longest - start) for start in range(0, longest, piece)), *([1] * 29),
    ]  # fmt: skip
    assert made.read == sum(1 + len(prompt) for prompt in prompts) + 4 * 29


def test_only_the_last_position_of_each_row_meets_the_head() -> None:
    made, widths = tiny_bitnet(vocab_size=256), list[tuple[int, ...]]()
    forward = made.forward
    made.forward = lambda *given: (out := forward(*given), widths.append(tuple(out.logits.shape)))[0]  # type: ignore[method-assign]
    generate(made, BYTE, ["a", "three", "seven t"], SamplingSettings(max_new_tokens=2))
    assert widths == [(3, 256), (3, 1, 256)]


def test_the_reader_knows_what_each_row_has_seen() -> None:
    reader = Reader(Rolling(), 256, 2)
    reader.read([[1, 2, 3], [2]])
    reader.read([[9], [9]])
    assert reader.seen[0].nonzero().flatten().tolist() == [1, 2, 3, 9]
    assert reader.seen[1].nonzero().flatten().tolist() == [2, 9]


def bitnet(capacity: int) -> LanguageModel:
    made = tiny_bitnet(mode=FULL_PRECISION, vocab_size=256, tie_word_embeddings=False, max_position_embeddings=capacity)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return made


@pytest.mark.parametrize("made", [Rolling(), bitnet(64)], ids=["recurrent", "bounded"])
def test_turns_continue_the_text_as_if_it_had_been_read_whole(made: LanguageModel) -> None:
    settings = GREEDY.model_copy(update={"max_new_tokens": 5})
    text, ids = GrowingText(made, BYTE), encode_prompt(BYTE, "The fox")
    text.add(ids)
    for more in (" met", "", " hens and"):
        ids += list(more.encode())
        text.add(list(more.encode()))
        drawn = list(text.draw(settings, 0))
        whole = GrowingText(made, BYTE)
        whole.add(ids)
        assert drawn == list(whole.draw(settings, 0))
        assert len(drawn) == 5
        ids += drawn


def test_a_message_that_does_not_fit_keeps_as_much_context_as_there_is_room_for() -> None:
    made = bitnet(12)
    text = GrowingText(made, BYTE)
    text.add(encode_prompt(BYTE, "The fox"))
    first = list(text.draw(GREEDY.model_copy(update={"max_new_tokens": 2}), 0))
    text.add(list(b" and a hen"))
    (token,) = text.draw(GREEDY.model_copy(update={"max_new_tokens": 1}), 0)
    kept = [*encode_prompt(BYTE, "The fox"), *first, *b" and a hen"][-11:]
    with torch.no_grad():
        assert token == int(made.eval()(torch.tensor([kept])).logits[0, -1].argmax())


def test_a_reading_that_is_interrupted_is_made_again_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 4)
    made, prompt = Rolling(), "interrupted in the middle"
    forward, left = made.forward, 3

    def breaking(*given: Any) -> Output:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return forward(*given)

    made.forward = breaking  # type: ignore[method-assign]
    text = GrowingText(made, BYTE)
    text.add(encode_prompt(BYTE, prompt))
    with pytest.raises(KeyboardInterrupt):
        list(text.draw(GREEDY, 0))
    assert list(text.draw(GREEDY, 0)) == said(prompt, 30)


def test_a_text_that_the_model_has_ended_waits_for_more() -> None:
    class Ends(Rolling):
        def forward(self, *given: Any) -> Output:
            made = super().forward(*given)
            return made._replace(logits=made.logits + 99 * torch.eye(256)[255])

    text = GrowingText(Ends(), BYTE)
    text.add([1, 2])
    assert list(text.draw(GREEDY, 0)) == []
    assert list(text.draw(GREEDY, 0)) == []
    assert list(stream(Ends(), BYTE, Request("a", GREEDY, 0))) == []


RECURRENT = [family for family in MODELS if MODELS[family].model.is_recurrent]


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_families_generate_beyond_their_context_as_full_passes_do(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 7)
    made = tiny_model(family, FULL_PRECISION, vocab_size=256, max_position_embeddings=16).double()
    made.compute_dtype = torch.float64
    prompts, settings = (
        ["Hé", "", "a prompt of more than sixteen bytes"],
        GREEDY.model_copy(update={"max_new_tokens": 9}),
    )
    samples = generate(made, BYTE, prompts, settings)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = encode_prompt(BYTE, prompt)
        with torch.no_grad():
            for token in sample.ids:
                assert token == int(made.eval()(torch.tensor([ids])).logits[0, -1, :256].argmax())
                ids.append(token)
    assert samples == [generate(made, BYTE, [prompt], settings)[0] for prompt in prompts]
