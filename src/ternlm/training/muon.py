"""Muon for the matrices of linear layers, AdamW for everything else, as one optimizer.

The orthogonalization is that of `torch.optim.Muon`. What is added here: matrices that share one parameter because they
read the same input are orthogonalized one by one, as if they were separate, and one learning rate means the same to
both halves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MATRICES = "matrices"
"""Kind of the groups that Muon updates."""


class MuonAdamW(torch.optim.AdamW):
    """Two optimizers with one list of groups and one state.

        M <- momentum M + (1 - momentum) G,   O = orthogonalize(momentum M + (1 - momentum) G)
        W <- W - lr weight_decay W - 0.2 sqrt(max(rows, columns)) lr O

    The factor gives the update of a matrix the root mean square that an update of AdamW has, so learning rates of
    AdamW are where to begin a search. In the convention of Muon's author, whose factor is sqrt(max(1, rows /
    columns)), the same update of a square matrix of width d is written as a rate of 0.2 sqrt(d) times this one.

    Args:
        groups: Parameter groups; those whose `kind` is `MATRICES` are updated by Muon.
        sizes: Rows of each merged matrix, by the id of its parameter.
        momentum: Decay rate of the momentum.
        common: Arguments of AdamW.

    Source:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor: Liu et al. 2025
        (arXiv 2502.16982).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], sizes: Mapping[int, Sequence[int]], momentum: float, **common: Any
    ) -> None:
        super().__init__(groups, **common)
        self._sizes, self._momentum = sizes, momentum
        self._step_supports_amp_scaling = False  # or a loss scaler would leave it to AdamW to skip an update

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether Muon updates it."""
        return any(parameter is other for group in self._matrix_groups() for other in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        held = [(p, p.grad) for group in self._matrix_groups() for p in group["params"]]
        for parameter, _ in held:
            parameter.grad = None  # AdamW passes over what has none
        try:
            loss = super().step(closure)
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient
        for group in self._matrix_groups():
            self._update(group)
        return loss

    def _matrix_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == MATRICES]

    def _update(self, group: Mapping[str, Any]) -> None:
        """One step of Muon on the separate matrices of a group, whose momentum lies side by side as they do."""
        parts: list[Tensor] = []
        state: dict[Tensor, dict[str, Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            sizes = self._sizes[id(parameter)]
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            kept = self.state[parameter]["momentum_buffer"].split(list(sizes))
            for matrix, gradient, momentum in zip(
                parameter.detach().split(list(sizes)), parameter.grad.split(list(sizes)), kept, strict=True
            ):
                matrix.grad = gradient
                parts.append(matrix)
                state[matrix] = {"momentum_buffer": momentum}
        if not parts:
            return
        rates = {"lr": group["lr"], "weight_decay": group["weight_decay"], "momentum": self._momentum}
        muon = torch.optim.Muon(parts, **rates, adjust_lr_fn="match_rms_adamw")
        muon.state.update(state)
        muon.step()
