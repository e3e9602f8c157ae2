"""What a run will cost, computed without training: parameters, tokens, arithmetic, memory, disk, rates."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ternlm.checkpoint import packed_bytes
from ternlm.models import LanguageModel, build_model
from ternlm.nn.linear import BitLinear
from ternlm.run_directory import runs_root
from ternlm.training.distillation import teacher_bytes
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings

_STATE_BYTES = 16  # float32 latent weight, gradient, and two Adam moments
_CHECKPOINT_BYTES = 12  # the same without the gradient


@dataclass(frozen=True)
class Plan:
    """Counts are exact except where `estimate` is part of the name; sizes are bytes.

    Attributes:
        ternary, embedding, other: Parameters by kind.
        integer: How many of those called ternary keep integer weights to the end.
        steps, tokens: Optimizer steps and training tokens.
        tokens_per_parameter: tokens / all parameters.
        flops: Floating-point operations of the whole run.
        state_bytes: Latent weights, gradients, Adam moments and cached codes.
        teacher_bytes: Weights of the teacher that the run learns from; 0 without one.
        activation_bytes_estimate: Kept for the backward pass of one micro-batch, with its logits.
        checkpoint_bytes: One checkpoint; `disk_bytes` all that are kept.
        packed_bytes: Codes at 2 bits, or at as many as integer weights have, scales, everything else in bfloat16.
        stages: First and last step and name of each stage of progressive quantization.
        schedule: Learning rate and weight decay of every update.
    """

    ternary: int
    integer: int
    embedding: int
    other: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops: float
    state_bytes: int
    teacher_bytes: int
    activation_bytes_estimate: int
    checkpoint_bytes: int
    disk_bytes: int
    packed_bytes: int
    stages: list[tuple[int, int, str]]
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
        model = build_model(settings.model, settings.quantization.base())
    counts = model.parameter_counts()
    training, length = settings.training, settings.data.sequence_length
    steps = settings.total_steps(windows_per_epoch)
    tokens = steps * training.batch_size * length
    is_quantized = settings.quantization.weights != "none"
    kept = training.keep_last + 2 + (steps // training.keep_every if training.keep_every else 0)
    checkpoint_bytes = _CHECKPOINT_BYTES * counts.total
    schedule = settings.rates(steps)
    return Plan(
        ternary=counts.ternary,
        integer=sum(layer.weight.numel() for layer in model.bit_linears().values() if layer.mode.weight_bits),
        embedding=counts.embedding,
        other=counts.other,
        steps=steps,
        tokens=tokens,
        tokens_per_parameter=tokens / counts.total,
        flops=tokens * settings.model.flops_per_token(length),
        state_bytes=_STATE_BYTES * counts.total + is_quantized * counts.ternary,
        teacher_bytes=teacher_bytes(settings.distillation, runs_root()),
        activation_bytes_estimate=activation_bytes(model, settings, training.first_micro_batch_size()),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=kept * checkpoint_bytes,
        packed_bytes=packed_bytes(model),
        stages=_stages(schedule),
        schedule=schedule,
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


def _stages(schedule: Schedule) -> list[tuple[int, int, str]]:
    starts = [0, *schedule.boundaries()] if schedule.quantization is not None else []
    ends = [*starts[1:], schedule.total_steps]
    return [(first, end - 1, str(schedule.stage_name(first))) for first, end in zip(starts, ends, strict=False)]


def activation_bytes(model: LanguageModel, settings: RunSettings, rows: int) -> int:
    """An estimate of what a forward pass over so many sequences keeps for the backward pass.

    Inputs of the linear layers (int8 when quantized, else the compute type), twice their outputs, what a family keeps
    besides, and logits of the positions that are scored, also those of a teacher. Each layer keeps its input; the
    outputs are kept by what consumes them (attention, gate, norms), about twice over with the norms' own copies.
    Layers whose quantizers are perturbed keep their weights as well, latent and rounded, and attention with dropout
    its scores where it is not fused. Inner stages of a hierarchical model count as if nothing were cut.
    """
    training, length = settings.training, settings.data.sequence_length
    tokens = rows * length
    wide = 4 if training.precision == "fp32" else 2
    is_int8 = settings.quantization.weights != "none" and settings.quantization.activations != "none"
    layers = list(model.bit_linears().values())
    kept = settings.model.kept_per_token
    per_token = kept + sum(
        layer.in_features * (1 if is_int8 else wide) + 2 * wide * sum(layer.sizes) for layer in layers
    )
    per_row = length * length * settings.model.kept_scores if _is_on_cpu(training.device) else 0
    if training.gradient_checkpointing:
        blocks = settings.model.total_blocks
        per_token = per_token // blocks + blocks * wide * layers[0].in_features
        per_row //= blocks
    masking = settings.objective.masking
    scored = tokens if masking is None else math.ceil(masking.mask_fraction * tokens)
    logits = (wide + 4 + 4 + wide * (settings.distillation.teacher is not None)) * (settings.model.vocab_size or 0)
    rounded = (m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))  # a head as well
    weights = sum(rounded) if settings.quantization.perturbs else 0
    return tokens * per_token + rows * per_row + scored * logits + weights * (4 + 2 * wide)


def _is_on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
