"""The model families, in one table written by hand.

A family is one file with its settings and its model, one line here, and one page in the manual.
"""

from typing import Any, NamedTuple

from ternlm.errors import SettingsError
from ternlm.models.bitnet import BitNet, BitNetSettings
from ternlm.models.hgrn import HGRN, HGRNSettings
from ternlm.models.hnet import HNet
from ternlm.models.hnet_settings import HNetSettings
from ternlm.models.language_model import LanguageModel, ModelSettings, Output, ParameterCounts
from ternlm.models.qdyt import QDyTModel
from ternlm.models.qdyt_settings import QDyTSettings
from ternlm.nn.quantization import FULL_PRECISION, QuantizationMode
from ternlm.settings.base import shortened


class Family(NamedTuple):
    """A settings class and the model it describes."""

    settings: type[ModelSettings]
    model: type[Any]


MODELS = {
    "bitnet": Family(BitNetSettings, BitNet),
    "qdyt": Family(QDyTSettings, QDyTModel),
    "hgrn": Family(HGRNSettings, HGRN),
    "hnet": Family(HNetSettings, HNet),
}


def model_settings(values: dict[str, Any]) -> ModelSettings:
    """Validate the `model` section for the family it names (default `bitnet`).

    Raises:
        SettingsError: The family or a setting is unknown, or a shape does not fit.
    """
    family = values.get("family", "bitnet")
    if not isinstance(family, str) or family not in MODELS:
        raise SettingsError(f"unknown model family '{shortened(str(family))}'. Choose one of: {', '.join(MODELS)}.")
    return MODELS[family].settings.from_mapping(values, "model")


def build_model(settings: ModelSettings, mode: QuantizationMode, gradient_checkpointing: bool = False) -> LanguageModel:
    """The model of a family, uninitialized, on the current default device."""
    model: LanguageModel = MODELS[settings.family].model(settings, mode, gradient_checkpointing)
    return model


__all__ = [
    "FULL_PRECISION",
    "MODELS",
    "Family",
    "LanguageModel",
    "ModelSettings",
    "Output",
    "ParameterCounts",
    "QuantizationMode",
    "build_model",
    "model_settings",
]
