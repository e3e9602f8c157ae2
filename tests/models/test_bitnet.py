"""What is particular to `bitnet`: its block as a formula, names, initial values, sizes, and refused shapes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from builders import random_tokens, tiny_bitnet, tiny_model_settings
from ternlm.errors import SettingsError
from ternlm.models import FULL_PRECISION, QuantizationMode, build_model, model_settings
from ternlm.nn import linear
from ternlm.ops import quantized_linear as ops
from ternlm.ops.quantize import quantize_activation, ternarize
from ternlm.ops.rotary import rotary_table, rotate
from ternlm.training.settings import RunSettings

LAYOUTS = ["subln", "prenorm", "double"]


def scaled(model: Any, factor: float = 15) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(factor) if parameter.dim() == 2 else parameter.add_(0.2 * noise)
    return model


def oracle(model: Any, tokens: Tensor, quantized: bool) -> Tensor:
    """The transformer of the documentation, from the tensors that files hold, one matrix at a time."""
    tensors, settings = model.tensors(), model.settings
    heads, narrow = settings.num_attention_heads, settings.num_key_value_heads
    width, layout = settings.hidden_size // heads, settings.norm_layout

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + settings.rms_norm_eps).sqrt() * tensors[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        if not quantized:
            return x @ weight.t()
        (codes, g), (x_codes, s) = ternarize(weight), quantize_activation(x)
        return (x_codes.double() @ codes.double().t()).float() * (g / s)

    x = tensors["model.embed_tokens.weight"][tokens]
    for i in range(settings.num_hidden_layers):
        at = f"model.layers.{i}."
        n = norm(x, f"{at}input_layernorm")
        if layout == "double":
            n = norm(n, f"{at}attn_inner_norm")
        parts = (project(n, f"{at}self_attn.{p}_proj").unflatten(-1, (-1, width)).transpose(1, 2) for p in "qkv")
        q, k, v = parts
        table = rotary_table(tokens.shape[1], width, settings.rope_theta)
        q, k = rotate(q, *table.unbind()), rotate(k, *table.unbind())
        k, v = (part.repeat_interleave(heads // narrow, dim=1) for part in (k, v))
        hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        o = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        o = o.transpose(1, 2).flatten(2)
        x = x + project(o if layout == "prenorm" else norm(o, f"{at}self_attn.attn_sub_norm"), f"{at}self_attn.o_proj")
        n = norm(x, f"{at}post_attention_layernorm")
        if layout == "double":
            n = norm(n, f"{at}ffn_inner_norm")
        gate = project(n, f"{at}mlp.gate_proj")
        gate = F.silu(gate) if settings.hidden_act == "silu" else gate.clamp_min(0).square()
        u = gate * project(n, f"{at}mlp.up_proj")
        x = x + project(u if layout == "prenorm" else norm(u, f"{at}mlp.ffn_sub_norm"), f"{at}mlp.down_proj")
    head = "model.embed_tokens.weight" if settings.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm") @ tensors[head].t()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_equals_its_equations(layout: str, activation: str, tied: bool, quantized: bool) -> None:
    mode = QuantizationMode() if quantized else FULL_PRECISION
    model = scaled(tiny_bitnet(mode=mode, norm_layout=layout, hidden_act=activation, tie_word_embeddings=tied))
    tokens = random_tokens(2, 13)
    with torch.no_grad():
        difference = (model(tokens).logits - oracle(model, tokens, quantized)).abs().amax(dim=-1)
        size = model(tokens).logits.std()
    assert (difference < 1e-4 * size).float().mean() > (0.9 if quantized else 0.999)
    assert bool((difference < 0.1 * size).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_q14_gradients_of_the_whole_model_equal_those_of_the_reference(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, gradients = random_tokens(2, 14), []
    for function in (ops.quantized_linear, ops.quantized_linear_reference):
        monkeypatch.setattr(linear, "quantized_linear", function)
        model = scaled(tiny_bitnet(norm_layout=layout), 5)
        logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, fast in gradients[0].items():
        plain = gradients[1][name]
        assert (fast - plain).norm() < 2e-3 * plain.norm(), name


def test_q14_a_whole_block_agrees_with_finite_differences() -> None:
    model = scaled(tiny_bitnet(mode=FULL_PRECISION), 10)
    (block, _), rotary = model.blocks(), model.rotary[:, :7]
    generator = torch.Generator().manual_seed(0)
    x, direction, upstream = (torch.randn(2, 7, 24, generator=generator) for _ in range(3))
    x.requires_grad_()
    (block(x, rotary) * upstream).sum().backward()
    step = 1e-2
    with torch.no_grad():
        ahead, behind = ((block(x + sign * step * direction, rotary) * upstream).double().sum() for sign in (1, -1))
    assert x.grad is not None
    analytic, numeric = (x.grad * direction).sum().item(), ((ahead - behind) / (2 * step)).item()
    assert analytic == pytest.approx(numeric, rel=5e-3)


def test_file_names_are_those_of_hugging_face() -> None:
    names = set(tiny_bitnet(tie_word_embeddings=False).tensors())
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(2):
        at = f"model.layers.{i}."
        expected |= {f"{at}self_attn.{p}_proj.weight" for p in "qkvo"}
        expected |= {f"{at}mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        expected |= {f"{at}{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{at}self_attn.attn_sub_norm.weight", f"{at}mlp.ffn_sub_norm.weight"}
    assert names == expected
    assert "lm_head.weight" not in tiny_bitnet().tensors()
    assert not any("sub_norm" in name for name in tiny_bitnet(norm_layout="prenorm").tensors())


def test_matrices_of_files_are_views_of_the_parameters() -> None:
    model = tiny_bitnet()
    tensors = model.tensors()
    shapes = {name.split(".")[-2]: tuple(t.shape) for name, t in tensors.items() if name.endswith("proj.weight")}
    assert shapes == {
        "q_proj": (24, 24), "k_proj": (12, 24), "v_proj": (12, 24), "o_proj": (24, 24),
        "gate_proj": (40, 24), "up_proj": (40, 24), "down_proj": (24, 40),
    }  # fmt: skip
    tensors["model.layers.1.self_attn.k_proj.weight"].fill_(3.0)
    merged = model.get_submodule("model.layers.1.self_attn.qkv").weight
    assert bool((merged[24:36] == 3).all()) and not bool((merged[:24] == 3).any())


@pytest.mark.parametrize("tied", [True, False])
def test_i03_every_parameter_starts_with_its_documented_deviation(tied: bool) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    model = tiny_bitnet(**sizes, initializer_range=0.05, embedding_init_std=0.03, tie_word_embeddings=tied)
    rescaled = 0.05 / (2 * 3) ** 0.5
    for name, tensor in model.tensors().items():
        if tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
            continue
        output = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.03 if "embed" in name else rescaled if output else 0.05
        assert tensor.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(tensor.mean().item()) < 0.03 * expected, name


@pytest.mark.parametrize("tied", [True, False])
def test_i01_the_initial_loss_is_ln_v_plus_the_spread_of_the_logits(tied: bool) -> None:
    model = tiny_bitnet(
        vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, tie_word_embeddings=tied
    )
    tokens = random_tokens(8, 33, vocab_size=2000)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(torch.tensor(2000.0).log().item() + 256 * 0.02**2 / 2, abs=0.05)
    assert (logits.argmax(-1) == tokens[:, :-1]).float().mean() < 0.05


def test_i01_a_wide_tied_embedding_is_the_documented_failure() -> None:
    model, tokens = tiny_bitnet(hidden_size=256, embedding_init_std=1.0), random_tokens(4, 20)
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits.argmax(-1) == tokens).float().mean() > 0.9


SHAPES = {
    (32, 256, 4, 4, 2, 768): (3_145_728, 3_160_320),
    (2048, 384, 6, 8, 4, 1152): (10_616_832, 11_417_472),
    (32000, 768, 8, 12, 6, 3072): (70_778_880, 95_398_656),
    (32000, 768, 16, 12, 6, 2048): (103_809_024, 128_455_424),
    (32000, 1024, 24, 16, 16, 4096): (402_653_184, 435_594_240),
    (32002, 1536, 24, 16, 16, 4096): (679_477_248, 728_842_752),
    (128256, 2560, 30, 20, 5, 6912): (2_084_044_800, 2_412_820_480),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_i05_published_shapes_have_exactly_their_published_parameters(shape: tuple[int, ...]) -> None:
    counts = counts_of(shape)
    assert (counts.ternary, counts.total) == SHAPES[shape]


@pytest.mark.parametrize(
    "overrides,total",
    [
        ({"norm_layout": "prenorm"}, 95_367_936),
        ({"norm_layout": "double"}, 95_410_944),
        ({"tie_word_embeddings": False}, 119_974_656),
    ],
)
def test_i05_other_layouts_of_the_95m_shape(overrides: dict[str, Any], total: int) -> None:
    counts = counts_of((32000, 768, 8, 12, 6, 3072), **overrides)
    assert (counts.ternary, counts.total) == (70_778_880, total)
    assert counts.embedding == 32000 * 768 * (1 if overrides.get("tie_word_embeddings", True) else 2)


def counts_of(shape: tuple[int, ...], **overrides: Any) -> Any:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = dict(zip((*names, "intermediate_size"), shape, strict=True))
    with torch.device("meta"):
        return build_model(model_settings(values | overrides), QuantizationMode()).parameter_counts()


def test_p02_a_block_quantizes_its_activations_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ops.quantize_activation
    monkeypatch.setattr(ops, "quantize_activation", lambda *a: calls.append(1) or original(*a))
    tiny_bitnet()(random_tokens(1, 5))
    assert len(calls) == 2 * 4


def test_floating_point_operations_count_every_multiplied_matrix() -> None:
    settings = tiny_model_settings("bitnet")
    ternary = build_model(settings, QuantizationMode()).parameter_counts().ternary
    assert settings.flops_per_token(0) == 6 * (ternary + 61 * 24)
    assert settings.flops_per_token(100) - settings.flops_per_token(0) == 12 * 2 * 24 * 100


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"hidden_size": 20}, "must be a multiple of twice"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_layout": "postnorm"}, "norm_layout"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_model_settings("bitnet", **overrides)


def test_t16_squared_relu_in_float16_is_refused() -> None:
    values = {"model": {"hidden_act": "relu2"}, "training": {"precision": "fp16", "max_steps": 1}}
    with pytest.raises(SettingsError, match="relu2 overflows"):
        RunSettings.from_mapping(values)


def test_more_tokens_than_the_memory_holds_are_refused() -> None:
    model = tiny_bitnet(max_position_embeddings=6)
    with torch.no_grad():
        state = model(random_tokens(2, 4), model.initial_state(2)).state
        with pytest.raises(ValueError, match="the state holds 6 tokens"):
            model(random_tokens(2, 3), state)
        assert model(random_tokens(2, 2), state).logits.shape == (2, 2, 61)
