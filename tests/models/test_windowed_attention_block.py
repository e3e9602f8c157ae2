"""The attention block in a stack together with recurrent ones."""

import torch

from builders import randn
from ragged import arriving
from ternlm.models.hgrn_block import HGRNBlock, HGRNStack, RecurrentSettings, initialize_stack
from ternlm.models.windowed_attention_block import WindowedAttentionBlock
from ternlm.nn.linear import BitLinear
from ternlm.nn.quantization import FULL_PRECISION, QuantizationMode

WIDTH, TIME = 24, 13
TERNARY = QuantizationMode()


def mixed_stack(mode: QuantizationMode, checkpointing: bool = False) -> HGRNStack:
    settings = RecurrentSettings(family="hnet", vocab_size=61, intermediate_size=40)
    layers = [HGRNBlock(settings, WIDTH, mode), WindowedAttentionBlock(settings, WIDTH, 4, 3, mode)]
    layers.append(HGRNBlock(settings, WIDTH, mode))
    stack = HGRNStack(settings, WIDTH, layers, checkpointing)
    initialize_stack(stack, settings, 0.01, seed=1, name="stack")
    return stack


def test_only_recurrent_blocks_have_bounds_and_only_the_feed_forward_network_is_ternary() -> None:
    stack = mixed_stack(TERNARY)
    assert stack.lower_bounds is not None and stack.lower_bounds.shape[0] == 2
    block = stack.layers[1]
    assert {name for name, part in block.named_modules() if isinstance(part, BitLinear)} == {"mlp.gate_up", "mlp.down"}


def test_the_model_wide_initialization_draws_the_projections_and_scales_the_output() -> None:
    attention = mixed_stack(TERNARY).layers[1].attn
    assert 0.017 < attention.q_proj.weight.std() < 0.023  # type: ignore[union-attr, operator]
    assert 0.008 < attention.o_proj.weight.std() < 0.012  # type: ignore[union-attr, operator]


def test_n12_a_mixed_stack_at_any_pace_equals_one_pass_beyond_the_window() -> None:
    stack, x = mixed_stack(FULL_PRECISION), randn(3, TIME, WIDTH)
    expected, none = stack(x, lengths=torch.tensor([13, 4, 9]))
    assert none is None
    states = stack.initial_state(3)
    for piece, here, places in arriving(x, [(5, 1, 2), (1, 1, 1), (0, 2, 0), (7, 0, 6)]):
        y, states = stack(piece, states=states, lengths=here)
        real = torch.arange(piece.shape[1]) < here[:, None]
        torch.testing.assert_close(y[real], expected[places], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        stack, x = mixed_stack(TERNARY, checkpointing), randn(2, TIME, WIDTH).requires_grad_()
        stack.train()
        y, _ = stack(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in stack.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
