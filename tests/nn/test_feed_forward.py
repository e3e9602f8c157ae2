"""The gated feed-forward network against its formula."""

import pytest
import torch
import torch.nn.functional as F

from builders import randn
from ternlm.nn.feed_forward import GatedFeedForward
from ternlm.nn.initialization import normal_
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import FULL_PRECISION


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_the_network_equals_its_formula(activation: str, eps: float | None) -> None:
    network = GatedFeedForward(12, 20, activation, FULL_PRECISION, eps)
    for name, parameter in network.named_parameters():
        normal_(parameter, 0.5, 1, name)
    x = randn(2, 3, 12)
    gate, up = network.gate_up.weight.split(20)
    z = x @ gate.t()
    inner = (F.silu(z) if activation == "silu" else z.clamp_min(0) ** 2) * (x @ up.t())
    if eps is not None:
        inner = inner / (inner.square().mean(-1, keepdim=True) + eps).sqrt() * network.ffn_sub_norm.weight
    torch.testing.assert_close(network(x), inner @ network.down.weight.t(), rtol=1e-4, atol=1e-5)
    assert isinstance(network.ffn_sub_norm, RMSNorm) == (eps is not None)


def test_the_matrices_have_their_own_names() -> None:
    network = GatedFeedForward(12, 20, "silu", FULL_PRECISION, None)
    assert network.gate_up.out_features == {"gate_proj": 20, "up_proj": 20}
    assert network.down.out_features == {"down_proj": 12}
