"""Which models transformers can run, and the `config.json` that makes it run them as they were trained.

    norm_layout    weights ternary                       weights in full precision
    subln          `bitnet`                              `bitnet`
    prenorm        `llama`                               `llama`
    double         `llama` with a norm in each linear    none

Everything is written out: where a key is left out, transformers takes that of another model without a word.
"""

from typing import Any

from ternlm.checkpoint import ternary_layers
from ternlm.errors import SettingsError
from ternlm.models import LanguageModel
from ternlm.models.bitnet import BitNetSettings
from ternlm.tokenizers import Tokenizer

TRANSFORMERS_FORMATS = ("hf", "hf-packed")

ROWS_PER_BYTE = 4


def is_full_precision(model: LanguageModel) -> bool:
    """Whether no layer rounds its weights."""
    return all(layer.mode.weights == "none" for layer in model.bit_linears().values())


def require_known_to_transformers(model: LanguageModel, form: str) -> None:
    """Refuse what transformers would not compute as this package does.

    Args:
        model: The model, with its rounding in force.
        form: ``hf``, latent weights that are rounded in each pass; ``hf-packed``, codes and scales.

    Raises:
        SettingsError: It names the setting and the formats that take the model.
    """
    problem = _problem(model, form)
    if problem is not None:
        what, instead = problem
        raise SettingsError(f"--to {form} cannot hold this model: {what}. {instead}")


def transformers_config(model: LanguageModel, tokenizer: Tokenizer, form: str, dtype: str) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: One that `require_known_to_transformers` lets pass.
        tokenizer: Its own.
        form: ``hf`` or ``hf-packed``.
        dtype: Type of embeddings, norms and head in the file, ``float32`` or ``bfloat16``.
    """
    settings = _settings(model)
    kind = "bitnet" if settings.norm_layout == "subln" else "llama"
    config: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM" if kind == "bitnet" else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_key_value_heads,
        "head_dim": settings.hidden_size // settings.num_attention_heads,
        "hidden_act": settings.hidden_act,
        "max_position_embeddings": settings.max_position_embeddings,
        "rms_norm_eps": settings.rms_norm_eps,
        "initializer_range": settings.initializer_range,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "rope_theta": settings.rope_theta,  # this and torch_dtype are the spellings of transformers 4
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if not is_full_precision(model):
        config["quantization_config"] = _quantization(settings, form)
    return config


def _quantization(settings: BitNetSettings, form: str) -> dict[str, Any]:
    """Without ``linear_class`` the scale would be divided by; without the head in the list it would be rounded."""
    is_double = settings.norm_layout == "double"
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online" if form == "hf" else "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": is_double,
        "rms_norm_eps": settings.rms_norm_eps,
    }


def _problem(model: LanguageModel, form: str) -> tuple[str, str] | None:
    """What transformers cannot do, and the formats that can; None where there is nothing."""
    packed = "--to packed takes it."
    if not isinstance(model.settings, BitNetSettings):
        return f"transformers has no model of the family model.family={model.settings.family}", packed
    if is_full_precision(model):
        return _problem_in_full_precision(model.settings, form)
    layers = model.bit_linears()
    ternary = ternary_layers(model)
    if len(ternary) < len(layers):
        return f"{len(layers) - len(ternary)} of its {len(layers)} layers are not ternary at this step", packed
    if any(layer.is_between for layer in ternary.values()):
        return "its layers are between two roundings at this step (quantization.blend_steps)", "Export a later one."
    mode = next(iter(ternary.values())).mode
    if mode.granularity != "tensor":
        return f"quantization.granularity={mode.granularity}, and transformers has one scale per matrix", packed
    if mode.activation_bits != 8:
        return f"quantization.activations={mode.activations}, and transformers always rounds to 8 bits", packed
    if form == "hf" and mode.quantizer != "absmean":
        what = f"quantization.quantizer={mode.quantizer}, and transformers finds codes by absmean"
        return what, "--to packed and --to hf-packed take it."
    if form == "hf" and model.is_packed:
        return "its latent weights are not in a packed checkpoint", "--to packed and --to hf-packed take it."
    if form == "hf-packed":
        return _unpackable(model)
    return None


def _problem_in_full_precision(settings: BitNetSettings, form: str) -> tuple[str, str] | None:
    if settings.norm_layout == "double":
        return (
            "model.norm_layout=double, which transformers knows around ternary layers only",
            "The checkpoint itself is all there is.",
        )
    if form == "hf-packed":
        return "quantization.weights=none, so there are no codes", "--to hf takes it."
    return None


def _unpackable(model: LanguageModel) -> tuple[str, str] | None:
    for name, layer in ternary_layers(model).items():
        for rows in layer.sizes:
            if rows % ROWS_PER_BYTE:
                what = f"a matrix of {name} has {rows} rows, which is no multiple of {ROWS_PER_BYTE}"
                return what, "--to packed and --to hf take it."
    return None


def _settings(model: LanguageModel) -> BitNetSettings:
    assert isinstance(model.settings, BitNetSettings)
    return model.settings
