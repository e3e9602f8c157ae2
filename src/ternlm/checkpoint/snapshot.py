"""What a checkpoint holds, fixed at one moment: tensors on the CPU that nothing changes any more, and JSON as bytes.

The safetensors layout (8 bytes of header length, a JSON header, the tensors one after the other) is put
together here, so that tensors are hashed and written from where they lie instead of being copied into one
block of memory first. Reading is the library's.
"""

import json
import platform
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

import ternlm
from ternlm.checkpoint.manifest import CONFIG, MODEL, OPTIMIZER, SCHEMA, STATE
from ternlm.errors import Diverged
from ternlm.files import to_json
from ternlm.tokenizers import Tokenizer

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Contents(NamedTuple):
    """What goes into a checkpoint.

    Attributes:
        model: Tensors by their names in files.
        optimizer: Optimizer tensors by name.
        state: Counters and scalars, JSON values only; ``run_id`` and the number of
            ``progress.roll_backs`` also go into the manifest.
        config: Resolved settings, JSON values only.
        tokenizer: Saved beside the model.
        reports: Further files by name, JSON values only.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    reports: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class Snapshot(NamedTuple):
    """A checkpoint that only has to be written.

    Attributes:
        step: Completed optimizer steps.
        files: For each file the pieces it consists of.
        tokenizer: Saved beside them.
        manifest: The manifest, without its list of files.
    """

    step: int
    files: Mapping[str, list[bytes | memoryview]]
    tokenizer: Tokenizer
    manifest: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files except the tokenizer's and the manifest."""
        return sum(len(part) for parts in self.files.values() for part in parts)


class Buffers:
    """Memory for copies, used again by the next snapshot wherever shape and type are the same."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def copy(self, key: str, value: Tensor) -> Tensor:
        """A copy of a tensor on the CPU, contiguous."""
        buffer = self._tensors.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._tensors[key] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return buffer.copy_(value.detach())

    def clear(self) -> None:
        """Give the memory back."""
        self._tensors.clear()


def take(step: int, contents: Contents, pinned: str | None = None, buffers: Buffers | None = None) -> Snapshot:
    """Fix the contents of a checkpoint.

    Args:
        step: Completed optimizer steps.
        contents: What to keep.
        pinned: Why this checkpoint must never be pruned, or None.
        buffers: Where tensors are copied to; without them those on the CPU are shared, and the
            snapshot must be written before they change.

    Raises:
        Diverged: A value is not finite.
    """
    parts: dict[str, list[bytes | memoryview]] = {}
    for name, tensors in ((MODEL, contents.model), (OPTIMIZER, contents.optimizer)):
        _require_finite(step, tensors)
        parts[name] = serialize(
            {
                key: value.detach().cpu().contiguous() if buffers is None else buffers.copy(f"{name}:{key}", value)
                for key, value in tensors.items()
            }
        )
    state = {**contents.state, "step": step, "tokenizer_fingerprint": contents.tokenizer.fingerprint}
    try:
        parts[STATE], parts[CONFIG] = [to_json(state)], [to_json(contents.config)]
    except ValueError as error:
        raise Diverged(f"the counters at step {step} are not finite ({error}); they are not saved.") from None
    parts |= {name: [to_json(report)] for name, report in contents.reports.items()}
    progress = contents.state.get("progress")
    device = next((tensor.device.type for tensor in contents.model.values()), "cpu")
    manifest = {
        "schema": SCHEMA,
        "writer": f"ternlm {ternlm.__version__}",
        "run_id": contents.state.get("run_id"),
        "step": step,
        "pinned": pinned,
        "rollbacks": len(progress.get("roll_backs", [])) if isinstance(progress, Mapping) else 0,
        "finite": True,
        "env": {**environment(), "device": device},
    }
    return Snapshot(step, parts, contents.tokenizer, manifest)


def environment() -> dict[str, str]:
    """Versions of what decides the last bits of a result."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": str(safetensors.__version__),
    }


def serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> list[bytes | memoryview]:
    """A safetensors file in pieces: the header, then the tensors' own memory, widest types first.

    Args:
        tensors: Contiguous, on the CPU.
        metadata: Further entries of the header.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = [tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in order]
    return [len(text).to_bytes(8, "little") + text, *(part for part in data if len(part))]


def _require_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        # Any NaN or infinity shows in the sum, in one pass; a sum may also overflow by itself.
        is_finite = not tensor.is_floating_point() or bool(tensor.sum().isfinite())
        if not is_finite and not bool(torch.isfinite(tensor).all()):
            raise Diverged(
                f"tensor '{name}' holds non-finite values at step {step}; it is not saved, earlier ones are good."
            )
