"""Trained models in files that others read: the packed file of this package, and folders for transformers.

An export is written beside its place, read back, compared with the model it came from, and only then renamed, so the
folder exists only when its content is known to be right.
"""

from ternlm.export.folder import require_new
from ternlm.export.transformers_config import TRANSFORMERS_FORMATS, require_known_to_transformers
from ternlm.export.writing import FORMATS, Choices, export

__all__ = [
    "FORMATS",
    "TRANSFORMERS_FORMATS",
    "Choices",
    "export",
    "require_known_to_transformers",
    "require_new",
]
