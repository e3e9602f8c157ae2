"""The exact integer product: every path gives the integers of an int64 matmul, bit for bit."""

import pytest
import torch

from builders import randn
from ternlm.ops import integer_matmul as module
from ternlm.ops.integer_matmul import integer_matmul, integer_matmul_reference
from ternlm.ops.quantize import quantize_activation, ternarize

WIDTHS = [256, 768, 3072, 4096]


def check(x: torch.Tensor, codes: torch.Tensor) -> None:
    exact = x.long() @ codes.long().t()
    for path in (integer_matmul, integer_matmul_reference):
        product = path(x, codes)
        assert product.dtype in (torch.int32, torch.float32)
        assert torch.equal(product.long(), exact)
        assert torch.equal(product.double(), exact.double())


@pytest.mark.parametrize("width", WIDTHS)
def test_q05_all_paths_agree_with_int64_on_random_codes(width: int) -> None:
    x, _ = quantize_activation(randn(7, width, seed=width))
    codes, _ = ternarize(randn(13, width, seed=width + 1))
    check(x, codes)


@pytest.mark.parametrize("width", [*WIDTHS, 8192])
def test_q08_all_paths_agree_with_int64_on_the_largest_codes(width: int) -> None:
    x = torch.full((5, width), 127, dtype=torch.int8)
    x[1], x[2, ::2], x[3, 1::2] = -127, -127, 0
    codes = torch.ones(6, width, dtype=torch.int8)
    codes[1], codes[2, ::2], codes[3, 1::2], codes[4] = -1, -1, 0, 0
    check(x, codes)
    assert integer_matmul(x, codes)[0, 0] == 127 * width


@pytest.mark.parametrize("tokens,columns,rows", [(1, 1, 1), (1, 3, 5), (2, 257, 3), (33, 40, 17), (0, 8, 3)])
def test_odd_shapes_agree(tokens: int, columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(tokens + columns)
    x = torch.randint(-127, 128, (tokens, columns), generator=generator).to(torch.int8)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    check(x, codes)


def test_byte_codes_of_rows_agree_while_float32_holds_their_sums() -> None:
    x = torch.full((3, 1040), 127, dtype=torch.int8)  # 127 * 127 * 1040 < 2^24
    check(x, x)


def test_q05_bfloat16_output_would_round_the_sums() -> None:
    x = torch.full((1, 1000), 127, dtype=torch.int8)
    codes = torch.ones(1, 1000, dtype=torch.int8)
    rounded = (x.bfloat16() @ codes.bfloat16().t()).long()
    assert rounded.item() != 127_000
    assert integer_matmul(x, codes).long().item() == 127_000


def test_the_plain_path_is_taken_where_bytes_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = quantize_activation(randn(3, 64, seed=1))
    codes, _ = ternarize(randn(5, 64, seed=2))
    products = []
    for fast in (False, True):
        monkeypatch.setattr(module, "_MULTIPLIES_BYTES_FAST", fast)
        products.append(integer_matmul(x, codes))
    assert products[0].dtype == torch.float32 and products[1].dtype == torch.int32
    assert torch.equal(products[0].long(), products[1].long())
