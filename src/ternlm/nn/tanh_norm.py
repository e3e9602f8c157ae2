"""QDyT: a norm without a division, in which a tanh bounds what the quantizer behind it sees."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.ops.grouped_tanh import centered, grouped_tanh

Centering = Literal["group", "token", "none"]

_RAW_CLIP = 3.0


class QDyT(nn.Module):
    """y = weight * tanh(alpha r v) + bias, v = clamp(u, -a, a), u = x - mean of its group of channels.

    a = softplus(raw_clip) starts at 3.0486. The slope alpha starts at `alpha_target` and is multiplied by the ramp

        r(k) = r0 + (1 - r0) min(1, k / warmup_steps),   r0 = alpha_init / alpha_target,

    a buffer that `set_step` sets from the optimizer step, so alpha has a gradient from the first update, and
    nothing jumps when the ramp ends. The mean is that of each token, in training and evaluation alike.

    Args:
        features: Width of the last dimension.
        groups: Runs of channels with a mean each; must divide features. Used when `center` is ``group``.
        center: ``group``, ``token`` (one mean) or ``none``.
        clips: Whether there is a clip; otherwise v = u and there is no `raw_clip`.
        alpha_init, alpha_target, warmup_steps: The ramp.
        rms_eps: Divide u by sqrt(mean(u^2) + rms_eps) first; None does not.

    Source:
        Zhu et al. 2025, DyT (arXiv 2503.10622); the learned clip, Choi et al. 2018, PACT (arXiv 1805.06085).
    """

    ramp: Tensor

    def __init__(
        self,
        features: int,
        groups: int = 16,
        center: Centering = "group",
        clips: bool = True,
        alpha_init: float = 0.05,
        alpha_target: float = 0.5,
        warmup_steps: int = 2000,
        rms_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.groups = {"group": groups, "token": 1, "none": 0}[center]
        self.rms_eps, self.warmup_steps = rms_eps, warmup_steps
        self.alpha_target, self.ramp_start = alpha_target, alpha_init / alpha_target
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.alpha = nn.Parameter(torch.tensor(alpha_target))
        self.raw_clip = nn.Parameter(torch.tensor(_RAW_CLIP)) if clips else None
        self.register_buffer("ramp", torch.tensor(self.ramp_at(0)))

    @torch.no_grad()
    def initialize(self) -> None:
        """The documented initial values, at step 0."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.alpha.fill_(self.alpha_target)
        if self.raw_clip is not None:
            self.raw_clip.fill_(_RAW_CLIP)
        self.set_step(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features), same dtype."""
        return grouped_tanh(x, self.weight, self.bias, self.slope(), self.clip(), self.groups, self.rms_eps)

    def ramp_at(self, step: int) -> float:
        """r at an optimizer step."""
        share = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.ramp_start + (1 - self.ramp_start) * share

    def set_step(self, step: int) -> None:
        """Use the ramp of this optimizer step from now on."""
        self.ramp.fill_(self.ramp_at(step))

    def slope(self) -> Tensor:
        """alpha r, ()."""
        return self.alpha * self.ramp

    def clip(self) -> Tensor | None:
        """a, (); None without a clip."""
        return None if self.raw_clip is None else F.softplus(self.raw_clip)

    def bound(self) -> Tensor:
        """The largest magnitude an output can have, max over channels of |weight| tanh(alpha r a) + |bias|, ()."""
        clip = self.clip()
        reach = 1.0 if clip is None else torch.tanh(self.slope().abs() * clip)
        return (self.weight.abs() * reach + self.bias.abs()).amax().detach()

    @torch.no_grad()
    def readings(self, x: Tensor, limit: float = 0.1) -> dict[str, Tensor]:
        """What the norm does to an input: how much it clips, how flat it is there, and how large the input is.

        Args:
            x: (..., features), what enters the norm.
            limit: A slope below this share of the steepest one counts as flat.

        Returns:
            ``clip_rate``, mean(|u| > a); ``saturation``, the share that is clipped or where 1 - tanh^2 < limit;
            ``alpha``, alpha r; ``clip``, a (infinite without one); ``std`` of x; each float32, ().
        """
        clip = self.clip()
        bound = torch.full_like(self.alpha, math.inf) if clip is None else clip
        u, _ = centered(x.reshape(-1, x.shape[-1]).float(), self.groups, self.rms_eps)
        clipped = u.abs() > bound
        flat = 1 - torch.tanh(self.slope() * u.clamp(-bound, bound)).square() < limit
        return {
            "clip_rate": clipped.float().mean(),
            "saturation": (clipped | flat).float().mean(),
            "alpha": self.slope(),
            "clip": bound,
            "std": x.float().std(),
        }

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, groups={self.groups}, clips={self.raw_clip is not None}"
