"""`export`: one model, one format, one folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ternlm.checkpoint import Loaded, pack, packed_snapshot, ternary_layers, write_snapshot
from ternlm.checkpoint.manifest import MODEL, PACKED
from ternlm.checkpoint.snapshot import serialize
from ternlm.errors import SettingsError
from ternlm.export.folder import new_folder
from ternlm.export.transformers_config import (
    TRANSFORMERS_FORMATS,
    is_full_precision,
    require_known_to_transformers,
    transformers_config,
)
from ternlm.export.transformers_weights import transformers_tensors
from ternlm.export.verification import compare_packed, compare_transformers
from ternlm.files import replace_durably, to_json, write_durably, write_parts_durably

FORMATS = ("packed", *TRANSFORMERS_FORMATS)

CARD, FACTS = "README.md", "export.json"

_SMALL = 200_000_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Choices(NamedTuple):
    """How an export is written.

    Attributes:
        form: ``packed``, ``hf`` or ``hf-packed``.
        encoding: Of ``packed``: ``2bit64`` or ``trit5``.
        dtype: Of embeddings, an unrounded head, and for transformers the norms; None is ``float32`` where that keeps
            the model as it is or it has fewer than 200 million parameters.
        verify: Read the export back and compare it.
    """

    form: str = "packed"
    encoding: str = "2bit64"
    dtype: Literal["float32", "bfloat16"] | None = None
    verify: bool = True


def export(
    loaded: Loaded, folder: Path, choices: Choices, card: Callable[[Mapping[str, Any]], str] | None = None
) -> dict[str, Any]:
    """Write a model into a folder, which must not exist.

    Args:
        loaded: The model, on the CPU.
        folder: Where.
        choices: The format.
        card: Makes the text of README.md from what this returns.

    Returns:
        Format, sizes and the outcome of the comparison; also written to `export.json`.

    Raises:
        SettingsError: The folder exists, or the format cannot hold the model.
        StorageFault: The disk is full or failing; nothing stays.
        TernlmError: What was written is not the model; nothing stays.
    """
    if choices.form in TRANSFORMERS_FORMATS:
        require_known_to_transformers(loaded.model, choices.form)
    if choices.dtype == "bfloat16" and _keeps_latents(loaded, choices.form):
        raise SettingsError(
            "--to hf holds latent weights, whose codes would change in bfloat16. Use --dtype float32 or --to hf-packed."
        )
    dtype = _DTYPES[choices.dtype or _default_dtype(loaded, choices.form)]
    with new_folder(folder) as temporary:
        if choices.form == "packed":
            weights, compared = _write_packed(loaded, temporary, choices, dtype)
        else:
            weights, compared = _write_transformers(loaded, temporary, choices, dtype)
        facts = _facts(loaded, choices, dtype, (temporary / weights).stat().st_size)
        facts["verification"] = compared
        write_durably(temporary / FACTS, to_json(facts))
        if card is not None:
            write_durably(temporary / CARD, card(facts).encode())
    return facts


def _default_dtype(loaded: Loaded, form: str) -> Literal["float32", "bfloat16"]:
    is_small = loaded.model.parameter_counts().total < _SMALL
    return "float32" if form == "packed" or _keeps_latents(loaded, form) or is_small else "bfloat16"


def _keeps_latents(loaded: Loaded, form: str) -> bool:
    """Whether the file holds weights that are rounded to codes when they are used."""
    return form == "hf" and not is_full_precision(loaded.model)


def _write_packed(loaded: Loaded, folder: Path, choices: Choices, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    packed = pack(loaded.model, choices.encoding, dtype)
    write_snapshot(folder, packed_snapshot(packed, loaded.tokenizer, loaded.config, loaded.state))
    if not choices.verify:
        return PACKED, _not_asked()
    return PACKED, compare_packed(loaded, folder, is_exact=dtype == torch.float32)


def _write_transformers(
    loaded: Loaded, folder: Path, choices: Choices, dtype: torch.dtype
) -> tuple[str, dict[str, Any]]:
    config = transformers_config(loaded.model, loaded.tokenizer, choices.form, _plain(dtype))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_durably(folder / "config.json", to_json(config))
    write_durably(folder / "generation_config.json", to_json({"_from_model_config": True, **ids}))
    write_parts_durably(folder / MODEL, serialize(transformers_tensors(loaded.model, choices.form, dtype)))
    loaded.tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    length = {"model_max_length": config["max_position_embeddings"]}
    replace_durably(file, to_json(json.loads(file.read_bytes()) | length))
    return MODEL, compare_transformers(loaded, folder, dtype) if choices.verify else _not_asked()


def _facts(loaded: Loaded, choices: Choices, dtype: torch.dtype, size: int) -> dict[str, Any]:
    """What there is to know about the files; the sizes of plain weights are those of the same tensors."""
    counts = loaded.model.parameter_counts()
    settings = loaded.model.settings
    return {
        "format": choices.form,
        "encoding": choices.encoding if choices.form == "packed" else None,
        "dtype": _plain(dtype),
        "family": settings.family,
        "step": loaded.state["step"],
        "run_id": loaded.state.get("run_id"),
        "tokenizer": loaded.tokenizer.name,
        "vocab_size": settings.vocab_size,
        "context": settings.max_position_embeddings,
        "is_causal": loaded.model.is_causal,
        "activation_bits": _activation_bits(loaded),
        "tokens_seen": (loaded.state.get("progress") or {}).get("tokens"),
        "ternary_layers": len(ternary_layers(loaded.model)),
        "parameters": {"total": counts.total, **counts._asdict()},
        "bytes": size,
        "bytes_bfloat16": 2 * counts.total,
        "bytes_float32": 4 * counts.total,
    }


def _activation_bits(loaded: Loaded) -> int | None:
    """Bits of activations in front of ternary layers that round them; None where none does, or not all alike."""
    bits = {layer.mode.activation_bits for layer in ternary_layers(loaded.model).values() if layer.rounds_input}
    return bits.pop() if len(bits) == 1 else None


def _not_asked() -> dict[str, Any]:
    return {"status": "skipped", "by": None, "reason": "--no-verify was given"}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
