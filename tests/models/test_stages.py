"""Progressive quantization: stages, roundings and rates as pure functions, and models that really follow them."""

import math
from typing import Any

import pytest
import torch

from builders import random_tokens, tiny_model
from ternlm.errors import SettingsError
from ternlm.models import FULL_PRECISION
from ternlm.models.stages import QuantizationSettings, Stages
from ternlm.training.schedule import Schedule, ScheduleSettings

STEPS, BLOCKS = 1000, 5


def stages(total_steps: int = STEPS, blocks: int = BLOCKS, **settings: Any) -> Stages:
    values = {"progressive": True, **settings}
    return Stages(QuantizationSettings.from_mapping(values, "quantization"), blocks, total_steps)


def test_m01_stages_begin_at_their_share_of_the_optimizer_steps() -> None:
    made = stages()
    assert [made.stage(k) for k in (0, 99, 100, 299, 300, 999)] == [1, 1, 2, 2, 3, 3]
    assert made.boundaries() == [100, 300]
    odd = stages(total_steps=37)  # floor(3.7), floor(11.1)
    assert [odd.stage(k) for k in (2, 3, 10, 11)] == [1, 2, 2, 3]


def test_m01_the_half_nearest_the_output_turns_ternary_first() -> None:
    made = stages()
    weights = {k: [mode.weights for mode in made.modes(k)] for k in (0, 99, 100, 299, 300, 999)}
    assert weights[0] == weights[99] == ["int8"] * 5
    assert weights[100] == weights[299] == ["int8"] * 2 + ["ternary"] * 3
    assert weights[300] == weights[999] == ["ternary"] * 5


def test_integer_values_have_eight_bits_in_the_first_stage_and_their_own_later() -> None:
    made = stages(activations="int4")
    assert made.mode(0, 0).activation_bits == 8
    assert made.mode(0, 100).activation_bits == 4
    assert made.mode(0, 300).activation_bits == 4


def test_without_progress_every_layer_is_ternary_from_the_first_update() -> None:
    made = stages(progressive=False)
    assert made.stage(0) == 3
    assert made.boundaries() == []
    assert {mode.weights for mode in made.modes(0)} == {"ternary"}
    assert made.rate_factor(999) == 1


def test_the_full_precision_twin_has_no_stages() -> None:
    made = stages(weights="none", activations="none")
    assert made.boundaries() == []
    assert {mode.weights for k in (0, 100, 300) for mode in made.modes(k)} == {"none"}
    assert made.rate_factor(999) == 1


def test_nothing_is_rounded_in_a_full_precision_start() -> None:
    made = stages(progressive=False, full_precision_until=0.25)
    assert [made.stage(k) for k in (0, 249, 250, 999)] == [0, 0, 3, 3]
    assert made.boundaries() == [250]
    assert {(mode.weights, mode.activations) for mode in made.modes(249)} == {("none", "none")}
    assert {(mode.weights, mode.activations) for mode in made.modes(250)} == {("ternary", "int8")}
    assert made.rate_factor(999) == 1
    assert [made.stage_name(k) for k in (0, 250)] == ["full precision", "fully ternary"]


def test_integers_and_then_ternary_weights_may_follow_a_full_precision_start() -> None:
    made = stages(full_precision_until=0.05)
    assert [made.stage(k) for k in (0, 49, 50, 99, 100, 300)] == [0, 0, 1, 1, 2, 3]
    assert made.boundaries() == [50, 100, 300]
    assert stages(progressive=False, full_precision_until=0.5, weights="int8").stage_name(500) == "int8"
    assert not stages(progressive=False).is_staged


def test_a_blend_may_lead_from_full_precision_to_ternary_weights() -> None:
    made = stages(progressive=False, full_precision_until=0.25, blend_steps=3)
    shares = [made.perturbation(2, k).blend for k in (0, 249, 250, 251, 252, 253)]
    assert shares == [1.0, 1.0, 0.25, 0.5, 0.75, 1.0]
    before = made.perturbation(2, 250).previous
    assert before is not None and before.weights == "none"


def test_a_model_in_its_full_precision_start_is_the_twin_and_then_ternary() -> None:
    model, twin = tiny_model("bitnet"), tiny_model("bitnet")
    twin.set_mode(FULL_PRECISION)
    made = stages(blocks=2, progressive=False, full_precision_until=0.25)
    tokens = random_tokens(2, 9)
    made.apply(model, 249)
    assert torch.equal(model(tokens).logits, twin(tokens).logits)
    made.apply(model, 250)
    fresh = tiny_model("bitnet")
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)
    assert not torch.equal(model(tokens).logits, twin(tokens).logits)


def test_t04_the_rate_stays_lowered_to_the_end_after_the_last_stage_begins() -> None:
    made = stages()
    assert made.rate_factor(299) == 1
    assert made.rate_factor(300) == 1
    assert made.rate_factor(350) == pytest.approx(0.85)
    assert [made.rate_factor(k) for k in (400, 700, 999)] == pytest.approx([0.7] * 3)
    assert stages(lr_ramp_steps=0).rate_factor(300) == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "two_stage"])
def test_t04_the_schedule_multiplies_its_curve_by_the_factor(name: str) -> None:
    settings = ScheduleSettings.from_mapping({"name": name}, "schedule")
    plain = Schedule(settings, 1e-3, 0.1, STEPS)
    staged = Schedule(settings, 1e-3, 0.1, STEPS, stages())
    for k in (0, 5, 99, 299, 300, 333, 400, 998, 999):
        assert staged.learning_rate(k) == pytest.approx(plain.learning_rate(k) * stages().rate_factor(k), rel=1e-12)
    assert set(staged.boundaries()) == {100, 300, *plain.boundaries()}
    assert [staged.stage(k) for k in (0, 100, 300)] == [1, 2, 3]


def test_t03_the_cosine_reaches_its_configured_end_times_the_factor() -> None:
    settings = ScheduleSettings.from_mapping({"name": "cosine", "min_lr_ratio": 0.02}, "schedule")
    last = Schedule(settings, 1e-3, 0.0, STEPS, stages()).learning_rate(STEPS - 1)
    assert last == pytest.approx(0.7 * 0.02 * 1e-3, rel=1e-3)


def test_qdrop_falls_in_a_line_to_nothing() -> None:
    made = stages(qdrop=0.1)  # over the first quarter
    assert [made.perturbation(0, k).drop for k in (0, 125, 250, 999)] == pytest.approx([0.1, 0.05, 0, 0])
    assert stages(qdrop=0.1, qdrop_steps=10).perturbation(3, 5).drop == pytest.approx(0.05)


def test_a_blend_goes_from_the_rounding_before_to_the_new_one() -> None:
    made = stages(blend_steps=9)
    assert made.perturbation(4, 99).blend == 1
    shares = [made.perturbation(4, k).blend for k in range(100, 112)]
    assert shares == pytest.approx([i / 10 for i in range(1, 10)] + [1.0] * 3)
    before = made.perturbation(4, 100).previous
    assert before is not None and before.weights == "int8"
    assert made.perturbation(0, 100).blend == 1  # the lower half turns at 300
    assert made.perturbation(0, 300).blend == pytest.approx(0.1)
    assert stages(blend_steps=9, progressive=False).perturbation(0, 0).blend == 1


def test_dither_follows_each_layer_from_the_update_in_which_it_turns_ternary() -> None:
    made = stages(dither=0.5, dither_steps=100)
    assert [made.perturbation(4, k).dither for k in (99, 100, 150, 200)] == pytest.approx([0, 0.5, 0.25, 0])
    assert [made.perturbation(0, k).dither for k in (100, 300, 350)] == pytest.approx([0, 0.5, 0.25])


def test_ternary_dropout_ends_after_its_steps_and_waits_for_ternary_weights() -> None:
    made = stages(ternary_dropout=0.1, ternary_dropout_steps=200)
    assert [made.perturbation(4, k).zeroed for k in (99, 100, 199, 200)] == [0, 0.1, 0.1, 0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"int8_until": 0.4, "partial_until": 0.3}, "int8_until=0.4 lies after"),
        ({"int8_until": -0.1}, "must lie between 0 and 1"),
        ({"qdrop": 1.5}, "qdrop=1.5 must lie between 0 and 1"),
        ({"ternary_dropout": 1.0}, "must be at least 0 and below 1"),
        ({"lr_factor": 0}, "lr_factor=0"),
        ({"weights": "int8"}, "leads to ternary weights"),
        ({"progresive": True}, "Did you mean 'quantization.progressive'"),
    ],
)
def test_wrong_stages_are_refused_with_a_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace("(", r"\(").replace(".", r"\.")):
        stages(**wrong)


def distinct_codes(layer: Any) -> int:
    layer.refresh()
    return max(len(codes.unique()) for codes, _ in layer.matrices().values())


def test_m01_the_number_of_distinct_codes_tells_the_stage() -> None:
    model, made = tiny_model("bitnet", num_hidden_layers=4, hidden_size=32, intermediate_size=300), stages(blocks=4)
    for k, ternary in ((0, 0), (99, 0), (100, 2), (299, 2), (300, 4), (999, 4)):
        made.apply(model, k)
        for number, block in enumerate(model.blocks()):
            for layer in (m for m in block.modules() if hasattr(m, "matrices")):
                found = distinct_codes(layer)
                assert found == 3 if number >= 4 - ternary else 3 < found <= 255, (k, number)


def test_applying_the_same_stage_again_leaves_the_codes_alone() -> None:
    model, made = tiny_model("bitnet"), stages(blocks=2)
    made.apply(model, 500)
    model.refresh()
    before = [layer.quantizations for layer in model.bit_linears().values()]
    made.apply(model, 501)
    model.refresh()
    assert [layer.quantizations for layer in model.bit_linears().values()] == before


@pytest.mark.parametrize("family", ["bitnet", "qdyt"])
def test_m03_a_blended_boundary_changes_the_function_by_one_share_of_the_whole_change(family: str) -> None:
    model, tokens = tiny_model(family, num_hidden_layers=4), random_tokens(3, 11)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(1.0)  # residual scales, so that blocks count
    model.eval()

    def change(blend_steps: int) -> float:
        made, logits = stages(blocks=4, blend_steps=blend_steps), []
        for k in (299, 300):
            made.apply(model, k)
            with torch.no_grad():
                logits.append(model(tokens).logits)
        return ((logits[1] - logits[0]).norm() / logits[0].norm()).item()

    assert change(0) > 0.02
    assert change(99) < 0.08 * change(0)  # one of a hundred shares, and activation codes that tip over


def test_int8_weights_are_close_to_full_precision_and_ternary_ones_are_not() -> None:
    model, made = tiny_model("bitnet"), stages(blocks=2)
    made.apply(model, 0)
    for layer in model.bit_linears().values():
        errors = {}
        for k in (0, 999):
            layer.mode = made.mode(0, k)
            rounded = torch.cat([codes * scale for codes, scale in layer.matrices().values()])
            errors[k] = ((rounded - layer.weight).norm() / layer.weight.norm()).item()
        assert errors[0] < 0.01 < 0.3 < errors[999]
        assert math.isfinite(errors[999])
