"""A ternary training step against its bfloat16 twin: time and peak memory, as ratios of one run.

    python benchmarks/training_step.py [--models 95m,10m] [--modes eager,compiled] [--steps 12]

The two shapes and the layers that `ternlm benchmark` would take by name, measured by what it measures with
(`ternlm.benchmark`): arms take turns step by step on one thread, the clock is process CPU time, and wall time is
reported beside it. A step is forward, backward, clipping and fused AdamW on one micro-batch, so each ternary step also
pays for one quantization of all weights. `tensors` is the largest sum of live tensors during a step (weights,
gradients, optimizer state, codes, activations), `process` the growth of the resident set of a process of its own.
`published` is the layer as papers print it.

Writes benchmarks/results/training_step-DATE.json.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ternlm.benchmark.candidate import Candidate
from ternlm.benchmark.subject import Work
from ternlm.benchmark.suite import Options, measure
from ternlm.device import set_up
from ternlm.training.provenance import hardware

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "95m": ({"family": "bitnet", "vocab_size": 32000}, 2, 1024),
    "10m": (
        {"family": "bitnet", "vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "intermediate_size": 1024},
        16, 256,
    ),
}  # fmt: skip
FULL = {"weights": "none", "activations": "none"}


def main() -> None:
    """Measure every shape and mode, and write the result."""
    arguments = _arguments()
    set_up(torch.device("cpu"), arguments.threads)
    results = []
    for shape in arguments.models.split(","):
        for mode in arguments.modes.split(","):
            torch._dynamo.reset()  # or the graphs of all cases together reach its limit
            results.append({"model": shape, "mode": mode, **step_case(shape, mode == "compiled", arguments)})
            print(line(results[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"training_step-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps({"machine": machine(arguments.threads), "results": results}, indent=1) + "\n")
    print(f"written to {file}")


def step_case(shape: str, compiled: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of all arms, and the peak memory of each."""
    model, rows, length = SHAPES[shape]
    ternary = Candidate("ternary", "own", model=model, quantization={"weights": "ternary"})
    candidates = [ternary, Candidate("twin", "own", model=model, quantization=FULL)]
    if not compiled:
        candidates.append(ternary.with_peer("published"))
    work = Work(rows, length, compiled)
    options = Options(torch.device("cpu"), inference=False, work=work, warmup=arguments.warmup,
                      repeats=arguments.steps, process_memory=not arguments.skip_memory)  # fmt: skip
    training = measure(candidates, options)["training"]
    found = {row["name"].rpartition(" / ")[2]: row for row in training["rows"]}
    ratios = {name: row["ratio"] for name, row in found.items() if name != "twin"}
    kinds = ("tensors", "process") if options.process_memory else ("tensors",)
    memory = {name: {kind: found[name][f"{kind}_mb"] for kind in kinds} for name in ("ternary", "twin")}
    return {
        "step_cpu_ms": {name: row["step_cpu_ms"]["median"] for name, row in found.items()},
        "step_wall_ms": {name: row["step_wall_ms"]["median"] for name, row in found.items()},
        "time_ratio": {name: ratio["median"] for name, ratio in ratios.items()},
        "time_ratio_quartiles": {name: [ratio["low"], ratio["high"]] for name, ratio in ratios.items()},
        "peak_memory_mb": memory,
        "memory_ratio": {kind: memory["ternary"][kind] / memory["twin"][kind] for kind in kinds},
    }


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    time_ratio, memory = result["time_ratio"], result["memory_ratio"]["tensors"]
    low, high = result["time_ratio_quartiles"]["ternary"]
    text = f"{result['model']:>4} {result['mode']:9} ternary/twin: time {time_ratio['ternary']:.3f} "
    text += f"({low:.3f} to {high:.3f}), peak memory {memory:.3f}"
    return text + (f"; as papers print it: time {time_ratio['published']:.3f}" if "published" in time_ratio else "")


def machine(threads: int) -> dict[str, Any]:
    """What it ran on."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": hardware()["cpu"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="95m,10m")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per arm")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-memory", action="store_true", help="no processes for the memory of each arm")
    return parser.parse_args()


if __name__ == "__main__":
    main()
