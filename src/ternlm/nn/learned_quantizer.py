"""The parameters of a learned ternary quantizer: a scale, and for `ttq` a threshold, of each row of a layer."""

import torch
from torch import Tensor, nn

from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.learned_ternary import RowQuantizer, fit_lsq, fit_ttq, gradient_port, inverse_positive, positive


class LearnedQuantizer(nn.Module):
    """s = softplus(raw_scale) and, for `ttq`, delta = softplus(raw_threshold), one of each per row.

    They are fitted to the latent weights once; the buffer `fitted` says so and is saved, so that loading a
    checkpoint never starts them afresh.

    Args:
        rows: Rows of the layer's weight, all merged matrices together.
        mode: Names the quantizer, ``ttq`` or ``lsq``.
    """

    fitted: Tensor

    def __init__(self, rows: int, mode: QuantizationMode) -> None:
        super().__init__()
        self.raw_scale = nn.Parameter(torch.zeros(rows))
        self.raw_threshold = nn.Parameter(torch.zeros(rows)) if mode.quantizer == "ttq" else None
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._percentile = mode.ttq_percentile
        self._clips, self._grad_clip = mode.ste == "clip", mode.lsq_grad_clip
        self._seen_fitted: tuple[int, int] | None = None

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Take scales and thresholds from the latent weights, (rows, in_features)."""
        if self.raw_threshold is None:
            scale = fit_lsq(weight)
        else:
            scale, threshold = fit_ttq(weight, self._percentile)
            self.raw_threshold.copy_(inverse_positive(threshold))
        self.raw_scale.copy_(inverse_positive(scale))
        self.fitted.fill_(True)

    def fit_once(self, weight: Tensor) -> None:
        """`fit`, unless that was done, here or in the run that a checkpoint came from.

        The buffer is read again only after somebody wrote to it, for reading it waits for the device.
        """
        version = (self.fitted.data_ptr(), self.fitted._version)
        if version != self._seen_fitted:
            if not bool(self.fitted):
                self.fit(weight)
            self._seen_fitted = (self.fitted.data_ptr(), self.fitted._version)

    def forget(self) -> None:
        """Let the next ternary codes be fitted anew."""
        self.fitted.fill_(False)

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a parameter does."""
        parameters = (self.raw_scale, *(() if self.raw_threshold is None else (self.raw_threshold,)))
        return tuple(number for p in parameters for number in (p.data_ptr(), p._version))

    def scale(self) -> Tensor:
        """s, (rows, 1), without gradient."""
        return positive(self.raw_scale.detach())[:, None]

    def threshold(self) -> Tensor | None:
        """delta, (rows, 1), without gradient; None for `lsq`."""
        return None if self.raw_threshold is None else positive(self.raw_threshold.detach())[:, None]

    def port(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        threshold: Tensor | None,
        share: Tensor | None = None,
        around: Tensor | None = None,
    ) -> Tensor:
        """The latent weights as the target of gradients (`gradient_port`)."""
        quantizer = RowQuantizer(codes, scale, threshold, self._clips)
        return gradient_port(weight, self.raw_scale, self.raw_threshold, quantizer, share, around)

    @torch.no_grad()
    def clamp_gradients(self) -> None:
        """Clamp each row's dL/ds and dL/ddelta, before the slope of softplus, to +-lsq_grad_clip.

        That is for the gradient of a whole step: of a part of it, or multiplied by a loss scale, other rows would be
        clamped.
        """
        for raw in (self.raw_scale, self.raw_threshold):
            if raw is not None and raw.grad is not None:
                limit = self._grad_clip * raw.sigmoid()
                raw.grad.clamp_(-limit, limit)

    def extra_repr(self) -> str:
        return f"rows={self.raw_scale.numel()}, {'lsq' if self.raw_threshold is None else 'ttq'}"
