"""Running a model to look at it, and leaving it exactly as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from ternlm.evaluation.ternary import not_compiled
from ternlm.models import LanguageModel


@contextmanager
def untouched(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode, blocks as written; afterwards each module is in its own mode again.

    In evaluation mode nothing is drawn at random and no quantizer observes.
    """
    training = [module for module in model.modules() if module.training]
    with not_compiled(model):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
