"""The `tokenizer` section of a run's settings."""

from pydantic import field_validator

from ternlm.settings.base import Settings
from ternlm.settings.numbers import Count


class TokenizerSettings(Settings):
    """Which tokenizer a run uses.

    Attributes:
        name: ``"byte"``, ``"train"`` (a byte-level BPE trained on the run's training documents), or any
            source that `load_tokenizer` takes: a folder, a tokenizer file, a name on the hub.
        vocab_size: Ids of the trained tokenizer, specials included; used with ``name="train"`` only.
        mask_token: Give the trained tokenizer a mask token, which ``objective.name=mlm`` needs.
    """

    name: str = "byte"
    vocab_size: Count = 4096
    mask_token: bool = False

    @field_validator("name")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a tokenizer needs a name; write byte, train, a path or a hub name")
        return value

    @field_validator("vocab_size")
    @classmethod
    def _holds_every_byte(cls, value: int) -> int:
        if value < 259:
            raise ValueError("256 bytes and 3 special tokens need at least 259")
        return value
