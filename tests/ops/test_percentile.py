"""The order statistic of sampled magnitudes: its rank, what is left out, and which values are looked at."""

import math

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.ops import percentile as module
from ternlm.ops.percentile import magnitude_percentile


def by_sorting(values: Tensor, percentile: float) -> Tensor:
    """The definition: rank ceil(p / 100 n), counted from 1."""
    flat = values.abs().flatten().sort().values
    return flat[math.ceil(round(percentile * 1000) * flat.numel() / 100_000 - 1e-9) - 1]


@pytest.mark.parametrize("percentile", [0.001, 30.0, 50.0, 99.7, 99.99, 100.0])
def test_the_rank_is_that_of_the_definition(percentile: float) -> None:
    x = randn(3, 11, 7)
    assert torch.equal(magnitude_percentile(x, percentile), by_sorting(x, percentile))
    heads = randn(2, 5, 9, 6, seed=1)
    found = magnitude_percentile(heads, percentile, heads=True)
    assert found.shape == (5, 1, 1)
    assert torch.equal(found.flatten(), torch.stack([by_sorting(heads[:, h], percentile) for h in range(5)]))


def test_exact_ranks_are_not_moved_by_binary_fractions() -> None:
    x = torch.arange(1.0, 1001.0).view(1, 100, 10)
    assert magnitude_percentile(x, 99.7).item() == 997
    assert magnitude_percentile(x, 29.0).item() == 290
    assert magnitude_percentile(x, 99.71).item() == 998


def test_channels_have_a_percentile_each() -> None:
    x, heads = randn(3, 40, 6) * torch.arange(1.0, 7.0), randn(2, 3, 30, 5, seed=2)
    expected = torch.stack([by_sorting(x[..., c], 90.0) for c in range(6)])
    assert torch.equal(magnitude_percentile(x, 90.0, channels=True), expected)
    found = magnitude_percentile(heads, 90.0, heads=True, channels=True)
    assert found.shape == (3, 1, 5) and torch.equal(found[2, 0, 4], by_sorting(heads[:, 2, :, 4], 90.0))


@pytest.mark.parametrize("layout", [{}, {"heads": True}, {"channels": True}, {"heads": True, "channels": True}])
def test_padding_is_ignored(layout: dict[str, bool]) -> None:
    x = randn(3, 4, 13, 6) if "heads" in layout else randn(3, 13, 6)
    valid = torch.arange(13) < torch.tensor([13, 2, 7])[:, None]
    loud = x.clone()
    (loud.transpose(1, 2) if "heads" in layout else loud)[~valid] = 1e6
    found = magnitude_percentile(x, 80.0, valid, **layout)
    assert torch.equal(magnitude_percentile(loud, 80.0, valid, **layout), found)
    if not layout:
        assert torch.equal(found, by_sorting(x[valid], 80.0))
    if layout == {"heads": True}:
        assert torch.equal(found[1].squeeze(), by_sorting(x[:, 1][valid], 80.0))


def test_nothing_valid_is_no_number() -> None:
    assert magnitude_percentile(randn(2, 3, 4), 99.7, torch.zeros(2, 3, dtype=torch.bool)).isnan()


def test_the_sample_meets_all_channels_equally_and_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VALUES", 1000)
    monkeypatch.setattr(module, "_LEAST_VALUES", 10)
    x = torch.zeros(4, 256, 64) + torch.arange(1.0, 65.0)  # a spacing of 66 would see every second channel
    assert magnitude_percentile(x, 50.0).item() == pytest.approx(32, abs=1.5)
    picked = module._spread(x.numel(), 1000, 64, x.device)
    assert 900 < picked.numel() <= 1000
    counts = torch.bincount(picked % 64, minlength=64)
    assert int(counts.max() - counts.min()) <= 1


def test_a_sample_is_near_the_whole() -> None:
    x = randn(8, 512, 96)
    assert magnitude_percentile(x, 99.7).item() == pytest.approx(by_sorting(x, 99.7).item(), rel=0.02)
    assert magnitude_percentile(x.bfloat16(), 99.7).item() == pytest.approx(by_sorting(x, 99.7).item(), rel=0.02)


def test_the_layout_in_memory_does_not_matter() -> None:
    x = randn(2, 9, 4, 6)
    turned = x.transpose(1, 2)
    assert torch.equal(
        magnitude_percentile(turned, 70.0, heads=True), magnitude_percentile(turned.contiguous(), 70.0, heads=True)
    )
