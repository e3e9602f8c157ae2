"""`predict`: what a model says about the targets of a batch, computed only where something is scored."""

from torch import Tensor

from ternlm.data.batch import IGNORED
from ternlm.models.language_model import LanguageModel, Output


def predict(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Output:
    """The model's output for a batch.

    Args:
        model: Of any family.
        tokens: (batch, time).
        targets: (batch, time), -100 where nothing is scored.

    Returns:
        Logits (batch, time, vocab); of an encoder, which scores a few positions only, (scored, vocab) of those alone,
        row after row.
    """
    output: Output = model(tokens) if model.is_causal else model(tokens, scored=targets != IGNORED)
    return output
