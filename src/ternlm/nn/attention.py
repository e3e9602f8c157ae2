"""Causal self-attention with grouped queries, rotary positions and a key-value cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.rotary import rotate


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, in fixed memory.

    Attributes:
        keys, values: (batch, key_value_heads, capacity, head_dim), filled from the left.
    """

    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write (batch, heads, time, head_dim) at `positions`, (batch, time), in place."""
        index = positions[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))


class CausalAttention(nn.Module):
    """o = softmax(q k^T / sqrt(e) + causal) v, then the output projection.

    q has `heads` heads, k and v have `key_value_heads`; key-value head j serves the query heads
    j * heads / key_value_heads onward. With `sub_norm` an RMSNorm over the concatenated heads
    stands right before the output projection, as in Hugging Face `BitNetForCausalLM`.

    Args:
        hidden_size: Width of the residual stream, equal to heads * head width.
        heads, key_value_heads: key_value_heads divides heads.
        mode: Rounding of the projections.
        sub_norm_eps: eps of the norm before the output projection; None leaves the norm out.

    Source:
        Ainslie et al. 2023, grouped-query attention (arXiv 2305.13245); the sub-norm, Wang et al.
        2022 (arXiv 2210.06423) as used by BitNet b1.58 2B4T (arXiv 2504.12285).
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int,
        mode: QuantizationMode,
        sub_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads
        self.head_dim = hidden_size // heads
        narrow = key_value_heads * self.head_dim
        self.qkv = BitLinear(hidden_size, {"q_proj": hidden_size, "k_proj": narrow, "v_proj": narrow}, mode)
        self.attn_sub_norm = nn.Identity() if sub_norm_eps is None else RMSNorm(hidden_size, sub_norm_eps)
        self.o = BitLinear(hidden_size, {"o_proj": hidden_size}, mode)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Attend within x.

        Args:
            x: (batch, time, hidden_size).
            rotary: cos and sin, (2, time, head_dim).
        """
        q, k, v = self._project(x)
        q, k = rotate(q, *rotary.unbind()), rotate(k, *rotary.unbind())
        grouped = self.heads != self.key_value_heads
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self._output(o)

    def forward_cached(self, x: Tensor, rotary: Tensor, cache: KeyValueCache, positions: Tensor) -> Tensor:
        """Attend to the cache and to x, and append x to the cache.

        Args:
            x: (batch, time, hidden_size).
            rotary: cos and sin of each row's positions, (2, batch, 1, time, head_dim).
            cache: Written in place.
            positions: Place of each token in its row, (batch, time).
        """
        q, k, v = self._project(x)
        q, k = rotate(q, *rotary.unbind()), rotate(k, *rotary.unbind())
        cache.append(k, v, positions)
        reach = int(positions.max()) + 1
        visible = torch.arange(reach, device=x.device) <= positions[:, :, None]
        keys, values = cache.keys[:, :, :reach].to(q.dtype), cache.values[:, :, :reach].to(q.dtype)
        grouped = self.heads != self.key_value_heads
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None], enable_gqa=grouped)
        return self._output(o)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads first: (batch, heads, time, head_dim)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x))
        return q, k, v

    def _output(self, o: Tensor) -> Tensor:
        (y,) = self.o(self.attn_sub_norm(o.transpose(1, 2).flatten(2)))
        return y
