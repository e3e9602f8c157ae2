"""What every model family promises, so that training, evaluation and generation need not know which one it is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ternlm.errors import SettingsError
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import Perturbation, QuantizationMode
from ternlm.ops.noise import noise_key
from ternlm.settings import Count, Settings


class ModelSettings(Settings):
    """Settings common to all families.

    Attributes:
        family: Key in `MODELS`.
        vocab_size: Size of the vocabulary; None takes the tokenizer's.
        max_position_embeddings: Longest sequence the model accepts, in tokens.
    """

    family: str
    vocab_size: Count | None = Field(default=None, ge=1)
    max_position_embeddings: Count = 1024

    @property
    def total_blocks(self) -> int:
        """How many blocks the model has."""
        return int(self.num_hidden_layers)  # type: ignore[attr-defined]

    @property
    def kept_scores(self) -> int:
        """Bytes per pair of positions that attention keeps where it is not fused; 0 where it always is."""
        return 0

    @property
    def kept_per_token(self) -> int:
        """Bytes that blocks keep of a token for the backward pass besides inputs and outputs of linear layers."""
        return 0

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one training token (forward and backward) at a context length."""
        raise NotImplementedError


class Output(NamedTuple):
    """What a model returns.

    Attributes:
        logits: (batch, time, vocab_size), for the token after each position, or of an encoder for the token at
            each position; (scored positions, vocab_size) where only those were asked for.
        state: The memory after these tokens when one was given, else None.
        auxiliary: Named extra losses, each a scalar, already weighted; empty for most families.
        telemetry: Named quantities of the pass worth a place in the log, each a scalar without gradient.
    """

    logits: Tensor
    state: Any
    auxiliary: dict[str, Tensor]
    telemetry: Mapping[str, Tensor] = MappingProxyType({})


class ParameterCounts(NamedTuple):
    """Number of parameters by kind; tied tensors are counted once."""

    ternary: int
    embedding: int
    other: int

    @property
    def total(self) -> int:
        return self.ternary + self.embedding + self.other


class Block(nn.Module, ABC):
    """A block that decides itself how its parts follow the dial; of any other, all parts get the same mode."""

    @abstractmethod
    def set_mode(self, mode: QuantizationMode) -> None:
        """Take over the rounding of this block; called before every update, mostly with the mode it has."""


class LanguageModel(nn.Module, ABC):
    """A model that predicts tokens, with one word for memory and one dial for quantization.

    Attributes:
        is_causal: Whether it predicts the next token; an encoder predicts masked ones and has no memory.
        is_recurrent: Whether its memory has a fixed size, so that a text may be as long as one likes.
        settings: The family's settings, with `vocab_size` filled in.
        compute_dtype: Type of activations; parameters stay float32.
    """

    is_causal: ClassVar[bool] = True
    is_recurrent: ClassVar[bool] = False
    settings: ModelSettings
    compute_dtype: torch.dtype = torch.float32

    @abstractmethod
    def forward(
        self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None, scored: Tensor | None = None
    ) -> Output:
        """Logits for the token after each given one, or of an encoder for the token at each position.

        Args:
            tokens: (batch, time), int64.
            state: Memory of earlier tokens from `initial_state` or a previous call. Without it the
                tokens stand at the beginning; with it the new state is returned.
            lengths: (batch,), how many of the tokens of each row are real when rows are padded on
                the right; for causal models only with a state. Logits at padding are meaningless.
            scored: (batch, time), bool: compute logits only there, which saves most of the head's work.
        """

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """Empty memory for `batch_size` rows."""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Draw all parameters afresh, as a pure function of the seed."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks, input side first: the units of gradient checkpointing and compilation."""

    def bit_linears(self) -> dict[str, BitLinear]:
        """The quantizable layers of the blocks by name, in order; a head may round by its own fixed rule."""
        inside = {id(module) for block in self.blocks() for module in block.modules()}
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, BitLinear) and id(module) in inside
        }

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """The sites outside of linear layers where activations are rounded, by name, in order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ActivationQuantizer)}

    def set_mode(self, mode: QuantizationMode) -> None:
        """Give every quantizable layer the same rounding."""
        self.set_modes([mode] * sum(1 for _ in self.blocks()))

    def set_modes(self, modes: Sequence[QuantizationMode]) -> None:
        """Give each block, input side first, its own rounding."""
        for block, mode in zip(self.blocks(), modes, strict=True):
            if isinstance(block, Block):
                block.set_mode(mode)
                continue
            for module in block.modules():
                if isinstance(module, (BitLinear, ActivationQuantizer)) and module.mode != mode:
                    module.mode = mode

    def perturb(self, perturbations: Sequence[Perturbation]) -> None:
        """Tell each block what a training step does to its quantizers besides rounding."""
        for block, perturbation in zip(self.blocks(), perturbations, strict=True):
            for module in block.modules():
                if isinstance(module, (BitLinear, ActivationQuantizer)):
                    module.perturb(perturbation)

    def is_embedding(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter outside of ternary layers belongs to an embedding or a head."""
        return parameter.dim() == 2 and ("embed" in name or "head" in name)

    def rate_factors(self) -> dict[str, float]:
        """Parameters, by name, that learn at another rate than the rest, as a factor of it."""
        return {}

    def set_step(self, k: int) -> None:
        """Take over what follows from the number of the update alone, such as the ramp of a norm."""

    def begin_pass(self, key: int) -> None:
        """Before a forward pass of training: draw all noise in it from this key.

        Noise is a function of the key, the place in the model and the element, so that a pass that is made
        again, whole or in part, sees the same.
        """
        for site, module in enumerate(self._noisy()):
            module.noise.fill_(noise_key(key, site))

    def end_pass(self) -> None:
        """After the backward pass: let activation scales take over what they have observed."""
        for quantizer in self._sites():
            quantizer.commit()

    def clamp_row_gradients(self) -> None:
        """After the last backward pass of a step: bound the gradients of learned scales and thresholds."""
        for layer in self._layers():
            if layer.quantizer is not None:
                layer.quantizer.clamp_gradients()

    def activation_scales(self) -> list[Tensor]:
        """Copies of what activation scales have learned so far, for `put_back`."""
        return [buffer.clone() for buffer in self._scales()]

    @torch.no_grad()
    def put_back(self, scales: Sequence[Tensor]) -> None:
        """Return to activation scales of before, as after a step that was not made."""
        for buffer, value in zip(self._scales(), scales, strict=True):
            buffer.copy_(value)

    def refresh(self) -> None:
        """Bring all codes up to date with the latent weights; needed before a compiled block runs."""
        for layer in self._layers():
            layer.refresh()

    @property
    def is_packed(self) -> bool:
        """Whether ternary layers have codes and scales only, and no latent weights."""
        return any(layer.is_packed for layer in self._layers())

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and saved buffers under the names that files use, as views without gradient.

        Merged matrices appear one by one beside their layer: `...self_attn.qkv.weight` becomes
        `...self_attn.q_proj.weight` and so on, which for `bitnet` are Hugging Face's names.

        Raises:
            SettingsError: The model is packed: what it would save in place of latent weights, rounded once more,
                would be another model.
        """
        if self.is_packed:
            raise SettingsError(
                "this model has packed weights, which cannot be trained or saved as a checkpoint: the latent weights "
                "are not there. Use the run's own checkpoint."
            )
        return self.dense_tensors()

    def dense_tensors(self) -> dict[str, Tensor]:
        """As `tensors`; of a packed model, g Q in place of each latent matrix."""
        saved, modules = self.state_dict().keys(), dict(self.named_modules())
        buffers = ((name, buffer) for name, buffer in self.named_buffers() if name in saved)
        named: dict[str, Tensor] = {}
        for name, tensor in (*self.named_parameters(), *buffers):
            inner, _, kind = name.rpartition(".")
            if inner.endswith(".quantizer"):
                inner, kind = inner.removesuffix(".quantizer"), f"quantizer.{kind}"
            layer = modules[inner]
            if isinstance(layer, BitLinear) and tensor.dim() > 0:
                parts = zip(layer.out_features, tensor.detach().split(layer.sizes), strict=True)
                named |= {f"{inner.rpartition('.')[0]}.{matrix}.{kind}": part for matrix, part in parts}
            else:
                named[name] = tensor.detach()
        return named

    def parameter_counts(self) -> ParameterCounts:
        """Parameters in BitLinear layers, in embeddings and heads, and elsewhere."""
        layers = [layer.weight for layer in self.bit_linears().values()]
        inside = {id(weight) for weight in layers}
        ternary, total = sum(weight.numel() for weight in layers), sum(p.numel() for p in self.parameters())
        outside = ((name, p) for name, p in self.named_parameters() if id(p) not in inside)
        embedding = sum(p.numel() for name, p in outside if self.is_embedding(name, p))
        return ParameterCounts(ternary, embedding, total - ternary - embedding)

    def _scales(self) -> list[Tensor]:
        return [
            buffer for site in self._sites() for name, buffer in site.named_buffers() if name in ("rho", "observed")
        ]

    def _layers(self) -> list[BitLinear]:
        return self._listed(BitLinear)

    def _sites(self) -> list[ActivationQuantizer]:
        return self._listed(ActivationQuantizer)

    def _noisy(self) -> list[BitLinear | ActivationQuantizer]:
        return self._listed((BitLinear, ActivationQuantizer))

    def _listed(self, kind: Any) -> list[Any]:
        """All modules of a kind; walking the tree in every pass would cost as much as a small layer."""
        found: dict[Any, list[Any]] = self.__dict__.setdefault("_modules_by_kind", {})
        if kind not in found:
            found[kind] = [module for module in self.modules() if isinstance(module, kind)]
        return found[kind]
