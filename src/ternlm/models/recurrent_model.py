"""What `hgrn` and `hnet` have around their stacks: an embedding of bytes, and a head that may be ternary.

The blocks and stacks themselves are in `ternlm.models.hgrn_block`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.models.hgrn_block import RecurrentSettings, initialize_stack
from ternlm.models.language_model import LanguageModel
from ternlm.nn.initialization import normal_
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import Perturbation, QuantizationMode

HEAD_INIT_STD = 0.02
"""Standard deviation of an unrounded head, whatever the ternary layers start with: its logits decide the first loss."""


class RecurrentModel(LanguageModel):
    """A model with a memory of fixed size between an embedding and a head.

    Args:
        settings: Shape; `vocab_size` must be set.
        width: Channels of embedding and head.
        mode: Rounding of a ternary head.
    """

    is_recurrent = True

    def __init__(self, settings: RecurrentSettings, width: int, mode: QuantizationMode) -> None:
        super().__init__()
        assert settings.vocab_size is not None
        self.settings = settings
        self.embed_tokens = nn.Embedding(settings.vocab_size, width)
        self.lm_head: TernaryHead | nn.Linear | None = None
        if settings.quantize_lm_head:
            self.lm_head = TernaryHead(settings, width, mode)
        elif not settings.tie_word_embeddings:
            self.lm_head = nn.Linear(width, settings.vocab_size, bias=False)

    def set_modes(self, modes: Sequence[QuantizationMode]) -> None:
        super().set_modes(modes)
        if isinstance(self.lm_head, TernaryHead) and self.lm_head.decoder.mode != modes[-1]:
            self.lm_head.decoder.mode = modes[-1]

    def perturb(self, perturbations: Sequence[Perturbation]) -> None:
        super().perturb(perturbations)
        if isinstance(self.lm_head, TernaryHead):
            self.lm_head.decoder.perturb(perturbations[-1])

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens).to(self.compute_dtype)

    def _logits(self, x: Tensor, scored: Tensor | None) -> Tensor:
        """(batch, time, vocab_size), or (number, vocab_size) where only scored positions are wanted."""
        if scored is not None:
            x = x[scored]
        if isinstance(self.lm_head, TernaryHead):
            logits: Tensor = self.lm_head(x)
            return logits
        return F.linear(x, (self.lm_head or self.embed_tokens).weight.to(x.dtype))

    def _initialize_ends(self, settings: RecurrentSettings, output_std: float, seed: int) -> None:
        """Draw embedding and head afresh."""
        normal_(self.embed_tokens.weight, settings.embedding_init_std, seed, "embed_tokens")
        if isinstance(self.lm_head, TernaryHead):
            initialize_stack(self.lm_head, settings, output_std, seed, "lm_head")
        elif self.lm_head is not None:
            normal_(self.lm_head.weight, HEAD_INIT_STD, seed, "lm_head")


class TernaryHead(nn.Module):
    """logits = W norm(x) with ternary W; the norm only where each ternary layer has one."""

    def __init__(self, settings: RecurrentSettings, width: int, mode: QuantizationMode) -> None:
        super().__init__()
        assert settings.vocab_size is not None
        self.norm = RMSNorm(width, settings.inner_eps) if settings.bitlinear_norm == "rms" else nn.Identity()
        self.decoder = BitLinear(width, {"decoder": settings.vocab_size}, mode)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., vocab_size)."""
        (logits,) = self.decoder(self.norm(x))
        return logits
