"""The `evaluation` section of a run's settings."""

from pydantic import Field

from ternlm.settings import Count, Float, Settings


class EvaluationSettings(Settings):
    """What is measured while training, and how often.

    Attributes:
        every_steps: Steps between evaluations on the validation split; the end is always evaluated.
        max_tokens: Score only the first so many tokens of the split; None scores all of it.
        batch_size: Sequences per forward pass; None takes the training batch.
        sample_every_steps: Steps between generated samples; None generates none.
        prompts: What the samples continue.
        sample_tokens: Tokens per sample.
        temperature, top_p: How samples are drawn; temperature 0 is greedy.
    """

    every_steps: Count = Field(default=250, ge=1)
    max_tokens: Count | None = Field(default=500_000, ge=1)
    batch_size: Count | None = Field(default=None, ge=1)
    sample_every_steps: Count | None = Field(default=None, ge=1)
    prompts: tuple[str, ...] = ("Once upon a time",)
    sample_tokens: Count = Field(default=100, ge=1)
    temperature: Float = Field(default=0.8, ge=0)
    top_p: Float = Field(default=0.95, gt=0, le=1)
