"""Model files in the form of `config.json` of simplified_slm and hnet_bit, turned into a `model` section.

Keys with a counterpart keep their names and values, and are validated where all settings are; keys that change no
result are left out, each with a sentence; values that would change it and cannot be had here are refused.
"""

from collections.abc import Mapping
from typing import Any

from ternlm.errors import SettingsError

FAMILIES = {"simplified_slm": "hgrn", "hnet_bit": "hnet"}
"""Model types of such files, and the families they become."""

_SCANS = {"fused_recurrent": "auto", "fused_chunk": "auto", "chunk": "chunk", "naive": "reference"}
_SPECIAL_TOKENS = {"bos_token_id": 254, "eos_token_id": 255}
_WITHOUT_EFFECT = {
    "use_cache": "generation always carries the memory on",
    "use_fused_bitlinear": "there is one ternary layer",
    "fuse_cross_entropy": "there is one loss",
    "pad_token_id": "padding is marked in the targets and has no token",
    "architectures": "the model type says it",
    "auto_map": "no code is loaded from files",
    "torch_dtype": "training.precision decides",
    "dtype": "training.precision decides",
    "transformers_version": "it says nothing of the model",
}
_DERIVED = {"hnet_bit": ("hidden_size", "num_hidden_layers", "num_stages")}


def is_model_config(values: Mapping[str, Any]) -> bool:
    """Whether values are those of a model in that form: they name a model type."""
    return "model_type" in values


def model_section(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values of the `model` section, and a sentence for each key that was left out.

    Args:
        values: The keys of the file. A key that it does not have takes the default of the family here.

    Raises:
        SettingsError: The model type is unknown, or a value cannot be had here.
    """
    kind = values["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SettingsError(f"model_type={kind!r} is unknown. Use {' or '.join(FAMILIES)}.")
    model: dict[str, Any] = {"family": FAMILIES[kind]}
    notes: list[str] = []
    for key, value in values.items():
        if key == "model_type":
            continue
        if key in _WITHOUT_EFFECT:
            notes.append(f"model.{key} is left out: {_WITHOUT_EFFECT[key]}")
        elif key in _DERIVED.get(kind, ()):
            notes.append(f"model.{key} is left out: d_model and num_blocks say it")
        elif key in _SPECIAL_TOKENS:
            _require(key, value, (_SPECIAL_TOKENS[key], None), "the byte tokenizer has no other")
        elif key == "hidden_act":
            _require(key, value, ("swish", "silu"), "the gate of these families is SiLU")
        elif key == "attn_mode":
            _require(key, value, tuple(_SCANS), "each gives the same result")
            model["scan_impl"] = _SCANS[value]
        elif key == "num_heads":
            notes.append(_heads(values, value, model))
        else:
            model[key] = value
    return model, notes


def _require(key: str, value: Any, allowed: tuple[Any, ...], because: str) -> None:
    if value not in allowed:
        known = " or ".join(str(choice) for choice in allowed if choice is not None)
        raise SettingsError(f"{key}={value!r} cannot be had: {because}. Write {known}, or leave it out.")


def _heads(values: Mapping[str, Any], heads: Any, model: dict[str, Any]) -> str:
    """What becomes of the number of heads: attention that names none of its own takes it."""
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise SettingsError(f"num_heads={heads!r} must be a whole number above 0. Leave it out: it changes nothing.")
    widths = values.get("d_model", [values.get("hidden_size")])
    ratio = values.get("expand_ratio", 1)
    for width in widths if isinstance(widths, list) else []:
        if isinstance(width, int) and isinstance(ratio, (int, float)) and int(width * ratio) % heads:
            raise SettingsError(
                f"num_heads={heads} does not divide a memory of {int(width * ratio)} channels. "
                "Leave num_heads out: it changes nothing."
            )
    if values.get("innermost_use_attention") and values.get("attention_num_heads") is None:
        model["attention_num_heads"] = heads
        return f"model.num_heads={heads} is taken as attention_num_heads; the recurrence does not depend on it"
    return f"model.num_heads={heads} is left out: the recurrence works channel by channel, however they are grouped"
