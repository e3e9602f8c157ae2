"""The trace of a sample: entropies and candidates of the model's own distribution, from the pass that draws."""

import math

import pytest
import torch

from builders import randn, tiny_bitnet
from ternlm.generation import Request, SamplingSettings, Trace, continue_all
from ternlm.models import LanguageModel
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()


def model() -> LanguageModel:
    """A model whose distribution is far from uniform."""
    made = tiny_bitnet(vocab_size=256, tie_word_embeddings=False)
    with torch.no_grad():
        made.get_parameter("lm_head.weight").mul_(40)
    return made


def traced(made: LanguageModel, prompt: str, **settings: float) -> tuple[list[float], list[list[tuple[int, float]]]]:
    trace = Trace()
    request = Request(prompt, SamplingSettings.from_mapping({"max_new_tokens": 12, **settings}), seed=3)
    continue_all(made, BYTE, [request], trace)
    return trace.entropies()[0], trace.candidates()[0]


def test_entropies_of_known_distributions_are_in_nats() -> None:
    trace = Trace()
    trace.add(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, 0.0, -math.inf]]))
    trace.add(torch.tensor([[0.9, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log())
    expected = [[math.log(4), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)], [math.log(2), 0.0]]
    for row, wanted in zip(trace.entropies(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 2}, {"temperature": 0.3}])
def test_g04_the_entropy_is_that_of_the_untempered_uncut_distribution(settings: dict[str, float]) -> None:
    made = model()
    entropies, candidates = traced(made, "The fox", repetition_penalty=2.0, **settings)
    with torch.no_grad():
        logits = made(torch.tensor([[254, *b"The fox"]])).logits[0, -1]
    log_p = logits.log_softmax(-1)
    assert entropies[0] == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-4)
    top = logits.topk(5)
    assert [token for token, _ in candidates[0]] == top.indices.tolist()
    assert [logit for _, logit in candidates[0]] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_every_position_has_an_entropy_and_the_first_ten_their_candidates() -> None:
    entropies, candidates = traced(model(), "The fox", temperature=0)
    assert len(entropies) == 12
    assert [len(position) for position in candidates] == [5] * 10


def test_tracing_changes_no_sample() -> None:
    requests = [Request("The fox", SamplingSettings(temperature=1.0, max_new_tokens=8), 5)]
    assert continue_all(model(), BYTE, requests, Trace()) == continue_all(model(), BYTE, requests)


def test_equal_logits_are_listed_by_id_as_greedy_takes_them() -> None:
    trace = Trace()
    trace.add(torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]]))
    assert trace.candidates() == [[[(1, 3.0), (3, 3.0), (4, 2.0), (0, 1.0), (2, 1.0)]]]


def test_a_vocabulary_of_three_has_three_candidates() -> None:
    trace = Trace()
    trace.add(randn(2, 3).bfloat16())
    assert [[len(position) for position in row] for row in trace.candidates()] == [[3], [3]]
