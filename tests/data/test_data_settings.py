import pytest

from ternlm.data import DataSettings
from ternlm.errors import SettingsError


def test_human_numbers_are_read() -> None:
    data = DataSettings.from_mapping({"max_tokens": "2M", "validation_fraction": "10%", "sequence_length": "1e2"})
    assert (data.max_tokens, data.validation_fraction, data.sequence_length) == (2_000_000, 0.1, 100)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"source": " "}, "empty"),
        ({"validation_fraction": 1.0}, "share"),
        ({"test_fraction": -0.1}, "share"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
        ({"sequence_length": 0}, "at least 1"),
        ({"max_tokens": 0}, "at least 1"),
        ({"encoding_errors": "ignore"}, "strict"),
        ({"sequence_len": 3}, "Did you mean"),
    ],
)
def test_contradictions_are_refused_with_the_rule(values: dict, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        DataSettings.from_mapping(values, "data")
