"""Model FLOPs utilization: how much of what a device could multiply goes into the model.

Peaks of GPUs are those of the vendor's data sheets; a CPU is measured. hw_util, the share of what the
hardware executes, is not reported: it needs the operations of every kernel at its own precision.
"""

import re
import time
from functools import cache
from typing import NamedTuple

import torch

from ternlm.device import choose_dtype

_TERA = {
    # Blackwell, Hopper
    "GB300|GB200": 2500.0, "B300 SXM6 AC|B200": 2250.0, "B100": 1750.0,
    "GH200 [0-9]+GB?( HBM3e)?|H200|H100 [0-9]+GB HBM3|H800": 989.4,
    "H200 NVL|H100 NVL": 835.5, "H100 PCIe|H800 PCIe": 756.0, "H20": 148.0,
    # Ada, Ampere
    "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A[18]00[- ](SXM4-[0-9]+GB|PCIE-[0-9]+GB|80GB PCIe)": 312.0,
    "A30": 165.0, "A40": 149.7, "A10": 125.0, "A10G": 70.0, "A2": 18.0,
    "RTX 6000 Ada Generation": 364.2, "RTX A6000": 154.8, "RTX A5000": 111.1, "RTX A4000": 76.7,
    # GeForce
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165.2, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2, "RTX 4070 Ti": 80.2,
    "RTX 4070 SUPER": 70.9, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80.0, "RTX 3090": 71.2, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070 Ti": 43.5,
    "RTX 3070": 40.6, "RTX 3060 Ti": 32.4, "RTX 3060": 25.5,
}  # fmt: skip
"""Dense bfloat16 matrix products with float32 sums, without sparsity, in 10^12 FLOP/s, by the whole name of the
device without the maker's; laptop chips, slices of a GPU and cards without bfloat16 are left out."""

_SIDE = 1024  # of the square matrices that a CPU is measured with: three of them fit its cache


class Peak(NamedTuple):
    """The most that a device could do.

    Attributes:
        flops: Floating-point operations per second; a multiplication with its addition is two.
        source: Where the number is from, in words.
    """

    flops: float
    source: str


def peak_flops(device: torch.device) -> Peak | None:
    """The peak of dense bfloat16 products of a device; None where it is not known.

    A CPU is measured for a third of a second in the type that ``training.precision=auto`` takes: the best
    rate of one thread, times the number of threads. All threads at once would be measured too low
    whenever another process has a core.
    """
    if device.type == "cpu":
        return _measured()
    return _from_data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(tokens_per_sec: float, flops_per_token: float, peak: Peak | None) -> float | None:
    """tokens/s x FLOPs of a training token / peak FLOP/s; None without a peak.

    The FLOPs are those of the model in any precision and without recomputation, so a ternary model and
    its full-precision twin compare.

    Source:
        Chowdhery et al. 2022, PaLM, appendix B (arXiv 2204.02311).
    """
    return None if peak is None else tokens_per_sec * flops_per_token / peak.flops


def _from_data_sheet(name: str) -> Peak | None:
    model = re.sub(r"^(NVIDIA )?(GeForce )?", "", name)
    found = [tera for pattern, tera in _TERA.items() if re.fullmatch(pattern, model)]
    return Peak(found[0] * 1e12, f"data sheet of {name}, dense bfloat16") if found else None


@cache
def _measured(seconds: float = 0.3) -> Peak:
    dtype = choose_dtype("auto", torch.device("cpu"))
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _seconds_of_one(matrix)  # the first product also sets up the library
        shortest = _seconds_of_one(matrix)
        last = time.perf_counter() + seconds
        while time.perf_counter() < last:
            shortest = min(shortest, _seconds_of_one(matrix))
    finally:
        torch.set_num_threads(threads)
    name = str(dtype).removeprefix("torch.")
    return Peak(threads * 2 * _SIDE**3 / shortest, f"measured: {name} product on one thread, times {threads}")


def _seconds_of_one(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    matrix @ matrix
    return max(time.perf_counter() - started, 1e-9)
