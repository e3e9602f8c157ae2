import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.data.sampler import permute, window_start, windows_per_epoch


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_the_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9, 63, 65, 99_991])
def test_the_permutation_is_a_bijection_for_odd_sizes(size: int) -> None:
    order = permute(np.arange(size), size, 3, 1)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_the_order_is_mixed_and_depends_on_seed_and_epoch() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
        assert (np.abs(np.diff(order)) == 1).mean() < 0.02
    assert (orders[0] == orders[1]).mean() < 0.02
    assert (orders[0] == orders[2]).mean() < 0.02


def test_neighbouring_samples_are_spread_over_the_whole_stream() -> None:
    first = permute(np.arange(2000), 20_000, 0, 0)
    counts, _ = np.histogram(first, bins=10, range=(0, 20_000))
    assert counts.min() > 140 and counts.max() < 260


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(2, 700), length=st.integers(1, 60), epoch=st.integers(0, 4))
def test_an_epoch_visits_disjoint_windows_inside_the_stream(tokens: int, length: int, epoch: int) -> None:
    count = windows_per_epoch(tokens, length)
    if tokens < length + 1:
        assert count == 0
        return
    starts = np.sort(window_start(5, epoch, np.arange(count), tokens, length))
    assert count >= 1
    assert starts[0] >= 0 and starts[-1] + length + 1 <= tokens
    assert (np.diff(starts) == length).all()
    assert tokens - 1 - count * length < 2 * length  # what an epoch leaves out


def test_the_phase_moves_window_edges_between_epochs() -> None:
    phases = {int(np.min(window_start(0, epoch, np.arange(9), 1000, 100))) for epoch in range(30)}
    assert len(phases) > 15 and phases <= set(range(100))


def test_one_index_gives_what_the_array_gives() -> None:
    together = window_start(1, 2, np.arange(50), 6000, 100)
    assert [int(window_start(1, 2, k, 6000, 100)) for k in range(50)] == together.tolist()


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must see the windows that the interrupted one would have seen."""
    assert permute(np.arange(8), 8, 0, 0).tolist() == GOLDEN_ORDER
    assert window_start(7, 3, np.arange(4), 1000, 100).tolist() == GOLDEN_STARTS


@pytest.mark.parametrize("index", [-1, 9])
def test_an_index_outside_the_epoch_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="outside the epoch of 9"):
        window_start(0, 0, index, 1000, 100)


GOLDEN_ORDER = [3, 0, 7, 2, 4, 6, 5, 1]
GOLDEN_STARTS = [0, 300, 700, 500]
