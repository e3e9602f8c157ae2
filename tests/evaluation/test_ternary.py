"""Statistics of quantized matrices: against their definitions, across modes, and without a trace in training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from builders import random_tokens, tiny_bitnet, tiny_model
from ternlm.data.batch import Batch
from ternlm.evaluation import ternary as module
from ternlm.evaluation.ternary import KEYS, TernaryStatistics, code_shares, quantized_matrices
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, QuantizationMode
from ternlm.nn.linear import BitLinear
from ternlm.training.objective import ObjectiveSettings
from ternlm.training.optimizer import OptimizerSettings, build_optimizer
from ternlm.training.step import Stepper

Row = dict[str, float | None]
CODES = ("frac_neg", "frac_zero", "frac_pos", "flip_rate", "threshold_distance", "near_threshold")


def of(row: Row, matrix: str) -> dict[str, Any]:
    """The values of one matrix by key."""
    return {key: row[f"ternary/{matrix}/{key}"] for key in KEYS}


def nudge(model: LanguageModel, seed: int, size: float = 0.02) -> None:
    """Move every weight a little, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def expected_scale(weight: Tensor, mode: QuantizationMode) -> Tensor:
    """mean|w| of what shares a scale, for every weight."""
    rows, columns = weight.shape
    width = {"tensor": columns, "row": columns, "group": mode.group_size}[mode.granularity]
    means = weight.abs().double().view(rows, -1, width).mean(dim=2, keepdim=True)
    if mode.granularity == "tensor":
        means = means.mean().expand_as(means)
    return means.expand(-1, -1, width).reshape(rows, columns)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_the_numbers_of_a_matrix_are_those_of_their_definitions(granularity: Any) -> None:
    mode = QuantizationMode(granularity=granularity, group_size=8)
    model = tiny_bitnet(mode=mode)
    nudge(model, 0)
    row = TernaryStatistics(model).measure()
    for name, weight in model.tensors().items():
        if "_proj" not in name:
            continue
        found = of(row, name.removeprefix("model.").removesuffix(".weight"))
        w, scale = weight.double(), expected_scale(weight, mode)
        codes = (w / scale).round().clamp(-1, 1)
        assert found["frac_neg"] == pytest.approx((codes == -1).double().mean().item())
        assert found["frac_zero"] == pytest.approx((codes == 0).double().mean().item())
        assert found["frac_pos"] == pytest.approx((codes == 1).double().mean().item())
        assert found["scale"] == pytest.approx(scale.mean().item(), rel=1e-6)
        distance = (w.abs() / scale - 0.5).abs()
        assert found["threshold_distance"] == pytest.approx(distance.mean().item(), rel=1e-5)
        assert found["near_threshold"] == pytest.approx((distance < 0.05).double().mean().item())
        assert found["latent_rms"] == pytest.approx(w.square().mean().sqrt().item(), rel=1e-5)
        assert found["flip_rate"] is found["activation_scale"] is found["activation_clipped"] is None


def test_e09_rows_hold_the_matrices_of_bit_linears_and_nothing_else() -> None:
    model = tiny_bitnet(tie_word_embeddings=False)
    row = TernaryStatistics(model).measure()
    names = {name.split("/")[1] for name in row}
    projections = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                   "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
    assert names == {f"layers.{i}.{name}" for i in range(2) for name in projections} | {"all"}
    assert set(row) == {f"ternary/{name}/{key}" for name in names for key in KEYS}
    assert sum(matrix.codes.numel() for matrix in quantized_matrices(model)) == model.parameter_counts().ternary


def test_flips_are_counted_exactly_between_measurements() -> None:
    model = tiny_bitnet()
    statistics = TernaryStatistics(model)
    before = {matrix.name: matrix.codes.clone() for matrix in quantized_matrices(model)}
    first, unchanged = statistics.measure(), statistics.measure()
    nudge(model, 1)
    changed = statistics.measure()
    for matrix in quantized_matrices(model):
        name = matrix.name.removeprefix("model.")
        differing = (matrix.codes != before[matrix.name]).double().mean().item()
        assert 0.05 < differing < 0.95
        assert [of(row, name)["flip_rate"] for row in (first, unchanged)] == [None, 0]
        assert of(changed, name)["flip_rate"] == pytest.approx(differing)
    assert of(statistics.measure(), "all")["flip_rate"] == 0


def test_two_bit_fields_that_differ_are_counted_once_each() -> None:
    codes = torch.tensor([[-1, 0, 1] * 100], dtype=torch.int8)
    other = torch.tensor([[1, 1, 1] * 100], dtype=torch.int8)
    pack = module.pack_2bit
    assert module._differing(pack(codes), pack(other)) == 200
    assert module._differing(pack(codes), pack(codes)) == 0


def test_what_is_remembered_when_a_run_goes_on_is_what_was_measured_before_it_stopped() -> None:
    model = tiny_bitnet()
    statistics = TernaryStatistics(model)
    statistics.measure()
    resumed = TernaryStatistics(model)
    resumed.remember()
    nudge(model, 2)
    assert resumed.measure() == statistics.measure()
    assert of(TernaryStatistics(model).measure(), "all")["flip_rate"] is None


def test_the_row_of_all_is_weighted_by_the_number_of_weights() -> None:
    model = tiny_bitnet()
    nudge(model, 3)
    statistics = TernaryStatistics(model)
    statistics.remember()
    nudge(model, 4)
    row = statistics.measure(random_tokens(2, 11))
    sizes = {matrix.name.removeprefix("model."): matrix.codes.numel() for matrix in quantized_matrices(model)}
    assert len(set(sizes.values())) > 1
    for key in set(KEYS) - {"latent_rms"}:
        expected = sum(of(row, name)[key] * size for name, size in sizes.items()) / sum(sizes.values())
        assert of(row, "all")[key] == pytest.approx(expected, rel=1e-9)
    everything = torch.cat([layer.weight.detach().flatten() for layer in model.bit_linears().values()]).double()
    assert of(row, "all")["latent_rms"] == pytest.approx(everything.square().mean().sqrt().item(), rel=1e-5)


def test_int8_weights_have_a_scale_but_no_ternary_numbers() -> None:
    model = tiny_bitnet(mode=QuantizationMode(weights="int8"))
    statistics = TernaryStatistics(model)
    statistics.remember()
    row = statistics.measure(random_tokens(2, 11))
    for name in ("layers.0.self_attn.k_proj", "all"):
        found = of(row, name)
        assert all(found[key] is None for key in CODES)
        assert min(found[key] for key in set(KEYS) - set(CODES)) > 0


def test_layers_of_different_modes_count_where_they_have_a_number() -> None:
    model = tiny_bitnet()
    first, second, third, *_ = model.bit_linears().values()
    first.mode, second.mode = QuantizationMode(weights="int8"), FULL_PRECISION
    third.mode = QuantizationMode(activations="none")
    row = TernaryStatistics(model).measure(random_tokens(2, 11))
    assert not any("layers.0.self_attn.o_proj" in name for name in row)
    assert of(row, "layers.0.self_attn.q_proj")["frac_zero"] is None
    assert of(row, "layers.0.mlp.up_proj")["activation_scale"] is None
    ternary = [m for m in quantized_matrices(model) if m.layer is not first]
    zeros = sum(int((m.codes == 0).sum()) for m in ternary)
    assert of(row, "all")["frac_zero"] == pytest.approx(zeros / sum(m.codes.numel() for m in ternary))


def test_a_full_precision_model_has_an_empty_row() -> None:
    statistics = TernaryStatistics(tiny_bitnet(mode=FULL_PRECISION))
    statistics.remember()
    assert statistics.measure(random_tokens(2, 11)) == {}


@pytest.mark.parametrize("family", MODELS)
def test_every_family_has_numbers_for_every_matrix(family: str) -> None:
    row = TernaryStatistics(tiny_model(family)).measure(random_tokens(2, 11))
    missing = {name.rpartition("/")[2] for name, value in row.items() if value is None}
    assert missing == {"flip_rate"}
    for name in {name.split("/")[1] for name in row}:
        assert sum(of(row, name)[key] for key in CODES[:3]) == pytest.approx(1)


@pytest.mark.parametrize(("activations", "levels"), [("int8", 127), ("int4", 7)])
def test_activations_are_those_of_a_pass_over_the_first_tokens(
    activations: Any, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bitnet(mode=QuantizationMode(activations=activations))
    tokens = random_tokens(5, 11)
    monkeypatch.setattr(module, "_WATCHED_TOKENS", 39)  # three of the five rows
    row = TernaryStatistics(model).measure(tokens)
    inputs: dict[str, Tensor] = {}
    for name, layer in model.bit_linears().items():
        layer.register_forward_hook(lambda _, given, __, name=name: inputs.__setitem__(name, given[0].detach()))
    model(tokens[:3])
    merged = {"self_attn.qkv": "self_attn.v_proj", "self_attn.o": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_proj",
              "mlp.down": "mlp.down_proj"}  # fmt: skip
    for name, x in inputs.items():
        _, _, layer, own = name.split(".", 3)
        found = of(row, f"layers.{layer}.{merged[own]}")
        largest = x.abs().amax(dim=-1, keepdim=True)
        assert found["activation_scale"] == pytest.approx((largest / levels).mean().item(), rel=1e-5)
        clipped = ((x * (levels / largest)).round().abs() == levels).float().mean().item()
        assert found["activation_clipped"] == pytest.approx(clipped)
        assert clipped >= 1 / x.shape[-1]


def test_a_layer_that_is_called_twice_is_averaged_over_the_tokens_of_both() -> None:
    model = tiny_bitnet()
    tokens = random_tokens(2, 11)

    class Twice(torch.nn.Module):
        def forward(self, given: Tensor) -> None:
            model(given[:1])
            model(given[1:])

        def bit_linears(self) -> dict[str, BitLinear]:
            return model.bit_linears()

        def blocks(self) -> Any:
            return model.blocks()

    once, twice = (module._watch(watched, tokens) for watched in (model, Twice()))  # type: ignore[arg-type]
    for layer, values in once.items():
        for key, value in values.items():
            torch.testing.assert_close(twice[layer][key], value)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_is_bit_identical_with_and_without_measuring(gradient_checkpointing: bool) -> None:
    def train(measures: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = tiny_bitnet(gradient_checkpointing=gradient_checkpointing)
        optimizer = build_optimizer(model, OptimizerSettings())
        stepper = Stepper(model, optimizer, ObjectiveSettings(), 1.0, 2, False, print)
        statistics = TernaryStatistics(model)
        losses = []
        for step in range(4):
            tokens = random_tokens(4, 12, seed=step)
            losses.append(stepper(Batch(tokens[:, :-1], tokens[:, 1:])).loss)
            if measures:
                state = torch.get_rng_state()
                statistics.measure(tokens)
                assert model.training and torch.equal(torch.get_rng_state(), state)
        assert all(layer.quantizations == 4 + measures for layer in model.bit_linears().values())
        return losses, {name: tensor.clone() for name, tensor in model.tensors().items()}

    (plain, weights), (watched, same) = train(False), train(True)
    assert plain == watched and all(torch.equal(weights[name], same[name]) for name in weights)


def test_p01_one_measurement_reads_the_device_once() -> None:
    class Reads(TorchFunctionMode):
        names: list[str] = []  # noqa: RUF012 (one instance)

        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(function, "__name__", "")
            if name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
                self.names.append(name)
            return function(*args, **(kwargs or {}))

    model = tiny_bitnet()
    statistics = TernaryStatistics(model)
    statistics.measure()
    nudge(model, 5)
    with Reads() as reads:
        statistics.measure(random_tokens(2, 11))
    assert reads.names == ["tolist"]


def test_compiled_blocks_are_measured_as_written_and_stay_compiled() -> None:
    model, tokens = tiny_bitnet(num_hidden_layers=1), random_tokens(2, 11)
    expected = TernaryStatistics(model).measure(tokens)
    frames: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        frames.append(graph)
        return graph.forward

    for block in model.blocks():
        block.compile(fullgraph=True, backend=backend)
    calls = [block._compiled_call_impl for block in model.blocks()]

    def passes() -> Tensor:
        logits = model(tokens).logits
        logits.mean().backward()
        return logits.detach()

    before, compiled = passes(), len(frames)
    assert compiled > 0
    row = TernaryStatistics(model).measure(tokens)
    assert row == pytest.approx(expected)
    assert [block._compiled_call_impl for block in model.blocks()] == calls
    assert torch.equal(passes(), before)
    assert len(frames) == compiled, "nothing is compiled again"


def test_a_pass_that_fails_leaves_no_hook_and_the_model_as_it_was() -> None:
    model = tiny_bitnet()
    with pytest.raises(ValueError, match="max_position_embeddings"):
        TernaryStatistics(model).measure(random_tokens(1, 38))
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.bit_linears().values())


def test_non_finite_weights_are_reported_as_they_are() -> None:
    model = tiny_bitnet()
    with torch.no_grad():
        model.bit_linears()["model.layers.0.self_attn.o"].weight[0, 0] = math.nan
    row = TernaryStatistics(model).measure()
    assert math.isnan(of(row, "layers.0.self_attn.o_proj")["latent_rms"])
    assert math.isfinite(of(row, "layers.1.self_attn.o_proj")["latent_rms"])


def test_shares_of_known_codes() -> None:
    shares = code_shares(torch.tensor([[-1, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.int8))
    assert {name: share.item() for name, share in shares.items()} == {
        "frac_neg": 1 / 8, "frac_zero": 3 / 8, "frac_pos": 4 / 8
    }  # fmt: skip
