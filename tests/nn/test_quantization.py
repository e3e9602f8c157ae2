"""The dial: bits of each mode, and which combinations are refused."""

import pytest

from ternlm.errors import SettingsError
from ternlm.nn.quantization import FULL_PRECISION, Perturbation, QuantizationMode


def mode(**values: object) -> QuantizationMode:
    return QuantizationMode.from_mapping(values, "quantization")


def test_bits_follow_the_names_and_the_floor() -> None:
    assert [mode(weights=w).weight_bits for w in ("ternary", "int8", "int6", "int4", "none")] == [None, 8, 6, 4, None]
    assert [mode(activations=a).activation_bits for a in ("int8", "int6", "int4", "none")] == [8, 6, 4, None]
    floored = mode(weights="int4", activations="int6", least_bits=8)
    assert (floored.weight_bits, floored.activation_bits) == (8, 8)
    assert mode(activations="none", least_bits=8).activation_bits is None
    assert mode(weights="ternary", least_bits=8).weight_bits is None
    assert FULL_PRECISION.weight_bits is None and FULL_PRECISION.activation_bits is None


def test_q18_learned_scales_belong_to_rows_and_say_so() -> None:
    assert mode(quantizer="ttq").granularity == mode(quantizer="lsq").granularity == "row"
    assert mode().granularity == mode(quantizer="twn").granularity == "tensor"
    with pytest.raises(SettingsError, match="quantizer=ttq learns a scale for each row, so granularity=tensor"):
        mode(quantizer="ttq", granularity="tensor")
    with pytest.raises(SettingsError, match="quantizer=twn knows no groups"):
        mode(quantizer="twn", granularity="group")


def test_q18_what_is_written_down_comes_back_the_same() -> None:
    for made in (mode(), mode(quantizer="lsq", ste="clip"), mode(quantizer="twn", granularity="row"), FULL_PRECISION):
        assert QuantizationMode.from_mapping(made.model_dump(mode="json"), "quantization") == made


def test_a_clipped_gradient_needs_a_learned_scale() -> None:
    assert mode(quantizer="lsq", ste="clip").ste == "clip"
    with pytest.raises(SettingsError, match="ste=clip needs a learned scale, not quantizer=absmean"):
        mode(ste="clip")


def test_a_mode_is_learned_only_while_weights_are_ternary() -> None:
    assert mode(quantizer="ttq").is_learned and not mode(quantizer="ttq", weights="int8").is_learned
    assert not mode().is_learned


@pytest.mark.parametrize(
    "values", [{"ttq_percentile": 0}, {"ttq_percentile": 100}, {"lsq_grad_clip": 0}, {"least_bits": 9}]
)
def test_numbers_outside_their_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=rf"quantization\.{next(iter(values))}"):
        mode(**values)


def test_no_perturbation_is_the_default() -> None:
    assert Perturbation() == (0.0, "token_row", 0.0, 0.0, 1.0, None)
