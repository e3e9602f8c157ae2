"""A compiled block of quantized sites and layers rounds as the plain one does, also while perturbations change."""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from builders import randn
from ternlm.nn.activation_quantizer import ActivationQuantizer, ActivationSettings
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import Perturbation, QuantizationMode
from ternlm.ops.noise import noise_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"),
]
WIDTH, HEADS = 24, 3
INT8 = QuantizationMode(weights="int8")


class Block(nn.Module):
    """A site, a layer on its grid, a site with heads, and a layer that rounds its own input."""

    def __init__(self, mode: QuantizationMode) -> None:
        super().__init__()
        settings = ActivationSettings()
        self.site = ActivationQuantizer(4, settings, WIDTH)
        self.qv = BitLinear(WIDTH, {"q": WIDTH, "v": WIDTH}, mode, rounds_input=False)
        self.heads = ActivationQuantizer(8, settings, WIDTH // HEADS, HEADS)
        self.out = BitLinear(WIDTH, {"o": WIDTH}, mode)
        with torch.no_grad():
            for i, layer in enumerate((self.qv, self.out)):
                layer.weight.copy_(randn(*layer.weight.shape, seed=i) / WIDTH**0.5)
                layer.fit()

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, v = self.qv(*self.site(x, valid))
        q, _ = self.heads(q.unflatten(-1, (HEADS, -1)).transpose(1, 2), valid)
        mixed = q.transpose(1, 2).flatten(2) * v
        return x + self.out(mixed)[0]

    def begin(self, key: int, perturbation: Perturbation) -> None:
        for i, part in enumerate((self.site, self.qv, self.heads, self.out)):
            part.noise.fill_(noise_key(key, i))
            part.perturb(perturbation)
            if isinstance(part, BitLinear):
                part.refresh()

    def end(self) -> None:
        self.site.commit()
        self.heads.commit()


def passes(block: Block, perturbations: list[Perturbation], dtype: torch.dtype) -> list[Tensor]:
    seen: list[Tensor] = []
    valid = torch.arange(7) < torch.tensor([[7], [5], [6]])
    for i, perturbation in enumerate(perturbations):
        block.zero_grad()
        block.begin(i, perturbation)
        x = randn(3, 7, WIDTH, seed=i).to(dtype).requires_grad_()
        y = block(x, valid)
        (y.float() * randn(3, 7, WIDTH, seed=99)).sum().backward()
        block.end()
        assert x.grad is not None
        seen += [y.detach(), x.grad, block.site.rho.clone(), block.heads.rho.clone()]
        seen += [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.eval()
    seen.append(block(randn(3, 7, WIDTH), valid).detach())
    return seen


def test_q23_a_compiled_block_equals_the_plain_one() -> None:
    torch._dynamo.reset()
    mode = QuantizationMode(quantizer="lsq")
    plain = Block(mode)
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True)
    nothing = [Perturbation()] * 3
    for a, b in zip(passes(plain, nothing, torch.float32), passes(compiled, nothing, torch.float32), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_perturbed_passes_compile_to_the_same_and_amounts_that_change_do_not_compile_again() -> None:
    torch._dynamo.reset()
    mode = QuantizationMode(quantizer="ttq", ste="clip")
    plain = Block(mode)
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True)
    amounts = [Perturbation(0.3 - 0.05 * i, "token_row", 0.5, 0.2, 0.1 + 0.1 * i, INT8) for i in range(4)]
    amounts.append(Perturbation())
    counter = torch._dynamo.utils.counters["stats"]
    expected = passes(plain, amounts, torch.float32)
    counter.clear()
    found = passes(compiled, amounts, torch.float32)
    assert counter["unique_graphs"] == 3  # perturbed, exact, and in evaluation
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
