"""The `evaluation` section of a run's settings."""

from typing import Literal

from pydantic import Field, field_validator

from ternlm.settings import Count, Settings

SampleMode = Literal["greedy", "typical", "stress"]


class EvaluationSettings(Settings):
    """What is measured while training, and how often.

    Attributes:
        every_steps: Steps between evaluations on the validation split; the end is always evaluated.
        max_tokens: Score only the first so many tokens of the split; None scores all of it.
        batch_size: Sequences per forward pass; None takes the training batch.
        sample_every_steps: Steps between generated samples; None generates none.
        sample_modes: How each prompt is continued: ``greedy``; ``typical`` (temperature 0.9, top-p 0.95);
            ``stress`` (temperature 1.5, top-k 10).
        prompts: What the samples continue.
        sample_tokens: Most tokens per sample; 200 suit bytes.
    """

    every_steps: Count = Field(default=250, ge=1)
    max_tokens: Count | None = Field(default=500_000, ge=1)
    batch_size: Count | None = Field(default=None, ge=1)
    sample_every_steps: Count | None = Field(default=None, ge=1)
    sample_modes: tuple[SampleMode, ...] = ("greedy", "typical", "stress")
    prompts: tuple[str, ...] = (
        "The quick brown fox",
        "In the beginning",
        "Once upon a time",
        "The capital of France",
        "Machine learning is",
    )
    sample_tokens: Count = Field(default=50, ge=1)

    @field_validator("sample_modes")
    @classmethod
    def _once_each(cls, value: tuple[SampleMode, ...]) -> tuple[SampleMode, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name one mode or several, each once; sample_every_steps=none switches samples off")
        return value

    @field_validator("prompts")
    @classmethod
    def _texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("give at least one prompt, and none that is empty")
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            raise ValueError("a prompt is not Unicode text; write it in UTF-8") from None
        return value
