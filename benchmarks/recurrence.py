"""The scan h_t = a_t h_{t-1} + u_t, forward and backward, against a Python loop and against a loop in C++.

    python benchmarks/recurrence.py [--shapes 4x256,32x512,1x512] [--lengths 512,1024,2048,4096,8192] [--repeats 7]

Arms: `auto` and `chunk` are `ternlm.ops.recurrence.scan`. `python` is a loop over time by automatic differentiation as
it is usually written, `a[:, t] * h + u[:, t]`; `unbind` is the reference of this package, the same loop over tensors
that were taken apart once, whose backward is linear in T. `c++` is the obvious loop, forward and backward by hand,
compiled here with `g++ -O3 -march=native` (left out where there is no g++). All arms live in one process and take
turns, so that a machine whose speed drifts treats them alike. The clock is process CPU time on one thread, which other
programs disturb least; medians, and medians of the ratios of each turn. `step` is one position without gradients, as
in generation. `linear` is the exponent of T in the time of `auto`: 1 is linear.

The goals: at 1,024 positions at least 15 times as fast as the Python loop and at most 2.5 times the time of the C++
loop; linear in T from 512 to 8,192.

Writes benchmarks/results/recurrence-DATE.json.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_step import machine

from ternlm.device import keep_freed_memory
from ternlm.ops.recurrence import scan, scan_reference

RESULTS = Path(__file__).parent / "results"
SLOW_TURNS = 3
"""Turns that the Python loops take; they need seconds each."""
LARGEST = {"python": 1 << 20, "unbind": 1 << 21}
"""Numbers (rows times positions times channels) above which the Python loops are left out."""

CPP = r"""
#include <cstring>
extern "C" void forward(const float* __restrict a, const float* __restrict u, float* __restrict h,
                        long rows, long length, long width) {
  for (long b = 0; b < rows; ++b)
    for (long t = 0; t < length; ++t) {
      const long now = (b * length + t) * width;
      if (t == 0) { std::memcpy(h + now, u + now, width * sizeof(float)); continue; }
      for (long c = 0; c < width; ++c) h[now + c] = a[now + c] * h[now - width + c] + u[now + c];
    }
}
extern "C" void backward(const float* __restrict a, const float* __restrict h, const float* __restrict grad_h,
                         float* __restrict grad_a, float* __restrict grad_u, long rows, long length, long width) {
  for (long b = 0; b < rows; ++b)
    for (long t = length - 1; t >= 0; --t) {
      const long now = (b * length + t) * width;
      for (long c = 0; c < width; ++c) {
        float grad = grad_h[now + c];
        if (t + 1 < length) grad += a[now + width + c] * grad_u[now + width + c];
        grad_u[now + c] = grad;
        grad_a[now + c] = t ? grad * h[now - width + c] : 0.0f;
      }
    }
}
"""


class CompiledLoop:
    """The loop in C++, as a function of gates and inputs with gradients."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "loop.cpp", Path(folder) / "loop.so"
            source.write_text(CPP)
            flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
            self.library = ctypes.CDLL(str(library))

    def __call__(self, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """All states and the last, by a Function whose two halves are the two loops."""
        h: Tensor = _Loop.apply(a, u, self.library)
        return h, h[:, -1]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, library: Any) -> Tensor:
        h = torch.empty_like(a)
        library.forward(*map(_pointer, (a, u, h)), *map(ctypes.c_long, a.shape))
        ctx.save_for_backward(a, h)
        ctx.library = library
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, h = ctx.saved_tensors
        grad_a, grad_u = torch.empty_like(a), torch.empty_like(a)
        tensors = (a, h, grads[0].contiguous(), grad_a, grad_u)
        ctx.library.backward(*map(_pointer, tensors), *map(ctypes.c_long, a.shape))
        return grad_a, grad_u, None


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def sliced_loop(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over time as it is usually written; the backward of each slice is as long as the row."""
    h = u[:, 0]
    states = [h]
    for t in range(1, a.shape[1]):
        h = a[:, t] * h + u[:, t]
        states.append(h)
    return torch.stack(states, dim=1), h


def main() -> None:
    """Measure every shape and length, and write the result."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    arms: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "auto": scan,
        "chunk": lambda a, u: scan(a, u, impl="chunk"),
        "unbind": scan_reference,
        "python": sliced_loop,
    }
    if shutil.which("g++"):
        arms["c++"] = CompiledLoop()
    results = []
    for shape in arguments.shapes.split(","):
        rows, width = map(int, shape.split("x"))
        cases = [measure(arms, rows, int(length), width, arguments.repeats) for length in arguments.lengths.split(",")]
        for case in cases:
            print(line(case), flush=True)
        exponents = {
            f"{short['positions']} to {long['positions']}": math.log(long["ms"]["auto"] / short["ms"]["auto"])
            / math.log(long["positions"] / short["positions"])
            for short, long in itertools.pairwise(cases)
        }
        results.append({"rows": rows, "width": width, "step_us": step_us(rows, width), "linear": exponents})
        results[-1]["cases"] = cases
        print(f"  linear: {', '.join(f'{name} {value:.2f}' for name, value in exponents.items())}; "
              f"one step {results[-1]['step_us']:.0f} us")  # fmt: skip
    if arguments.dry:
        return
    described = {**machine(arguments.threads), "load_average": round(os.getloadavg()[0], 1)}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"recurrence-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")
    print(f"written to {file}")


def measure(arms: dict[str, Any], rows: int, length: int, width: int, repeats: int) -> dict[str, Any]:
    """Interleaved passes, forward and backward, of all arms on the same numbers."""
    generator = torch.Generator().manual_seed(length)
    a = torch.rand(rows, length, width, generator=generator).requires_grad_()
    u = torch.randn(rows, length, width, generator=generator).requires_grad_()
    grad = torch.randn(rows, length, width, generator=generator)
    present = [name for name in arms if rows * length * width <= LARGEST.get(name, 1 << 40)]
    times: dict[str, list[float]] = {name: [] for name in present}
    values = {}
    for turn in range(repeats + 2):
        for name in random.Random(turn).sample(present, len(present)):  # who comes after whom decides what is cached
            if name in LARGEST and turn >= SLOW_TURNS + 2:
                continue
            a.grad = u.grad = None
            started = time.process_time()
            h, _ = arms[name](a, u)
            h.backward(grad)
            elapsed = time.process_time() - started
            if turn >= 2:
                times[name].append(1e3 * elapsed)
            assert a.grad is not None
            values[name] = [h.detach(), a.grad]
    pairs = [pair for name in present for pair in zip(values[name], values["auto"], strict=True)]
    error = max((x - y).abs().max().item() for x, y in pairs)
    ratios = {
        f"auto / {name}": statistics.median(
            x / y for x, y in zip(times["auto"], times[name], strict=name not in LARGEST)
        )
        for name in present
        if name != "auto"
    }
    ms = {name: statistics.median(values) for name, values in times.items()}
    return {"rows": rows, "positions": length, "width": width, "ms": ms, "ratios": ratios, "largest_difference": error}


def step_us(rows: int, width: int, steps: int = 2000) -> float:
    """Microseconds of one position without gradients."""
    a, u, h = torch.rand(rows, 1, width), torch.randn(rows, 1, width), torch.zeros(rows, width)
    with torch.no_grad():
        started = time.process_time()
        for _ in range(steps):
            _, h = scan(a, u, h)
    return 1e6 * (time.process_time() - started) / steps


def line(case: dict[str, Any]) -> str:
    """One result for people."""
    times = ", ".join(f"{name} {value:.2f}" for name, value in case["ms"].items())
    ratios = ", ".join(f"{name} {value:.3f}" for name, value in case["ratios"].items())
    return f"{case['rows']:>3} x {case['positions']:>5} x {case['width']:>4}: ms {times}; {ratios}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="4x256,32x512,1x512", help="rows x channels of each case")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print and write no file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
