"""Settings of the `qdyt` family: shape, norms, mixers, and the bits of every place that rounds."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ternlm.models.language_model import ModelSettings
from ternlm.nn.activation_quantizer import ActivationSettings
from ternlm.nn.mixer import MixerOrder
from ternlm.nn.tanh_norm import Centering
from ternlm.ops.hadamard import is_power_of_two
from ternlm.settings import Count, Float

OFF_BITS = 16
"""From so many bits on a site does not round."""

PUBLISHED: dict[str, Any] = {
    "final_norm": "qdyt",
    "embed_scale": "none",
    "head_init_std": None,
    "mixer_order": "hadamard_first",
    "share_qk_mixer": False,
    "act_granularity": "channel",
    "attention_input_bits": OFF_BITS,
    "ffn_input_bits": OFF_BITS,
    "qk_bits": OFF_BITS,
    "gate_bits": OFF_BITS,
    "embedding_bits": OFF_BITS,
    "lm_head_bits": OFF_BITS,
    "vo_bits": OFF_BITS,
}
"""What `published: true` sets, each where it is not given: the form in which the family was first published."""


class QDyTSettings(ModelSettings, ActivationSettings):
    """Shape of a `qdyt` model, named as in Hugging Face configurations where they have a name.

    Bits: a site without bits of its own rounds as `quantization.activations` says; 16 or more leave a site
    unrounded; `quantization.weights=none` or `quantization.activations=none` switches all of them off.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Widths and depth.
        type_vocab_size: Token types, such as the two sentences of a pair.
        hidden_dropout: Share of channels dropped behind the embedding and behind each feed-forward network.
        attention_dropout: Share of attention weights dropped.
        norm_type: ``qdyt``, or ``rms``, the control: root-mean-square norms everywhere.
        final_norm: Norm before the head; a tanh there lets the residual stream grow until nothing learns.
        rms_norm_eps: Added to the mean square inside the root.
        embed_scale: ``sqrt_d``, a learned scalar that starts at sqrt(hidden_size), or ``none``.
        qdyt_groups, qdyt_center: Channels that share a mean: that many runs per token (``group``), the whole
            ``token``, or ``none``.
        qdyt_pre: ``rms`` divides by the root mean square before the tanh.
        use_pact_clip: Whether the tanh norms clip at a learned bound.
        qdyt_alpha_init, qdyt_alpha_target, qdyt_alpha_warmup_steps: Slope of the tanh at step 0, its start
            value as a parameter, and the optimizer steps of the ramp between the two.
        skip_init: Whether sub-layers are added with a learned scalar that starts at
            skip_init_scale / sqrt(num_hidden_layers).
        mixers: Whether fixed rotations stand before the quantizers of q, k, v and the feed-forward network.
        block_hadamard_size: Channels that a Hadamard transform mixes, a power of two.
        hadamard_exact: Refuse a width that the block does not divide, instead of reducing the block there.
        mixer_order: ``permutation_first`` or ``hadamard_first``.
        share_qk_mixer: One rotation for q and k, so that their products stay what they were.
        alternate_ffn_mixing: The transform at the feed-forward input only in layers with (layer // 2) even.
        qk_bits: q and k, per head.
        gate_bits, up_bits, down_bits: The gate behind its SiLU, its factor, and the input of the down projection.
        attention_input_bits, ffn_input_bits: What the projections of a block read.
        mixed_precision_last_blocks, vo_bits: So many blocks nearest the output have integer instead of ternary
            weights in the value and output projections, with so many bits, as have v and the input of the latter.
        embedding_bits, lm_head_bits: Rows of the embedding; rows and input of the head.
        head_init_std: Standard deviation of an untied head; None is 1 / sqrt(hidden_size).
        embedding_init_std: Standard deviation of the embeddings.
        published: Set whatever is not given to the form that was published (`PUBLISHED`).
    """

    family: Literal["qdyt"] = "qdyt"
    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    intermediate_size: Count = 3072
    max_position_embeddings: Count = 512
    type_vocab_size: Count = 2
    hidden_dropout: Float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: Float = Field(default=0.1, ge=0, lt=1)
    tie_word_embeddings: bool = False
    norm_type: Literal["qdyt", "rms"] = "qdyt"
    final_norm: Literal["rms", "qdyt"] = "rms"
    rms_norm_eps: Float = Field(default=1e-5, gt=0)
    embed_scale: Literal["sqrt_d", "none"] = "sqrt_d"
    qdyt_groups: Count = 16
    qdyt_center: Centering = "group"
    qdyt_pre: Literal["none", "rms"] = "none"
    use_pact_clip: bool = True
    qdyt_alpha_init: Float = Field(default=0.05, gt=0)
    qdyt_alpha_target: Float = Field(default=0.5, gt=0)
    qdyt_alpha_warmup_steps: Count = Field(default=2000, ge=0)
    skip_init: bool = True
    skip_init_scale: Float = Field(default=0.5, gt=0)
    mixers: bool = True
    block_hadamard_size: Count = 64
    hadamard_exact: bool = False
    mixer_order: MixerOrder = "permutation_first"
    share_qk_mixer: bool = True
    alternate_ffn_mixing: bool = True
    attention_input_bits: Count | None = None
    qk_bits: Count = 8
    ffn_input_bits: Count | None = None
    gate_bits: Count = 8
    up_bits: Count | None = None
    down_bits: Count | None = None
    mixed_precision_last_blocks: Count = Field(default=0, ge=0)
    vo_bits: Count = 8
    embedding_bits: Count = 8
    lm_head_bits: Count = 8
    head_init_std: Float | None = Field(default=0.02, gt=0)
    embedding_init_std: Float = Field(default=0.02, gt=0)
    published: bool = False

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kept_scores(self) -> int:
        """Float32 weights of attention before and after dropout and what dropout kept, of every head."""
        return 12 * self.num_hidden_layers * self.num_attention_heads if self.attention_dropout else 0

    @model_validator(mode="before")
    @classmethod
    def _published_forms(cls, values: Any) -> Any:
        """Raw values, so any spelling of true counts that the field itself takes."""
        if isinstance(values, dict) and values.get("published") in (True, 1, "true", "True", "yes", "on", "1"):
            return PUBLISHED | values
        return values

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size", "qdyt_groups"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.mixed_precision_last_blocks > self.num_hidden_layers:
            raise ValueError(
                f"model.mixed_precision_last_blocks={self.mixed_precision_last_blocks} exceeds "
                f"model.num_hidden_layers={self.num_hidden_layers}"
            )
        tanh_norms = self.norm_type == "qdyt" or self.final_norm == "qdyt"
        if tanh_norms and self.qdyt_center == "group" and self.hidden_size % self.qdyt_groups:
            raise ValueError(
                f"model.qdyt_groups={self.qdyt_groups} does not divide model.hidden_size={self.hidden_size}; "
                "choose a divisor, or model.qdyt_center=token"
            )
        return self

    @model_validator(mode="after")
    def _mixers_fit(self) -> Self:
        block = self.block_hadamard_size
        if not is_power_of_two(block):
            raise ValueError(f"model.block_hadamard_size={block} must be a power of two, such as 64")
        widths = {
            "the head width hidden_size / num_attention_heads": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
        }
        for name, width in widths.items():
            if self.mixers and self.hadamard_exact and width % block:
                raise ValueError(
                    f"model.block_hadamard_size={block} does not divide {name} = {width}; choose "
                    f"model.block_hadamard_size={width & -width}, or model.hadamard_exact=false, which reduces the "
                    "block where it does not fit"
                )
        return self

    @model_validator(mode="after")
    def _bits_exist(self) -> Self:
        for name in ("attention_input_bits", "qk_bits", "ffn_input_bits", "gate_bits", "up_bits", "down_bits",
                     "embedding_bits"):  # fmt: skip
            bits = getattr(self, name)
            if bits is not None and not (2 <= bits <= 8 or bits >= OFF_BITS):
                raise ValueError(f"model.{name}={bits} must lie in 2 .. 8, or be {OFF_BITS}, which does not round")
        for name in ("vo_bits", "lm_head_bits"):
            bits = getattr(self, name)
            if bits not in (4, 6, 8) and bits < OFF_BITS:
                raise ValueError(f"model.{name}={bits} must be 4, 6 or 8, or {OFF_BITS}, which does not round")
        return self

    def flops_per_token(self, context: int) -> float:
        """6 (linear + vocab_size * hidden_size) + 12 layers * hidden_size * context: the PaLM convention.

        It counts the head at every token, although training computes it at masked ones only, so that figures
        compare with published ones.

        Source:
            Chowdhery et al. 2022, PaLM, appendix B (arXiv 2204.02311).
        """
        d = self.hidden_size
        linear = self.num_hidden_layers * (4 * d * d + 3 * d * self.intermediate_size)
        return 6.0 * (linear + (self.vocab_size or 0) * d + 2 * self.num_hidden_layers * d * context)
