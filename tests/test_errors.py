"""The error tree: every class has the exit code that launchers rely on, and one sentence is enough to act on."""

import pytest

from ternlm import errors

CODES = {
    "TernlmError": 1,
    "SettingsError": 2,
    "EnvironmentFault": 3,
    "DataError": 3,
    "TokenizerError": 3,
    "CheckpointError": 3,
    "StorageFault": 3,
    "Diverged": 4,
    "MemoryExhausted": 5,
    "Preempted": 75,
    "Interrupted": 130,
}


def declared() -> dict[str, type[Exception]]:
    return {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_error_has_its_exit_code_and_none_is_missing_from_the_table() -> None:
    assert {name: cls.exit_code for name, cls in declared().items()} == CODES


@pytest.mark.parametrize("name", CODES)
def test_every_error_is_a_ternlm_error_and_says_what_it_is_for(name: str) -> None:
    cls = declared()[name]
    assert issubclass(cls, errors.TernlmError)
    assert cls.__doc__
    assert name in (errors.__doc__ or "")


def test_faults_of_data_tokenizer_and_checkpoint_are_faults_of_the_environment() -> None:
    for cls in (errors.DataError, errors.TokenizerError, errors.CheckpointError):
        assert issubclass(cls, errors.EnvironmentFault)
    assert not issubclass(errors.SettingsError, errors.EnvironmentFault)


def test_a_missing_extra_names_the_package_and_the_command() -> None:
    error = errors.missing_extra("wandb", "wandb", "tracking.wandb=online")
    assert error.exit_code == 3
    assert "tracking.wandb=online" in str(error)
    assert "pip install 'ternlm[wandb]'" in str(error)
