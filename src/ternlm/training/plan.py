"""What a run will cost, computed without training: parameters, tokens, arithmetic, memory, disk, rates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ternlm.models import LanguageModel, build_model
from ternlm.ops.packing import BLOCK
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings

_STATE_BYTES = 16  # float32 latent weight, gradient, and two Adam moments
_CHECKPOINT_BYTES = 12  # the same without the gradient


@dataclass(frozen=True)
class Plan:
    """Counts are exact except where `estimate` is part of the name; sizes are bytes.

    Attributes:
        ternary, embedding, other: Parameters by kind.
        steps, tokens: Optimizer steps and training tokens.
        tokens_per_parameter: tokens / all parameters.
        flops: Floating-point operations of the whole run.
        state_bytes: Latent weights, gradients, Adam moments and cached codes.
        activation_bytes_estimate: Kept for the backward pass of one micro-batch, with its logits.
        checkpoint_bytes: One checkpoint; `disk_bytes` all that are kept.
        packed_bytes: Codes at 2 bits, scales, everything else in bfloat16.
        schedule: Learning rate and weight decay of every update.
    """

    ternary: int
    embedding: int
    other: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops: float
    state_bytes: int
    activation_bytes_estimate: int
    checkpoint_bytes: int
    disk_bytes: int
    packed_bytes: int
    schedule: Schedule

    @property
    def parameters(self) -> int:
        return self.ternary + self.embedding + self.other

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with the rates at a few steps."""
        last = self.steps - 1
        marks = sorted({0, self.schedule.warmup_steps, *self.schedule.boundaries(), last // 2, last} - {self.steps})
        rates = [
            {
                "step": k,
                "learning_rate": self.schedule.learning_rate(k),
                "weight_decay": self.schedule.weight_decay(k),
            }
            for k in marks
        ]
        values = {name: value for name, value in vars(self).items() if name != "schedule"}
        return {"parameters": self.parameters, **values, "rates": rates}


def make_plan(settings: RunSettings, windows_per_epoch: int | None = None) -> Plan:
    """Count a run.

    Args:
        settings: With the model's vocabulary size filled in.
        windows_per_epoch: Needed only where `training.max_epochs` is the limit.
    """
    with torch.device("meta"):
        model = build_model(settings.model, settings.quantization)
    counts = model.parameter_counts()
    training, length = settings.training, settings.data.sequence_length
    steps = settings.total_steps(windows_per_epoch)
    tokens = steps * training.batch_size * length
    is_quantized = settings.quantization.weights != "none"
    kept = training.keep_last + 2 + (steps // training.keep_every if training.keep_every else 0)
    checkpoint_bytes = _CHECKPOINT_BYTES * counts.total
    return Plan(
        ternary=counts.ternary,
        embedding=counts.embedding,
        other=counts.other,
        steps=steps,
        tokens=tokens,
        tokens_per_parameter=tokens / counts.total,
        flops=tokens * settings.model.flops_per_token(length),
        state_bytes=_STATE_BYTES * counts.total + is_quantized * counts.ternary,
        activation_bytes_estimate=activation_bytes(model, settings, training.first_micro_batch_size()),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=kept * checkpoint_bytes,
        packed_bytes=_packed_bytes(model),
        schedule=Schedule(settings.schedule, settings.optimizer.learning_rate, settings.optimizer.weight_decay, steps),
    )


def draw_schedule(plan: Plan, file: Path, title: str) -> None:
    """The learning-rate curve, and the weight decay below it, as a picture (PNG or SVG by the ending)."""
    from matplotlib.figure import Figure

    steps = sorted({min(round(i * plan.steps / 600), plan.steps - 1) for i in range(601)}
                   | {b + side for b in plan.schedule.boundaries() for side in (-1, 0)})  # fmt: skip
    figure = Figure(figsize=(7, 4), layout="constrained")
    rate, decay = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    rate.plot(steps, [plan.schedule.learning_rate(k) for k in steps], color="#1f6feb")
    rate.set(ylabel="learning rate", title=title, ylim=(0, None))
    decay.plot(steps, [plan.schedule.weight_decay(k) for k in steps], color="#bc4c00")
    decay.set(ylabel="weight decay", xlabel="optimizer step", ylim=(0, None))
    for axes in (rate, decay):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _packed_bytes(model: LanguageModel) -> int:
    packed = scales = 0
    for layer in model.bit_linears().values():
        packed += sum(layer.sizes) * 64 * -(-layer.in_features // BLOCK)
        scales += 4 * len(layer.sizes)
    counts = model.parameter_counts()
    return packed + scales + 2 * (counts.embedding + counts.other)


def activation_bytes(model: LanguageModel, settings: RunSettings, rows: int) -> int:
    """An estimate of what a forward pass over so many sequences keeps for the backward pass.

    Inputs of the linear layers (int8 when quantized, else the compute type), twice their outputs, logits.
    Each layer keeps its input; the outputs are kept by what consumes them (attention, gate, norms),
    about twice over with the norms' own copies.
    """
    training = settings.training
    tokens = rows * settings.data.sequence_length
    wide = 4 if training.precision == "fp32" else 2
    is_int8 = settings.quantization.weights != "none" and settings.quantization.activations != "none"
    layers = list(model.bit_linears().values())
    per_token = sum(layer.in_features * (1 if is_int8 else wide) + 2 * wide * sum(layer.sizes) for layer in layers)
    if training.gradient_checkpointing:
        blocks = sum(1 for _ in model.blocks())
        per_token = per_token // blocks + blocks * wide * layers[0].in_features
    logits = (wide + 4 + 4) * (settings.model.vocab_size or 0)
    return tokens * (per_token + logits)
