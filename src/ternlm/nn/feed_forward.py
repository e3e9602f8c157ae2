"""Gated feed-forward network."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import QuantizationMode

Activation = Literal["silu", "relu2"]


class GatedFeedForward(nn.Module):
    """y = W_down norm(act(W_gate x) * (W_up x)), act = SiLU or squared ReLU.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gate.
        activation: ``silu`` or ``relu2``.
        mode: Rounding of the three projections; gate and up are one product.
        sub_norm_eps: eps of the RMSNorm before the down projection; None leaves the norm out.
        one_matrix: Gate and up are one matrix, `gate_up_proj`, which has one scale where two have one each.
        input_norm_eps: eps of an RMSNorm before gate and up; None leaves the norm out.

    Source:
        Shazeer 2020, gated units (arXiv 2002.05202); So et al. 2021, squared ReLU (arXiv 2109.08668);
        the sub-norm as in BitNet b1.58 2B4T (arXiv 2504.12285).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        mode: QuantizationMode,
        sub_norm_eps: float | None,
        one_matrix: bool = False,
        input_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        matrices = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        if one_matrix:
            matrices = {"gate_up_proj": 2 * intermediate_size}
        self.input_norm = nn.Identity() if input_norm_eps is None else RMSNorm(hidden_size, input_norm_eps)
        self.gate_up = BitLinear(hidden_size, matrices, mode)
        self.ffn_sub_norm = nn.Identity() if sub_norm_eps is None else RMSNorm(intermediate_size, sub_norm_eps)
        self.down = BitLinear(intermediate_size, {"down_proj": hidden_size}, mode)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        parts = self.gate_up(self.input_norm(x))
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        gate = F.silu(gate) if self.activation == "silu" else F.relu(gate).square()
        (y,) = self.down(self.ffn_sub_norm(gate * up))
        return y
