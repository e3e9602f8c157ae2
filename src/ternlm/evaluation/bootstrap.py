"""How sure a number about a text is: the text's documents drawn again, many times.

Tokens of one document are not independent, so whole documents are drawn, and all models on the same draws: the
interval of a difference between two models is much narrower than the two intervals apart.
"""

import math

import numpy as np

RESAMPLES = 1000
FEWEST_DOCUMENTS = 10
"""Of fewer documents no interval is given: redrawing them tells little about other texts."""


def resampled_bpb(nats: np.ndarray, text_bytes: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Bits per byte of models on texts made of the same documents, drawn with replacement.

    Args:
        nats: Of each model on each document, (models, documents).
        text_bytes: Raw bytes of each document, (documents,).
        seed: Decides the draws.

    Returns:
        (models, `RESAMPLES`), or None if there are fewer than `FEWEST_DOCUMENTS` documents.

    Source:
        Efron 1979, "Bootstrap methods".
    """
    per_byte = resampled_ratio(nats, text_bytes, seed)
    return None if per_byte is None else per_byte / math.log(2)


def resampled_ratio(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Sums per count, as nats per target, on texts made of the same documents, drawn as `resampled_bpb` does.

    Args:
        sums: Of each model on each document, (models, documents).
        counts: What they are divided by, the same for all models, (documents,).
        seed: Decides the draws; equal ones for equal seeds, whatever is summed.

    Returns:
        (models, `RESAMPLES`), or None if there are fewer than `FEWEST_DOCUMENTS` documents.
    """
    count = len(counts)
    if count < FEWEST_DOCUMENTS:
        return None
    draws = np.random.default_rng(seed)
    columns = np.concatenate([sums, counts[None]]).T  # (documents, models + 1)
    totals = np.stack([
        np.bincount(draws.integers(0, count, count), minlength=count) @ columns for _ in range(RESAMPLES)
    ])  # fmt: skip
    ratios: np.ndarray = totals[:, :-1] / totals[:, -1:]
    return ratios.T


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values, (resamples,)."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
