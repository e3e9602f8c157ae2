"""One optimizer step: micro-batches, gradients, the non-finite check, clipping, and the update."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ternlm.data.batch import Batch
from ternlm.device import is_out_of_memory
from ternlm.errors import Diverged, MemoryExhausted
from ternlm.models import LanguageModel
from ternlm.training.objective import ObjectiveSettings, loss_sums

MOST_SKIPPED_IN_A_ROW = 3
LOWER_RATE = (
    "The last checkpoint is good. Start from it with a lower rate: "
    "ternlm train --resume-from RUN --run-id NEW optimizer.learning_rate=..."
)


class StepResult(NamedTuple):
    """What one step measured.

    Attributes:
        loss: Nats per target, without auxiliary terms.
        grad_norm: Norm of the gradient before clipping.
        targets: Targets in the batch.
        skipped: The gradient was not finite and nothing was updated.
    """

    loss: float
    grad_norm: float
    targets: int
    skipped: bool


class Stepper:
    """Turns a batch into an update.

    The gradient is that of the sum of nats over the whole batch divided by its number of targets,
    however it is cut into micro-batches. A non-finite loss or gradient never reaches the optimizer.

    Args:
        model: Its parameters are updated.
        optimizer: Rates are set by the caller.
        objective: What is minimized.
        grad_clip: Largest gradient norm; 0 switches clipping off.
        micro_batch_size: Rows per forward pass.
        shrink: Halve `micro_batch_size` when memory runs out, and try the batch again.
        warn: Called with one sentence when that happens, or when a step is skipped.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        objective: ObjectiveSettings,
        grad_clip: float,
        micro_batch_size: int,
        shrink: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.grad_clip, self.micro_batch_size, self.shrink, self.warn = (
            grad_clip,
            micro_batch_size,
            shrink,
            warn,
        )
        self.skipped_in_a_row = 0
        self._parameters = list(model.parameters())
        # Only float16 gradients underflow; the scaler is off, and free, in every other precision.
        device = self._parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=model.compute_dtype == torch.float16)

    def __call__(self, batch: Batch) -> StepResult:
        """Run one step.

        Raises:
            Diverged: The gradient was not finite several times in a row.
            MemoryExhausted: A single row does not fit.
        """
        nll = self._backward_within_memory(batch)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        loss, grad_norm = (nll / batch.num_targets).item(), norm.item()
        is_finite = bool(torch.isfinite(torch.tensor([loss, grad_norm])).all())
        if is_finite:
            self._update(norm, grad_norm)
        elif self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(is_finite, loss, grad_norm)
        return StepResult(loss, grad_norm, batch.num_targets, not is_finite)

    def _update(self, norm: Tensor, grad_norm: float) -> None:
        if self.grad_clip and grad_norm > self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _backward_within_memory(self, batch: Batch) -> Tensor:
        while True:
            try:
                return self._backward(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block, so that the traceback no longer holds the tensors of the failed pass.
            self._shrink(batch.tokens.shape)

    def _backward(self, batch: Batch) -> Tensor:
        nll = torch.zeros((), device=batch.tokens.device)
        parts = zip(batch.tokens.split(self.micro_batch_size), batch.targets.split(self.micro_batch_size), strict=True)
        for tokens, targets in parts:
            sums = loss_sums(self.model(tokens), targets, self.objective)
            self.scaler.scale(sums.objective / max(batch.num_targets, 1)).backward()
            nll += sums.nll
        return nll

    def _shrink(self, shape: torch.Size) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = min(self.micro_batch_size, shape[0])
        if not self.shrink or rows == 1:
            advice = "training.micro_batch_size=auto" if not self.shrink else "training.gradient_checkpointing=true"
            raise MemoryExhausted(
                f"out of memory with {rows} sequences of {shape[1]} tokens per forward pass. Try {advice}, "
                f"data.sequence_length={shape[1] // 2}, or a smaller model."
            )
        self.micro_batch_size = rows // 2
        self.warn(f"out of memory: going on with training.micro_batch_size={self.micro_batch_size}.")

    def _count_skipped(self, is_finite: bool, loss: float, grad_norm: float) -> None:
        if is_finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0:
            return  # the scaler is still searching for its scale
        self.warn(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite, the step is skipped.")
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Diverged(f"loss or gradient was not finite {self.skipped_in_a_row} times in a row. {LOWER_RATE}")
