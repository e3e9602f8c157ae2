"""How many parameters a run's model has, read off the header of a checkpoint, and how large it is when packed."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ternlm.files import regular_file
from ternlm.report import tail
from ternlm.report.tail import mapping, whole
from ternlm.run_directory import RunDirectory

_LARGEST_HEADER = 64 * 1024 * 1024
_COUNTS = ("total", "ternary", "embedding", "scales", "packed_bytes")
_PADDED = 256
"""Columns of a row of codes are a multiple of this many."""


def parameter_counts(
    run: RunDirectory, config: Mapping[str, Any], steps: Sequence[int], matrices: Sequence[str]
) -> dict[str, Any]:
    """`total`, `ternary`, `embedding` parameters, `scales`, `packed_bytes` and `source`; None where they are not known.

    Packed are ternary weights at 2 bits in rows padded to 256 columns, scales at 32, everything else at 16.
    The total is counted in the newest checkpoint whose header can be read. Ternary are those tensors that the file of
    measurements (`eval/alignment.json`) counts, or else those that the ternary statistics name.

    Args:
        run: The run.
        config: Its settings, which say whether a matrix has one scale.
        steps: Of its checkpoints, ascending.
        matrices: Names in the ternary statistics.
    """
    measured = mapping((tail.document(run.alignment) or {}).get("parameters"))
    counts = {name: whole(measured.get(name)) for name in _COUNTS}
    if counts["total"] and (counts["packed_bytes"] is not None or not counts["ternary"]):
        return {**counts, "source": "eval/alignment.json"}
    for step in reversed(steps):
        file = run.checkpoints / f"step_{step:06d}" / "model.safetensors"
        shapes = tensor_shapes(file)
        if shapes:
            sizes = {name: math.prod(shape) for name, shape in shapes.items()}
            known = {name.removeprefix("model.").removesuffix(".weight"): shape for name, shape in shapes.items()}
            found = [shape for name in matrices if len(shape := known.get(name, [])) == 2]
            total = sum(sizes.values())
            ternary = sum(map(math.prod, found)) if found and len(found) == len(matrices) else None
            scales = len(found) if mapping(config.get("quantization")).get("granularity") == "tensor" else None
            packed = None
            if ternary is not None and scales is not None:
                codes = sum(rows * _PADDED // 4 * -(-columns // _PADDED) for rows, columns in found)
                packed = codes + 4 * scales + 2 * (total - ternary)
            source = file.relative_to(run.path).as_posix()
            return {**dict(zip(_COUNTS, (total, ternary, None, scales, packed), strict=True)), "source": source}
    return {**counts, "source": "eval/alignment.json" if counts["total"] else None}


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, by name; empty if its header cannot be read."""
    try:
        with regular_file(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length <= _LARGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    shapes = {name: mapping(entry).get("shape") for name, entry in mapping(header).items()}
    return {
        name: shape
        for name, shape in shapes.items()
        if isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)
    }
