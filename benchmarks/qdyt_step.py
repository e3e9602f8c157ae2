"""A masked-encoder training step, everything on, against its full-precision twin with root-mean-square norms.

    python benchmarks/qdyt_step.py [--models base,small] [--modes eager,compiled] [--steps 12]

`ternary` is the family as it trains in its last stage: absmean ternary weights, 4-bit activations with stochastic
rounding and observed scales, tanh norms, mixers, learned residual scales, integer embedding and head. `learned` is the
same with a learned scale and threshold of each row (ttq). `twin` has the same shape with none of it. All arms live in
one process and take turns step by step, so that a machine whose speed drifts treats them alike. The clock is process
CPU time on one thread, which other programs disturb least; wall time is reported beside it. A step is forward, loss at
15% of the positions, backward, the update of activation scales, and fused AdamW on one micro-batch, dropout included,
so each ternary step also pays for one rounding of all weights.

`mixers` is the share of a ternary step spent in the rotations: their forward and backward alone, at the shapes of the
step, measured between the steps of the same run. They run eagerly there, so the share is an upper bound for compiled
blocks; `step_without_mixers`, a third arm that has none, tells what they cost in any mode.

Writes benchmarks/results/qdyt_step-DATE.json.
"""

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from turns import against_twin, measure_cases, ratios, step_arguments, take_turns

from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode, build_model, model_settings
from ternlm.nn.mixer import Mixer
from ternlm.training.optimizer import OptimizerSettings, build_optimizer

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "base": ({"vocab_size": 30522, "mixed_precision_last_blocks": 2, "vo_bits": 6, "qk_bits": 6}, 8, 128),
    "small": (
        {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
         "intermediate_size": 1536},
        8, 128,
    ),
}  # fmt: skip
TERNARY = QuantizationMode(activations="int4")
LEARNED = QuantizationMode(quantizer="ttq", granularity="row", activations="int4")
ARMS: dict[str, tuple[dict[str, Any], QuantizationMode]] = {
    "ternary": ({}, TERNARY),
    "learned": ({}, LEARNED),
    "step_without_mixers": ({"mixers": False}, TERNARY),
    "twin": (
        {"norm_type": "rms", "mixers": False, "skip_init": False, "embed_scale": "none"},
        FULL_PRECISION,
    ),
}  # fmt: skip
MASKED = 0.15


class Arm:
    """A model, its optimizer, and one fixed batch."""

    def __init__(self, name: str, shape: str, compiled: bool) -> None:
        values, rows, length = SHAPES[shape]
        overrides, mode = ARMS[name]
        settings = model_settings({"family": "qdyt", **values, **overrides})
        self.name, self.passes = name, 0
        self.model: LanguageModel = build_model(settings, mode)
        self.model.initialize(0)
        self.model.compute_dtype = torch.bfloat16
        self.model.set_step(10_000)
        if compiled:
            for block in self.model.blocks():
                block.compile(fullgraph=True)
        self.optimizer = build_optimizer(self.model, OptimizerSettings(learning_rate=3e-4))
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, settings.vocab_size or 0, (rows, length), generator=generator)
        self.scored = torch.rand(rows, length, generator=generator) < MASKED
        self.targets = self.tokens[self.scored]

    def step(self) -> float:
        """One training step; returns the loss."""
        self.passes += 1
        torch.manual_seed(self.passes)
        self.model.begin_pass(self.passes)
        loss = F.cross_entropy(self.model(self.tokens, scored=self.scored).logits.float(), self.targets)
        loss.backward()
        self.model.end_pass()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Rotations:
    """All mixers of a model on inputs of the shapes that they meet, forward and backward."""

    def __init__(self, model: LanguageModel, rows: int, length: int) -> None:
        self.calls: list[tuple[Mixer, torch.Tensor]] = []
        heads = model.settings.num_attention_heads  # type: ignore[attr-defined]
        for name, module in model.named_modules():
            if isinstance(module, Mixer):
                is_head = module.width == model.settings.head_dim  # type: ignore[attr-defined]
                shape = (rows, length, heads, module.width) if is_head else (rows, length, module.width)
                x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
                self.calls += [(module, x)] * (2 if name.endswith("qk_mixer") else 1)

    def run(self) -> None:
        """Once forward and backward through each."""
        for mixer, x in self.calls:
            mixer(x).backward(x.detach())
            x.grad = None


def main() -> None:
    arguments = step_arguments(str(__doc__).splitlines()[0], "base,small")
    measure_cases("qdyt_step", arguments, lambda shape, compiled: measure(shape, compiled, arguments), line)


def measure(shape: str, compiled: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of all arms, and of the rotations alone."""
    arms = [Arm(name, shape, compiled) for name in ARMS]
    rotations = Rotations(arms[0].model, *SHAPES[shape][1:])
    calls = {arm.name: arm.step for arm in arms} | {"mixers": rotations.run}
    cpu, wall = take_turns(calls, arguments.warmup, arguments.steps)
    return {
        **against_twin(cpu, wall),
        "learned_time_ratio": statistics.median(ratios(cpu, "learned", "twin")),
        "mixer_share": statistics.median(ratios(cpu, "mixers", "ternary")),
    }


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    low, high = result["time_ratio_quartiles"]
    text = f"{result['model']:>5} {result['mode']:9} ternary/twin: time {result['time_ratio']:.3f} "
    text += f"({low:.3f} to {high:.3f}), learned {result['learned_time_ratio']:.3f}; "
    return text + f"mixers {result['mixer_share']:.1%} of the ternary step"


if __name__ == "__main__":
    main()
