"""Counter-based noise: a pure function of key and place, uniform, and unrelated wherever one might look."""

import itertools
import shutil

import pytest
import torch
from torch import Tensor

from ternlm.ops.noise import NoiseRows, bypassed, happens, noise_key, uniform


def key(*parts: int) -> Tensor:
    return torch.tensor(noise_key(5, *parts))


def test_keys_tell_their_parts_apart_and_are_the_same_in_every_process() -> None:
    keys = [noise_key(*parts) for parts in itertools.product((0, 1, 12), (0, 1, 2), (1, 21))]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**31 for k in keys)
    assert noise_key(1, 23) != noise_key(12, 3) and noise_key(1) != noise_key(1, 0)
    assert noise_key(7, 1, 2) == 1833703933


def test_the_same_key_gives_the_same_numbers_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = uniform(key(1), (3, 5, 7))
    assert torch.equal(first, uniform(key(1), (3, 5, 7)))
    assert torch.equal(first, uniform(key(1).int(), (3, 5, 7)))
    assert torch.equal(first.view(15, 7), uniform(key(1), (15, 7)))
    assert not torch.equal(first, uniform(key(2), (3, 5, 7)))
    assert not torch.equal(first, uniform(key(1), (3, 5, 7), stream=1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_block_of_rows_is_that_part_of_the_whole() -> None:
    rows = NoiseRows(key(3), 9, 7)
    whole = rows.words(slice(0, 9))
    for start, stop in ((0, 1), (2, 6), (8, 9)):
        assert torch.equal(rows.words(slice(start, stop)), whole[start:stop])
        assert torch.equal(rows.odd(slice(start, stop)), (whole[start:stop] | 1).float())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (0, 3), (4, 1), (2, 1, 3)])
def test_any_shape_is_served(shape: tuple[int, ...]) -> None:
    numbers = uniform(key(4), shape)
    assert numbers.shape == shape and numbers.dtype == torch.float32
    assert bool((numbers >= 0).all()) and bool((numbers < 1).all())


def chi_square(cells: Tensor, number: int) -> float:
    counts = torch.bincount(cells.flatten(), minlength=number).double()
    return float(((counts - counts.mean()).square() / counts.mean()).sum())


def test_the_numbers_are_uniform_singly_and_in_neighbouring_pairs() -> None:
    numbers = uniform(key(5), (500, 1001))
    limit = 255 + 5 * (2 * 255) ** 0.5
    sixteenth = (numbers * 16).long()
    assert chi_square((numbers * 256).long(), 256) < limit
    assert chi_square(sixteenth[:, :-1:2] * 16 + sixteenth[:, 1::2], 256) < limit  # halves of one word
    assert chi_square(sixteenth[:, 1:-1:2] * 16 + sixteenth[:, 2::2], 256) < limit
    assert chi_square(sixteenth[:-1] * 16 + sixteenth[1:], 256) < limit
    assert chi_square(sixteenth * 16 + (uniform(key(6), (500, 1001)) * 16).long(), 256) < limit
    assert chi_square(sixteenth * 16 + (uniform(key(5), (500, 1001), 1) * 16).long(), 256) < limit
    assert abs(float(numbers.mean()) - 0.5) < 4 / (12 * numbers.numel()) ** 0.5


def test_places_are_unrelated_over_keys_the_corner_included() -> None:
    draws = torch.stack([uniform(key(7, i), (3, 4)) for i in range(4000)]).view(4000, 12) - 0.5
    correlation = draws.t() @ draws * 12 / 4000
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert bool((correlation.diagonal() - 1).abs().max() < 0.1) and bool(off_diagonal.abs().max() < 5 / 4000**0.5)


def test_rounding_noise_is_odd_and_symmetric() -> None:
    noise = NoiseRows(key(8), 300, 301).odd(slice(0, 300))
    assert bool((noise % 2 != 0).all()) and float(noise.abs().max()) < 2**15
    assert abs(float(noise.mean())) < 4 * 2**15 / (3 * noise.numel()) ** 0.5


def test_events_happen_at_their_rate_never_at_zero_and_always_at_one() -> None:
    shape = (400, 257)
    for chance in (0.0, 1.0, 0.1):
        share = float(happens(key(9), torch.tensor(chance), shape).float().mean())
        assert abs(share - chance) <= 4 * (chance * (1 - chance) / (400 * 257)) ** 0.5


def test_a_bypass_is_drawn_by_token_by_batch_or_by_element() -> None:
    shape, chance = (3, 50, 20), torch.tensor(0.5)
    masks = {by: bypassed(key(10), chance, by, shape) for by in ("token_row", "batch", "element")}
    assert {by: tuple(mask.shape) for by, mask in masks.items()} == {
        "token_row": (3, 50, 1),
        "batch": (1, 1, 1),
        "element": shape,
    }
    assert abs(float(masks["token_row"].float().mean()) - 0.5) < 4 * 0.5 / 150**0.5
    draws = [bool(bypassed(key(11, i), chance, "batch", shape)) for i in range(100)]
    assert 30 < sum(draws) < 70


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_graph_draws_the_same_bits() -> None:
    torch._dynamo.reset()
    for columns in (1, 6, 33):
        compiled = torch.compile(lambda k, columns=columns: uniform(k, (5, 7, columns), 2), fullgraph=True)
        odd = torch.compile(lambda k, columns=columns: NoiseRows(k, 35, columns).odd(slice(3, 35)), fullgraph=True)
        for i in range(3):
            assert torch.equal(compiled(key(i)), uniform(key(i), (5, 7, columns), 2))
            assert torch.equal(odd(key(i)), NoiseRows(key(i), 35, columns).odd(slice(3, 35)))
