"""The `data` section of a run's settings."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from ternlm.data.wikitext import WikiTextForm, is_wikitext_file
from ternlm.settings.base import Settings
from ternlm.settings.numbers import Bytes, Count, Float, Seconds

_LEAST_WINDOWS = 8  # that a stream's buffer holds, at 4 bytes per token


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
        encoding_errors: ``strict`` refuses bytes that are not UTF-8; ``replace`` reads them as U+FFFD;
            ``skip`` leaves such documents out.
        wikitext: How the corpora `wikitext-*` and local WikiText files become documents: ``articles``, which is also
            what files named like ``wiki.test.raw`` become without it; ``detokenized`` or ``joined`` to be scored as
            papers do.
        cache: Folder that prepared corpora go to; by default ``$XDG_CACHE_HOME/ternlm/data``.
        revision: Branch, tag or commit of a dataset on the hub; by default the newest.
        retry_for: Give up after a dataset could not be read for this long, e.g. ``2h``; by default never.
        stream: Read while training instead of preparing the corpus before.
        stream_buffer: Most disk that the token blocks of a stream take.
        stream_validation_tokens: The validation split of a stream ends with the document that reaches this.
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
    encoding_errors: Literal["strict", "replace", "skip"] = "strict"
    wikitext: WikiTextForm | None = None
    cache: str | None = None
    revision: str | None = None
    retry_for: Seconds | None = None
    stream: bool = False
    stream_buffer: Bytes = 2 * 2**30
    stream_validation_tokens: Count = 500_000

    def identity(self) -> dict[str, Any]:
        """The settings that decide which documents are read and how they are divided, as JSON values.

        What is not given is left out where it came later, so that corpora prepared before it existed are still found.
        """
        incidental = {"sequence_length", "cache", "retry_for", "stream", "stream_buffer", "stream_validation_tokens"}
        paths = [path for path in (self.source, self.validation_path, self.test_path) if path is not None]
        if self.revision is None:
            incidental.add("revision")
        if self.wikitext is None and not any(is_wikitext_file(path) for path in paths):
            incidental.add("wikitext")
        return self.model_dump(exclude=incidental)

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

    @field_validator("max_documents", "max_tokens", "sequence_length", "stream_buffer", "stream_validation_tokens")
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

    @field_validator("retry_for")
    @classmethod
    def _is_not_negative(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError("it must not be negative; 0 gives up at once, null never")
        return value

    @model_validator(mode="after")
    def _fits_a_stream(self) -> "DataSettings":
        if not self.stream:
            return self
        given = next((name for name in ("max_tokens", "max_documents") if getattr(self, name) is not None), None)
        if given is not None:
            raise ValueError(
                f"data.{given}={getattr(self, given)} limits what is prepared, and data.stream=true prepares "
                "nothing; limit the run with training.max_tokens instead"
            )
        least = _LEAST_WINDOWS * 4 * (self.sequence_length + 1)
        if self.stream_buffer < least:
            raise ValueError(
                f"data.stream_buffer={self.stream_buffer} is less than {_LEAST_WINDOWS} windows of "
                f"data.sequence_length={self.sequence_length}; give at least {least}, better 1GiB"
            )
        return self
