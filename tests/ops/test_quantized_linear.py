"""The integer linear map against its definition: value and gradient, merged and separate, all precisions."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from builders import randn
from ternlm.ops import quantized_linear as module
from ternlm.ops import row_blocks
from ternlm.ops.quantize import dequantize_weight, quantize_activation, quantize_rows, ternarize
from ternlm.ops.quantized_linear import per_row, quantized_linear, quantized_linear_reference

K, SIZES, GROUP = 24, (5, 3, 7), 8


def quantized(weight: Tensor, sizes: Sequence[int], granularity: str) -> tuple[Tensor, Tensor]:
    """Codes of stacked matrices, each with its own scale, in the layout that the map takes."""
    parts = [ternarize(part, granularity, GROUP) for part in weight.split(list(sizes))]
    scales = [scale for _, scale in parts]
    stacked = torch.stack(scales) if granularity == "tensor" else torch.cat(scales)
    return torch.cat([codes for codes, _ in parts]), stacked


def operands(granularity: str = "tensor", sizes: Sequence[int] = SIZES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spread = torch.cat([torch.full((size, 1), 0.01 * 3**i) for i, size in enumerate(sizes)])
    weight = randn(sum(sizes), K, seed=1) * spread
    return randn(2, 3, K, seed=2), weight, *quantized(weight, sizes, granularity)


def run(function: object, x: Tensor, weight: Tensor, *rest: object) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs, and the gradients of x and the weight for a fixed upstream gradient."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = function(x, weight, *rest)  # type: ignore[operator]
    upstream = [randn(*y.shape, seed=3 + i).to(y.dtype) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, upstream)
    assert x.grad is not None and weight.grad is not None
    return [y.detach() for y in outputs], x.grad, weight.grad


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("sizes", [(15,), SIZES])
def test_the_fast_path_equals_its_reference_in_value_and_gradient(
    granularity: str, bits: int | None, sizes: tuple[int, ...]
) -> None:
    x, weight, codes, scale = operands(granularity, sizes)
    fast = run(quantized_linear, x, weight, codes, scale, sizes, bits)
    plain = run(quantized_linear_reference, x, weight, codes, scale, sizes, bits)
    assert [y.shape for y in fast[0]] == [(2, 3, size) for size in sizes]
    for a, b in zip([*fast[0], *fast[1:]], [*plain[0], *plain[1:]], strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_the_fast_path_in_bfloat16_is_near_the_float32_reference(granularity: str, bits: int | None) -> None:
    x, weight, codes, scale = operands(granularity)
    fast = run(quantized_linear, x.bfloat16(), weight, codes, scale, SIZES, bits)
    plain = run(quantized_linear_reference, x.bfloat16().float(), weight, codes, scale, SIZES, bits)
    assert fast[1].dtype == torch.bfloat16 and fast[2].dtype == torch.float32
    assert all(y.dtype == torch.bfloat16 for y in fast[0])
    for a, b in zip([*fast[0], *fast[1:]], [*plain[0], *plain[1:]], strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_q05_in_bfloat16_only_the_result_is_rounded() -> None:
    x, weight, codes, scale = operands()
    for a, b in zip(
        quantized_linear(x.bfloat16(), weight, codes, scale, SIZES),
        quantized_linear(x.bfloat16().float(), weight, codes, scale, SIZES),
        strict=True,
    ):
        assert torch.equal(a, b.bfloat16())


def test_the_scale_is_applied_after_the_integer_product_in_one_fixed_order() -> None:
    x, weight, codes, scale = operands()
    x_codes, s = quantize_activation(x)
    counts = (x_codes.long() @ codes.long().t()).split(list(SIZES), dim=-1)
    for y, count, g in zip(quantized_linear(x, weight, codes, scale, SIZES), counts, scale, strict=True):
        assert torch.equal(y, count.float() * (g / s))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_merged_matrices_equal_separate_ones_bit_for_bit(granularity: str) -> None:
    x, weight, codes, scale = operands(granularity)
    merged = quantized_linear(x, weight, codes, scale, SIZES)
    start = 0
    for i, (y, size) in enumerate(zip(merged, SIZES, strict=True)):
        rows = slice(start, start + size)
        own = scale[[i]] if granularity == "tensor" else scale[rows]
        (alone,) = quantized_linear(x, weight[rows], codes[rows], own, (size,))
        assert torch.equal(y, alone)
        start += size


def test_gradients_of_merged_matrices_equal_those_of_separate_ones() -> None:
    x, weight, codes, scale = operands()
    _, grad_x, grad_weight = run(quantized_linear, x, weight, codes, scale, SIZES)
    total, start = torch.zeros_like(x), 0
    for i, size in enumerate(SIZES):
        rows = slice(start, start + size)
        own_x, own_weight = x.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        (y,) = quantized_linear(own_x, own_weight, codes[rows], scale[[i]], (size,))
        y.backward(randn(*y.shape, seed=3 + i))
        assert own_x.grad is not None and own_weight.grad is not None
        torch.testing.assert_close(grad_weight[rows], own_weight.grad, rtol=1e-6, atol=1e-6)
        total += own_x.grad
        start += size
    torch.testing.assert_close(grad_x, total, rtol=1e-5, atol=1e-6)


def test_q13_gradients_are_taken_at_the_quantized_operands() -> None:
    x, weight, codes, scale = operands()
    _, grad_x, grad_weight = run(quantized_linear, x, weight, codes, scale, SIZES)
    upstream = torch.cat([randn(2, 3, size, seed=3 + i) for i, size in enumerate(SIZES)], dim=-1).view(6, -1)
    x_codes, s = quantize_activation(x.view(6, K))
    rounded = dequantize_weight(codes, per_row(scale, SIZES))
    torch.testing.assert_close(grad_x.view(6, K), upstream @ rounded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_weight, upstream.t() @ (x_codes / s), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(grad_weight, upstream.t() @ x.view(6, K), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(grad_x.view(6, K), upstream @ weight, rtol=1e-2, atol=1e-2)


def test_q15_latents_far_outside_the_codes_still_get_their_gradient() -> None:
    x, weight, _, _ = operands(sizes=(15,))
    weight[3] *= 50  # |W / scale| far above 1
    codes, scale = quantized(weight, (15,), "tensor")
    _, _, grad = run(quantized_linear, x, weight, codes, scale, (15,))
    _, _, plain = run(quantized_linear_reference, x, weight, codes, scale, (15,))
    assert bool((grad[3] != 0).all())
    torch.testing.assert_close(grad, plain, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_computed_only_where_it_is_wanted() -> None:
    x, weight, codes, scale = operands()
    for wants_x, wants_weight in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(wants_x), weight.clone().requires_grad_(wants_weight)
        sum(y.sum() for y in quantized_linear(a, b, codes, scale, SIZES)).backward()  # type: ignore[union-attr]
        assert (a.grad is not None) == wants_x and (b.grad is not None) == wants_weight


def test_only_int8_activations_are_kept_for_the_backward_pass() -> None:
    x, weight, codes, scale = operands()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized_linear(x.requires_grad_(), weight.requires_grad_(), codes, scale, SIZES)
    wide = [tensor for tensor in kept if tensor.numel() >= x.numel() and tensor.dtype != torch.int8]
    assert kept and not wide


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_stays_visibly_broken(value: float) -> None:
    x, weight, codes, scale = operands()
    clean = quantized_linear(x, weight, codes, scale, SIZES)
    x[0, 1, 5] = value
    for y, before in zip(quantized_linear(x, weight, codes, scale, SIZES), clean, strict=True):
        assert not torch.isfinite(y[0, 1]).any()
        assert torch.equal(y[1], before[1]) and torch.equal(y[0, 0], before[0, 0])


def test_p02_merged_matrices_share_one_quantization_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = module.quantize_activation
    monkeypatch.setattr(module, "quantize_activation", lambda *a: calls.append(1) or original(*a))
    x, weight, codes, scale = operands()
    quantized_linear(x, weight, codes, scale, SIZES)
    assert len(calls) == 1


def test_byte_rows_equal_the_reference() -> None:
    x, weight, _, _ = operands()
    codes, scale = quantize_rows(weight)
    fast = run(quantized_linear, x, weight, codes, scale, SIZES, 8)
    plain = run(quantized_linear_reference, x, weight, codes, scale, SIZES, 8)
    for a, b in zip([*fast[0], *fast[1:]], [*plain[0], *plain[1:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_q23_scales_that_are_no_powers_of_two_stay_finite_and_exact() -> None:
    x, weight, _, _ = operands(sizes=(15,))
    for factor in torch.logspace(-6, 6, 20):
        codes, scale = quantized(weight * factor, (15,), "tensor")
        (y,) = quantized_linear(x, weight * factor, codes, scale, (15,))
        (plain,) = quantized_linear_reference(x, weight * factor, codes, scale, (15,))
        assert bool(torch.isfinite(y).all())
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5 * scale.item())


def test_blocks_cover_the_outputs_once_and_a_few_tokens_take_one() -> None:
    matrix = torch.empty(1300, 3, dtype=torch.int8)
    for tokens, blocks in ((4096, 3), (128, 3), (60, 2), (1, 1), (0, 1)):
        slices = module._column_blocks(torch.empty(tokens, 3, dtype=torch.int8), matrix)
        assert [i for columns in slices for i in range(1300)[columns]] == list(range(1300))
        assert len(slices) == blocks


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_the_captured_graph_gives_the_same_bits_for_any_number_of_tokens(granularity: str) -> None:
    captured = torch.compile(quantized_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    x, *rest = operands(granularity)
    for tokens in (6, 5, 2):
        part = x.view(6, K)[:tokens].bfloat16()
        plain, compiled = (run(function, part, *rest, SIZES) for function in (quantized_linear, captured))
        for a, b in zip([*plain[0], *plain[1:]], [*compiled[0], *compiled[1:]], strict=True):
            assert torch.equal(a, b)


def test_the_product_is_an_operator_that_fits_its_declaration() -> None:
    x, _, codes, scale = operands()
    x_codes, s = quantize_activation(x.view(6, K))
    torch.library.opcheck(module._blocked_product, (x_codes, s, codes, scale, SIZES, torch.bfloat16))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_working_in_blocks_changes_no_bit(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements, columns in ((1 << 16, 512), (30, 4), (1, 1)):
        monkeypatch.setattr(row_blocks, "ELEMENTS", elements)
        monkeypatch.setattr(module, "_SUMS_AT_A_TIME", elements)
        monkeypatch.setattr(module, "_COLUMNS_AT_A_TIME", columns)
        outputs, *gradients = run(quantized_linear, *operands(granularity), SIZES)
        results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
