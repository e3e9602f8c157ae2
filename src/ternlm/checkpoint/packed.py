"""A model in one small file: codes and scales of its ternary matrices, and everything else as it is.

A ternary matrix X becomes `X.weight_packed` (uint8) and `X.weight_scale` (float32, multiplied): the very codes and
scales that the layer computes with, never found again from their product. All other tensors keep their names. The
header says how to read them: format, version, encoding, family, settings of the model, and the shape of each matrix.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ternlm
from ternlm.checkpoint.manifest import CONFIG, PACKED, SCHEMA, STATE
from ternlm.checkpoint.snapshot import Snapshot, environment, serialize
from ternlm.errors import CheckpointError, SettingsError
from ternlm.files import from_json, to_json
from ternlm.models import LanguageModel
from ternlm.nn.linear import BitLinear
from ternlm.ops.packing import BLOCK, pack_2bit, pack_trits, unpack_2bit, unpack_trits
from ternlm.tokenizers import Tokenizer

VERSION = "1"

_CODECS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "2bit64": (pack_2bit, unpack_2bit),
    "trit5": (pack_trits, unpack_trits),
}
ENCODINGS = tuple(_CODECS)

_KEPT_STATE = ("step", "total_steps", "run_id", "tokenizer_fingerprint", "data_fingerprint", "progress", "calibration")
_ANOTHER = "Export again, or use another checkpoint."


class Packed(NamedTuple):
    """The content of a packed file.

    Attributes:
        tensors: By name.
        metadata: Entries of the header.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class _Layout(NamedTuple):
    """Where the tensors of a model go.

    Attributes:
        layers: Ternary layers by path.
        others: All tensors that are not part of them, by name.
    """

    layers: dict[str, BitLinear]
    others: dict[str, Tensor]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape of each ternary matrix, by name."""
        return {
            f"{_parent(path)}{matrix}": (rows, layer.in_features)
            for path, layer in self.layers.items()
            for matrix, rows in layer.out_features.items()
        }


def ternary_layers(model: LanguageModel) -> dict[str, BitLinear]:
    """Every layer, a head included, that multiplies by ternary weights now, by its path."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))
    return {name: layer for name, layer in layers if layer.mode.weights == "ternary"}


def ternary_matrices(model: LanguageModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scale of every matrix of `ternary_layers`, by its name in files without ``.weight``."""
    return {
        f"{_parent(path)}{matrix}": found
        for path, layer in ternary_layers(model).items()
        for matrix, found in layer.matrices().items()
    }


def pack(model: LanguageModel, encoding: str = "2bit64", embedding: torch.dtype = torch.float32) -> Packed:
    """The packed form of a model as it computes now.

    Args:
        model: At least one of its layers is ternary.
        encoding: ``2bit64``, the run-time layout, or ``trit5``, a fifth smaller.
        embedding: Type of embeddings and an unrounded head in the file; ``bfloat16`` halves them and rounds them.

    Raises:
        SettingsError: No layer is ternary, or one is between two roundings.
    """
    layers = ternary_layers(model)
    _require_ternary(model, layers)
    layout, matrices = _layout(model, layers), ternary_matrices(model)
    encode, _ = _CODECS[encoding]
    tensors = {
        name: tensor.to(embedding) if _is_table(model, name, tensor) else tensor
        for name, tensor in layout.others.items()
    }
    for name, (codes, scale) in matrices.items():
        tensors[f"{name}.weight_packed"] = encode(codes)
        tensors[f"{name}.weight_scale"] = scale.squeeze(1) if scale.dim() == 2 and scale.shape[1] == 1 else scale
    metadata = {
        "ternlm.format": "packed",
        "ternlm.version": VERSION,
        "ternlm.encoding": encoding,
        "ternlm.family": model.settings.family,
        "ternlm.model": json.dumps(model.settings.model_dump(mode="json"), sort_keys=True),
        "ternlm.shapes": json.dumps({name: list(shape) for name, shape in layout.matrices().items()}, sort_keys=True),
        "ternlm.codes_sha256": _digest({name: codes for name, (codes, _) in matrices.items()}),
    }
    return Packed({name: _plain(name, tensor) for name, tensor in tensors.items()}, metadata)


def packed_bytes(model: LanguageModel) -> int:
    """Size of a packed model without the header of its file; it may be on the meta device.

    Codes at 2 bits in rows padded to whole blocks of columns (``2bit64``), integer weights at as many bits as they
    have, scales in float32, everything else in bfloat16.
    """
    rounding = {name: layer for name, layer in model.bit_linears().items() if layer.mode.weights != "none"}
    layers = {**rounding, **ternary_layers(model)}
    inside, size = {id(layer.weight) for layer in layers.values()}, 0
    for layer in layers.values():
        rows, bits = sum(layer.sizes), layer.mode.weight_bits
        size += rows * (BLOCK // 4 * -(-layer.in_features // BLOCK) if bits is None else layer.in_features * bits // 8)
        shapes = [_scale_shape(layer, each) for each in layer.sizes] if bits is None else [(rows,)]
        size += 4 * sum(math.prod(shape) for shape in shapes)
    others = (p for name, p in model.named_parameters() if id(p) not in inside and ".quantizer." not in name)
    return size + 2 * sum(other.numel() for other in others)


def packed_snapshot(
    packed: Packed, tokenizer: Tokenizer, config: Mapping[str, Any], state: Mapping[str, Any]
) -> Snapshot:
    """A packed model as the content of a checkpoint folder that every verb reads.

    Args:
        packed: The model.
        tokenizer: Its own.
        config: Resolved settings of the run.
        state: Counters of the run; what only training needs is left out.
    """
    kept = {name: state[name] for name in _KEPT_STATE if name in state}
    files: dict[str, list[bytes | memoryview]] = {
        PACKED: serialize(*packed),
        STATE: [to_json(kept)],
        CONFIG: [to_json(config)],
    }
    manifest = {
        "schema": SCHEMA,
        "writer": f"ternlm {ternlm.__version__}",
        "run_id": state.get("run_id"),
        "step": state["step"],
        "pinned": None,
        "rollbacks": 0,
        "finite": True,
        "env": {**environment(), "device": "cpu"},
    }
    return Snapshot(int(state["step"]), files, tokenizer, manifest)


def parse_metadata(content: bytes, path: Path) -> dict[str, str]:
    """The entries of a packed file's header, known to be of a format that this version reads.

    Args:
        content: The file.
        path: Where it lies, for sentences.

    Raises:
        CheckpointError: It is no packed file, or of another version or encoding.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = from_json(content[8 : 8 + size]).get("__metadata__", {})
    except (ValueError, AttributeError):
        metadata = {}
    if not isinstance(metadata, dict) or metadata.get("ternlm.format") != "packed":
        raise CheckpointError(f"'{path}' says nowhere that its weights are packed. {_ANOTHER}")
    for key, known in (("version", (VERSION,)), ("encoding", ENCODINGS)):
        found = metadata.get(f"ternlm.{key}")
        if found not in known:
            raise CheckpointError(
                f"'{path}' has the {key} {str(found)[:40]!a}; this version reads {', '.join(known)}. Upgrade ternlm."
            )
    return metadata


def require_packed_fitting(
    model: LanguageModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> None:
    """Refuse packed tensors that are not a model's; the model may be on the meta device.

    Raises:
        CheckpointError: Names, shapes or types differ from the model's.
    """
    shapes = _shapes(metadata, path)
    layout = _layout_of_file(model, shapes, path)
    wanted = _wanted(model, layout, metadata["ternlm.encoding"])
    for problem, names in (("lacks", wanted.keys() - tensors), ("has the unknown", tensors.keys() - wanted)):
        if names:
            raise CheckpointError(f"'{path}' {problem} tensor {min(names)!r} ({len(names)} in all). {_ANOTHER}")
    for name, (shape, dtypes) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            raise CheckpointError(
                f"tensor '{name}' in '{path}' has shape {tuple(found.shape)} and type "
                f"{str(found.dtype).removeprefix('torch.')}, which its model does not take. {_ANOTHER}"
            )


@torch.no_grad()
def load_packed(model: LanguageModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Give a model the codes, scales and other tensors of a packed file, all or nothing.

    Args:
        model: With the rounding of the checkpoint in force.
        tensors, metadata: The file.
        path: Where it lies, for sentences.

    Raises:
        CheckpointError: They are not this model's, or are damaged.
    """
    require_packed_fitting(model, tensors, metadata, path)
    shapes = _shapes(metadata, path)
    layout = _layout_of_file(model, shapes, path)
    _, decode = _CODECS[metadata["ternlm.encoding"]]
    codes = {name: decode(tensors[f"{name}.weight_packed"], columns) for name, (_, columns) in shapes.items()}
    if _digest(codes) != metadata.get("ternlm.codes_sha256"):
        raise CheckpointError(f"the codes in '{path}' differ from their own sha256: they are damaged. {_ANOTHER}")
    for inner, layer in layout.layers.items():
        names = [f"{_parent(inner)}{matrix}" for matrix in layer.out_features]
        scales = [tensors[f"{name}.weight_scale"] for name in names]
        if not all(bool((scale > 0).all() and scale.isfinite().all()) for scale in scales):
            raise CheckpointError(f"a scale of '{names[0]}' in '{path}' is no positive number. {_ANOTHER}")
        if layer.mode.weights != "ternary":
            raise CheckpointError(f"'{path}' packs '{names[0]}', which its settings do not make ternary. {_ANOTHER}")
        joined = torch.cat(scales)
        if layer.mode.granularity == "row":
            joined = joined[:, None]
        elif layer.mode.granularity == "group":
            joined = joined.view(sum(layer.sizes), -1)
        layer.take_codes(torch.cat([codes[name] for name in names]), joined)
    for name, tensor in layout.others.items():
        tensor.copy_(tensors[name])


def _layout(model: LanguageModel, layers: Mapping[str, BitLinear]) -> _Layout:
    """The tensors of a model when these layers are packed; what learned scales came from is not needed then."""
    layout = _Layout(dict(layers), {})
    inside = tuple(f"{name}.weight" for name in layout.matrices())
    quantizers = tuple(f"{name}.quantizer." for name in (*layout.matrices(), *layers))
    layout.others.update(
        (name, tensor)
        for name, tensor in model.dense_tensors().items()
        if name not in inside and not name.startswith(quantizers)
    )
    return layout


def _layout_of_file(model: LanguageModel, shapes: Mapping[str, tuple[int, int]], path: Path) -> _Layout:
    """The layout in which exactly these matrices are packed.

    Raises:
        CheckpointError: They are not whole layers of the model, or have other shapes there.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BitLinear) and all(f"{_parent(name)}{matrix}" in shapes for matrix in layer.out_features)
    }
    layout = _layout(model, layers)
    if layout.matrices() != dict(shapes):
        raise CheckpointError(f"the ternary matrices in '{path}' are not those of its model. {_ANOTHER}")
    return layout


def _wanted(
    model: LanguageModel, layout: _Layout, encoding: str
) -> dict[str, tuple[tuple[int, ...], set[torch.dtype]]]:
    """Shape and possible types of each tensor of a packed file, by name."""
    wanted = {
        name: (tuple(tensor.shape), {tensor.dtype} | ({torch.bfloat16} if _is_table(model, name, tensor) else set()))
        for name, tensor in layout.others.items()
    }
    encode, _ = _CODECS[encoding]
    for path, layer in layout.layers.items():
        row = torch.zeros(1, layer.in_features, dtype=torch.int8, device="cpu")
        for matrix, rows in layer.out_features.items():
            name = f"{_parent(path)}{matrix}"
            wanted[f"{name}.weight_packed"] = ((rows, encode(row).shape[1]), {torch.uint8})
            wanted[f"{name}.weight_scale"] = (_scale_shape(layer, rows), {torch.float32})
    return wanted


def _require_ternary(model: LanguageModel, layers: Mapping[str, BitLinear]) -> None:
    if not layers:
        raise SettingsError(
            "none of the model's layers is ternary at this step, so there is nothing to pack. "
            "Export a later checkpoint, or a full-precision transformer with --to hf."
        )
    between = next((name for name, layer in layers.items() if layer.is_between), None)
    if between is not None:
        raise SettingsError(
            f"layer '{between}' is between two roundings at this step (quantization.blend_steps), which no codes "
            "describe. Export a later checkpoint."
        )


def _shapes(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[int, int]]:
    try:
        found = from_json(metadata["ternlm.shapes"].encode())
        shapes = {name: (rows, columns) for name, (rows, columns) in found.items()}
        if not all(isinstance(size, int) and size > 0 for shape in shapes.values() for size in shape):
            raise ValueError("no sizes")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"'{path}' does not say which shapes its matrices have. {_ANOTHER}") from None
    return shapes


def _scale_shape(layer: BitLinear, rows: int) -> tuple[int, ...]:
    groups = layer.in_features // layer.mode.group_size
    if layer.mode.granularity == "tensor":
        return (1,)
    return (rows, groups) if layer.mode.granularity == "group" and groups > 1 else (rows,)


def _is_table(model: LanguageModel, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is an embedding or an unrounded head, which a file may hold in 16 bits."""
    return tensor.dtype == torch.float32 and name.endswith(".weight") and model.is_embedding(name, tensor)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """As it goes into the file: on the CPU, contiguous, and a single scale as (1,)."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(1) if name.endswith(".weight_scale") and tensor.dim() == 0 else tensor


def _digest(codes: Mapping[str, Tensor]) -> str:
    """sha256 over the names and codes of all matrices, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(codes):
        digest.update(name.encode())
        digest.update(codes[name].detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _parent(path: str) -> str:
    """The path of a layer's parent with a dot behind it; empty at the top."""
    parent = path.rpartition(".")[0]
    return f"{parent}." if parent else ""
