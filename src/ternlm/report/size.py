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


def parameter_counts(
    run: RunDirectory, config: Mapping[str, Any], steps: Sequence[int], matrices: Sequence[str]
) -> dict[str, Any]:
    """`total`, `ternary`, `embedding` parameters, `scales` and `source`; None where they cannot be known.

    The total is counted in the newest checkpoint whose header can be read. Ternary are those tensors that the file of
    measurements (`eval/alignment.json`) counts, or else those that the ternary statistics name.

    Args:
        run: The run.
        config: Its settings, which say whether a matrix has one scale.
        steps: Of its checkpoints, ascending.
        matrices: Names in the ternary statistics.
    """
    measured = mapping((tail.document(run.alignment) or {}).get("parameters"))
    counts = {name: whole(measured.get(name)) for name in ("total", "ternary", "embedding", "scales")}
    if counts["total"]:
        return {**counts, "source": "eval/alignment.json"}
    for step in reversed(steps):
        file = run.checkpoints / f"step_{step:06d}" / "model.safetensors"
        shapes = tensor_shapes(file)
        if shapes:
            sizes = {name: math.prod(shape) for name, shape in shapes.items()}
            known = {name.removeprefix("model.").removesuffix(".weight"): size for name, size in sizes.items()}
            found = [known[name] for name in matrices if name in known]
            return {
                "total": sum(sizes.values()),
                "ternary": sum(found) if found and len(found) == len(matrices) else None,
                "embedding": None,
                "scales": len(found) if mapping(config.get("quantization")).get("granularity") == "tensor" else None,
                "source": file.relative_to(run.path).as_posix(),
            }
    return {"total": None, "ternary": None, "embedding": None, "scales": None, "source": None}


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


def packed_bytes(parameters: Mapping[str, Any]) -> int | None:
    """Size at 2 bits for each ternary weight, 32 for each scale and 16 for each other parameter; None if unknown."""
    total, ternary, scales = (parameters.get(name) for name in ("total", "ternary", "scales"))
    if total is None or ternary is None or scales is None:
        return None
    return -(-int(ternary) // 4) + 4 * int(scales) + 2 * (int(total) - int(ternary))
