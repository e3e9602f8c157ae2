"""How far one distribution over the vocabulary is from another: what knowledge distillation minimizes.

Logits are the largest tensors of a training step, so nothing of their size is made in float32: values and
gradients are computed in blocks of rows, and only the gradient is as large as the logits, in their own dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks

ELEMENTS = 1 << 25
"""Elements per block away from the CPU: 128 MB per float32 intermediate."""


def divergence(student: Tensor, teacher: Tensor, scored: Tensor | None, temperature: float) -> Tensor:
    """Sum over rows of KL(softmax(teacher / tau) || softmax(student / tau)), in nats.

    The gradient in a row of the student is (softmax(student / tau) - softmax(teacher / tau)) / tau.

    Args:
        student: Logits, (rows, vocab), any float dtype; the gradient has the same.
        teacher: Logits, (rows, vocab); they get no gradient.
        scored: (rows,), bool: the rows that count; None counts all. What stands in the others has no effect.
        temperature: tau, above 0.

    Returns:
        float32, ().

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2 (arXiv 1503.02531).
    """
    total: Tensor = _Divergence.apply(student, teacher, scored, temperature)
    return total


def plain_divergence(student: Tensor, teacher: Tensor, scored: Tensor | None, temperature: float) -> Tensor:
    """`divergence` as its formula reads, differentiated by autograd: what the fast one is compared with."""
    if scored is not None:
        student, teacher = student[scored], teacher[scored]
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum()


class _Divergence(torch.autograd.Function):
    """Both passes block by block; the backward pass computes the probabilities again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, scored: Tensor | None, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, scored)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for rows in _blocks(student):
            log_student, log_teacher = (
                F.log_softmax(logits[rows].float() / temperature, dim=-1) for logits in (student, teacher)
            )
            nats = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
            total += (nats if scored is None else torch.where(scored[rows], nats, 0.0)).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, scored = ctx.saved_tensors
        temperature, gradient = ctx.temperature, torch.empty_like(student)
        for rows in _blocks(student):
            p_student, p_teacher = (
                F.softmax(logits[rows].float() / temperature, dim=-1) for logits in (student, teacher)
            )
            part = (p_student - p_teacher) * (grads[0] / temperature)
            gradient[rows] = part if scored is None else torch.where(scored[rows, None], part, 0.0)
        return gradient, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    if logits.device.type == "cpu":
        return row_blocks(logits)
    step = max(1, ELEMENTS // max(logits.shape[1], 1))
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
