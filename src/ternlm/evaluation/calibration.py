"""Calibration: fixed activation scales, measured once on training text, in place of those that training left.

While a model trains, each static scale is a moving average of noisy observations, made through stochastic
rounding and dropout. Calibration measures the same percentile with rounding to nearest and without dropout, as
the model is used, and keeps what it finds only if the model predicts held-out text no worse. No other number of
the model changes, and no site ever observes again.

All sites are measured in the same passes, each behind the trained scales of the sites before it. Measuring layer
by layer would need a pass per site, and differ only by how far the new scales of earlier sites move what reaches
later ones; the comparison on held-out text judges all of them together.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ternlm.data.batch import Batch
from ternlm.errors import SettingsError
from ternlm.evaluation.evaluate import EvaluationResult
from ternlm.evaluation.untouched import untouched
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.ops.percentile import magnitude_percentile

Method = Literal["exact", "ema"]

EMA = 0.99

POOLED_VALUES, POOLED_TOKENS = 1 << 18, 1 << 10
"""Values per scale in the sample over all batches; where each channel has a scale, tokens."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration found and did.

    Attributes:
        kept: Whether the new scales are in force; otherwise the old ones are, because the loss was worse.
        method: How observations of several batches were put together.
        batches: Batches measured.
        tokens: Tokens in them.
        before, after: The evaluation with the old and with the new scales.
        scales: Of each site, the scales it had and those that were measured.
    """

    kept: bool
    method: Method
    batches: int
    tokens: int
    before: EvaluationResult
    after: EvaluationResult
    scales: dict[str, dict[str, list[float | None]]]

    def as_dict(self) -> dict[str, Any]:
        """The calibration as JSON values."""
        evaluations = {"before": self.before.as_dict(), "after": self.after.as_dict()}
        return {**vars(self), **evaluations}


def static_sites(model: LanguageModel) -> dict[str, ActivationQuantizer]:
    """The sites of a model that round, with a scale that comes from observations, by name.

    Raises:
        SettingsError: There are none.
    """
    sites = {name: site for name, site in model.activation_quantizers().items() if _is_static(site)}
    if not sites:
        raise SettingsError(
            f"this {model.settings.family} model has no activation scales that come from observations (each token is "
            "scaled anew, or nothing is rounded), so there is nothing to calibrate. Use the checkpoint as it is."
        )
    return sites


@torch.no_grad()
def calibrate(
    model: LanguageModel,
    batches: Sequence[Batch],
    score: Callable[[], EvaluationResult],
    method: Method = "exact",
    check: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure all static scales of a model, take them over if it predicts no worse, and freeze them.

    Args:
        model: Only `rho` and `frozen` of its static sites change.
        batches: Of training text, at least one.
        score: Evaluates the model as it is, on text that is not in the batches.
        method: ``exact``, the percentile of one sample over all batches; or ``ema``, the average of the batches'
            percentiles, with weights that fall by 0.99 per batch into the past and sum to 1.
        check: Called before each batch; may raise to stop. Whatever raises, the old scales are in force then.

    Raises:
        SettingsError: The model has no static scales.
    """
    sites = static_sites(model)
    before = score()
    found = _measure(model, sites, batches, method, check)
    old = {name: site.rho.clone() for name, site in sites.items()}
    kept = False
    try:
        for name, site in sites.items():
            site.rho.copy_(torch.where(found[name].isfinite(), found[name], old[name]))
        after = score()
        kept = after.loss <= before.loss or (math.isnan(before.loss) and math.isfinite(after.loss))
    finally:
        for name, site in sites.items():
            if not kept:
                site.rho.copy_(old[name])
    for site in sites.values():
        site.frozen.fill_(True)
    scales = {name: {"before": _numbers(old[name]), "measured": _numbers(found[name])} for name in sites}
    tokens = sum(batch.tokens.numel() for batch in batches)
    return Calibration(kept, method, len(batches), tokens, before, after, scales)


def _is_static(site: ActivationQuantizer) -> bool:
    return site.settings.act_scale != "absmax_token" and site.bits is not None and bool(site.observed > 0)


def _measure(
    model: LanguageModel,
    sites: Mapping[str, ActivationQuantizer],
    batches: Sequence[Batch],
    method: Method,
    check: Callable[[], None],
) -> dict[str, Tensor]:
    """The percentile at each site over all batches, shaped as its `rho`."""
    observers: dict[str, _Observer] = {
        name: _Sample(site, len(batches)) if method == "exact" else _Average(site) for name, site in sites.items()
    }
    with untouched(model), ExitStack() as hooks:
        for name, site in sites.items():
            handle = site.register_forward_pre_hook(observers[name], with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in batches:
            check()
            predict(model, batch.tokens, batch.targets)
    return {name: observer.scale() for name, observer in observers.items()}


class _Observer(ABC):
    """Sees what reaches one site, as a forward hook."""

    def __init__(self, site: ActivationQuantizer) -> None:
        self.site = site
        self.by_head, self.by_channel = site.heads is not None, site.settings.act_granularity == "channel"

    def __call__(self, site: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x, valid = inputs[0], inputs[1] if len(inputs) > 1 else named.get("valid")
        self.see(x if x.dim() > 2 else x[None], valid)

    def percentile(self, x: Tensor, valid: Tensor | None, **options: int) -> Tensor:
        """As a training pass observes it."""
        percentile = self.site.settings.act_percentile
        return magnitude_percentile(x, percentile, valid, self.by_head, self.by_channel, **options)

    @abstractmethod
    def see(self, x: Tensor, valid: Tensor | None) -> None:
        """What reached the site, (batch, [heads,] time, features), of which `valid`, (batch, time), is real."""

    @abstractmethod
    def scale(self) -> Tensor:
        """What follows for rho."""


class _Average(_Observer):
    """The average of percentiles, with weights that fall into the past; they sum to 1 from the first batch on."""

    def __init__(self, site: ActivationQuantizer) -> None:
        super().__init__(site)
        self._sum, self._weights = torch.zeros_like(site.rho), 0.0

    def see(self, x: Tensor, valid: Tensor | None) -> None:
        self._sum = EMA * self._sum + (1 - EMA) * self.percentile(x, valid)
        self._weights = EMA * self._weights + (1 - EMA)

    def scale(self) -> Tensor:
        return self._sum / self._weights if self._weights else torch.full_like(self._sum, torch.nan)


class _Sample(_Observer):
    """Values taken at random from all batches, and the percentile of all of them together."""

    def __init__(self, site: ActivationQuantizer, batches: int) -> None:
        super().__init__(site)
        self._width = 1 if self.by_channel else site.features
        self._per_batch = -(-(POOLED_TOKENS if self.by_channel else POOLED_VALUES) // batches)
        self._generator = torch.Generator().manual_seed(0)
        self._taken: list[Tensor] = []

    def see(self, x: Tensor, valid: Tensor | None) -> None:
        tokens = (x.transpose(1, 2) if self.by_head else x).flatten(0, 1)
        if valid is not None:
            tokens = tokens[valid.flatten()]
        count = len(tokens) * self._width
        picked = torch.arange(count)
        if count > self._per_batch:
            picked = torch.randint(count, (self._per_batch,), generator=self._generator)
        places, channels = (part.to(x.device) for part in (picked // self._width, picked % self._width))
        if self.by_channel:
            self._taken.append(tokens[places])
        else:
            self._taken.append((tokens[places, :, channels] if self.by_head else tokens[places, channels])[..., None])

    def scale(self) -> Tensor:
        if not any(map(len, self._taken)):
            return torch.full_like(self.site.rho, torch.nan)
        pooled = torch.cat(self._taken)
        pooled = pooled.transpose(0, 1) if self.by_head else pooled
        return self.percentile(pooled[None], None, most_values=pooled.numel())


def _numbers(scale: Tensor) -> list[float | None]:
    """A scale as JSON values; None where nothing was seen."""
    return [value if math.isfinite(value) else None for value in scale.flatten().tolist()]
