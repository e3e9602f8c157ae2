"""`bitnet`: a causal transformer with ternary weights and 8-bit activations.

Rotary positions, grouped-query attention, a gated feed-forward network, root-mean-square norms
before each sub-layer and, by default, right before its output projection. Embedding, head, norms,
attention scores and the residual stream stay in high precision.

Source:
    Ma et al. 2024, BitNet b1.58 (arXiv 2402.17764); 2B4T report (arXiv 2504.12285), whose block
    and tensor names (Hugging Face `BitNetForCausalLM`) are kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternlm.models.language_model import LanguageModel, ModelSettings, Output
from ternlm.nn.attention import CausalAttention, KeyValueCache
from ternlm.nn.feed_forward import Activation, GatedFeedForward
from ternlm.nn.initialization import normal_
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.rotary import rotary_table
from ternlm.settings import Count, Float


class BitNetSettings(ModelSettings):
    """Shape of a `bitnet` model, named as in Hugging Face configurations.

    Attributes:
        hidden_size: Width of the residual stream; a multiple of 256 keeps every export format open.
        num_hidden_layers: Number of blocks.
        num_attention_heads, num_key_value_heads: Query heads, and the heads that hold keys and values.
        intermediate_size: Width of the gated feed-forward network.
        hidden_act: ``silu`` or ``relu2``.
        norm_layout: ``subln``, norms before each sub-layer and before its output projection (the
            same network as one norm inside each merged BitLinear); ``prenorm``, the former only;
            ``double``, subln with a second norm in front of the input projections.
        tie_word_embeddings: The head reuses the embedding.
        initializer_range: Standard deviation of the input projections; output projections are
            scaled by 1 / sqrt(2 num_hidden_layers).
        embedding_init_std: Standard deviation of the embedding; a tied model starts about
            hidden_size * embedding_init_std^2 / 2 nats above ln(vocab_size).
    """

    family: Literal["bitnet"] = "bitnet"
    hidden_size: Count = 768
    num_hidden_layers: Count = 8
    num_attention_heads: Count = 12
    num_key_value_heads: Count = 6
    intermediate_size: Count = 3072
    hidden_act: Activation = "silu"
    norm_layout: Literal["subln", "prenorm", "double"] = "subln"
    rope_theta: Float = Field(default=10_000.0, gt=0)
    rms_norm_eps: Float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = True
    initializer_range: Float = Field(default=0.02, gt=0)
    embedding_init_std: Float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "intermediate_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of twice "
                f"model.num_attention_heads={self.num_attention_heads}, so that heads have an even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads={self.num_key_value_heads} must divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        return self

    def flops_per_token(self, context: int) -> float:
        """6 (linear + vocab_size * hidden_size) + 12 layers * hidden_size * context: the PaLM convention.

        It counts attention to all positions, masked ones included, so that figures compare with published ones.

        Source:
            Chowdhery et al. 2022, PaLM, appendix B (arXiv 2204.02311).
        """
        d, narrow = self.hidden_size, self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        linear = self.num_hidden_layers * (2 * d * d + 2 * d * narrow + 3 * d * self.intermediate_size)
        return 6.0 * (linear + (self.vocab_size or 0) * d + 2 * self.num_hidden_layers * d * context)


@dataclass
class BitNetState:
    """Keys and values of each layer, and how many tokens each row has seen, (batch,) int64."""

    caches: list[KeyValueCache]
    lengths: Tensor


class BitNetBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, settings: BitNetSettings, mode: QuantizationMode) -> None:
        super().__init__()
        eps, width = settings.rms_norm_eps, settings.hidden_size
        sub_norm_eps = None if settings.norm_layout == "prenorm" else eps
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        double = settings.norm_layout == "double"
        self.attn_inner_norm = RMSNorm(width, eps) if double else nn.Identity()
        self.ffn_inner_norm = RMSNorm(width, eps) if double else nn.Identity()
        self.self_attn = CausalAttention(
            width, settings.num_attention_heads, settings.num_key_value_heads, mode, sub_norm_eps
        )
        self.mlp = GatedFeedForward(width, settings.intermediate_size, settings.hidden_act, mode, sub_norm_eps)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """(batch, time, hidden_size) -> the same shape."""
        x = x + self.self_attn(self.attn_inner_norm(self.input_layernorm(x)), rotary)
        return self._feed_forward(x)

    def forward_cached(self, x: Tensor, rotary: Tensor, cache: KeyValueCache, positions: Tensor) -> Tensor:
        """As `forward`, continuing after the tokens in the cache."""
        normed = self.attn_inner_norm(self.input_layernorm(x))
        x = x + self.self_attn.forward_cached(normed, rotary, cache, positions)
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ffn_inner_norm(self.post_attention_layernorm(x)))


class BitNetTrunk(nn.Module):
    """Embedding, blocks and final norm; separate from the head so that tensor names match Hugging Face's."""

    def __init__(self, settings: BitNetSettings, mode: QuantizationMode) -> None:
        super().__init__()
        assert settings.vocab_size is not None
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(BitNetBlock(settings, mode) for _ in range(settings.num_hidden_layers))
        self.norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)


class BitNet(LanguageModel):
    """The causal transformer.

    Args:
        settings: Shape; `vocab_size` must be set.
        mode: Rounding of all BitLinear layers.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.
    """

    settings: BitNetSettings
    rotary: Tensor

    def __init__(self, settings: BitNetSettings, mode: QuantizationMode, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.gradient_checkpointing = gradient_checkpointing
        self.model = BitNetTrunk(settings, mode)
        if not settings.tie_word_embeddings:
            self.lm_head = nn.Linear(settings.hidden_size, settings.vocab_size or 0, bias=False)
        head_dim = settings.hidden_size // settings.num_attention_heads
        table = rotary_table(settings.max_position_embeddings, head_dim, settings.rope_theta)
        self.register_buffer("rotary", table, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        state: BitNetState | None = None,
        lengths: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Output:
        if tokens.shape[1] > self.settings.max_position_embeddings:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed max_position_embeddings={self.settings.max_position_embeddings}"
            )
        self.refresh()
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)
        if state is None:
            x = self._blocks(x)
        else:
            x, state = self._blocks_cached(x, state, lengths)
        head = self.model.embed_tokens if self.settings.tie_word_embeddings else self.lm_head
        if scored is not None:
            x = x[scored]
        logits = F.linear(self.model.norm(x), head.weight.to(x.dtype))
        return Output(logits, state, {})

    def initial_state(self, batch_size: int) -> BitNetState:
        settings, table = self.settings, self.rotary
        places = settings.max_position_embeddings + 1  # the last one takes padding, and no token sees it
        shape = (batch_size, settings.num_key_value_heads, places, table.shape[-1])
        caches = [
            KeyValueCache(*(torch.zeros(shape, dtype=self.compute_dtype, device=table.device) for _ in "kv"))
            for _ in self.model.layers
        ]
        return BitNetState(caches, torch.zeros(batch_size, dtype=torch.int64, device=table.device))

    def initialize(self, seed: int) -> None:
        settings = self.settings
        output_std = settings.initializer_range / math.sqrt(2 * settings.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, BitLinear):
                is_output = name.endswith((".o", ".down"))
                normal_(module.weight, output_std if is_output else settings.initializer_range, seed, name)
                module.fit()
            elif isinstance(module, nn.Embedding):
                normal_(module.weight, settings.embedding_init_std, seed, name)
            elif isinstance(module, nn.Linear):
                normal_(module.weight, settings.initializer_range, seed, name)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.model.layers)

    def _blocks(self, x: Tensor) -> Tensor:
        rotary = self.rotary[:, : x.shape[1]]
        for block in self.model.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return x

    def _blocks_cached(self, x: Tensor, state: BitNetState, lengths: Tensor | None) -> tuple[Tensor, Any]:
        time = x.shape[1]
        positions = state.lengths[:, None] + torch.arange(time, device=x.device)
        capacity = self.settings.max_position_embeddings
        if lengths is None:
            lengths = torch.full_like(state.lengths, time)
        if int((state.lengths + lengths).max()) > capacity:
            raise ValueError(f"the state holds {capacity} tokens; start a new one from the last of them")
        positions = positions.clamp_max(capacity)
        rotary = self.rotary[:, positions.clamp_max(capacity - 1)][:, :, None]
        for block, cache in zip(self.model.layers, state.caches, strict=True):
            assert isinstance(block, BitNetBlock)
            x = block.forward_cached(x, rotary, cache, positions)
        return x, BitNetState(state.caches, state.lengths + lengths)
