"""Where a run is: everything that is neither weights nor settings, and all JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ternlm.errors import CheckpointError

MEAN_DECAY = 0.99


@dataclass
class Progress:
    """The position of a run, as checkpoints hold it.

    Attributes:
        step: Completed optimizer steps.
        samples: Sequences drawn so far, those a roll-back passed over included: the whole state of the data.
        tokens: Targets trained on so far.
        elapsed_s: Seconds of training so far, over all sittings.
        best_loss: Lowest validation loss of a saved checkpoint.
        last_evaluation: Step and loss of the latest evaluation.
        loss_sum, loss_weight: Training losses of accepted steps and their number, each weighted by 0.99 per
            step since: their quotient is the moving mean of the training loss.
        roll_backs: One entry per roll-back: the step it left, the step it returned to, and the samples passed over.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    last_evaluation: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    roll_backs: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], where: object) -> Self:
        """The position saved in a checkpoint's state.

        Raises:
            CheckpointError: There is none, or it is malformed.
        """
        try:
            progress = cls(**state["progress"])
            positions = (progress.step, progress.samples, progress.tokens)
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in positions):
                raise TypeError("counters are not whole numbers")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"'{where}' holds no position to go on from ({error}). Use another one.") from None
        return progress

    def accept(self, loss: float) -> None:
        """Let the loss of an accepted step into the moving mean."""
        self.loss_sum = MEAN_DECAY * self.loss_sum + loss
        self.loss_weight = MEAN_DECAY * self.loss_weight + 1

    @property
    def mean_loss(self) -> float | None:
        """Moving mean of the training loss over about a hundred steps, None before the first."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None
