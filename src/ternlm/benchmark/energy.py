"""What a call takes from the power supply, where the GPU counts it."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ternlm.benchmark.turns import synchronize

_LEAST_S = 2.0  # the counter moves in steps of up to a tenth of a second


def joules_per_call(call: Callable[[], Any], device: torch.device, check: Callable[[], None]) -> float | None:
    """Energy of one call: the GPU's own counter around calls for two seconds, by their number.

    It is that of the whole GPU, idle power and other users included; None without such a counter.
    """
    before = _millijoules(device)
    if before is None:
        return None
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < _LEAST_S:
        check()
        call()
        synchronize()
        calls += 1
    after = _millijoules(device)
    return None if after is None else (after - before) / 1000 / calls


def _millijoules(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        name = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{name}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return None
