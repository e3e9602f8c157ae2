"""Checkpoints: old or new, never a mixture, and proved by SHA-256 before a weight is touched.

A checkpoint is a folder `step_NNNNNN` (completed optimizer steps) of safetensors and JSON files; no
pickle is written or read. It is written beside its final place, brought to the disk, and renamed,
so the name exists only when the content is complete. It holds what is needed to use it: weights,
optimizer state, position, settings, and tokenizer.
"""

from ternlm.checkpoint.loading import (
    Loaded,
    Opened,
    load,
    load_tensors,
    open_checkpoint,
    open_newest,
)
from ternlm.checkpoint.manifest import verify
from ternlm.checkpoint.packed import ENCODINGS, pack, packed_bytes, packed_snapshot, ternary_layers, ternary_matrices
from ternlm.checkpoint.snapshot import Contents
from ternlm.checkpoint.store import abandon, folder, newest_valid, point, prune, remove_unfinished, resolve, steps
from ternlm.checkpoint.writer import Saved, Writer, require_room, save, save_as, write_snapshot

__all__ = [
    "ENCODINGS",
    "Contents",
    "Loaded",
    "Opened",
    "Saved",
    "Writer",
    "abandon",
    "folder",
    "load",
    "load_tensors",
    "newest_valid",
    "open_checkpoint",
    "open_newest",
    "pack",
    "packed_bytes",
    "packed_snapshot",
    "point",
    "prune",
    "remove_unfinished",
    "require_room",
    "resolve",
    "save",
    "save_as",
    "steps",
    "ternary_layers",
    "ternary_matrices",
    "verify",
    "write_snapshot",
]
