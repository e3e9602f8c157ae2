"""The tensors of a model as transformers names and packs them."""

import torch
from torch import Tensor

from ternlm.checkpoint import ternary_matrices
from ternlm.export.transformers_config import ROWS_PER_BYTE
from ternlm.models import LanguageModel
from ternlm.models.bitnet import BitNetSettings

_INNER_NORMS = {
    "self_attn.q_proj": "attn_inner_norm",
    "self_attn.k_proj": "attn_inner_norm",
    "self_attn.v_proj": "attn_inner_norm",
    "self_attn.o_proj": "self_attn.attn_sub_norm",
    "mlp.gate_proj": "ffn_inner_norm",
    "mlp.up_proj": "ffn_inner_norm",
    "mlp.down_proj": "mlp.ffn_sub_norm",
}
"""Of ``norm_layout: double``, the norm in front of each matrix, which transformers has inside of it."""


def pack_row_blocks(codes: Tensor) -> Tensor:
    """Four codes per byte, a quarter of the rows apart.

    With P = rows / 4: byte[p, c] = sum over i = 0..3 of (Q[i P + p, c] + 1) * 4^i.

    Args:
        codes: int8 in {-1, 0, +1}, (rows, columns), rows a multiple of 4.

    Returns:
        uint8, (rows / 4, columns).
    """
    digits = (codes + 1).to(torch.uint8).view(ROWS_PER_BYTE, -1, codes.shape[1])
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(-1, 1, 1)
    return (digits << shifts).sum(dim=0, dtype=torch.uint8)


def unpack_row_blocks(packed: Tensor) -> Tensor:
    """The inverse of `pack_row_blocks`: int8 codes, (4 * rows of the packed, columns)."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(-1, 1, 1)
    return ((packed >> shifts) & 3).to(torch.int8).flatten(0, 1) - 1


@torch.no_grad()
def transformers_tensors(model: LanguageModel, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the file by name, on the CPU, contiguous.

    Args:
        model: One that `require_known_to_transformers` lets pass.
        form: ``hf``: matrices as they are; ``hf-packed``: codes, and g as `weight_scale`, float32, (1,).
        dtype: Of everything else.
    """
    found = model.dense_tensors() if form == "hf-packed" else model.tensors()
    matrices = ternary_matrices(model)
    tensors = {}
    for name, tensor in found.items():
        matrix = name.removesuffix(".weight")
        if matrix not in matrices:
            tensors[name] = tensor.to(dtype)
        elif form == "hf":
            tensors[name] = tensor
        else:
            codes, scale = matrices[matrix]
            tensors[name] = pack_row_blocks(codes.cpu())
            tensors[f"{name}_scale"] = scale.view(1)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if ".quantizer." not in name
    }
    assert isinstance(model.settings, BitNetSettings)
    return _with_inner_norms(tensors) if model.settings.norm_layout == "double" else tensors


def _with_inner_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each norm that stands in front of a matrix as a part of it; where several share one, each gets a copy."""
    moved: dict[str, Tensor] = {}
    taken = set()
    for name in tensors:
        for matrix, norm in _INNER_NORMS.items():
            if name.endswith(f".{matrix}.weight"):
                layer = name.removesuffix(f"{matrix}.weight")
                moved[f"{layer}{matrix}.rms_norm.weight"] = tensors[f"{layer}{norm}.weight"]
                taken.add(f"{layer}{norm}.weight")
    return {name: tensor for name, tensor in tensors.items() if name not in taken} | moved
