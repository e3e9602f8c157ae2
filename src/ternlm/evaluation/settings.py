"""The `evaluation` section of a run's settings."""

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

    every_steps: Count = 250
    max_tokens: Count | None = 500_000
    batch_size: Count | None = None
    sample_every_steps: Count | None = None
    prompts: tuple[str, ...] = ("Once upon a time",)
    sample_tokens: Count = 100
    temperature: Float = 0.8
    top_p: Float = 0.95
