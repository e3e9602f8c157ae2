"""The `data` section of a run's settings."""

from typing import Literal

from pydantic import field_validator, model_validator

from ternlm.settings.base import Settings
from ternlm.settings.numbers import Count, Float


class DataSettings(Settings):
    """Which documents a run reads and how they are divided.

    Attributes:
        source: A name in `CORPORA`, ``hf:owner/name[:config]``, or a file, folder or glob.
        validation_path, test_path: Files, folder or glob to use instead of carving documents off.
        text_column: The column or key that holds the text in Parquet and JSONL.
        validation_fraction, test_fraction: Shares carved off where the source has no such split.
        max_documents: Read at most this many documents of each split that the source stores.
        max_tokens: Stop the training split at the document that reaches this many tokens.
        sequence_length: Targets per training window, T.
        encoding_errors: ``strict`` refuses bytes that are not UTF-8; ``replace`` reads them as U+FFFD.
        cache: Folder that prepared corpora go to; by default ``$XDG_CACHE_HOME/ternlm/data``.
    """

    source: str = "stories"
    validation_path: str | None = None
    test_path: str | None = None
    text_column: str = "text"
    validation_fraction: Float = 0.05
    test_fraction: Float = 0.05
    max_documents: Count | None = None
    max_tokens: Count | None = None
    sequence_length: Count = 256
    encoding_errors: Literal["strict", "replace"] = "strict"
    cache: str | None = None

    @field_validator("source", "text_column")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it must not be empty")
        return value

    @field_validator("validation_fraction", "test_fraction")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("a share lies in [0, 1); write 0.05 or 5%")
        return value

    @field_validator("max_documents", "max_tokens", "sequence_length")
    @classmethod
    def _is_positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("it must be at least 1")
        return value

    @model_validator(mode="after")
    def _leaves_training_documents(self) -> "DataSettings":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} "
                "leave nothing to train on; their sum must be below 1"
            )
        return self
