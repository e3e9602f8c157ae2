"""Exact products of small integers: int8 codes times int8 codes.

The product of activation codes (at most 127) and ternary codes (at most 1) over K columns stays
below 127 K, so an int32 accumulator is always exact and a float32 one is while K <= 132,104.
Every path below therefore returns the same integers; only the speed differs. Weight codes of 8 bits
make sums 127 times as large: then the float32 paths are exact while K <= 1,040 and round beyond.
"""

import torch
from torch import Tensor

_MULTIPLIES_BYTES_FAST = bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def integer_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """x @ codes^T on integer codes, exactly.

    Uses int32 accumulation where the processor multiplies bytes fast (CPUs with VNNI or AMX),
    bfloat16 operands with a float32 result on CUDA (integers up to 256 are exact in bfloat16),
    and float32 operands elsewhere.

    Args:
        x: Activation codes, (tokens, in_features), int8.
        codes: Weight codes, (out_features, in_features), int8.

    Returns:
        (tokens, out_features), int32 or float32, holding the exact integers.
    """
    if x.device.type == "cpu" and _MULTIPLIES_BYTES_FAST:
        return torch._int_mm(x, codes.t())
    if x.device.type == "cuda":
        return torch.mm(x.bfloat16(), codes.bfloat16().t(), out_dtype=torch.float32)
    return integer_matmul_reference(x, codes)


def integer_matmul_reference(x: Tensor, codes: Tensor) -> Tensor:
    """The plain form of `integer_matmul`: float32 operands, exact while K <= 132,104."""
    return x.float() @ codes.float().t()
