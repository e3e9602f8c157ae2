"""What the activation quantizers of a model do on real text: codes in use, clipping, and how values are spread.

A site is a place where activations are rounded: an `ActivationQuantizer`, or the input of a BitLinear that rounds
it by itself.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ternlm.data.batch import Batch
from ternlm.evaluation.histogram import Histogram
from ternlm.evaluation.placement import Place, places
from ternlm.evaluation.untouched import untouched
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.linear import BitLinear
from ternlm.nn.tanh_norm import QDyT
from ternlm.ops.quantize import EPS, quantize_activation, top_code

_BEYOND, _BINS = 1.25, 120
_DEVIATIONS = 5.0


class Site:
    """Running counts of one site.

    Args:
        place: Where it is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.bits: int | None = None
        self.values = self.clipped = self.nonfinite = 0
        self.sum = self.squares = self.largest = self.steps = 0.0
        self.calls = 0
        self.codes: Tensor | None = None
        self._histogram: Histogram | None = None
        self._unit = 1.0

    def add(self, x: Tensor, step: Tensor | None, bits: int | None) -> None:
        """Count one call.

        Args:
            x: What reaches the site, before it is rounded.
            step: Distance of two codes, shaped to divide x; None where nothing is rounded.
            bits: Width of the codes; None where nothing is rounded.
        """
        x = x.detach().float()
        self._moments(x)
        if step is None or bits is None:
            if self._histogram is None:
                self._unit = max(float(x.double().square().mean().sqrt()), 1e-30)
                self._histogram = Histogram(-_DEVIATIONS, _DEVIATIONS, _BINS)
            self._histogram.add(x / self._unit)
            return
        self.bits = bits
        if self._histogram is None:
            self._histogram = Histogram(-_BEYOND, _BEYOND, _BINS)
        in_codes = x / step
        levels = top_code(bits)
        self.steps += float(step.double().mean())
        self.clipped += int((in_codes.abs() > levels * (1 + 1e-6)).sum())  # float error is no clipping
        codes = torch.nan_to_num(in_codes).round().clamp_(-levels, levels).add_(levels).to(torch.int64)
        counts = torch.bincount(codes.reshape(-1), minlength=2 * levels + 1).cpu()
        self.codes = counts if self.codes is None else self.codes + counts
        self._histogram.add(in_codes / levels)

    def as_dict(self) -> dict[str, Any]:
        """The site as a row; what does not apply is None."""
        mean = self.sum / max(self.values, 1)
        row: dict[str, Any] = {
            **self.place.as_dict(), "bits": self.bits, "values": self.values, "nonfinite": self.nonfinite,
            "mean": mean, "std": math.sqrt(max(self.squares / max(self.values, 1) - mean**2, 0.0)),
            "absmax": self.largest,
            "codes_used": None, "utilization": None, "entropy_bits": None, "entropy": None, "clip_rate": None,
            "at_limit": None, "step": None, "codes": None, "unit": "root mean square",
            "histogram": self._histogram.as_dict() if self._histogram else None,
        }  # fmt: skip
        if self.codes is None:
            return row
        shares = self.codes.double() / self.codes.sum()
        entropy = float(torch.special.entr(shares).sum()) / math.log(2)
        used = int(self.codes.count_nonzero())
        return row | {
            "codes_used": used, "utilization": used / self.codes.numel(), "entropy_bits": entropy,
            "entropy": entropy / math.log2(self.codes.numel()), "clip_rate": self.clipped / max(self.values, 1),
            "at_limit": float(shares[0] + shares[-1]), "step": self.steps / self.calls,
            "codes": self.codes.tolist(), "unit": "largest code",
        }  # fmt: skip

    def _moments(self, x: Tensor) -> None:
        finite = x.isfinite()
        if not bool(finite.all()):
            self.nonfinite += int((~finite).sum())
            x = x[finite]
        self.calls += 1
        self.values += x.numel()
        if x.numel():
            self.sum += float(x.sum(dtype=torch.float64))
            self.squares += float(x.square().sum(dtype=torch.float64))
            self.largest = max(self.largest, float(x.abs().max()))


class _Norm:
    """Running means of what a tanh norm says of its inputs."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.sums: dict[str, float] = {}
        self.tokens = 0

    def add(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(norm, QDyT)
        tokens = inputs[0].shape[:-1].numel()
        for name, value in norm.readings(inputs[0].detach()).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * tokens
        self.tokens += tokens

    def as_dict(self) -> dict[str, Any]:
        means = {name: total / self.tokens for name, total in self.sums.items()}
        return {
            **self.place.as_dict(), "clip_rate": means["clip_rate"], "saturation": means["saturation"],
            "alpha_eff": means["alpha"], "clip": means["clip"] if math.isfinite(means["clip"]) else None,
            "stream_std": means["std"],
        }  # fmt: skip


@torch.no_grad()
def analyze_activations(
    model: LanguageModel, batches: Sequence[Batch], check: Callable[[], None] = lambda: None
) -> dict[str, list[dict[str, Any]]]:
    """Rows on every site, and on the residual stream, over some batches.

    Args:
        model: Used in evaluation mode; put back as it was.
        batches: What it reads.
        check: Called before each batch; may raise to stop.

    Returns:
        `sites`: per site `bits`, `std`, `absmax`; with L = 2^(bits - 1) - 1, `codes_used`, `utilization`
        (codes_used / (2 L + 1)), `entropy_bits` and `entropy` (of the codes, in bits and as a share of
        log2(2 L + 1)), `clip_rate` (share of values beyond L steps), `at_limit` (share of codes at -L and L,
        never below 1 / width where the largest value of a token sets the step), mean `step`, counts of the
        `codes`, and `histogram`, in units of the largest code. Where nothing is rounded these are None, and the
        histogram is in units of the root mean square of the first batch.
        `norms`: of each tanh norm `clip_rate`, `saturation` (the share that is clipped, or where the slope is
        below a tenth of its largest), `alpha_eff` (its slope at 0), `clip` (a), and `stream_std`, of what enters.
        `stream`: `std` and `absmax` of what enters each block and leaves the last one.
    """
    where = places(model)
    sites: dict[nn.Module, Site] = {}
    blocks = list(model.blocks())
    stream = [Site(Place(where[block].name, number, "input")) for number, block in enumerate(blocks)]
    stream.append(Site(Place("after the blocks", None, "input")))

    def watch_layer(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, BitLinear)
        bits = layer.mode.activation_bits if layer.mode.weights != "none" else None
        step = quantize_activation(inputs[0], bits)[1].reciprocal() if bits else None
        sites.setdefault(layer, Site(where[layer])).add(inputs[0], step, bits)

    def watch_quantizer(quantizer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        step = _step(quantizer, inputs[0], output[1])
        sites.setdefault(quantizer, Site(where[quantizer])).add(inputs[0], step, quantizer.bits)

    norms = {norm: _Norm(where[norm]) for norm in where if isinstance(norm, QDyT)}
    hooks = [norm.register_forward_pre_hook(reading.add) for norm, reading in norms.items()]
    for module in where:
        if isinstance(module, ActivationQuantizer):
            hooks.append(module.register_forward_hook(watch_quantizer))
        elif isinstance(module, BitLinear) and module.rounds_input:
            hooks.append(module.register_forward_pre_hook(watch_layer))
    for site, block in zip(stream, blocks, strict=False):
        hooks.append(block.register_forward_pre_hook(partial(_watch_input, site=site)))
    hooks.append(blocks[-1].register_forward_hook(partial(_watch_output, site=stream[-1])))
    try:
        with untouched(model):
            for batch in batches:
                check()
                predict(model, batch.tokens, batch.targets)
    finally:
        for hook in hooks:
            hook.remove()
    columns = ("name", "block", "std", "absmax", "nonfinite")
    return {
        "sites": [site.as_dict() for site in sites.values()],
        "norms": [reading.as_dict() for reading in norms.values()],
        "stream": [{name: row[name] for name in columns} for row in (site.as_dict() for site in stream)],
    }


def _step(quantizer: ActivationQuantizer, x: Tensor, grid: Tensor | None) -> Tensor | None:
    """The distance of two codes, also where it is none that an integer product could use."""
    if grid is not None or quantizer.bits is None:
        return grid
    top = top_code(quantizer.bits)
    if quantizer.settings.act_scale == "absmax_token":
        return x.detach().abs().amax(dim=-1, keepdim=True).float() / top
    return (quantizer.rho / top).clamp_min(EPS**2) if int(quantizer.observed) else None


def _watch_input(module: nn.Module, inputs: tuple[Any, ...], site: Site) -> None:
    site.add(inputs[0], None, None)


def _watch_output(module: nn.Module, inputs: tuple[Any, ...], output: Any, site: Site) -> None:
    site.add(output[0] if isinstance(output, tuple) else output, None, None)
