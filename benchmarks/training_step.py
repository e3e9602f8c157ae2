"""A ternary training step against its bfloat16 twin: time and peak memory, as ratios of one run.

    python benchmarks/training_step.py [--models 95m,10m] [--modes eager,compiled] [--steps 12]

Both arms live in one process and take turns step by step, so that a machine whose speed drifts treats them alike.
The clock is process CPU time on one thread, which other programs disturb least; wall time is reported beside it.
A step is forward, backward, and fused AdamW on one micro-batch, so each ternary step also pays for one
quantization of all weights. Memory is measured in a process of its own per arm: `tensors` is the largest sum of live
tensors during a step (weights, gradients, optimizer state, codes, activations), `process` the growth of the resident
set, which also holds the holes that the C library's heap keeps.
`published` is the layer as papers print it: every forward pass rounds weights and activations, dequantizes both, and
multiplies in bfloat16 (here even with merged projections).

Writes benchmarks/results/training_step-DATE.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ternlm.device import keep_freed_memory, peak_memory_mb
from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode, build_model
from ternlm.models.bitnet import BitNetSettings
from ternlm.nn import linear
from ternlm.ops.quantized_linear import quantized_linear
from ternlm.training.optimizer import OptimizerSettings, build_optimizer

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "95m": (BitNetSettings(vocab_size=32000), 2, 1024),
    "10m": (
        BitNetSettings(vocab_size=256, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
                       num_key_value_heads=4, intermediate_size=1024),
        16, 256,
    ),
}  # fmt: skip
ARMS = ("ternary", "twin", "published")


class Arm:
    """A model, its optimizer, and one fixed batch."""

    def __init__(self, name: str, shape: str, compiled: bool) -> None:
        settings, rows, length = SHAPES[shape]
        self.name = name
        mode = FULL_PRECISION if name == "twin" else QuantizationMode()
        self.model: LanguageModel = build_model(settings, mode)
        self.model.initialize(0)
        self.model.compute_dtype = torch.bfloat16
        if compiled:
            for block in self.model.blocks():
                block.compile(fullgraph=True)
        self.optimizer = build_optimizer(self.model, OptimizerSettings(learning_rate=1e-3))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, settings.vocab_size or 0, (rows, length + 1), generator=generator)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def step(self) -> float:
        """One training step; returns the loss."""
        linear.quantized_linear = published_linear if self.name == "published" else quantized_linear
        loss = F.cross_entropy(self.model(self.tokens).logits.float().flatten(0, 1), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def published_linear(
    x: torch.Tensor, weight: torch.Tensor, codes: Any, scale: Any, sizes: Sequence[int], bits: Any
) -> tuple[torch.Tensor, ...]:
    """The usual formulation, with the interface of `quantized_linear`."""
    rounded = []
    for part in weight.split(list(sizes)):
        s = 1.0 / part.abs().mean().clamp_min(1e-5)
        rounded.append(part + ((part * s).round().clamp(-1, 1) / s - part).detach())
    s = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
    x = x + ((x * s).round().clamp(-128, 127) / s - x).detach()
    return F.linear(x, torch.cat(rounded).to(x.dtype)).split(list(sizes), dim=-1)


def main() -> None:
    """Measure every shape and mode, and write the result."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.memory_of:
        print(json.dumps(peak_of(*arguments.memory_of.split(","))))
        return
    results = []
    for shape in arguments.models.split(","):
        for mode in arguments.modes.split(","):
            result = measure(shape, mode == "compiled", arguments)
            results.append({"model": shape, "mode": mode, **result})
            print(line(results[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"training_step-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps({"machine": machine(arguments.threads), "results": results}, indent=1) + "\n")
    print(f"written to {file}")


def measure(shape: str, compiled: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of all arms, and peak memory of each in its own process."""
    arms = [Arm(name, shape, compiled) for name in ARMS if not (compiled and name == "published")]
    for arm in arms:
        for _ in range(arguments.warmup):
            arm.step()
    cpu: dict[str, list[float]] = {arm.name: [] for arm in arms}
    wall: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(arguments.steps):
        for arm in arms:
            started, cpu_started = time.perf_counter(), time.process_time()
            arm.step()
            cpu[arm.name].append(time.process_time() - cpu_started)
            wall[arm.name].append(time.perf_counter() - started)
    twin = cpu["twin"]
    ratios = {name: [a / b for a, b in zip(times, twin, strict=True)] for name, times in cpu.items() if name != "twin"}
    memory = {} if arguments.skip_memory else {name: memory_of(name, shape, compiled) for name in ("ternary", "twin")}
    kinds = next(iter(memory.values()), {})
    return {
        "step_cpu_ms": {name: 1e3 * statistics.median(times) for name, times in cpu.items()},
        "step_wall_ms": {name: 1e3 * statistics.median(times) for name, times in wall.items()},
        "time_ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "time_ratio_quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
        "peak_memory_mb": memory,
        "memory_ratio": {kind: memory["ternary"][kind] / memory["twin"][kind] for kind in kinds},
    }


def memory_of(name: str, shape: str, compiled: bool) -> dict[str, float]:
    """Peak memory of one arm, in MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", f"{name},{shape},{'compiled' if compiled else 'eager'}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def peak_of(name: str, shape: str, mode: str) -> dict[str, float]:
    """Peak of live tensors, and of the process above what it held before the model was built."""
    before = peak_memory_mb(torch.device("cpu"))
    arm = Arm(name, shape, mode == "compiled")
    for _ in range(3):
        arm.step()
    process = peak_memory_mb(torch.device("cpu")) - before
    kept = [*arm.model.parameters(), *arm.model.buffers()]
    kept += [value for state in arm.optimizer.state.values() for value in state.values()]
    static = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        arm.step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"tensors": (static + peak) / 2**20, "process": process}


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    time_ratio, memory = result["time_ratio"], result["memory_ratio"].get("tensors", float("nan"))
    low, high = result["time_ratio_quartiles"]["ternary"]
    text = f"{result['model']:>4} {result['mode']:9} ternary/twin: time {time_ratio['ternary']:.3f} "
    text += f"({low:.3f} to {high:.3f}), peak memory {memory:.3f}"
    return text + (f"; as papers print it: time {time_ratio['published']:.3f}" if "published" in time_ratio else "")


def machine(threads: int) -> dict[str, Any]:
    """What it ran on."""
    model = next((row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines()
                  if row.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": model, "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="95m,10m")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per arm")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
