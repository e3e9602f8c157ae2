"""Checkpoints: old or new, never a mixture, and proved by SHA-256 before a weight is touched.

A checkpoint is a folder `step_NNNNNN` (completed optimizer steps) of safetensors and JSON files; no
pickle is written or read. It is written beside its final place, brought to the disk, and renamed,
so the name exists only when the content is complete. It holds what is needed to use it: weights,
optimizer state, position, settings, and tokenizer.
"""

from ternlm.checkpoint.loading import Loaded, load, load_tensors, read_training_state
from ternlm.checkpoint.manifest import verify
from ternlm.checkpoint.store import (
    Contents,
    newest_valid,
    point,
    prune,
    remove_unfinished,
    resolve,
    save,
    steps,
)

__all__ = [
    "Contents",
    "Loaded",
    "load",
    "load_tensors",
    "newest_valid",
    "point",
    "prune",
    "read_training_state",
    "remove_unfinished",
    "resolve",
    "save",
    "steps",
    "verify",
]
