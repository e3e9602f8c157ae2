"""Orthogonal mixers: fixed rotations that spread outliers over channels before activations are rounded."""

from typing import Literal

import torch
from torch import Tensor, nn

from ternlm.nn.initialization import generator_of
from ternlm.ops.hadamard import hadamard, hadamard_matrix, largest_block, signed_permutation

MixerOrder = Literal["permutation_first", "hadamard_first"]

_DENSE_WIDTH = 128
"""Up to this width one product with the whole rotation costs less than moving channels."""


class Mixer(nn.Module):
    """y = H D2 P D1 x: channels change sign, move, change sign, then each run of b is Hadamard-transformed.

    D1 and D2 are random +-1 diagonals and P a permutation, drawn from a generator of their own. They alone change
    nothing for a quantizer with one scale; it is H behind them that lowers the error of a few large channels.
    The map is orthogonal, so two tensors mixed alike keep their dot products, and a matrix behind it can undo it.

    Args:
        width: Channels, the last dimension of the input.
        block: b, a power of two, reduced to the largest one that divides the width; 1 leaves H out.
        order: ``permutation_first`` as above; ``hadamard_first``, D2 P D1 H, which for a quantizer with one scale
            is H alone.

    Source:
        Wang et al. 2025, BitNet v2 (arXiv 2504.18415), for the transform before 4-bit activations.
    """

    first_signs: Tensor
    permutation: Tensor
    second_signs: Tensor

    def __init__(self, width: int, block: int, order: MixerOrder = "permutation_first") -> None:
        super().__init__()
        self.width, self.block, self.order = width, largest_block(width, block), order
        self.register_buffer("first_signs", torch.ones(width, dtype=torch.int8))
        self.register_buffer("permutation", torch.arange(width))
        self.register_buffer("second_signs", torch.ones(width, dtype=torch.int8))
        self._derived: tuple[Tensor, ...] | None = None
        self._derived_version: tuple[object, ...] | None = None

    @torch.no_grad()
    def draw(self, seed: int, layer: int, site: str) -> None:
        """Draw signs and permutation afresh, as a pure function of the arguments."""
        generator = generator_of(seed, f"mixer|{layer}|{site}")
        for signs in (self.first_signs, self.second_signs):
            signs.copy_(2 * torch.randint(0, 2, (self.width,), generator=generator) - 1)
        self.permutation.copy_(torch.randperm(self.width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), same dtype."""
        if not torch.compiler.is_compiling():
            self.refresh()
        assert self._derived is not None
        matrix, source, signs, target = self._derived
        if self.width <= _DENSE_WIDTH:
            return x @ matrix.to(x.dtype)
        if self.order == "hadamard_first":
            return signed_permutation(hadamard(x, matrix), source, signs, target)
        x = signed_permutation(x, source, signs, target)
        return x if self.block == 1 else hadamard(x, matrix)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what is derived from the buffers up to date; free when they have not changed."""
        buffers = (self.first_signs, self.permutation, self.second_signs)
        version = (*(buffer._version for buffer in buffers), *(buffer.data_ptr() for buffer in buffers))
        if version == self._derived_version:
            return
        source = self.permutation.clone()
        target = source.argsort()
        signs = (self.second_signs * self.first_signs[source]).float()
        matrix = hadamard_matrix(self.block).to(source.device)
        if self.width <= _DENSE_WIDTH:
            matrix = self._dense(matrix, source, signs)
        derived = (matrix, source, signs, target)
        if self._derived is None or self._derived[0].device != source.device:
            self._derived = derived
        else:
            for old, new in zip(self._derived, derived, strict=True):
                old.copy_(new)
        self._derived_version = version

    def _dense(self, matrix: Tensor, source: Tensor, signs: Tensor) -> Tensor:
        """The whole map as a matrix that stands to the right of x, (width, width)."""
        rotation = torch.block_diag(*[matrix] * (self.width // self.block))
        moved = torch.zeros_like(rotation)
        moved[source, torch.arange(self.width, device=source.device)] = signs
        return rotation @ moved if self.order == "hadamard_first" else moved @ rotation

    def extra_repr(self) -> str:
        return f"width={self.width}, block={self.block}, order={self.order}"
