"""The attention block that takes turns with recurrent ones in the innermost stack of the `hnet` family."""

import torch
from torch import Tensor, nn

from ternlm.models.hgrn_block import RecurrentSettings, block_norm, feed_forward
from ternlm.nn.quantization import QuantizationMode
from ternlm.nn.windowed_attention import AttentionState, WindowedAttention


class WindowedAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); only the feed-forward network is ternary.

    Args:
        settings: Shape and ingredients of norms and feed-forward network.
        width: Width of the residual stream.
        heads: Attention heads.
        window: Positions that one sees, itself included.
        mode: Rounding of the feed-forward network.
    """

    is_recurrent = False

    def __init__(
        self, settings: RecurrentSettings, width: int, heads: int, window: int, mode: QuantizationMode
    ) -> None:
        super().__init__()
        self.attn_norm = block_norm(settings, width)
        self.attn = WindowedAttention(width, heads, window)
        self.mlp_norm = block_norm(settings, width)
        self.mlp = feed_forward(settings, width, mode)

    def forward(
        self,
        x: Tensor,
        bound: Tensor | None = None,
        starts: Tensor | None = None,
        state: AttentionState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """As `WindowedAttention.forward`, with the residual stream as x; there is no gate to bound."""
        y, state = self.attn(self.attn_norm(x), starts, state, lengths)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> AttentionState:
        """Empty memory for `batch_size` rows."""
        return self.attn.initial_state(batch_size, device)
