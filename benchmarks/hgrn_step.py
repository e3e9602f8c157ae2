"""A training step of the flat recurrent model against its full-precision twin: time, as ratios of one run.

    python benchmarks/hgrn_step.py [--models small,nano] [--modes eager,compiled] [--steps 12]

`ternary` is the family by default: merged input projections, one norm before each output projection. `norms_everywhere`
is the same with a norm of its own in front of every ternary layer, the form first published, whose three input
projections round their input three times. `twin` is the default form in full precision, the same norms included. All
arms live in one process and take turns step by step, so that a machine whose speed drifts treats them alike. The clock
is process CPU time on one thread, which other programs disturb least; wall time is reported beside it. A step is
forward, loss, backward, and fused AdamW on one micro-batch, so each ternary step also pays for one rounding of all
weights.

`scan_share` is the share of a ternary step spent in the scans: their forward and backward alone, at the shapes of the
step, measured between the steps of the same run.

Writes benchmarks/results/hgrn_step-DATE.json.
"""

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from turns import against_twin, measure_cases, ratios, step_arguments, take_turns

from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode, build_model, model_settings
from ternlm.ops.recurrence import scan
from ternlm.training.optimizer import OptimizerSettings, build_optimizer

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "85m": ({"hidden_size": 768, "num_hidden_layers": 12}, 1, 2048),
    "small": ({"hidden_size": 512, "num_hidden_layers": 6}, 4, 512),
    "nano": ({"hidden_size": 256, "num_hidden_layers": 4}, 16, 256),
}
ARMS: dict[str, tuple[dict[str, Any], QuantizationMode]] = {
    "ternary": ({}, QuantizationMode()),
    "norms_everywhere": ({"bitlinear_norm": "rms"}, QuantizationMode()),
    "twin": ({}, FULL_PRECISION),
}


class Arm:
    """A model, its optimizer, and one fixed batch."""

    def __init__(self, name: str, shape: str, compiled: bool) -> None:
        values, rows, length = SHAPES[shape]
        overrides, mode = ARMS[name]
        settings = model_settings({"family": "hgrn", "vocab_size": 256, **values, **overrides})
        self.name = name
        self.model: LanguageModel = build_model(settings, mode)
        self.model.initialize(0)
        self.model.compute_dtype = torch.bfloat16
        if compiled:
            for block in self.model.blocks():
                block.compile(fullgraph=True)
        self.optimizer = build_optimizer(self.model, OptimizerSettings(learning_rate=1e-3))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 256, (rows, length + 1), generator=generator)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def step(self) -> float:
        """One training step; returns the loss."""
        loss = F.cross_entropy(self.model(self.tokens).logits.float().flatten(0, 1), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Scans:
    """The scans of all layers on inputs of the shapes that they meet, forward and backward."""

    def __init__(self, shape: str) -> None:
        values, rows, length = SHAPES[shape]
        self.layers = values["num_hidden_layers"]
        size = (rows, length, values["hidden_size"])
        self.a, self.u = torch.rand(size, requires_grad=True), torch.randn(size, requires_grad=True)

    def run(self) -> None:
        """Once forward and backward through each layer's scan."""
        for _ in range(self.layers):
            h, _ = scan(self.a, self.u)
            h.backward(self.u.detach())
            self.a.grad = self.u.grad = None


def main() -> None:
    arguments = step_arguments(str(__doc__).splitlines()[0], "small,nano")
    measure_cases("hgrn_step", arguments, lambda shape, compiled: measure(shape, compiled, arguments), line)


def measure(shape: str, compiled: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of all arms, and of the scans alone."""
    arms = [Arm(name, shape, compiled) for name in ARMS]
    calls = {arm.name: arm.step for arm in arms} | {"scans": Scans(shape).run}
    cpu, wall = take_turns(calls, arguments.warmup, arguments.steps)
    return {
        **against_twin(cpu, wall),
        "norms_everywhere_time_ratio": statistics.median(ratios(cpu, "norms_everywhere", "twin")),
        "scan_share": statistics.median(ratios(cpu, "scans", "ternary")),
    }


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    low, high = result["time_ratio_quartiles"]
    text = f"{result['model']:>5} {result['mode']:9} ternary/twin: time {result['time_ratio']:.3f} "
    text += f"({low:.3f} to {high:.3f}), norms everywhere {result['norms_everywhere_time_ratio']:.3f}; "
    return text + f"scans {result['scan_share']:.1%} of the ternary step"


if __name__ == "__main__":
    main()
