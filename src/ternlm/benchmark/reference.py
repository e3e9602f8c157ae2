"""Models of other people that ours are measured beside: their shapes, and what of them can be fetched."""

from pathlib import Path
from typing import Any, NamedTuple

from ternlm.errors import EnvironmentFault

_PATIENCE_S = 5.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


class Reference(NamedTuple):
    """A model with a name of its own here.

    Attributes:
        hub: Where its configuration, tokenizer and weights are.
        config: Its `config.json` as far as it decides shapes and speed.
        source: Where those values were published.
    """

    hub: str
    config: dict[str, Any]
    source: str


REFERENCES = {
    "tinyllama-1.1b": Reference(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "attention_bias": False, "initializer_range": 0.02,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        "Zhang et al. 2024 (arXiv 2401.02385), table 1, and its config.json",
    ),
}  # fmt: skip


def fetch(hub: str, with_weights: bool) -> Path:
    """The folder of a model of the hub: from the local cache, else downloaded.

    Args:
        hub: ``owner/name``.
        with_weights: Also the weights, safetensors only.

    Raises:
        EnvironmentFault: The package is missing, the hub cannot be reached, or it refuses.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise EnvironmentFault(f"'{hub}' needs huggingface_hub. Run: pip install 'ternlm[hub]'") from None
    patterns = ["config.json", *_TOKENIZER_FILES, *(["*.safetensors", "*.safetensors.index.json"] * with_weights)]
    last: Exception | None = None
    for is_local in (True, False):
        try:
            if not is_local:
                huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE_S)
            folder = Path(huggingface_hub.snapshot_download(hub, allow_patterns=patterns, local_files_only=is_local))
            if _is_complete(folder, with_weights):
                return folder
        except Exception as error:  # noqa: BLE001 (errors of many network and file layers come through)
            last = error
    reason = (str(last).strip().splitlines() or ["it holds no weights in safetensors"])[0] if last else "no weights"
    raise EnvironmentFault(f"'{hub}' cannot be fetched from the hub ({reason[:160]}). Give a local folder instead.")


def _is_complete(folder: Path, with_weights: bool) -> bool:
    return (folder / "config.json").is_file() and (not with_weights or any(folder.glob("*.safetensors")))
