"""BitLinear: the dial of modes, one quantization per change of the latents, merged and separate matrices."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from builders import randn
from ternlm.errors import SettingsError
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import FULL_PRECISION, QuantizationMode
from ternlm.ops.quantize import dequantize_weight, quantize_rows, ternarize
from ternlm.ops.quantized_linear import quantized_linear_reference

OUT = {"a": 5, "b": 3}
GROUPED = QuantizationMode(granularity="group", group_size=8)


def layer(mode: QuantizationMode | None = None, out: dict[str, int] | None = None, seed: int = 1) -> BitLinear:
    made = BitLinear(24, OUT if out is None else out, mode or QuantizationMode())
    with torch.no_grad():
        made.weight.copy_(randn(*made.weight.shape, seed=seed) * 0.02)
        made.weight[: made.sizes[0]] *= 4  # so that merged matrices have different scales
    return made


@pytest.mark.parametrize("weights", ["ternary", "int8"])
@pytest.mark.parametrize("activations", ["int8", "int4", "none"])
def test_each_mode_equals_the_reference(weights: str, activations: str) -> None:
    made = layer(QuantizationMode.from_mapping({"weights": weights, "activations": activations}))
    x = randn(2, 7, 24)
    bits = {"int8": 8, "int4": 4, "none": None}[activations]
    for y, part in zip(made(x), made.weight.detach().split(made.sizes), strict=True):
        codes, scale = ternarize(part) if weights == "ternary" else quantize_rows(part)
        rows = scale.reshape(-1, 1).expand(part.shape[0], 1)
        (plain,) = quantized_linear_reference(x, part, codes, rows, (part.shape[0],), bits)
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)


def test_the_twin_is_a_plain_linear_map_of_the_latents() -> None:
    made, x = layer(FULL_PRECISION), randn(4, 24)
    a, b = made(x)
    assert torch.equal(torch.cat([a, b], dim=-1), F.linear(x, made.weight))
    assert made.quantizations == 0 and made.codes is None and made.scale is None


@pytest.mark.parametrize("mode", [QuantizationMode(), QuantizationMode(granularity="row"), GROUPED])
def test_a_merged_layer_equals_separate_layers_bit_for_bit(mode: QuantizationMode) -> None:
    merged, x = layer(mode), randn(2, 3, 24)
    for (name, size), y, part in zip(OUT.items(), merged(x), merged.weight.split(merged.sizes), strict=True):
        alone = BitLinear(24, {name: size}, mode)
        with torch.no_grad():
            alone.weight.copy_(part)
        assert torch.equal(alone(x)[0], y)
        for ours, theirs in zip(merged.matrices()[name], alone.matrices()[name], strict=True):
            assert torch.equal(ours, theirs)


def test_q18_the_number_of_scales_is_that_of_the_granularity() -> None:
    shapes = {"tensor": (2,), "row": (8, 1), "group": (8, 3)}
    for granularity, shape in shapes.items():
        made = layer(QuantizationMode.from_mapping({"granularity": granularity, "group_size": 8}))
        made.refresh()
        assert tuple(made.scale.shape) == shape
    assert tuple(layer().matrices()["a"][1].shape) == ()
    assert tuple(layer(GROUPED).matrices()["b"][1].shape) == (3, 3)


def test_the_codes_that_are_handed_out_are_those_of_the_quantizer() -> None:
    made = layer()
    for part, (codes, scale) in zip(made.weight.split(made.sizes), made.matrices().values(), strict=True):
        own_codes, own_scale = ternarize(part)
        assert torch.equal(codes, own_codes) and torch.equal(scale, own_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q04_latents_and_scales_stay_float32_whatever_computes(dtype: torch.dtype) -> None:
    made, wide = layer(), layer()
    x = randn(4, 24).to(dtype)
    outputs = made(x)
    sum(y.float().sum() for y in outputs).backward()  # type: ignore[union-attr]
    wide(x.float())
    assert all(y.dtype == dtype for y in outputs)
    assert made.weight.dtype == made.scale.dtype == torch.float32 and made.weight.grad is not None
    assert made.weight.grad.dtype == torch.float32
    assert torch.equal(made.scale, wide.scale) and torch.equal(made.codes, wide.codes)


def test_q04_files_hold_latents_only() -> None:
    made = layer()
    made.refresh()
    assert list(made.state_dict()) == ["weight"]


def test_p02_the_codes_are_computed_once_for_all_micro_batches_and_evaluations() -> None:
    made = layer()
    for i in range(4):
        sum(y.square().sum() for y in made(randn(2, 24, seed=i))).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        made.eval()(randn(2, 24))
    made.refresh()
    made.matrices()
    assert made.quantizations == 1


def step(made: BitLinear) -> None:
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    sum(y.sum() for y in made(randn(3, 24))).backward()  # type: ignore[union-attr]
    optimizer.step()


def edit(made: BitLinear) -> None:
    with torch.no_grad():
        made.weight[2:4].neg_()


def replace(made: BitLinear) -> None:
    made.weight = torch.nn.Parameter(randn(*made.weight.shape, seed=9))


CHANGES: dict[str, Callable[[BitLinear], object]] = {
    "optimizer step": step,
    "load_state_dict": lambda made: made.load_state_dict(layer(seed=5).state_dict()),
    "load_state_dict by assignment": lambda made: made.load_state_dict(layer(seed=5).state_dict(), assign=True),
    "edit in place": edit,
    "edit of a detached view": lambda made: made.weight.detach()[0].mul_(-3),
    "another parameter": replace,
    "another storage": lambda made: setattr(made.weight, "data", randn(*made.weight.shape, seed=9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_q22_the_codes_follow_every_change_of_the_latents(change: str) -> None:
    made, x = layer(), randn(6, 24, seed=8)
    before = [y.detach() for y in made(x)]
    CHANGES[change](made)
    after = made(x)
    fresh = BitLinear(24, OUT, QuantizationMode())
    with torch.no_grad():
        fresh.weight.copy_(made.weight)
    assert made.quantizations == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for y, expected in zip(after, fresh(x), strict=True):
        assert torch.equal(y, expected)


def test_q22_a_new_mode_is_in_force_at_once_and_the_old_one_comes_back() -> None:
    made, x = layer(), randn(6, 24, seed=8)
    outputs = []
    modes = [QuantizationMode(), QuantizationMode(granularity="row"), GROUPED, FULL_PRECISION, QuantizationMode()]
    modes.insert(4, QuantizationMode(weights="int8"))
    for mode in modes:
        made.mode = mode
        outputs.append(torch.cat(made(x), dim=-1).detach())
        fresh = layer(mode)
        assert torch.equal(outputs[-1], torch.cat(fresh(x), dim=-1))
    assert torch.equal(outputs[0], outputs[-1])
    for i in range(len(modes) - 1):
        for j in range(i + 1, len(modes) - 1):
            assert not torch.equal(outputs[i], outputs[j])


def test_q22_a_copy_has_codes_of_its_own() -> None:
    made, x = layer(), randn(6, 24)
    before = made(x)[0].detach()
    twin = copy.deepcopy(made)
    edit(twin)
    twin(x)
    assert torch.equal(made(x)[0], before)
    assert not torch.equal(twin(x)[0], before)


def test_a_first_pass_in_inference_mode_does_not_spoil_training() -> None:
    made, x = layer(), randn(3, 24)
    with torch.inference_mode():
        made(x)
    made(x)[0].sum().backward()
    assert made.weight.grad is not None and made.quantizations == 1


def test_a_refresh_between_forward_and_backward_is_never_silent() -> None:
    made = layer()
    x = randn(3, 24).requires_grad_()
    loss = made(x)[0].sum()
    edit(made)
    made.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_q02_a_layer_made_of_its_own_codes_keeps_them_but_not_its_scale() -> None:
    made = layer(out={"a": 40})
    codes, scale = (part.clone() for part in made.matrices()["a"])
    with torch.no_grad():
        made.weight.copy_(dequantize_weight(codes, scale))
    again, shrunk = made.matrices()["a"]
    assert torch.equal(again, codes) and shrunk < 0.8 * scale


def test_unknown_modes_are_refused_with_a_sentence() -> None:
    with pytest.raises(SettingsError, match=r"quantization\.weights='binary' is refused"):
        QuantizationMode.from_mapping({"weights": "binary"}, "quantization")
    with pytest.raises(SettingsError, match=r"Did you mean 'quantization\.activations'"):
        QuantizationMode.from_mapping({"activation": "int8"}, "quantization")


def test_a_group_that_does_not_divide_the_input_is_refused() -> None:
    with pytest.raises(SettingsError, match="group_size=7 does not divide a width of 24"):
        layer(QuantizationMode(granularity="group", group_size=7))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_q23_a_compiled_layer_equals_the_plain_one_on_twenty_scales() -> None:
    torch._dynamo.reset()
    plain = layer()
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True)
    for i, factor in enumerate(torch.logspace(-5, 5, 20)):
        x = randn(6, 24, seed=i)
        results = []
        for made in (plain, compiled):
            with torch.no_grad():
                made.weight.copy_(randn(8, 24, seed=100 + i) * factor)
            made.weight.grad = None
            made.refresh()
            own = x.clone().requires_grad_()
            outputs = made(own)
            sum((y * y.detach().sign()).sum() for y in outputs).backward()  # type: ignore[union-attr]
            results.append((*outputs, own.grad, made.weight.grad))
        for a, b in zip(*results, strict=True):
            assert bool(torch.isfinite(b).all())
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.detach().abs().max()))
    assert compiled.quantizations == 20
