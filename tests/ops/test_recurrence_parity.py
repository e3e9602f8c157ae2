"""The scan against the naive recurrence of flash-linear-attention, whose gates are logarithms. Needs fla-core."""

import pytest
import torch
from torch import Tensor

from builders import randn
from recurrences import assert_same, gates, results
from ternlm.ops.recurrence import scan

fla = pytest.importorskip("fla.ops.hgrn.naive", reason="fla-core is not installed")


def foreign(a: Tensor, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    h, last = fla.naive_recurrent_hgrn(u, a.log(), initial_state=h0, output_final_state=True)
    return h, last


@pytest.mark.parametrize("impl", ["auto", "chunk", "reference"])
@pytest.mark.parametrize("kind", ["any", "almost zero", "almost one"])
def test_states_and_gradients_are_those_of_flash_linear_attention(kind: str, impl: str) -> None:
    a, u, h0 = gates(kind, 2, 70, 5).clamp_min(1e-8), randn(2, 70, 5), randn(2, 5, seed=2)
    for state in (None, h0):
        fast = results(lambda a, u, h0=None: scan(a, u, h0, impl), a, u, state)  # type: ignore[arg-type]
        assert_same(fast, results(foreign, a, u, state), 1e-4)
    assert torch.isfinite(fast[2]).all()
