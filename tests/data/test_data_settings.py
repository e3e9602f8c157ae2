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
        ({"retry_for": -1}, "0 gives up at once"),
        ({"stream_buffer": "8kB", "stream": True}, "at least 8224"),
        ({"stream_validation_tokens": 0}, "at least 1"),
        ({"stream": True, "max_tokens": "2B"}, r"data\.max_tokens=2000000000 .* training\.max_tokens"),
        ({"stream": True, "max_documents": 9}, r"data\.max_documents=9 .* training\.max_tokens"),
    ],
)
def test_contradictions_are_refused_with_the_rule(values: dict, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        DataSettings.from_mapping(values, "data")


def test_settings_of_streams_are_read_and_do_not_make_another_corpus() -> None:
    values = {"stream_buffer": "1.5GiB", "stream_validation_tokens": "1M", "retry_for": "2h30m", "stream": True}
    data = DataSettings.from_mapping(values)
    assert (data.stream_buffer, data.stream_validation_tokens, data.retry_for) == (3 * 2**29, 1_000_000, 9000.0)
    assert data.identity() == DataSettings().identity()
    assert DataSettings(revision="v1").identity() != DataSettings().identity()
    assert DataSettings(source="other").identity() != DataSettings().identity()
    assert "revision" not in DataSettings().identity()
