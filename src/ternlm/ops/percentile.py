"""Percentiles of magnitudes, from a sample that is spread evenly over a tensor."""

import math

import torch
from torch import Tensor

MOST_VALUES = 1 << 16
"""Values looked at for one tensor, all its scales together."""

_LEAST_VALUES = 1 << 12  # per scale all the same, however many there are
_UNITS = 1000  # percentiles are read to a thousandth of a percent, so that ranks are exact integers


def magnitude_percentile(
    x: Tensor,
    percentile: float,
    valid: Tensor | None = None,
    heads: bool = False,
    channels: bool = False,
    most_values: int = MOST_VALUES,
) -> Tensor:
    """The order statistic ceil(percentile / 100 * n) of |x|, over n sampled values.

    Every k-th value is taken, k just large enough for the budget and without a common divisor with the number of
    channels, so that all channels are met equally often. Nothing is read back from the device.

    Args:
        x: (batch, time, channels), or (batch, heads, time, channels) with `heads`; any float dtype.
        percentile: Above 0, at most 100.
        valid: (batch, time), bool: positions to look at; None is all.
        heads: One result per head.
        channels: One result per channel.
        most_values: Values to look at, all results together.

    Returns:
        float32: (), (heads, 1, 1), (channels,) or (heads, 1, channels); NaN where no value is valid.
    """
    places = x.detach().transpose(1, 2) if heads else x.detach()  # (batch, time, [heads,] channels)
    batch, time, width = places.shape[0], places.shape[1], places.shape[-1]
    results = (places.shape[2] if heads else 1) * (width if channels else 1)
    most = max(most_values // results, _LEAST_VALUES)
    picked = _spread(batch * time * (1 if channels else width), most, 1 if channels else width, x.device)
    place = picked if channels else picked // width
    row, moment = place // time, place % time
    # Indices, and not slices of a flat view, so that no layout of x is copied whole.
    if channels:
        sample = places[row, moment]
    elif heads:
        sample = places[row, moment, :, picked % width]
    else:
        sample = places[row, moment, picked % width]
    magnitudes = sample.reshape(picked.numel(), results).t().float().abs()
    kept = None if valid is None else valid[row, moment]
    found = _order_statistic(magnitudes, round(percentile * _UNITS), kept)
    if heads:
        return found.view(-1, 1, width if channels else 1)
    return found if channels else found.view(())


def _spread(count: int, most: int, width: int, device: torch.device) -> Tensor:
    """At most `most` of the numbers 0 .. count - 1, evenly spaced, the spacing coprime to `width`."""
    spacing = max(1, -(-count // most))
    while math.gcd(spacing, width) > 1:
        spacing += 1
    return torch.arange(0, count, spacing, device=device)


def _order_statistic(values: Tensor, units: int, kept: Tensor | None) -> Tensor:
    """The value of rank ceil(units / 100,000 * n) in each row of `values`, (rows, all), among the n that are kept."""
    total = 100 * _UNITS
    size = values.shape[1]
    from_the_top = size - -(-units * size // total) + 1
    if kept is None:
        return values.topk(from_the_top, dim=1).values[:, -1]
    # Fewer values are kept, so the rank from the top only shrinks, and the number to look at stays fixed.
    top = values.masked_fill(~kept, -1.0).topk(from_the_top, dim=1).values
    count = kept.sum()
    place = count - (units * count + total - 1) // total
    found = top.gather(1, place.clamp_min(0).expand(values.shape[0], 1))[:, 0]
    return torch.where(count > 0, found, torch.nan)
