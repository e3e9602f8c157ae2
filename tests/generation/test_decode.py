"""Generating text with a tiny model: state against full passes, batches, endings, streams, seeds across processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_bitnet
from ternlm.errors import SettingsError
from ternlm.generation import Request, SamplingSettings, Trace, continue_all, generate, stream
from ternlm.generation.decode import encode_prompt
from ternlm.models import FULL_PRECISION, LanguageModel, Output
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)


def model(**overrides: Any) -> LanguageModel:
    """A model whose next token depends on its context."""
    made = tiny_bitnet(mode=FULL_PRECISION, vocab_size=256, tie_word_embeddings=False, **overrides)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return made


class Scripted(torch.nn.Module):
    """Says the same bytes after every prompt, one per step, whatever it is given."""

    compute_dtype = torch.float32
    is_recurrent = False

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script, self.weight = script, torch.nn.Parameter(torch.zeros(1))
        self.settings = tiny_bitnet(vocab_size=256).settings
        self.calls: list[tuple[int, ...]] = []

    def initial_state(self, batch_size: int) -> int:
        return 0

    def forward(self, tokens: torch.Tensor, state: int, lengths: Any = None, scored: Any = None) -> Output:
        self.calls.append(tuple(tokens.shape))
        logits = torch.zeros(*tokens.shape, 256)
        logits[..., self.script[state % len(self.script)]] = 9.0
        return Output(logits if scored is None else logits[scored], state + 1, {})


def test_greedy_generation_equals_full_passes() -> None:
    made, prompt = model(), "The fox"
    (sample,) = generate(made, BYTE, [prompt], GREEDY)
    ids = encode_prompt(BYTE, prompt)
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 12:
            expected.append(int(made(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    assert BYTE.eos_id not in expected and len(set(expected)) > 3
    assert sample.ids == expected and not sample.finished
    assert sample.prompt == prompt and sample.text == BYTE.decode(expected)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_result_of_a_prompt_does_not_depend_on_its_neighbours(temperature: float) -> None:
    made, prompts = model(), ["The fox", "", "Seven hens met", "x"]
    settings = SamplingSettings(temperature=temperature, max_new_tokens=10, seed=3)
    together = generate(made, BYTE, prompts, settings)
    alone = [generate(made, BYTE, [prompt], settings)[0] for prompt in prompts]
    assert together == alone
    assert len({tuple(sample.ids) for sample in together}) == 4


def test_equal_prompts_get_different_draws_numbered_by_occurrence() -> None:
    made, settings = model(), SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=10)
    samples = generate(made, BYTE, ["a", "b", "a"], settings)
    assert samples[0].ids != samples[2].ids
    assert samples == generate(made, BYTE, ["a", "b", "a"], settings)
    assert samples[1] == generate(made, BYTE, ["b"], settings)[0]
    other = generate(made, BYTE, ["a"], settings.model_copy(update={"seed": 1}))[0]
    assert other.ids != samples[0].ids


def test_g02_sampling_leaves_the_global_random_state_and_the_mode_alone() -> None:
    made = model()
    state = torch.get_rng_state()
    generate(made, BYTE, ["a"], SamplingSettings(max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), state) and made.training
    generate(made.eval(), BYTE, ["a"], SamplingSettings(max_new_tokens=3))
    assert not made.training and not any(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("trace", [None, Trace()])
def test_g04_one_pass_per_token_and_none_after_the_last_traced_or_not(trace: Trace | None) -> None:
    made, settings = Scripted([65]), SamplingSettings(temperature=0, max_new_tokens=5)
    continue_all(made, BYTE, [Request("abc", settings, 0), Request("d", settings, 0)], trace)  # type: ignore[arg-type]
    assert made.calls == [(2, 4), (2, 1), (2, 1), (2, 1), (2, 1)]
    assert trace is None or [len(row) for row in trace.entropies()] == [5, 5]


def test_requests_of_different_lengths_and_rules_are_continued_as_if_alone() -> None:
    made = model()
    requests = [
        Request("The fox", SamplingSettings(temperature=0, max_new_tokens=9), 1),
        Request("Seven", SamplingSettings(temperature=1.3, max_new_tokens=4), 2),
        Request("Seven", SamplingSettings(temperature=1.3, max_new_tokens=9), 3),
    ]
    together = continue_all(made, BYTE, requests)
    assert together == [continue_all(made, BYTE, [request])[0] for request in requests]
    assert [len(sample.ids) for sample in together] == [9, 4, 9]
    assert together[1].ids != together[2].ids[:4], "the seed decides"


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn() -> None:
    class Padded(Scripted):
        def forward(self, tokens: torch.Tensor, state: int, lengths: Any = None, scored: Any = None) -> Output:
            made = super().forward(tokens, state, lengths, scored)
            beyond = torch.full((*made.logits.shape[:-1], 8), 20.0)
            return Output(torch.cat([made.logits, beyond], dim=-1), made.state, {})

    settings = SamplingSettings(temperature=0, max_new_tokens=3)
    assert generate(Padded([65]), BYTE, ["x"], settings)[0].text == "AAA"  # type: ignore[arg-type]


def test_a_text_ends_at_eos_which_is_not_part_of_it() -> None:
    script = [*"Hé".encode(), 255, 65, 65]
    (sample,) = generate(Scripted(script), BYTE, ["x"], GREEDY)  # type: ignore[arg-type]
    assert sample.text == "Hé" and sample.finished and sample.ids == list("Hé".encode())


def test_streamed_tokens_are_those_of_generation_and_stop_at_eos() -> None:
    made = model()
    (sample,) = generate(made, BYTE, ["The fox"], GREEDY)
    assert list(stream(made, BYTE, Request("The fox", GREEDY, 0))) == sample.ids
    assert list(stream(Scripted([65, 66, 255, 67]), BYTE, Request("x", GREEDY, 0))) == [65, 66]  # type: ignore[arg-type]


def test_g06_characters_are_printed_when_their_last_byte_arrives() -> None:
    raw = "aé🙂b".encode()
    decoder = BYTE.stream()
    tokens = stream(Scripted([*raw, 255]), BYTE, Request("x", GREEDY, 0))  # type: ignore[arg-type]
    printed = [decoder.feed(token) for token in tokens]
    assert printed == ["a", "", "é", "", "", "", "🙂", "b"]
    assert decoder.finish() == ""


def test_g06_a_character_that_the_prompt_began_is_finished_and_a_broken_one_replaced() -> None:
    raw = "🙂".encode()
    (sample,) = generate(Scripted([*raw[:2], 255]), BYTE, ["x"], GREEDY)  # type: ignore[arg-type]
    assert sample.text == "\ufffd"
    decoder = BYTE.stream(list(raw[:2]))
    assert decoder.feed(raw[2]) + decoder.feed(raw[3]) == "🙂"


def test_generation_goes_on_when_the_context_is_full() -> None:
    made = model(max_position_embeddings=8)
    (sample,) = generate(made, BYTE, ["abc"], SamplingSettings(temperature=0, max_new_tokens=30))
    ids, used = encode_prompt(BYTE, "abc"), 4
    expected: list[int] = []
    window = list(ids)
    with torch.no_grad():
        for _ in range(30):
            expected.append(int(made(torch.tensor([window])).logits[0, -1].argmax()))
            used += 1
            window = [*window, expected[-1]] if used <= 8 else [*ids, *expected][-4:]
            used = len(window)
    assert sample.ids == expected[: len(sample.ids)] and len(sample.ids) == 30


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    made = model(max_position_embeddings=8)
    long = generate(made, BYTE, ["0123456789abcdefg"], SamplingSettings(temperature=0, max_new_tokens=1))[0]
    with torch.no_grad():
        expected = made(torch.tensor([list(b"abcdefg")])).logits[0, -1].argmax()
    assert long.ids == [int(expected)]


def test_an_empty_prompt_starts_from_bos_and_is_refused_where_nothing_can_start() -> None:
    assert encode_prompt(BYTE, "") == [254]
    assert encode_prompt(BYTE, "é") == [254, 0xC3, 0xA9]

    class Bare(ByteTokenizer):
        bos_id = None

    assert encode_prompt(Bare(), "") == [255]
    Bare.eos_id = None
    with pytest.raises(SettingsError, match="has no BOS"):
        encode_prompt(Bare(), "")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_decode import BYTE, model
from ternlm.generation import SamplingSettings, generate
print([s.ids for s in generate(model(), BYTE, ["a", "a"], SamplingSettings(temperature=1.0, max_new_tokens=8))])
"""


def test_g01_two_processes_with_different_hash_seeds_draw_the_same() -> None:
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folders[0]],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": folders[1], "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    here = generate(model(), BYTE, ["a", "a"], SamplingSettings(temperature=1.0, max_new_tokens=8))
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] == f"{[sample.ids for sample in here]}\n"


def test_a_short_prompt_is_not_affected_by_a_neighbour_whose_context_is_full() -> None:
    made = model(max_position_embeddings=12)
    settings = SamplingSettings(max_new_tokens=24, temperature=0)
    (alone,) = generate(made, BYTE, ["ab"], settings)
    together = generate(made, BYTE, ["ab", "a long neighbour"], settings)
    assert together[0].ids == alone.ids
