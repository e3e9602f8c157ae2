"""What is particular to `hgrn`: its equations, bounds, sizes, initial values, heads, packing, and refused shapes."""

import copy
import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builders import randn, random_tokens
from ternlm.errors import SettingsError
from ternlm.models import FULL_PRECISION, QuantizationMode, build_model, model_settings
from ternlm.models.hgrn_block import HGRNBlock, HGRNStack
from ternlm.models.recurrent_model import TernaryHead
from ternlm.nn.norm import RMSNorm
from ternlm.nn.pointwise_norm import Derf, DyT
from ternlm.nn.quantization import Perturbation
from ternlm.ops.quantize import ternarize

SMALL = {"family": "hgrn", "vocab_size": 61, "hidden_size": 22, "num_hidden_layers": 3, "intermediate_size": 34}
PUBLISHED = {
    "use_lower_bound": False,
    "output_gate": "norm_g_silu_h",
    "bitlinear_norm": "rms",
    "quantize_lm_head": True,
    "share_conv_kernel": True,
}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": PUBLISHED,
    "convolutions": {"use_short_conv": True, "expand_ratio": 2},
    "shared convolution": {"use_short_conv": True, "share_conv_kernel": True},
    "dyt without inner norms": {"norm_type": "dyt", "bitlinear_norm": "none"},
    "derf": {"norm_type": "derf"},
    "tied": {"tie_word_embeddings": True},
}
every_form = pytest.mark.parametrize("form", INGREDIENTS)


def hgrn(mode: QuantizationMode | None = None, seed: int = 1, checkpointing: bool = False, **overrides: Any) -> Any:
    model = build_model(model_settings({**SMALL, **overrides}), mode or QuantizationMode(), checkpointing)
    model.initialize(seed)
    return model


def lively(mode: QuantizationMode = FULL_PRECISION, **overrides: Any) -> Any:
    """A model whose blocks, bounds and gains matter."""
    model = hgrn(mode, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "lower_bounds" not in name:
                parameter.mul_(15)
            else:
                parameter.add_(0.3 * randn(*parameter.shape, seed=len(name)))
    return model


def rms(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def oracle(model: Any, tokens: Tensor) -> Tensor:
    """The equations of the documentation, from the tensors that files hold: full precision, default ingredients."""
    t = model.tensors()
    x, layers = t["embed_tokens.weight"][tokens], model.settings.num_hidden_layers
    shares = torch.softmax(t["model.lower_bounds"], dim=0)
    for layer in range(layers):
        p = {name.removeprefix(f"model.layers.{layer}."): v for name, v in t.items() if f"layers.{layer}." in name}
        z, bound = rms(x, p["attn_norm.weight"]), shares[1 : layer + 1].sum(dim=0)
        i, f, g = (z @ p[f"attn.{name}_proj.weight"].t() for name in "ifg")
        f = bound + (1 - bound) * torch.sigmoid(f)
        h, states = torch.zeros_like(i[:, 0]), []
        for at in range(tokens.shape[1]):
            h = f[:, at] * h + (1 - f[:, at]) * F.silu(i[:, at])
            states.append(h)
        y = rms(torch.stack(states, dim=1), p["attn.g_norm.weight"]) * F.silu(g)
        x = x + rms(y, p["attn.o_inner_norm.weight"]) @ p["attn.o_proj.weight"].t()
        gate, up = (rms(x, p["mlp_norm.weight"]) @ p["mlp.gate_up_proj.weight"].t()).chunk(2, dim=-1)
        x = x + rms(F.silu(gate) * up, p["mlp.ffn_sub_norm.weight"]) @ p["mlp.down_proj.weight"].t()
    return rms(x, t["model.norm.weight"]) @ t["lm_head.weight"].t()


def test_the_model_equals_its_equations_in_value_and_gradient() -> None:
    model, tokens = lively(), random_tokens(2, 13)
    logits = model(tokens).logits
    expected = oracle(model, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    twin = copy.deepcopy(model)
    model(tokens).logits.square().sum().backward()
    for layer in twin.model.layers:
        layer.attn.scan_impl = "reference"
    twin(tokens).logits.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({"hidden_size": 256, "num_hidden_layers": 4}, 3_547_392),
        ({"hidden_size": 256, "num_hidden_layers": 4, "bitlinear_norm": "rms"}, 3_551_488),
        ({}, 20_734_464),
        ({"bitlinear_norm": "rms"}, 20_746_752),
        (PUBLISHED, 20_744_192),
        ({"num_hidden_layers": 7}, 24_146_432),
        ({"hidden_size": 640, "num_hidden_layers": 10}, 51_168_640),
        ({"hidden_size": 768, "num_hidden_layers": 12}, 85_399_296),
        ({"hidden_size": 768, "num_hidden_layers": 12, **PUBLISHED}, 85_427_712),
        ({"hidden_size": 768, "num_hidden_layers": 13}, 92_483_072),
        ({"hidden_size": 768, "num_hidden_layers": 14, "bitlinear_norm": "rms"}, 99_609_856),
        ({"hidden_size": 1024, "num_hidden_layers": 24}, 308_997_120),
        ({"hidden_size": 1024, "num_hidden_layers": 24, **PUBLISHED}, 309_071_872),
        ({"hidden_size": 1024, "num_hidden_layers": 27}, 347_556_096),
        ({"use_short_conv": True}, 20_734_464 + 6 * 2 * 512 * 4),
        ({"use_short_conv": True, "share_conv_kernel": True}, 20_734_464 + 6 * 512 * 4),
    ],
)
def test_i05_parameters_are_counted_as_published(values: dict[str, Any], total: int) -> None:
    settings = model_settings({"family": "hgrn", "vocab_size": 256, **values})
    with torch.device("meta"):
        assert build_model(settings, QuantizationMode()).parameter_counts().total == total


def test_the_width_of_the_feed_forward_network_is_rounded_up_to_256() -> None:
    settings: Any = model_settings({"family": "hgrn"})
    widths = {128: 512, 256: 768, 384: 1024, 512: 1536, 576: 1536, 640: 1792, 768: 2048, 896: 2560, 1024: 2816,
              1152: 3072, 1536: 4096, 2048: 5632}  # fmt: skip
    assert {width: settings.feed_forward_width(width) for width in widths} == widths
    assert model_settings({"family": "hgrn", "intermediate_size": 34}).feed_forward_width(512) == 34  # type: ignore[attr-defined]


def test_training_operations_are_counted_by_the_matrices() -> None:
    settings: Any = model_settings({"family": "hgrn", "vocab_size": 256, "expand_ratio": 2})
    d, memory, inner, layers = 512, 1024, 1536, 6
    expected = 6 * layers * (3 * d * memory + memory * d + 3 * d * inner) + 30 * layers * memory + 6 * 256 * d
    assert settings.flops_per_token(2048) == settings.flops_per_token(1) == expected


def test_h07_bounds_start_at_equal_steps_and_grow_from_layer_to_layer() -> None:
    stack = hgrn(num_hidden_layers=5, expand_ratio=2).model
    assert stack.lower_bounds.shape == (5, 44)
    bounds = stack.bounds()
    assert bounds[0] is None
    for layer, bound in enumerate(bounds[1:], start=1):
        torch.testing.assert_close(bound, torch.full((44,), layer / 5))
    with torch.no_grad():
        stack.lower_bounds.copy_(3 * randn(5, 44))
    before = torch.zeros(44)
    for bound in stack.bounds()[1:]:
        assert bool((bound >= before).all()) and bool((bound < 1).all())
        before = bound


@pytest.mark.parametrize("layers", [1, 3])
def test_h07_bounds_receive_a_gradient_with_a_wider_memory(layers: int) -> None:
    model = lively(expand_ratio=2, num_hidden_layers=layers)
    model(random_tokens(2, 9)).logits.square().sum().backward()
    gradient = model.model.lower_bounds.grad
    assert gradient is not None and bool(gradient.any()) == (layers > 1)


def test_without_bounds_every_layer_may_forget_everything() -> None:
    model = hgrn(use_lower_bound=False)
    assert model.model.lower_bounds is None and model.model.bounds() == [None] * 3
    assert "model.lower_bounds" not in model.tensors()


class Passing(nn.Module):
    """A layer without a forget gate, which counts the calls that it remembers."""

    is_recurrent = False

    def forward(self, x: Tensor, bound: Tensor | None, starts: Any, state: Any, lengths: Any) -> tuple[Tensor, Any]:
        assert bound is None
        return x, None if state is None else state + 1

    def initial_state(self, batch_size: int, device: Any = None) -> Any:
        return 0


def test_a_stack_counts_bounds_over_its_recurrent_layers_only() -> None:
    settings: Any = model_settings(SMALL)
    blocks = [HGRNBlock(settings, 22, FULL_PRECISION) for _ in range(2)]
    stack = HGRNStack(settings, 22, [Passing(), blocks[0], Passing(), blocks[1]])
    assert stack.lower_bounds is not None and stack.lower_bounds.shape == (2, 22)
    for parameter in stack.parameters():
        nn.init.ones_(parameter)
    _, states = stack(randn(2, 5, 22), states=stack.initial_state(2))
    assert states is not None and (states[0], states[2]) == (1, 1)


@pytest.mark.parametrize("width", [64, 512])
def test_the_initial_loss_is_a_little_above_that_of_guessing(width: int) -> None:
    model = hgrn(hidden_size=width, vocab_size=256, num_hidden_layers=2, intermediate_size=None)
    tokens = random_tokens(4, 65, vocab_size=256)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - (math.log(256) + width * 0.02**2 / 2)) < 0.1


def test_matrices_start_with_the_documented_deviations() -> None:
    model = hgrn(hidden_size=128, num_hidden_layers=2, intermediate_size=None, use_short_conv=True)
    tensors = model.tensors()
    for name, std in (
        ("attn.i_proj", 0.02),
        ("attn.o_proj", 0.01),
        ("mlp.gate_up_proj", 0.02),
        ("mlp.down_proj", 0.01),
    ):
        assert tensors[f"model.layers.1.{name}.weight"].std().item() == pytest.approx(std, rel=0.05), name
    assert tensors["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert tensors["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not tensors["model.lower_bounds"].any()


def test_the_first_loss_does_not_depend_on_what_ternary_layers_start_with() -> None:
    model = hgrn(hidden_size=64, vocab_size=256, initializer_range=0.12)
    tokens = random_tokens(4, 65, vocab_size=256)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.1
    assert model.tensors()["model.layers.0.attn.i_proj.weight"].std().item() == pytest.approx(0.12, rel=0.1)


@every_form
@pytest.mark.parametrize("mode", [QuantizationMode(), FULL_PRECISION], ids=["ternary", "twin"])
def test_every_parameter_of_every_form_receives_a_finite_gradient(form: str, mode: QuantizationMode) -> None:
    model = hgrn(mode, **INGREDIENTS[form])
    model(random_tokens(3, 17)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name


@every_form
def test_h11_prefill_and_steps_equal_one_pass_in_every_form(form: str) -> None:
    model = lively(QuantizationMode(activations="none"), **INGREDIENTS[form]).eval()
    tokens, lengths = random_tokens(3, 15), torch.tensor([4, 7, 0])
    with torch.no_grad():
        whole = model(tokens).logits
        output = model(tokens[:, :7], model.initial_state(3), lengths)
        for step in range(8):
            places = lengths + step
            output = model(tokens[torch.arange(3), places][:, None], output.state)
            expected = whole[torch.arange(3), places]
            torch.testing.assert_close(output.logits[:, 0], expected, rtol=1e-3, atol=2e-3)


@every_form
def test_h13_packed_sequences_equal_separate_ones(form: str) -> None:
    model, tokens = lively(QuantizationMode(activations="none"), **INGREDIENTS[form]), random_tokens(1, 12)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [0, 5, 6, 8]] = True
    packed = model(tokens, starts=starts).logits
    separate = torch.cat([model(piece).logits for piece in tokens.split([5, 1, 2, 4], dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(packed, model(tokens).logits, atol=0.05)


def test_a_text_may_be_longer_than_the_windows_it_was_trained_on() -> None:
    model = hgrn(max_position_embeddings=8).eval()
    assert model.is_recurrent
    with torch.no_grad():
        output = model(random_tokens(1, 50), model.initial_state(1))
        assert bool(torch.isfinite(model(random_tokens(1, 3), output.state).logits).all())


def test_recomputed_blocks_give_the_same_gradients() -> None:
    tokens, gradients = random_tokens(2, 11), []
    for checkpointing in (False, True):
        model = hgrn(checkpointing=checkpointing)
        model(tokens).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_norms_of_blocks_are_chosen_and_the_others_stay() -> None:
    for kind, norm in (("rms", RMSNorm), ("dyt", DyT), ("derf", Derf)):
        model = hgrn(norm_type=kind, bitlinear_norm="none")
        assert all(isinstance(n, norm) for block in model.blocks() for n in (block.attn_norm, block.mlp_norm))
        assert isinstance(model.model.norm, RMSNorm)
        assert sum(isinstance(m, RMSNorm) for m in model.modules()) == (10 if kind == "rms" else 4)


def test_gate_and_up_are_one_matrix_with_one_scale() -> None:
    model = hgrn()
    name, layer = next((name, layer) for name, layer in model.bit_linears().items() if name.endswith("gate_up"))
    (matrix,) = layer.matrices().values()
    weight = model.tensors()[f"{name.rpartition('.')[0]}.gate_up_proj.weight"]
    assert weight.shape == (68, 22)
    codes, scale = ternarize(weight)
    assert torch.equal(matrix[0], codes) and torch.equal(matrix[1], scale)


def test_a_ternary_head_follows_the_dial_of_the_last_block() -> None:
    model = hgrn(FULL_PRECISION, quantize_lm_head=True)
    assert isinstance(model.lm_head, TernaryHead) and model.lm_head.decoder.mode == FULL_PRECISION
    modes = [FULL_PRECISION, FULL_PRECISION, QuantizationMode()]
    model.set_modes(modes)
    assert model.lm_head.decoder.mode == QuantizationMode()
    tokens = random_tokens(2, 7)
    model(tokens)
    assert set(model.lm_head.decoder.codes.unique().tolist()) == {-1, 0, 1}
    assert model.tensors()["lm_head.decoder.weight"].shape == (61, 22)
    model.perturb([Perturbation(), Perturbation(), Perturbation(drop=1.0)])
    model.begin_pass(1)
    assert not torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)


def test_only_the_form_with_a_norm_in_each_ternary_layer_has_one_in_its_head() -> None:
    names = [set(hgrn(quantize_lm_head=True, bitlinear_norm=kind).tensors()) for kind in ("rms", "out_only")]
    assert [("lm_head.norm.weight" in found) for found in names] == [True, False]


def test_a_tied_head_reads_the_embedding() -> None:
    model = hgrn(FULL_PRECISION, tie_word_embeddings=True)
    assert model.lm_head is None and "lm_head.weight" not in model.tensors()
    tokens = random_tokens(2, 5)
    before = model(tokens).logits
    with torch.no_grad():
        model.embed_tokens.weight[60] += 1.0  # a token that does not occur
    assert 60 not in tokens
    after = model(tokens).logits
    assert torch.equal(after[..., :60], before[..., :60]) and not torch.equal(after[..., 60], before[..., 60])


@pytest.mark.parametrize("mode", [QuantizationMode(), FULL_PRECISION], ids=["ternary", "twin"])
def test_a_small_model_learns_512_bytes_by_heart(mode: QuantizationMode) -> None:
    torch.manual_seed(0)
    model = hgrn(mode, hidden_size=64, num_hidden_layers=2, intermediate_size=128, embedding_init_std=0.3)
    tokens = random_tokens(4, 129)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, r"model\.hidden_size=0 must be at least 1"),
        ({"num_hidden_layers": 0}, r"model\.num_hidden_layers=0 must be at least 1"),
        ({"max_position_embeddings": 0}, r"model\.max_position_embeddings=0 must be at least 1"),
        ({"intermediate_size": 0}, r"model\.intermediate_size=0 must be at least 1"),
        ({"hidden_size": 8, "expand_ratio": 0.1}, "leaves no memory"),
        ({"quantize_lm_head": True, "tie_word_embeddings": True}, "the embedding is not rounded"),
        ({"norm_type": "layer"}, "norm_type"),
        ({"num_heads": 4}, "num_heads"),
    ],
)
def test_shapes_that_make_no_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        model_settings({"family": "hgrn", **values})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_block_is_one_graph_and_equals_the_plain_one() -> None:
    torch._dynamo.reset()
    plain = hgrn(QuantizationMode(activations="none"), use_short_conv=True, initializer_range=0.3)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks():
        block.compile(fullgraph=True)
    for length in (9, 40):
        tokens, outputs = random_tokens(2, length), []
        for model in (plain, compiled):
            model.zero_grad()
            logits = model(tokens).logits
            logits.square().sum().backward()
            outputs.append(logits.detach())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm() + 1e-6, name
