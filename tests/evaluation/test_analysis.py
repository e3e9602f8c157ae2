"""The analysis of a model: numbers known by construction, and a model that does not notice."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import randn, random_tokens, tiny_bitnet, tiny_corpus, tiny_model
from ternlm.data.batch import IGNORED, Batch
from ternlm.evaluation import timing
from ternlm.evaluation.activations import Site, analyze_activations
from ternlm.evaluation.analysis import Wanted, analyze, find_alarms, held_out_batches
from ternlm.evaluation.histogram import Histogram, spread
from ternlm.evaluation.placement import Place, places
from ternlm.evaluation.sensitivity import measure_sensitivity, target_losses
from ternlm.evaluation.timing import measure_time
from ternlm.evaluation.weights import analyze_matrices
from ternlm.files import from_json, to_json
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, QuantizationMode
from ternlm.models.prediction import predict
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import Perturbation
from ternlm.ops.quantize import quantize_activation

PLACE = Place("layers.0.x", 0, "x")


def batches(model: LanguageModel, rows: int = 3, time: int = 17) -> list[Batch]:
    """Two batches with targets of the kind the model has."""
    made = []
    for seed in (0, 1):
        tokens = random_tokens(rows, time, seed=seed)
        targets = random_tokens(rows, time, seed=seed + 10)
        if not model.is_causal:
            targets = torch.where(random_tokens(rows, time, seed=seed + 20) % 4 == 0, targets, IGNORED)
        made.append(Batch(tokens, targets))
    return made


def only(model: LanguageModel, name: str) -> BitLinear:
    """A layer by the end of its name."""
    (layer,) = [layer for path, layer in model.bit_linears().items() if path.endswith(name)]
    return layer


def everything_about(model: LanguageModel) -> dict[str, Any]:
    """Whatever an analysis might have changed."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "kept aside": [b.tolist() for name, b in model.named_buffers() if name.endswith(("noise", "_drop"))],
        "modes": [module.mode for module in model.modules() if hasattr(module, "mode")],
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert torch.equal(before.pop("random"), after["random"])
    assert before == {key: after[key] for key in before}


def test_a_place_has_the_number_of_its_block_and_the_same_part_in_every_block() -> None:
    model = tiny_bitnet()
    where = places(model)
    assert where[only(model, "layers.1.self_attn.qkv")] == ("layers.1.self_attn.qkv", 1, "self_attn.qkv")
    assert where[model.get_submodule("model.norm")] == ("norm", None, "norm")
    assert where[only(model, "layers.1.mlp.down")].matrix("down_proj") == ("layers.1.mlp.down_proj", 1, "mlp.down_proj")


def test_a_histogram_counts_every_finite_value_once_and_the_far_ones_at_the_edges() -> None:
    histogram = Histogram(-1.0, 1.0, 4)
    histogram.add(torch.tensor([[-0.9, -0.1, 0.1], [0.2, 0.9, 50.0]]))
    histogram.add(torch.tensor([-math.inf, math.nan, -7.0]))
    assert histogram.as_dict() == {"low": -1.0, "high": 1.0, "counts": [2, 1, 2, 2]}
    assert histogram.nonfinite == 2


def test_a_spread_is_the_mean_and_the_quantiles() -> None:
    assert spread(torch.arange(101.0), "s") == pytest.approx(
        {"s_mean": 50, "s_min": 0, "s_q05": 5, "s_median": 50, "s_q95": 95, "s_max": 100}
    )


def test_occupancy_scale_error_and_dead_rows_are_those_built_in() -> None:
    model = tiny_bitnet()
    layer = only(model, "layers.1.self_attn.o")
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:12, :6] = -1.0
        layer.weight[:12, 6:] = 1.0
    row = next(row for row in analyze_matrices(model) if row["name"] == "layers.1.self_attn.o_proj")
    assert (row["negative"], row["zero"], row["positive"]) == pytest.approx((0.125, 0.5, 0.375))
    assert (row["dead_rows"], row["distinct_codes"]) == (12, 3)
    assert row["scale_median"] == row["scale_max"] == pytest.approx(0.5)  # mean |w|
    assert row["threshold_median"] == 0.5
    assert row["relative_error"] == pytest.approx(0.25)  # (1 - 1/2)^2 where w is +-1
    assert (row["block"], row["part"], row["rows"], row["columns"]) == (1, "self_attn.o_proj", 24, 24)
    histogram = row["histogram"]
    assert sum(histogram["counts"]) == 24 * 24
    assert histogram["counts"][len(histogram["counts"]) // 2] == 288  # the zeros


@pytest.mark.parametrize("quantizer", ["ttq", "lsq", "twn"])
def test_thresholds_are_those_that_separate_the_codes(quantizer: Any) -> None:
    model = tiny_bitnet(mode=QuantizationMode(quantizer=quantizer, granularity="row"))
    layer = only(model, "layers.0.mlp.down")
    (row,) = [row for row in analyze_matrices(model) if row["name"] == "layers.0.mlp.down_proj"]
    ((codes, scale),) = layer.matrices().values()
    size = layer.weight.detach().abs()
    largest_zero = torch.where(codes == 0, size, 0.0).amax(dim=1)
    smallest_other = torch.where(codes != 0, size, math.inf).amin(dim=1)
    middle = (largest_zero + smallest_other) / 2 / scale[:, 0]
    assert row["threshold_mean"] == pytest.approx(middle.mean().item(), rel=0.05)
    assert row["scale_mean"] == pytest.approx(scale.mean().item(), rel=1e-5)


def test_integer_weights_have_no_shares_of_ternary_codes() -> None:
    rows = analyze_matrices(tiny_bitnet(mode=QuantizationMode(weights="int8")))
    assert all(row["zero"] is None and row["threshold_median"] is None for row in rows)
    assert all(3 < row["distinct_codes"] <= 255 and row["relative_error"] < 1e-3 for row in rows)


def test_a_site_counts_codes_clipping_and_entropy() -> None:
    site = Site(PLACE)
    site.add(torch.tensor([-2.0, -1.0, 0.0, 1.0]), torch.tensor(1.0), 3)
    site.add(torch.tensor([-2.0, -1.0, 0.2, 9.0]), torch.tensor(1.0), 3)
    row = site.as_dict()
    assert row["codes"] == [0, 2, 2, 2, 1, 0, 1]  # -3 to 3
    assert (row["codes_used"], row["utilization"]) == (5, 5 / 7)
    assert row["clip_rate"] == row["at_limit"] == 1 / 8
    entropy = 3 * (1 / 4) * 2 + 2 * (1 / 8) * 3
    assert row["entropy_bits"] == pytest.approx(entropy)
    assert row["entropy"] == pytest.approx(entropy / math.log2(7))
    assert (row["absmax"], row["step"]) == (9.0, 1.0)
    assert sum(row["histogram"]["counts"]) == 8


def test_a_site_that_rounds_nothing_has_a_histogram_and_no_codes() -> None:
    site = Site(PLACE)
    site.add(randn(100), None, None)
    row = site.as_dict()
    assert row["codes"] is row["utilization"] is row["clip_rate"] is row["bits"] is None
    assert (row["unit"], sum(row["histogram"]["counts"])) == ("root mean square", 100)


def test_sites_of_a_model_hold_the_codes_that_its_layers_compute_with() -> None:
    model = tiny_bitnet(mode=QuantizationMode(activations="int4"))
    layer = only(model, "layers.1.mlp.gate_up")
    seen: list[Tensor] = []
    data = batches(model)
    with layer.register_forward_pre_hook(lambda module, inputs: seen.append(quantize_activation(inputs[0], 4)[0])):
        model.eval()
        for batch in data:
            model(batch.tokens)
    row = next(row for row in analyze_activations(model, data)["sites"] if row["name"] == "layers.1.mlp.gate_up")
    codes = torch.cat(seen)
    assert row["codes"] == [int((codes == code).sum()) for code in range(-7, 8)]
    assert (row["bits"], row["values"], row["clip_rate"]) == (4, codes.numel(), 0.0)


def test_the_stream_is_measured_before_each_block_and_after_the_last() -> None:
    model = tiny_bitnet()
    (data, _) = batches(model)
    stream = analyze_activations(model, [data])["stream"]
    assert [row["name"] for row in stream] == ["layers.0", "layers.1", "after the blocks"]
    embedded = model.get_submodule("model.embed_tokens")(data.tokens).detach()
    assert stream[0]["std"] == pytest.approx(float(embedded.std(correction=0)), rel=1e-5)


def test_a_layer_that_equals_its_codes_loses_nothing_by_rounding() -> None:
    model = tiny_bitnet(mode=QuantizationMode(activations="none"))
    layer = only(model, "layers.0.mlp.down")
    with torch.no_grad():
        layer.weight.copy_(torch.where(randn(*layer.weight.shape, seed=3) > 0, 0.25, -0.25))
    measured = measure_sensitivity(model, batches(model))
    changes = {row["name"]: (row["change"], row["error"]) for row in measured["layers"]}
    assert changes.pop("layers.0.mlp.down") == (0.0, 0.0)
    assert all(change != 0 and error > 0 for change, error in changes.values())
    assert measured["activations"]["change"] == 0.0


def test_losses_in_full_precision_are_those_of_models_with_these_weights() -> None:
    model = tiny_bitnet().eval()
    data = batches(model)
    measured = measure_sensitivity(model, data)
    with torch.no_grad():
        losses = target_losses(model, data, lambda: None)
        assert measured["loss"] == pytest.approx(float(losses.mean()))
        for layer in model.get_submodule("model.layers.1").modules():
            if isinstance(layer, BitLinear):
                layer.mode = FULL_PRECISION
        upper = target_losses(model, data, lambda: None) - losses
        model.set_mode(QuantizationMode(activations="none"))
        exact = target_losses(model, data, lambda: None)
        model.set_mode(FULL_PRECISION)
        twin = target_losses(model, data, lambda: None)
    assert measured["targets"] == losses.numel() == 2 * 3 * 17
    block = measured["blocks"][1]
    assert (block["name"], block["block"]) == ("layers.1", 1)
    assert block["change"] == pytest.approx(float(upper.mean()))
    assert block["error"] == pytest.approx(float(upper.std(correction=0)) / math.sqrt(upper.numel()))
    assert measured["activations"]["loss"] == pytest.approx(float(exact.mean()))
    assert measured["full_precision"]["loss"] == pytest.approx(float(twin.mean()))


@pytest.mark.parametrize("calls", [1, 3, 9])
def test_an_interruption_leaves_every_layer_as_it_was(calls: int) -> None:
    model = tiny_bitnet()
    before = everything_about(model)
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(model, batches(model), Wanted(repeats=1), check)
    assert_same(before, everything_about(model))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("quantizer", ["absmean", "ttq"])
def test_a_model_is_exactly_as_it_was(family: str, quantizer: Any) -> None:
    model = tiny_model(family, QuantizationMode(quantizer=quantizer, granularity="row"))
    model.refresh()
    next(iter(model.blocks())).eval()  # as somebody may have left it
    before = everything_about(model)
    result = analyze(model, batches(model), Wanted(repeats=1, backward=True))
    assert_same(before, everything_about(model))
    assert len(result["sensitivity"]["blocks"]) == len(list(model.blocks()))
    assert all(row["histogram"] for row in [*result["matrices"], *result["sites"]])


@pytest.mark.parametrize("family", MODELS)
def test_an_analysis_is_strict_json(family: str) -> None:
    model = tiny_model(family)
    result = analyze(model, batches(model), Wanted(repeats=1))
    assert from_json(to_json(result)).keys() == result.keys()


def test_a_full_precision_twin_has_histograms_and_times_and_nothing_to_put_back() -> None:
    model = tiny_bitnet(mode=FULL_PRECISION)
    result = analyze(model, batches(model), Wanted(repeats=1))
    assert all(row["zero"] is None and sum(row["histogram"]["counts"]) for row in result["matrices"])
    assert all(row["bits"] is None and sum(row["histogram"]["counts"]) for row in result["sites"])
    assert result["sensitivity"]["full_precision"] is None
    assert result["sensitivity"]["layers"] == result["alarms"] == []
    assert len(result["time"]["parts"]) == 4


def test_parts_are_timed_from_edge_to_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = 0.0

    def tick(device: torch.device) -> float:
        nonlocal ticks
        ticks += 1.0
        return ticks

    monkeypatch.setattr(timing, "_now", tick)
    model = tiny_bitnet()
    measured = measure_time(model, batches(model)[0], repeats=2, backward=True)
    assert [part["name"] for part in measured["parts"]] == ["embedding", "block 0", "block 1", "head"]
    assert [part["block"] for part in measured["parts"]] == [None, 0, 1, None]
    assert [part["forward_ms"] for part in measured["parts"]] == [1000.0] * 4
    assert [part["backward_ms"] for part in measured["parts"]] == [1000.0] * 4
    assert (measured["tokens"], measured["repeats"]) == (51, 2)


def test_alarms_name_what_deserves_a_look_and_nothing_else() -> None:
    model = tiny_bitnet()
    assert analyze(model, batches(model), Wanted(False, 0))["alarms"] == []
    layer = only(model, "layers.0.self_attn.o")
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, :3] = 1.0
    alarms = {alarm["kind"]: alarm for alarm in analyze(model, batches(model), Wanted(False, 0))["alarms"]}
    assert alarms.keys() == {"occupancy", "dead_rows"}
    assert alarms["dead_rows"]["value"] == 23
    assert alarms["occupancy"]["sentence"].startswith("layers.0.self_attn.o_proj: 99% of its codes are 0")


def test_alarms_ring_beyond_their_limits_only() -> None:
    norm = {"name": "n", "block": 0, "part": "n", "clip_rate": 0.2}
    site = {"name": "s", "nonfinite": 0, "clip_rate": 0.2, "utilization": 0.5, "codes_used": 2, "codes": [1, 1, 0, 0]}
    result = {"matrices": [], "stream": [], "norms": [norm], "sites": [site]}
    assert find_alarms(result) == []
    norm["clip_rate"] = site["clip_rate"] = 0.21
    site["utilization"], site["nonfinite"] = 0.25, 4
    kinds = [alarm["kind"] for alarm in find_alarms(result)]
    assert kinds == ["nonfinite", "norm_clipping", "clipping", "utilization"]


def test_weights_that_are_not_finite_raise_an_alarm_and_no_error() -> None:
    model = tiny_bitnet()
    with torch.no_grad():
        only(model, "layers.1.mlp.down").weight[0, 0] = math.nan
    result = analyze(model, batches(model), Wanted(repeats=0))
    names = [alarm["name"] for alarm in result["alarms"] if alarm["kind"] == "nonfinite"]
    assert names == ["layers.1.mlp.down_proj", "after the blocks"]
    assert result["sensitivity"]["loss"] is None
    assert to_json(result)


def test_held_out_batches_are_whole_windows_within_the_limit(tmp_path: Any) -> None:
    prepared = tiny_corpus(tmp_path)
    model = tiny_model("bitnet", vocab_size=256)
    stream = prepared.corpus.split("train")
    made = held_out_batches(model, stream, prepared.tokenizer, 16, 2, 100)
    assert [batch.tokens.shape for batch in made] == [(2, 16), (2, 16), (2, 16)][: len(made)]
    assert sum(batch.tokens.numel() for batch in made) == 96
    tokens = torch.cat([batch.tokens.flatten() for batch in made])
    assert tokens.tolist() == stream.read(0, 96).tolist()
    (one,) = held_out_batches(model, stream, prepared.tokenizer, 16, 2, 3)
    assert one.tokens.shape == (1, 16)


def test_held_out_text_shorter_than_a_window_comes_without_padding(tmp_path: Any) -> None:
    prepared = tiny_corpus(tmp_path)
    model = tiny_model("bitnet", vocab_size=256)
    stream = prepared.corpus.split("validation")
    (one,) = held_out_batches(model, stream, prepared.tokenizer, len(stream) + 50, 2, 10_000)
    assert one.tokens.tolist() == [stream.read(0, len(stream) - 1).tolist()]
    assert one.targets.shape == one.tokens.shape and one.num_targets == int((one.targets != IGNORED).sum())


def trained_encoder(**overrides: Any) -> LanguageModel:
    """An encoder whose sites have observed one batch."""
    model = tiny_model("qdyt", **overrides)
    model.begin_pass(5)
    predict(model, batches(model)[0].tokens, batches(model)[0].targets).logits.sum().backward()
    model.end_pass()
    return model


def test_sites_of_an_encoder_hold_the_codes_that_come_out_of_its_quantizers() -> None:
    model = trained_encoder().eval()
    data = batches(model)
    name = "model.layers.1.mlp.input_quantizer"
    quantizer = model.activation_quantizers()[name]
    seen: list[Tensor] = []
    with quantizer.register_forward_hook(lambda module, inputs, output: seen.append((output[0] / output[1]).round())):
        for batch in data:
            predict(model, batch.tokens, batch.targets)
    rows = analyze_activations(model, data)["sites"]
    row = next(row for row in rows if row["name"] == name.removeprefix("model."))
    codes, top = torch.cat(seen), 2 ** (row["bits"] - 1) - 1
    assert row["codes"] == [int((codes == code).sum()) for code in range(-top, top + 1)]
    assert row["step"] == pytest.approx(float(quantizer.rho) / top)


def test_every_quantizer_of_an_encoder_is_a_site_and_its_layers_are_not() -> None:
    model = trained_encoder()
    names = {row["name"] for row in analyze_activations(model, batches(model))["sites"]}
    sites = {name.removeprefix("model.") for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    assert names == sites | {"lm_head.decoder"}


def test_a_clip_rate_is_the_share_of_values_beyond_the_scale() -> None:
    model = trained_encoder().eval()
    quantizer = model.activation_quantizers()["model.layers.0.mlp.input_quantizer"]
    seen: list[Tensor] = []
    data = batches(model)
    with quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        for batch in data:
            predict(model, batch.tokens, batch.targets)
    quantizer.rho.copy_(torch.cat(seen).abs().median())
    row = next(r for r in analyze_activations(model, data)["sites"] if r["name"] == "layers.0.mlp.input_quantizer")
    assert row["clip_rate"] == pytest.approx(0.5, abs=0.01)


def test_the_skip_scales_of_an_encoder_are_listed() -> None:
    model = tiny_model("qdyt")
    rows = {row["name"]: row["value"] for row in analyze(model, batches(model), Wanted(False, 0))["skips"]}
    assert rows["layers.1.attention_scale"] == pytest.approx(0.5 / math.sqrt(2))
    assert len(rows) == 4


def test_m11_a_norm_that_reads_a_constant_of_100_is_saturated_everywhere() -> None:
    model = tiny_model("qdyt", qdyt_center="none")
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight.fill_(100.0)
    result = analyze(model, batches(model), Wanted(False, 0))
    first = result["norms"][0]
    assert (first["name"], first["saturation"], first["clip_rate"]) == ("embed_norm", 1.0, 1.0)
    assert first["clip"] == pytest.approx(3.0486, abs=1e-4)
    assert [alarm["name"] for alarm in result["alarms"] if alarm["kind"] == "norm_clipping"] == ["embed_norm"]


def test_a_checkpoint_between_two_roundings_is_put_in_full_precision_as_well() -> None:
    model = tiny_bitnet().eval()
    data = batches(model)
    twin = measure_sensitivity(model, data)["full_precision"]["loss"]
    model.perturb([Perturbation(blend=0.5, previous=QuantizationMode(weights="int8"))] * 2)
    measured = measure_sensitivity(model, data)
    assert measured["full_precision"]["loss"] == pytest.approx(twin, rel=1e-6)
    assert measured["loss"] != pytest.approx(twin, rel=1e-6)
