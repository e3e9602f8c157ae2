"""The block of the `qdyt` family: bidirectional attention and a gated feed-forward network, rounded at every site.

Activations are rounded by quantizers of their own, each with its bits and its running scale, so that the
integer products behind them know the grid of what they read.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.models.language_model import Block
from ternlm.models.qdyt_settings import OFF_BITS, QDyTSettings
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.linear import BitLinear
from ternlm.nn.mixer import Mixer
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import QuantizationMode
from ternlm.nn.tanh_norm import QDyT


class QDyTBlock(Block):
    """x + za * attention(norm(x)), then x + zf * dropout(feed_forward(norm(x))).

    Args:
        settings: Shape and ingredients.
        mode: Rounding at the start; `set_mode` changes it.
        layer: Number of the block, input side first.
    """

    attention_scale: nn.Parameter | None
    feed_forward_scale: nn.Parameter | None

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode, layer: int) -> None:
        super().__init__()
        self.hidden_dropout = settings.hidden_dropout
        self.attention_norm = build_norm(settings, settings.norm_type)
        self.feed_forward_norm = build_norm(settings, settings.norm_type)
        self.self_attn = EncoderAttention(settings, mode, layer)
        self.mlp = EncoderFeedForward(settings, mode, layer)
        self.is_bounded = settings.act_scale == "bound" and settings.norm_type == "qdyt"
        if settings.skip_init:
            self.attention_scale = nn.Parameter(torch.empty(()))
            self.feed_forward_scale = nn.Parameter(torch.empty(()))
        else:
            self.register_parameter("attention_scale", None)
            self.register_parameter("feed_forward_scale", None)
        self.set_mode(mode)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the block.

        Args:
            x: (batch, time, hidden_size).
            valid: (batch, time), bool, False at padding; None where there is none.
        """
        y = self.self_attn(self.attention_norm(x), valid, self._bound(self.attention_norm))
        x = self._add(x, y, self.attention_scale)
        y = self.mlp(self.feed_forward_norm(x), valid, self._bound(self.feed_forward_norm))
        return self._add(x, F.dropout(y, self.hidden_dropout, self.training), self.feed_forward_scale)

    def set_mode(self, mode: QuantizationMode) -> None:
        """Round as `mode` says; sites with bits of their own, and late value and output projections, keep theirs."""
        for part in (self.self_attn, self.mlp):
            part.set_mode(mode)

    def _bound(self, norm: nn.Module) -> Tensor | None:
        """Largest magnitude that a norm can put out, where scales are made from it."""
        return norm.bound() if self.is_bounded and isinstance(norm, QDyT) else None

    def _add(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        return x + y if scale is None else x + y * scale.to(y.dtype)


class EncoderAttention(nn.Module):
    """o = softmax(q k^T / sqrt(e)) v over all tokens that are no padding, then the output projection.

    q and k are mixed alike, so that their products stay, v by a rotation of its own; each head of the three is
    then rounded with a scale of its own. The rotation of v commutes with the average over tokens, so it also
    stands before the rounding of the output projection's input.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762); the place of the rotations, BitNet v2 (arXiv 2504.18415).
    """

    input_quantizer: ActivationQuantizer
    q_quantizer: ActivationQuantizer
    k_quantizer: ActivationQuantizer
    v_quantizer: ActivationQuantizer
    output_quantizer: ActivationQuantizer

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode, layer: int) -> None:
        super().__init__()
        width, heads, self.head_dim = settings.hidden_size, settings.num_attention_heads, settings.head_dim
        self.dropout = settings.attention_dropout
        self.is_late = layer >= settings.num_hidden_layers - settings.mixed_precision_last_blocks
        self.late_bits = settings.vo_bits
        late = self._late(mode)
        vo_bits = settings.vo_bits if self.is_late else None
        if self.is_late:
            self.qk = BitLinear(width, {"q_proj": width, "k_proj": width}, mode, rounds_input=False)
            self.v = BitLinear(width, {"v_proj": width}, late, rounds_input=False)
        else:
            self.qkv = BitLinear(width, {"q_proj": width, "k_proj": width, "v_proj": width}, mode, rounds_input=False)
        self.o = BitLinear(width, {"o_proj": width}, late if self.is_late else mode, rounds_input=False)
        self.qk_mixer = build_mixer(settings, self.head_dim)
        self.k_mixer = None if settings.share_qk_mixer else build_mixer(settings, self.head_dim)
        self.v_mixer = build_mixer(settings, self.head_dim)
        self.own_bits = {
            "input_quantizer": settings.attention_input_bits,
            "q_quantizer": settings.qk_bits,
            "k_quantizer": settings.qk_bits,
            "v_quantizer": vo_bits,
            "output_quantizer": vo_bits,
        }
        widths = {"input_quantizer": width, "output_quantizer": width}
        add_quantizers(self, settings, mode, self.own_bits, widths, heads)

    def forward(self, x: Tensor, valid: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
        """(batch, time, hidden_size), with its largest possible magnitude if that is known -> the same shape."""
        x, grid = self.input_quantizer(x, valid, bound)
        q, k, v = (*self.qk(x, grid), *self.v(x, grid)) if self.is_late else self.qkv(x, grid)
        q, _ = self.q_quantizer(self._heads(q, self.qk_mixer), valid)
        k, _ = self.k_quantizer(self._heads(k, self.k_mixer or self.qk_mixer), valid)
        v, _ = self.v_quantizer(self._heads(v, self.v_mixer), valid)
        visible = None if valid is None else valid[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        o, grid = self.output_quantizer(o.transpose(1, 2).flatten(2), valid)
        (y,) = self.o(o, grid)
        return y

    def set_mode(self, mode: QuantizationMode) -> None:
        """As `QDyTBlock.set_mode`."""
        late = self._late(mode)
        if self.is_late:
            set_linears(mode, self.qk)
            set_linears(late, self.v, self.o)
        else:
            set_linears(mode, self.qkv, self.o)
        set_quantizers(self, mode, self.own_bits)

    def _late(self, mode: QuantizationMode) -> QuantizationMode:
        """Integer rows where the other matrices are ternary."""
        if mode.weights != "ternary":
            return mode
        return mode.model_copy(update={"weights": integer_weights(self.late_bits), "quantizer": "absmean"})

    def _heads(self, x: Tensor, mixer: nn.Module) -> Tensor:
        """(batch, time, hidden_size), mixed head by head -> (batch, heads, time, head_dim)."""
        return mixer(x.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)


class EncoderFeedForward(nn.Module):
    """y = W_down A(O_mid(A(SiLU(W_gate n)) * A(W_up n))), n = A(O_in x), O rotations and A quantizers.

    Source:
        Shazeer 2020, gated units (arXiv 2002.05202).
    """

    input_quantizer: ActivationQuantizer
    gate_quantizer: ActivationQuantizer
    up_quantizer: ActivationQuantizer
    down_quantizer: ActivationQuantizer

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode, layer: int) -> None:
        super().__init__()
        width, inner = settings.hidden_size, settings.intermediate_size
        self.gate_up = BitLinear(width, {"gate_proj": inner, "up_proj": inner}, mode, rounds_input=False)
        self.down = BitLinear(inner, {"down_proj": width}, mode, rounds_input=False)
        transforms = not settings.alternate_ffn_mixing or (layer // 2) % 2 == 0
        self.transforms_input = settings.mixers and transforms
        self.input_mixer = build_mixer(settings, width, transforms)
        self.middle_mixer = build_mixer(settings, inner)
        self.own_bits = {
            "input_quantizer": settings.ffn_input_bits,
            "gate_quantizer": settings.gate_bits,
            "up_quantizer": settings.up_bits,
            "down_quantizer": settings.down_bits,
        }
        widths = {"input_quantizer": width, "gate_quantizer": inner, "up_quantizer": inner, "down_quantizer": inner}
        add_quantizers(self, settings, mode, self.own_bits, widths)

    def forward(self, x: Tensor, valid: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
        """As `EncoderAttention.forward`; a transform of the input leaves no useful bound."""
        x, grid = self.input_quantizer(self.input_mixer(x), valid, None if self.transforms_input else bound)
        gate, up = self.gate_up(x, grid)
        gate, _ = self.gate_quantizer(F.silu(gate), valid)
        up, _ = self.up_quantizer(up, valid)
        middle, grid = self.down_quantizer(self.middle_mixer(gate * up), valid)
        (y,) = self.down(middle, grid)
        return y

    def set_mode(self, mode: QuantizationMode) -> None:
        """As `QDyTBlock.set_mode`."""
        set_linears(mode, self.gate_up, self.down)
        set_quantizers(self, mode, self.own_bits)


def build_norm(settings: QDyTSettings, kind: str) -> nn.Module:
    """A norm of the residual stream, ``qdyt`` or ``rms``."""
    if kind == "rms":
        return RMSNorm(settings.hidden_size, settings.rms_norm_eps)
    return QDyT(
        settings.hidden_size,
        settings.qdyt_groups,
        settings.qdyt_center,
        settings.use_pact_clip,
        settings.qdyt_alpha_init,
        settings.qdyt_alpha_target,
        settings.qdyt_alpha_warmup_steps,
        settings.rms_norm_eps if settings.qdyt_pre == "rms" else None,
    )


def build_mixer(settings: QDyTSettings, width: int, transforms: bool = True) -> nn.Module:
    """A rotation of `width` channels, without its Hadamard part unless `transforms`; nothing where mixers are off."""
    if not settings.mixers:
        return nn.Identity()
    return Mixer(width, settings.block_hadamard_size if transforms else 1, settings.mixer_order)


def integer_weights(bits: int) -> str:
    """The mode of integer weights with so many bits, ``none`` where they are switched off."""
    return "none" if bits >= OFF_BITS else f"int{bits}"


def add_quantizers(
    owner: nn.Module,
    settings: QDyTSettings,
    mode: QuantizationMode,
    own_bits: Mapping[str, int | None],
    widths: Mapping[str, int],
    heads: int | None = None,
) -> None:
    """Give a module its activation quantizers; those without a width of their own have one scale per head."""
    for name, bits in own_bits.items():
        width = widths.get(name, settings.head_dim)
        by_head = None if name in widths else heads
        quantizer = ActivationQuantizer(bits or mode.activation_bits or OFF_BITS, settings, width, by_head)
        setattr(owner, name, quantizer)


def set_quantizers(owner: nn.Module, mode: QuantizationMode, own_bits: Mapping[str, int | None]) -> None:
    """Let the activation quantizers of a module round as `mode` says, with their own bits where they have them."""
    for name, bits in own_bits.items():
        quantizer = getattr(owner, name)
        if quantizer.mode != mode:
            quantizer.own_bits = bits or mode.activation_bits or OFF_BITS
            quantizer.mode = mode


def set_linears(mode: QuantizationMode, *layers: BitLinear) -> None:
    """Let layers round as `mode` says; the same mode again would make their codes stale."""
    for layer in layers:
        if layer.mode != mode:
            layer.mode = mode
