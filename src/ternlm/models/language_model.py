"""What every model family promises, so that training, evaluation and generation need not know which one it is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ternlm.nn.linear import BitLinear, QuantizationMode
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

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one training token (forward and backward) at a context length."""
        raise NotImplementedError


class Output(NamedTuple):
    """What a model returns.

    Attributes:
        logits: (batch, time, vocab_size), for the token after each position.
        state: The memory after these tokens when one was given, else None.
        auxiliary: Named extra losses, each a scalar, already weighted; empty for most families.
    """

    logits: Tensor
    state: Any
    auxiliary: dict[str, Tensor]


class ParameterCounts(NamedTuple):
    """Number of parameters by kind; tied tensors are counted once."""

    ternary: int
    embedding: int
    other: int

    @property
    def total(self) -> int:
        return self.ternary + self.embedding + self.other


class LanguageModel(nn.Module, ABC):
    """A model that predicts tokens, with one word for memory and one dial for quantization.

    Attributes:
        settings: The family's settings, with `vocab_size` filled in.
        compute_dtype: Type of activations; parameters stay float32.
    """

    settings: ModelSettings
    compute_dtype: torch.dtype = torch.float32

    @abstractmethod
    def forward(self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None) -> Output:
        """Logits for the token after each given one.

        Args:
            tokens: (batch, time), int64.
            state: Memory of earlier tokens from `initial_state` or a previous call. Without it the
                tokens stand at the beginning; with it the new state is returned.
            lengths: (batch,), how many of the tokens of each row are real when rows are padded on
                the right; only with a state. Logits at padding are meaningless.
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
        """The quantizable layers by name, in order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, BitLinear)}

    def set_mode(self, mode: QuantizationMode) -> None:
        """Give every quantizable layer the same rounding."""
        for layer in self.bit_linears().values():
            layer.mode = mode

    def refresh(self) -> None:
        """Bring all codes up to date with the latent weights; needed before a compiled block runs."""
        for layer in self._layers():
            layer.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """All parameters under the names that files use, as views without gradient.

        Merged matrices appear one by one beside their layer: `...self_attn.qkv.weight` becomes
        `...self_attn.q_proj.weight` and so on, which for `bitnet` are Hugging Face's names.
        """
        layers = {f"{name}.weight": layer for name, layer in self.bit_linears().items()}
        named: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            if name in layers:
                parent = name.rpartition(".")[0].rpartition(".")[0]
                parts = parameter.detach().split(layers[name].sizes)
                named |= {
                    f"{parent}.{matrix}.weight": part
                    for matrix, part in zip(layers[name].out_features, parts, strict=True)
                }
            else:
                named[name] = parameter.detach()
        return named

    def parameter_counts(self) -> ParameterCounts:
        """Parameters in BitLinear layers, in embeddings and heads, and elsewhere."""
        ternary = sum(layer.weight.numel() for layer in self.bit_linears().values())
        matrices = {id(p): p.numel() for p in self.parameters() if p.dim() == 2}
        total = sum(p.numel() for p in self.parameters())
        embedding = sum(matrices.values()) - ternary
        return ParameterCounts(ternary, embedding, total - ternary - embedding)

    def _layers(self) -> list[BitLinear]:
        cached = self.__dict__.get("_bit_linears")
        if cached is None:
            cached = self.__dict__["_bit_linears"] = list(self.bit_linears().values())
        return cached
