"""A compiled block against the plain one: one graph without breaks, the same values and gradients."""

import copy
import shutil

import pytest
import torch

from builders import randn, random_tokens, tiny_bitnet, tiny_model
from ternlm.models import QuantizationMode
from ternlm.training.compilation import compile_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"),
]


def test_q23_a_compiled_block_equals_the_plain_one_in_value_and_gradient() -> None:
    torch._dynamo.reset()
    model = tiny_bitnet(num_hidden_layers=1, initializer_range=0.3)
    (block,), rotary = model.blocks(), model.rotary[:, :7]
    compiled = copy.deepcopy(block)
    compiled.compile(fullgraph=True)
    results = []
    for made in (block, compiled):
        x = randn(2, 7, 24).requires_grad_()
        for layer in (made.self_attn.qkv, made.self_attn.o, made.mlp.gate_up, made.mlp.down):
            layer.refresh()
        y = made(x, rotary)
        (y * randn(2, 7, 24, seed=1)).sum().backward()
        gradients = {name: p.grad for name, p in made.named_parameters()}
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
        results.append({"y": y.detach(), "x": x.grad} | gradients)
    for name, plain in results[0].items():
        other = results[1][name]
        assert other is not None and bool(torch.isfinite(other).all()), name
        assert (other - plain).norm() < 1e-3 * plain.norm(), name


def test_a_compiled_model_follows_the_optimizer_and_keeps_its_names() -> None:
    torch._dynamo.reset()
    plain, tokens, said = tiny_bitnet(), random_tokens(2, 9), []
    compiled = copy.deepcopy(plain)
    assert compile_blocks(compiled, lambda: compiled(tokens).logits.sum().backward(), said.append)
    compiled.zero_grad()
    assert list(plain.state_dict()) == list(compiled.state_dict()) and said[0] == "compiling ..."
    before = plain(tokens).logits.detach()
    for _ in range(3):
        outputs = []
        for model in (plain, compiled):
            logits = model(tokens).logits
            outputs.append(logits.detach())
            logits.square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
            model.zero_grad()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs[0], before, atol=1e-2)
    assert [layer.quantizations for layer in compiled.bit_linears().values()] == [
        layer.quantizations for layer in plain.bit_linears().values()
    ]


def test_a_compiled_encoder_equals_the_plain_one_with_every_ingredient_on() -> None:
    torch._dynamo.reset()
    mode, tokens = QuantizationMode(quantizer="ttq", activations="int4"), random_tokens(2, 9)
    plain = tiny_model("qdyt", mode, num_hidden_layers=1)
    plain.set_step(10_000)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks():
        block.compile(fullgraph=True)
    for key in range(2):
        outputs = []
        for model in (plain, compiled):
            model.begin_pass(key)
            logits = model(tokens).logits
            logits.square().sum().backward()
            model.end_pass()
            outputs.append(logits.detach())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    scales = zip(plain.activation_scales(), compiled.activation_scales(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), rtol=1e-4) for a, b in scales)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm() + 1e-7, name
