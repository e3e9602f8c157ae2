"""What is minimized: next-token cross-entropy in nats, weighted by tokens, in float32."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ternlm.models import Output
from ternlm.settings import Float, Settings


class ObjectiveSettings(Settings):
    """The training objective.

    Attributes:
        name: ``causal``, prediction of the next token.
        z_loss: Weight of the mean squared log-normalizer, which keeps logits small; 0 switches it off.
    """

    name: Literal["causal"] = "causal"
    z_loss: Float = Field(default=0.0, ge=0)


class LossSums(NamedTuple):
    """Sums over the targets of a micro-batch.

    Attributes:
        objective: What to differentiate: nll plus auxiliary terms, each summed over targets.
        nll: Negative log-likelihood alone, in nats; this is what is reported.
    """

    objective: Tensor
    nll: Tensor


def loss_sums(output: Output, targets: Tensor, settings: ObjectiveSettings) -> LossSums:
    """Sum of -ln p(target) over positions whose target is not -100.

    Dividing by the number of targets of the whole step, not of the micro-batch, makes accumulated
    gradients equal those of one large batch.

    Args:
        output: Logits (batch, time, vocab), and auxiliary losses, each a mean over the micro-batch.
        targets: (batch, time), already shifted; -100 where nothing is scored.
        settings: Auxiliary terms.
    """
    logits = output.logits.float().flatten(0, 1)
    flat = targets.flatten()
    nll = F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum")
    objective = nll
    if settings.z_loss:
        scored = (flat != -100).float()
        objective = objective + settings.z_loss * (torch.logsumexp(logits, dim=-1).square() * scored).sum()
    for auxiliary in output.auxiliary.values():
        objective = objective + auxiliary * (flat != -100).sum()
    return LossSums(objective, nll.detach())
