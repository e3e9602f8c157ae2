"""`qdyt`: a bidirectional encoder with ternary weights and 4-bit activations, trained on masked tokens.

Tanh norms (QDyT) before each sub-layer, learned scales on what sub-layers add, orthogonal mixers before the
places that round, a running scale for every activation, and an ordinary norm before the head. Every
ingredient can be switched off, down to the full-precision encoder with root-mean-square norms.

    x = dropout( norm( m (E_w[tokens] + E_p[position] + E_t[type]) ) )
    x = x + za attention(norm(x)),  x = x + zf dropout(feed_forward(norm(x)))        for each block
    logits = W_head norm(x) + bias

Source:
    BudEcosystem/budnetencoder, "BitNet-QDyT-v2", a description without results; the ingredients' own sources
    stand at their files, and what deviates, and why, in docs/models/qdyt.md.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternlm.errors import SettingsError
from ternlm.models.language_model import LanguageModel, Output
from ternlm.models.qdyt_block import QDyTBlock, build_norm, integer_weights
from ternlm.models.qdyt_settings import QDyTSettings
from ternlm.nn.activation_quantizer import ActivationQuantizer, ActivationSettings
from ternlm.nn.initialization import normal_
from ternlm.nn.linear import BitLinear
from ternlm.nn.mixer import Mixer
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import Perturbation, QuantizationMode
from ternlm.nn.tanh_norm import QDyT

_ROWS = ActivationSettings(act_scale="absmax_token", stochastic_rounding=False)
"""How looked-up rows of the embedding are rounded: by their own largest element, to nearest."""


class QDyTTrunk(nn.Module):
    """Embeddings, blocks and final norm."""

    embed_scale: nn.Parameter | None

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode) -> None:
        super().__init__()
        assert settings.vocab_size is not None
        width = settings.hidden_size
        self.embed_tokens = nn.Embedding(settings.vocab_size, width)
        self.embed_positions = nn.Embedding(settings.max_position_embeddings, width)
        self.embed_types = nn.Embedding(settings.type_vocab_size, width)
        self.embed_quantizer = ActivationQuantizer(settings.embedding_bits, _ROWS, width)
        scaled = settings.embed_scale == "sqrt_d"
        self.register_parameter("embed_scale", nn.Parameter(torch.empty(())) if scaled else None)
        self.embed_norm = build_norm(settings, settings.norm_type)
        self.layers = nn.ModuleList(QDyTBlock(settings, mode, layer) for layer in range(settings.num_hidden_layers))
        self.norm = build_norm(settings, settings.final_norm)
        self.hidden_dropout = settings.hidden_dropout

    def embed(self, tokens: Tensor, types: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Tokens, (batch, time), and their types to the residual stream, (batch, time, hidden_size), in `dtype`."""
        words, _ = self.embed_quantizer(self.embed_tokens(tokens))
        kinds = self.embed_types.weight[0] if types is None else self.embed_types(types)
        x = words + (self.embed_positions.weight[: tokens.shape[1]] + kinds)
        if self.embed_scale is not None:
            x = x * self.embed_scale
        return F.dropout(self.embed_norm(x.to(dtype)), self.hidden_dropout, self.training)


class MaskedHead(nn.Module):
    """logits = W x + bias, W with integer rows and x rounded per token, at `lm_head_bits`."""

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode) -> None:
        super().__init__()
        assert settings.vocab_size is not None
        self.bits = settings.lm_head_bits
        self.decoder = BitLinear(settings.hidden_size, {"decoder": settings.vocab_size}, self._own(mode))
        self.bias = nn.Parameter(torch.empty(settings.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        (logits,) = self.decoder(x)
        return logits + self.bias.to(logits.dtype)

    def set_mode(self, mode: QuantizationMode) -> None:
        """Off where a block's weights or activations are not rounded; else at its own bits, or the least allowed."""
        own = self._own(mode)
        if self.decoder.mode != own:
            self.decoder.mode = own

    def _own(self, mode: QuantizationMode) -> QuantizationMode:
        bits = "none" if mode.weights == "none" else integer_weights(self.bits)
        activations = "none" if mode.activations == "none" else bits
        return QuantizationMode.from_mapping(
            {"weights": bits, "activations": activations, "least_bits": mode.least_bits}, "quantization"
        )


class QDyTModel(LanguageModel):
    """The masked-language-model encoder.

    Args:
        settings: Shape; `vocab_size` must be set.
        mode: Rounding of the blocks; embedding and head follow the first and the last.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping activations.
    """

    is_causal = False
    settings: QDyTSettings

    def __init__(self, settings: QDyTSettings, mode: QuantizationMode, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.gradient_checkpointing = gradient_checkpointing
        self.model = QDyTTrunk(settings, mode)
        self.lm_head = MaskedHead(settings, mode)
        shared = self.model.embed_tokens.weight
        if settings.tie_word_embeddings and isinstance(shared, nn.Parameter):
            self.lm_head.decoder.weight = shared
        self.set_modes([mode] * settings.num_hidden_layers)

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        scored: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Output:
        """Logits for each token from all others.

        Args:
            tokens: (batch, time), int64.
            state: None: an encoder has no memory.
            lengths: (batch,), how many tokens of each row are real when rows are padded on the right; no token
                sees padding, and logits there are meaningless. None where all are real, which is faster.
            scored: (batch, time), bool; logits are computed there only and come as (number, vocab_size).
            types: (batch, time), int64, types of tokens; None is type 0 everywhere.

        Raises:
            SettingsError: A state is given.
        """
        if state is not None:
            _refuse_memory()
        if tokens.shape[1] > self.settings.max_position_embeddings:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed max_position_embeddings={self.settings.max_position_embeddings}"
            )
        self.refresh()
        valid = None
        if lengths is not None:
            valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x = self.model.embed(tokens, types, self.compute_dtype)
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, valid, use_reentrant=False)
            else:
                x = block(x, valid)
        if scored is not None:
            x = x[scored]
        return Output(self.lm_head(self.model.norm(x)), None, {})

    def initial_state(self, batch_size: int) -> NoReturn:
        """Refused: an encoder reads a whole text at once.

        Raises:
            SettingsError: Always.
        """
        _refuse_memory()

    def initialize(self, seed: int) -> None:
        settings = self.settings
        for name, module in self.named_modules():
            if isinstance(module, BitLinear):
                is_head = module is self.lm_head.decoder
                if not (is_head and settings.tie_word_embeddings):
                    own = settings.head_init_std if is_head else None
                    normal_(module.weight, own or 1 / math.sqrt(module.in_features), seed, name)
            elif isinstance(module, nn.Embedding):
                normal_(module.weight, settings.embedding_init_std, seed, name)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, QDyT):
                module.initialize()
            elif isinstance(module, ActivationQuantizer):
                module.reset()
        self._initialize_scalars()
        for layer, block in enumerate(self.model.layers):
            for site, mixer in block.named_modules():
                if isinstance(mixer, Mixer):
                    mixer.draw(seed, layer, site)
        for linear in self.bit_linears().values():
            linear.fit()

    @torch.no_grad()
    def _initialize_scalars(self) -> None:
        settings = self.settings
        nn.init.zeros_(self.lm_head.bias)
        if self.model.embed_scale is not None:
            self.model.embed_scale.fill_(math.sqrt(settings.hidden_size))
        for block in self.model.layers:
            assert isinstance(block, QDyTBlock)
            for scale in (block.attention_scale, block.feed_forward_scale):
                if scale is not None:
                    scale.fill_(settings.skip_init_scale / math.sqrt(settings.num_hidden_layers))

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.model.layers

    def set_modes(self, modes: Sequence[QuantizationMode]) -> None:
        super().set_modes(modes)
        self.model.embed_quantizer.mode = modes[0]
        self.lm_head.set_mode(modes[-1])

    def perturb(self, perturbations: Sequence[Perturbation]) -> None:
        super().perturb(perturbations)
        first, last = perturbations[0], perturbations[-1]
        self.model.embed_quantizer.perturb(Perturbation(drop=first.drop, drop_by=first.drop_by))
        self.lm_head.decoder.perturb(Perturbation(drop=last.drop, drop_by=last.drop_by))

    def set_step(self, step: int) -> None:
        """Set the ramp of the tanh slopes."""
        for norm in self.modules():
            if isinstance(norm, QDyT):
                norm.set_step(step)

    def refresh(self) -> None:
        super().refresh()
        self.lm_head.decoder.refresh()
        for mixer in self._mixers():
            mixer.refresh()

    def _mixers(self) -> list[Mixer]:
        cached = self.__dict__.get("_all_mixers")
        if cached is None:
            cached = self.__dict__["_all_mixers"] = [m for m in self.modules() if isinstance(m, Mixer)]
        return cached


def _refuse_memory() -> NoReturn:
    raise SettingsError(
        "a 'qdyt' model is an encoder: it reads a text at once, keeps no memory and cannot continue it. "
        "Use 'ternlm fill' for masked tokens, or a causal family such as bitnet to generate."
    )
