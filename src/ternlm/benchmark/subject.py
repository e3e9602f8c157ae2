"""A model under test: what the comparisons of training and of inference ask of it, whoever made it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ternlm.checkpoint import packed_bytes
from ternlm.data.batch import IGNORED, Batch
from ternlm.device import choose_dtype
from ternlm.models import LanguageModel, ParameterCounts
from ternlm.nn.linear import BitLinear
from ternlm.training.compilation import compile_blocks
from ternlm.training.objective import ObjectiveSettings
from ternlm.training.optimizer import OptimizerSettings, build_optimizer, set_rates
from ternlm.training.step import Stepper

LEARNING_RATE = 1e-5
"""So small that hundreds of steps on one batch change nothing about the arithmetic."""
GRAD_CLIP = 1.0
_SCORED = 0.15


class Work(NamedTuple):
    """What one training step reads.

    Attributes:
        rows: Sequences.
        length: Tokens of each.
        compiled: Whether the blocks are compiled.
    """

    rows: int
    length: int
    compiled: bool = False


class Subject(ABC):
    """A model under test. Measuring uses it up: its weights have moved, and may have another type.

    Attributes:
        name: What tables call it.
        device: Where it is.
        dtype: Type of its activations.
        notes: What a reader must know about it, a sentence each.
        tokens: Ids that it reads, (n,), over and over if they are few; None makes them up at random.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    notes: list[str]
    tokens: Tensor | None = None
    decodes: bool = True
    is_quantized: bool = False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def parameter_counts(self) -> ParameterCounts:
        """Parameters by kind."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one training token, by the PaLM convention."""

    @abstractmethod
    def disk_bytes(self) -> int:
        """Size of a file of it: ternary weights as `packed_bytes` counts them, everything else at 16 bits."""

    @abstractmethod
    def begin_training(self, work: Work, say: Callable[[str], None]) -> bool:
        """Make everything that a step needs; returns whether the blocks are compiled now."""

    @abstractmethod
    def training_step(self) -> float:
        """Forward, backward, clipping and update on one fixed batch; returns the loss in nats per target."""

    @abstractmethod
    def begin_inference(self) -> None:
        """Evaluation mode, without an optimizer, and with weights in the type in which they are multiplied."""

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read (rows, time) from the beginning; returns the logits after the last one, (rows, vocab_size)."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, (rows,); returns the logits after it, (rows, vocab_size)."""

    @abstractmethod
    def held(self) -> Iterator[Tensor]:
        """Tensors that live from step to step."""

    def ids(self, rows: int, length: int) -> Tensor:
        """(rows, length) of `tokens`, or drawn at random, the same each time."""
        if self.tokens is None:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, self.vocab_size, (rows, length), generator=generator)
        repeated = self.tokens.repeat(-(-rows * length // self.tokens.numel()))
        return repeated[: rows * length].view(rows, length)


@final
class OwnSubject(Subject):
    """A model of one of our families, trained by the step that training itself uses.

    Args:
        name: What tables call it.
        model: On its device, with weights; used up.
        optimizer: Whose state it keeps; rates do not matter.
        dtype: Type of its activations; None takes that of the model.
        step: Number of the update that it is in, for what follows from that.
    """

    def __init__(
        self,
        name: str,
        model: LanguageModel,
        optimizer: OptimizerSettings | None = None,
        dtype: torch.dtype | None = None,
        step: int | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.device = next(model.parameters()).device
        self.dtype = model.compute_dtype = dtype or model.compute_dtype
        self.notes, self.decodes = [], model.is_causal
        self.is_quantized = any(layer.mode.weights != "none" for layer in model.bit_linears().values())
        self._optimizer_settings = optimizer or OptimizerSettings()
        self._stepper: Stepper | None = None
        self._batch: Batch | None = None
        self._state: Any = None
        if step is not None:
            model.set_step(step)

    @property
    def vocab_size(self) -> int:
        return self.model.settings.vocab_size or 0

    def parameter_counts(self) -> ParameterCounts:
        return self.model.parameter_counts()

    def flops_per_token(self, context: int) -> float:
        return self.model.settings.flops_per_token(context)

    def disk_bytes(self) -> int:
        return packed_bytes(self.model)

    def begin_training(self, work: Work, say: Callable[[str], None]) -> bool:
        model = self.model.train()
        optimizer = build_optimizer(model, self._optimizer_settings)
        set_rates(optimizer, LEARNING_RATE, 0.0)
        objective = ObjectiveSettings(name="causal" if model.is_causal else "mlm")
        self._stepper = Stepper(model, optimizer, objective, GRAD_CLIP, work.rows, shrink=False, warn=say)
        self._batch = self._training_batch(work).to(self.device)
        if not work.compiled:
            return False
        return compile_blocks(model, self._try_out, say)

    def training_step(self) -> float:
        assert self._stepper is not None and self._batch is not None
        return self._stepper(self._batch, judge=lambda result: True).loss

    def _try_out(self) -> None:
        self.training_step()

    def begin_inference(self) -> None:
        self._stepper = self._batch = None
        self.model.zero_grad(set_to_none=True)
        for block in self.model.blocks():
            block._compiled_call_impl = None
        for module in self.model.eval().modules():
            is_plain = isinstance(module, BitLinear) and module.mode.weights == "none"
            if is_plain or (isinstance(module, torch.nn.Embedding) and not self.is_integer_embedding()):
                module.weight.data = module.weight.data.to(self.dtype)
        self.model.refresh()

    def is_integer_embedding(self) -> bool:
        """Whether the embedding is rounded to integers, which begins from float32."""
        return getattr(self.model.settings, "embedding_bits", None) is not None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        scored = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        scored[:, -1] = True
        if not self.decodes:
            return self.model(tokens, scored=scored).logits
        output = self.model(tokens, self.model.initial_state(len(tokens)), None, scored)
        self._state = output.state
        return output.logits

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens[:, None], self._state)
        self._state = output.state
        return output.logits[:, -1]

    def held(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        if self._stepper is not None:
            for state in self._stepper.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _training_batch(self, work: Work) -> Batch:
        if self.model.is_causal:
            return Batch.from_windows(self.ids(work.rows, work.length + 1), None)
        tokens = self.ids(work.rows, work.length)
        generator = torch.Generator().manual_seed(0)
        is_scored = torch.rand(tokens.shape, generator=generator) < _SCORED
        is_scored[:, 0] = True
        return Batch(tokens, torch.where(is_scored, tokens, IGNORED))


def default_dtype(device: torch.device) -> torch.dtype:
    """The type of activations that training takes on a device by itself."""
    return choose_dtype("auto", device)
