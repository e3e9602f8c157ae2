"""Choosing a token: nucleus, top-k, temperature, greedy ties, repetition penalty, seeds."""

import hashlib

import pytest
import torch

from ternlm.errors import SettingsError
from ternlm.generation.sampling import SamplingSettings, nucleus, row_seed, sample_each, sample_next


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def choose(logits: torch.Tensor, seen: torch.Tensor | None = None, seed: int = 0, **settings: object) -> list[int]:
    seen = torch.zeros(logits.shape, dtype=torch.bool) if seen is None else seen
    made = SamplingSettings.from_mapping(settings)
    return sample_next(logits, seen, made, generators(len(logits), seed)).tolist()


def test_g03_the_token_that_crosses_p_is_kept() -> None:
    kept = nucleus(torch.tensor([[0.5, 0.4, 0.1]]), 0, 0.6)
    torch.testing.assert_close(kept, torch.tensor([[5 / 9, 4 / 9, 0.0]]))


def test_g03_a_token_that_reaches_p_exactly_is_the_last() -> None:
    kept = nucleus(torch.tensor([[0.25, 0.125, 0.5, 0.125]]), 0, 0.75)
    torch.testing.assert_close(kept, torch.tensor([[1 / 3, 0.0, 2 / 3, 0.0]]))


def test_the_likeliest_token_always_stays() -> None:
    kept = nucleus(torch.tensor([[0.1, 0.7, 0.2]]), 0, 1e-6)
    assert kept.tolist() == [[0.0, 1.0, 0.0]]


def test_rows_are_cut_independently_and_order_is_kept() -> None:
    kept = nucleus(torch.tensor([[0.1, 0.2, 0.7], [0.7, 0.2, 0.1]]), 0, 0.75)
    assert (kept > 0).tolist() == [[False, True, True], [True, True, False]]
    torch.testing.assert_close(kept.sum(dim=1), torch.ones(2))


def test_top_k_keeps_k_tokens_and_the_lower_ids_among_equals() -> None:
    kept = nucleus(torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]]), 3, 1.0)
    torch.testing.assert_close(kept, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0, 0.0]]))


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    kept = nucleus(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), 2, 0.5)  # 4/7 reaches one half
    assert kept.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("top_k", [0, 4, 99])
def test_nothing_is_cut_by_p_of_one_and_a_large_k(top_k: int) -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    torch.testing.assert_close(nucleus(probabilities, top_k, 1.0), probabilities)


def test_the_probabilities_are_left_as_they_were() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3]])
    before = probabilities.clone()
    nucleus(probabilities, 1, 0.5)
    assert torch.equal(probabilities, before)


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert choose(logits, temperature=0) == [1, 0]


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    for temperature in (1.0, 0.5, 2.0):
        expected = torch.softmax(logits[0] / temperature, dim=-1)
        drawn = torch.tensor(choose(logits, temperature=temperature, top_p=1.0))
        torch.testing.assert_close(drawn.bincount(minlength=3) / 4000, expected, atol=0.03, rtol=0)


def test_draws_never_leave_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.4, 0.1]).log().expand(500, 3)
    assert set(choose(logits, temperature=1.0, top_p=0.6)) == {0, 1}


def test_g02_draws_depend_on_their_own_generator_and_leave_the_global_state_alone() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    together = choose(logits, temperature=1.0, top_p=1.0)
    torch.manual_seed(123)
    alone = [choose(logits[[row]], seed=row, temperature=1.0, top_p=1.0)[0] for row in range(5)]
    torch.set_rng_state(before)
    assert together == alone
    choose(logits, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_repetition_penalty_lowers_positive_and_negative_logits_of_seen_tokens() -> None:
    seen = torch.tensor([[True, False, False]])
    assert choose(torch.tensor([[2.0, 1.5, 0.0]]), seen, temperature=0, repetition_penalty=1.2) == [0]
    assert choose(torch.tensor([[2.0, 1.5, 0.0]]), seen, temperature=0, repetition_penalty=1.5) == [1]
    assert choose(torch.tensor([[-1.0, -1.2, -3.0]]), seen, temperature=0, repetition_penalty=1.5) == [1]
    assert choose(torch.tensor([[2.0, 1.5, 0.0]]), temperature=0, repetition_penalty=9.0) == [0]


def test_rows_with_settings_of_their_own_are_drawn_as_if_alone() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    seen = torch.rand(5, 50, generator=torch.Generator().manual_seed(3)) < 0.3
    values = [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 3}, {"temperature": 0.0, "repetition_penalty": 3.0}]
    rules = [SamplingSettings.from_mapping(values[i]) for i in (0, 1, 0, 2, 1)]
    together = sample_each(logits, seen, rules, generators(5)).tolist()
    alone = [sample_next(logits[[i]], seen[[i]], rules[i], generators(1, seed=i)).item() for i in range(5)]
    assert together == alone
    assert together[0] == logits[0].argmax()


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert choose(logits, temperature=0.7) == choose(logits.float(), temperature=0.7)


def test_g01_seeds_are_a_hash_that_no_process_can_change() -> None:
    digest = hashlib.sha256(b"Once upon|2|7").digest()[:8]
    assert row_seed("Once upon", 2, 7) == int.from_bytes(digest, "little") >> 1
    assert row_seed("Once upon", "2", 7) == row_seed("Once upon", 2, 7)
    seeds = {row_seed(p, i, s) for p in ("a", "b") for i in range(3) for s in range(3)}
    assert len(seeds) == 18
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize(
    "values",
    [{"top_p": 0}, {"top_p": 1.5}, {"temperature": -1}, {"top_k": -1}, {"repetition_penalty": 0},
     {"max_new_tokens": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        SamplingSettings.from_mapping(values)
