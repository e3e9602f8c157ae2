"""What is minimized: cross-entropy in nats, of the next token or of hidden ones, weighted by tokens, in float32."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ternlm.data.batch import IGNORED
from ternlm.data.masking import MaskingSettings
from ternlm.errors import SettingsError
from ternlm.models import Output
from ternlm.settings import Float


class ObjectiveSettings(MaskingSettings):
    """The training objective.

    Attributes:
        name: ``causal``, prediction of the next token; ``mlm``, of hidden tokens by a model that reads both sides.
        z_loss: Weight of the mean squared log-normalizer, which keeps logits small; 0 switches it off.
        mask_fraction, mask_share, random_share, whole_word: With ``mlm``, as `MaskingSettings` has them.
    """

    name: Literal["causal", "mlm"] = "causal"
    z_loss: Float = Field(default=0.0, ge=0)

    @property
    def masking(self) -> MaskingSettings | None:
        """How tokens are hidden; None where none are."""
        return self if self.name == "mlm" else None


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
        output: Logits (batch, time, vocab), or (scored, vocab) of the scored positions alone, row after row; and
            auxiliary losses, each a mean over the micro-batch.
        targets: (batch, time), already shifted; -100 where nothing is scored.
        settings: Auxiliary terms.
    """
    flat = targets.flatten()
    if output.logits.dim() == 2:
        flat = flat[flat != IGNORED]
    logits = output.logits.float().flatten(0, -2)
    nll = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
    objective = nll
    if settings.z_loss:
        scored = (flat != IGNORED).float()
        objective = objective + settings.z_loss * (torch.logsumexp(logits, dim=-1).square() * scored).sum()
    for auxiliary in output.auxiliary.values():
        objective = objective + auxiliary * (flat != IGNORED).sum()
    return LossSums(objective, nll.detach())


def require_matching(objective: ObjectiveSettings, family: str, is_causal: bool) -> None:
    """Refuse an objective that the family of model cannot have.

    Args:
        objective: What is minimized.
        family: Key in `MODELS`.
        is_causal: Whether its models see only what came before.

    Raises:
        SettingsError: A causal model would be asked for hidden tokens, or an encoder for the next one.
    """
    if objective.name == "mlm" and is_causal:
        raise SettingsError(
            f"objective.name=mlm hides tokens and needs a model that reads both sides; model.family={family} sees "
            "only what came before. Use objective.name=causal or an encoder such as model.family=qdyt."
        )
    if objective.name == "causal" and not is_causal:
        raise SettingsError(
            f"objective.name=causal asks for the next token, which model.family={family} has already read. "
            "Use objective.name=mlm."
        )
