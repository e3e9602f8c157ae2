"""What goes wrong with a router that cuts text into chunks, read off the share of positions where it cuts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SPAN = 1000
"""Steps of each stage that are remembered."""

_COLLAPSED, _WHOLE = 0.02, 0.9
_FOR_STEPS = 50
_AT_START = (0.3, 0.7)
_UNSTEADY, _UNSTEADY_STEPS = 0.1, 200
_SAMPLE = 100


def rates_of(telemetry: Mapping[str, float]) -> dict[str, float]:
    """Boundary rate by stage, such as ``stage0``, of what a model said about a step; what is not finite is left out."""
    found = {name: name.split("/") for name in telemetry if name.endswith("/boundary_rate")}
    return {parts[1]: telemetry[name] for name, parts in found.items() if math.isfinite(telemetry[name])}


def complaints(rates: Sequence[float], target: float | None, is_settled: bool) -> dict[str, str]:
    """What is wrong with the boundary rates F of one stage.

        router_collapse          F < 0.02 in each of the last 50 steps: the inner network sees almost nothing
        router_no_compression    F > 0.9 in each of the last 50 steps
        router_start             F outside [0.3, 0.7] in the first step
        router_oscillation       standard deviation of the last 200 above 0.1
        router_stuck             |N F - 1| > 1, and |F - 1/N| is no smaller than 1000 steps ago

    Args:
        rates: The last of them, at most `SPAN`, the newest at the end.
        target: Bytes per chunk that the ratio loss aims at, N.
        is_settled: Whether warm-up is over, before which rates may swing.

    Returns:
        A sentence by event; empty if all is well.

    Source:
        Hwang et al. 2025, H-Net (arXiv 2507.07955), for the ratio loss these rules watch over.
    """
    found, last = {}, rates[-_FOR_STEPS:]
    if len(rates) == 1 and not _AT_START[0] <= last[0] <= _AT_START[1]:
        found["router_start"] = f"the untrained router cuts at {last[0]:.1%} of all positions; 30 % to 70 % is usual"
    if len(last) == _FOR_STEPS and max(last) < _COLLAPSED:
        found["router_collapse"] = (
            f"the router cuts at {last[-1]:.2%} of all positions, for {_FOR_STEPS} steps: "
            "the inner network sees almost nothing"
        )
    if len(last) == _FOR_STEPS and min(last) > _WHOLE:
        found["router_no_compression"] = (
            f"the router cuts at {last[-1]:.1%} of all positions, for {_FOR_STEPS} steps: nothing is compressed"
        )
    recent = rates[-_UNSTEADY_STEPS:]
    if is_settled and len(recent) == _UNSTEADY_STEPS and statistics.pstdev(recent) > _UNSTEADY:
        found["router_oscillation"] = (
            f"the share of cuts swings by {statistics.pstdev(recent):.2f} around {statistics.fmean(recent):.2f}"
        )
    if target is not None and len(rates) == SPAN:
        before, now = (abs(statistics.fmean(part) - 1 / target) for part in (rates[:_SAMPLE], rates[-_SAMPLE:]))
        if now >= before and abs(target * rates[-1] - 1) > 1:
            found["router_stuck"] = (
                f"the router cuts at {rates[-1]:.1%} of all positions and comes no nearer to {1 / target:.1%}"
            )
    return found


def remember(history: dict[str, Any], rates: Mapping[str, float]) -> None:
    """Add a step's rates to what is remembered by stage, shortened to what a checkpoint need hold."""
    for stage, rate in rates.items():
        kept = history.setdefault(stage, [])
        kept.append(float(f"{rate:.4g}"))
        del kept[:-SPAN]
