"""One optimizer step: micro-batches, gradients, the question whether to use them, clipping, and the update."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ternlm.data.batch import IGNORED, Batch
from ternlm.device import is_out_of_memory
from ternlm.errors import MemoryExhausted
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.ops.noise import noise_key
from ternlm.training.distillation import Distillation
from ternlm.training.objective import ObjectiveSettings, loss_sums


class StepResult(NamedTuple):
    """What one step measured.

    Attributes:
        loss: Nats per target, without auxiliary terms.
        grad_norm: Norm of the gradient before clipping.
        targets: Targets in the batch.
        skipped: Nothing was updated.
        distillation: The weighted term of a teacher per target, which is not in the loss; None without one.
        telemetry: What the model said about its passes, averaged over the targets of the batch.
    """

    loss: float
    grad_norm: float
    targets: int
    skipped: bool = False
    distillation: float | None = None
    telemetry: Mapping[str, float] = MappingProxyType({})


def _numbers(totals: Collection[Tensor], count: int) -> list[float]:
    """Totals by their count, brought to the host at once."""
    means: list[float] = (torch.stack([*totals]) / count).tolist() if totals else []
    return means


class _Sums(NamedTuple):
    """Over the targets of a batch: nats, what a teacher adds to them, and what the model says about its passes."""

    nll: Tensor
    taught: Tensor
    seen: Mapping[str, Tensor]


Judge = Callable[[StepResult], bool]
"""Says whether a gradient may be used; called while it is still there to be looked at."""


def is_finite(result: StepResult) -> bool:
    """The least that any judge asks for."""
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


class Stepper:
    """Turns a batch into an update.

    The gradient is that of the sum of nats over the whole batch divided by its number of targets,
    however it is cut into micro-batches. A non-finite loss or gradient never reaches the optimizer, whatever
    the judge says. All randomness of a pass (dropout, stochastic rounding) follows from (seed, step,
    micro-batch), so that a resumed run draws what it would have drawn.

    Args:
        model: Its parameters are updated.
        optimizer: Rates are set by the caller.
        objective: What is minimized.
        grad_clip: Largest gradient norm; 0 switches clipping off.
        micro_batch_size: Rows per forward pass.
        shrink: Halve `micro_batch_size` when memory runs out, and try the batch again.
        warn: Called with one sentence when that happens.
        seed: Decides what a pass draws.
        distillation: Adds the term of a teacher to what is minimized.
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
        seed: int = 0,
        distillation: Distillation | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.grad_clip, self.micro_batch_size, self.shrink, self.warn = (
            grad_clip,
            micro_batch_size,
            shrink,
            warn,
        )
        self.seed, self.distillation = seed, distillation
        self._parameters = list(model.parameters())
        # Only float16 gradients underflow; the scaler is off, and free, in every other precision.
        device = self._parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=model.compute_dtype == torch.float16)

    def __call__(self, batch: Batch, judge: Judge = is_finite, k: int = 0) -> StepResult:
        """Run one step.

        Args:
            batch: The whole batch of the step.
            k: Number of the update.
            judge: Not asked while a loss scaler is still searching for its scale, where overflow is expected.

        Raises:
            MemoryExhausted: A single row does not fit.
        """
        observed = self.model.activation_scales()
        nll, taught, seen = self._backward_within_memory(batch, k, observed)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self.model.clamp_row_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        result = StepResult(
            (nll / batch.num_targets).item(), norm.item(), batch.num_targets,
            distillation=None if self.distillation is None else (taught / batch.num_targets).item(),
            telemetry=dict(zip(seen, _numbers(seen.values(), batch.num_targets), strict=True)),
        )  # fmt: skip
        usable = is_finite(result)
        if usable or not self._searching_scale():
            usable = judge(result) and usable
        if usable:
            self._update(norm, result.grad_norm)
        else:
            self.model.put_back(observed)
            if self.scaler.is_enabled():
                self.scaler.update()  # lowers the scale if the gradient overflowed
        self.optimizer.zero_grad(set_to_none=True)
        return result._replace(skipped=not usable)

    def _update(self, norm: Tensor, grad_norm: float) -> None:
        if self.grad_clip and grad_norm > self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _backward_within_memory(self, batch: Batch, k: int, observed: list[Tensor]) -> _Sums:
        while True:
            try:
                return self._backward(batch, k)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block, so that the traceback no longer holds the tensors of the failed pass.
            self.model.put_back(observed)
            self._shrink(batch.tokens.shape)

    def _backward(self, batch: Batch, k: int) -> _Sums:
        seen: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=batch.tokens.device))
        nll, taught = torch.zeros(2, device=batch.tokens.device).unbind()
        parts = zip(batch.tokens.split(self.micro_batch_size), batch.targets.split(self.micro_batch_size), strict=True)
        for number, (tokens, targets) in enumerate(parts):
            key = noise_key(self.seed, k, number)
            torch.manual_seed(key)  # dropout draws from torch's own generator
            self.model.begin_pass(key)
            output = predict(self.model, tokens, targets)
            sums = loss_sums(output, targets, self.objective)
            objective = sums.objective
            if self.distillation is not None:
                term = self.distillation.term(tokens, targets, output.logits, k)
                objective = objective + term
                taught += term.detach()
            self.scaler.scale(objective / max(batch.num_targets, 1)).backward()
            self.model.end_pass()
            nll += sums.nll
            for name, mean in output.telemetry.items():
                seen[name] += mean * (targets != IGNORED).sum()
        return _Sums(nll, taught, seen)

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

    def _searching_scale(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0
