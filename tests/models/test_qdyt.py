"""What is particular to `qdyt`: its equations, sites and bits, initial values, sizes, ramps, and refused shapes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import random_tokens, tiny_model, tiny_model_settings
from ternlm.data.stories import stories
from ternlm.errors import SettingsError
from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode, build_model, model_settings
from ternlm.models.qdyt_settings import PUBLISHED
from ternlm.nn.activation_quantizer import ActivationQuantizer
from ternlm.nn.mixer import Mixer
from ternlm.nn.quantization import Perturbation
from ternlm.nn.tanh_norm import QDyT
from ternlm.ops.quantize import quantize_activation, ternarize
from ternlm.recipes import load_recipe

TTQ = QuantizationMode(quantizer="ttq", activations="int4")
ABSMEAN = QuantizationMode(activations="int4")
INT8 = QuantizationMode(weights="int8", activations="int4", least_bits=8)
CONTROL: dict[str, Any] = {"norm_type": "rms", "mixers": False, "skip_init": False, "embed_scale": "none"}
SEEDS = ("qdyt-small", "qdyt-base", "qdyt-large", "qdyt-rtx")


def tiny(mode: QuantizationMode = ABSMEAN, **overrides: Any) -> Any:
    return tiny_model("qdyt", mode, **overrides)


def observed(model: Any, seed: int = 7) -> Any:
    """A model whose blocks matter, past its ramp, whose sites have seen a batch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif "quantizer" not in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.2 * noise)
        for layer in model.bit_linears().values():
            layer.fit()
        model.set_step(10_000)
        model.begin_pass(seed)
        model(random_tokens(3, 19, seed=seed))
        model.end_pass()
    return model


def train_pass(model: Any, tokens: Tensor, key: int = 1) -> None:
    model.begin_pass(key)
    F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.roll(1).flatten()).backward()
    model.end_pass()


def oracle(model: Any, tokens: Tensor, quantized: bool) -> Tensor:
    """The encoder of the documentation, from the tensors that files hold, in evaluation."""
    t, s = model.tensors(), model.settings
    heads, length = s.num_attention_heads, tokens.shape[1]

    def norm(x: Tensor, name: str, kind: str) -> Tensor:
        if kind == "rms":
            return x / (x.square().mean(-1, keepdim=True) + s.rms_norm_eps).sqrt() * t[f"{name}.weight"]
        groups = {"group": s.qdyt_groups, "token": 1, "none": 0}[s.qdyt_center]
        u = x
        if groups:
            u = (x.unflatten(-1, (groups, -1)) - x.unflatten(-1, (groups, -1)).mean(-1, keepdim=True)).flatten(-2)
        if s.qdyt_pre == "rms":
            u = u / (u.square().mean(-1, keepdim=True) + s.rms_norm_eps).sqrt()
        if s.use_pact_clip:
            bound = F.softplus(t[f"{name}.raw_clip"]).item()
            u = u.clamp(-bound, bound)
        return t[f"{name}.weight"] * torch.tanh(t[f"{name}.alpha"] * t[f"{name}.ramp"] * u) + t[f"{name}.bias"]

    def mix(x: Tensor, name: str, transforms: bool = True) -> Tensor:
        if not s.mixers:
            return x
        width = x.shape[-1]
        b = min(width & -width, s.block_hadamard_size) if transforms else 1
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(b)] for i in range(b)]
        h = torch.block_diag(*[torch.tensor(signs) / b**0.5] * (width // b))
        x = (x * t[f"{name}.first_signs"])[..., t[f"{name}.permutation"]] * t[f"{name}.second_signs"]
        return x @ h.t()

    def site(x: Tensor, name: str, bits: int) -> Tensor:
        if not quantized or bits >= 16:
            return x
        top = 2 ** (bits - 1) - 1
        step = t[f"{name}.rho"] / top
        return (x * step.reciprocal()).round().clamp(-top, top) * step

    def project(x: Tensor, name: str) -> Tensor:
        weight = t[f"{name}.weight"]
        codes, scale = ternarize(weight)
        return x @ (codes * scale if quantized else weight).t()

    def rows(x: Tensor, bits: int) -> Tensor:
        codes, inverse = quantize_activation(x, bits)
        return codes / inverse if quantized else x

    embedding = t["model.embed_tokens.weight"]
    x = rows(embedding[tokens], s.embedding_bits) + t["model.embed_positions.weight"][:length]
    x = (x + t["model.embed_types.weight"][0]) * t.get("model.embed_scale", torch.tensor(1.0))
    x = norm(x, "model.embed_norm", s.norm_type)
    for i in range(s.num_hidden_layers):
        at = f"model.layers.{i}."
        n = site(norm(x, f"{at}attention_norm", s.norm_type), f"{at}self_attn.input_quantizer", 4)
        q, k, v = (
            site(
                mix(project(n, f"{at}self_attn.{p}_proj").unflatten(-1, (heads, -1)),
                    f"{at}self_attn.{'v' if p == 'v' else 'qk'}_mixer").transpose(1, 2),
                f"{at}self_attn.{p}_quantizer",
                4 if p == "v" else s.qk_bits,
            )
            for p in "qkv"
        )  # fmt: skip
        o = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        o = site(o.transpose(1, 2).flatten(2), f"{at}self_attn.output_quantizer", 4)
        x = x + t.get(f"{at}attention_scale", torch.tensor(1.0)) * project(o, f"{at}self_attn.o_proj")
        n = mix(norm(x, f"{at}feed_forward_norm", s.norm_type), f"{at}mlp.input_mixer", (i // 2) % 2 == 0)
        n = site(n, f"{at}mlp.input_quantizer", 4)
        gate = site(F.silu(project(n, f"{at}mlp.gate_proj")), f"{at}mlp.gate_quantizer", s.gate_bits)
        up = site(project(n, f"{at}mlp.up_proj"), f"{at}mlp.up_quantizer", 4)
        middle = site(mix(gate * up, f"{at}mlp.middle_mixer"), f"{at}mlp.down_quantizer", 4)
        x = x + t.get(f"{at}feed_forward_scale", torch.tensor(1.0)) * project(middle, f"{at}mlp.down_proj")
    head = embedding if s.tie_word_embeddings else t["lm_head.decoder.weight"]
    x = norm(x, "model.norm", s.final_norm)
    return rows(x, s.lm_head_bits) @ rows(head, s.lm_head_bits).t() + t["lm_head.bias"]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 4},
        {"tie_word_embeddings": True},
        {"qdyt_pre": "rms", "qdyt_center": "token"},
        {"use_pact_clip": False, "qdyt_center": "none", "final_norm": "qdyt"},
        {"mixers": False},
        {"skip_init": False, "embed_scale": "none"},
        CONTROL,
    ],
)
def test_the_model_equals_its_equations(overrides: dict[str, Any], quantized: bool) -> None:
    model = observed(tiny(ABSMEAN if quantized else FULL_PRECISION, **overrides)).eval()
    tokens = random_tokens(2, 13)
    with torch.no_grad():
        for i, buffer in enumerate(b for name, b in model.named_buffers() if name.endswith(".rho")):
            buffer.mul_(1.01 + 0.0037 * i)  # scales that were observed on integer products put many values on ties
        logits = model(tokens).logits
        difference = (logits - oracle(model, tokens, quantized)).abs().amax(dim=-1)
    assert (difference < 1e-4 * logits.std()).float().mean() > (0.9 if quantized else 0.999)
    assert bool((difference < 0.3 * logits.std()).all())


def test_q14_a_whole_block_agrees_with_finite_differences() -> None:
    model = observed(tiny(FULL_PRECISION))
    block = next(model.blocks())
    generator = torch.Generator().manual_seed(0)
    x, direction, upstream = (torch.randn(2, 7, 24, generator=generator) for _ in range(3))
    x.requires_grad_()
    (block(x) * upstream).sum().backward()
    step = 1e-2
    with torch.no_grad():
        ahead, behind = ((block(x + sign * step * direction) * upstream).double().sum() for sign in (1, -1))
    assert x.grad is not None
    analytic, numeric = (x.grad * direction).sum().item(), ((ahead - behind) / (2 * step)).item()
    assert analytic == pytest.approx(numeric, rel=1e-2)


def codes_of(model: LanguageModel) -> dict[str, int]:
    """Distinct codes of each matrix."""
    model.refresh()
    return {
        f"{name.removeprefix('model.layers.')}.{matrix}": len(codes.unique())
        for name, layer in model.bit_linears().items()
        for matrix, (codes, _) in layer.matrices().items()
    }


@pytest.mark.parametrize("mode", [ABSMEAN, TTQ])
def test_m01_weights_have_255_codes_in_warm_up_and_three_when_ternary(mode: QuantizationMode) -> None:
    model = tiny(mode, hidden_size=96, intermediate_size=160)
    model.set_mode(INT8.model_copy(update={"quantizer": mode.quantizer, "granularity": mode.granularity}))
    assert all(200 < count <= 255 for count in codes_of(model).values())
    model.set_modes([INT8, mode])
    counts = codes_of(model)
    assert len(counts) == 14
    assert all(count <= 255 if name.startswith("0.") else count == 3 for name, count in counts.items())
    assert max(count for name, count in counts.items() if name.startswith("0.")) > 200
    model.set_mode(mode)
    assert set(codes_of(model).values()) == {3}


def test_m01_late_blocks_keep_integer_value_and_output_projections() -> None:
    model = tiny(TTQ, hidden_size=96, mixed_precision_last_blocks=1, vo_bits=6)
    counts = codes_of(model)
    integer = {name for name, count in counts.items() if count > 3}
    assert integer == {"1.self_attn.v.v_proj", "1.self_attn.o.o_proj"}
    assert all(40 < counts[name] <= 63 for name in integer)
    learned = {name for name, _ in model.named_parameters() if ".quantizer." in name}
    assert len(learned) == 2 * 7 and not [name for name in learned if ".v." in name or "1.self_attn.o." in name]
    attention = model.model.layers[1].self_attn
    assert (attention.v_quantizer.bits, attention.output_quantizer.bits, attention.input_quantizer.bits) == (6, 6, 4)
    model.set_mode(INT8.model_copy(update={"quantizer": "ttq", "granularity": "row"}))
    assert attention.v.mode.weight_bits == 8 and attention.v_quantizer.bits == 8
    assert max(codes_of(model).values()) > 63
    off = tiny(TTQ, mixed_precision_last_blocks=1, vo_bits=16).model.layers[1].self_attn
    assert off.v.mode.weights == "none" and off.v_quantizer.bits is None


def site_inputs(model: Any, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters and leaves each site in one pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        quantizer.register_forward_hook(
            lambda _, given, result, name=name: seen.__setitem__(name, (given[0].detach(), result[0].detach()))
        )
        for name, quantizer in model.activation_quantizers().items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


DEFAULT_BITS = {"input": 4, "q": 8, "k": 8, "v": 4, "output": 4, "gate": 8, "up": 4, "down": 4, "embed": 8}


@pytest.mark.parametrize("training", [False, True])
def test_m07_every_site_has_no_more_values_than_its_bits_allow_and_changes_its_tensor(training: bool) -> None:
    model = observed(tiny()).train(training)
    seen = site_inputs(model, random_tokens(8, 37))
    assert len(seen) == 2 * 9 + 1 == len(model.activation_quantizers())
    for name, (before, after) in seen.items():
        bits = DEFAULT_BITS[name.rpartition(".")[2].removesuffix("_quantizer")]
        assert model.get_submodule(name).bits == bits
        assert not torch.equal(before, after), name
        parts = after.unbind(1) if before.dim() == 4 else after.flatten(0, 1) if "embed" in name else [after]
        assert max(len(part.unique()) for part in parts) <= 2**bits - 1, name
        assert max(len(part.unique()) for part in parts) > (8 if bits == 4 else 12), name


BIT_KEYS = {
    "attention_input_bits": ["self_attn.input"],
    "qk_bits": ["self_attn.q", "self_attn.k"],
    "ffn_input_bits": ["mlp.input"],
    "gate_bits": ["mlp.gate"],
    "up_bits": ["mlp.up"],
    "down_bits": ["mlp.down"],
    "embedding_bits": ["model.embed"],
}


@pytest.mark.parametrize("key", BIT_KEYS)
def test_m06_bits_reach_their_sites_and_no_other_and_change_the_output(key: str) -> None:
    plain, changed, tokens = tiny(), tiny(**{key: 5}), random_tokens(2, 11)
    for name, quantizer in changed.activation_quantizers().items():
        is_meant = any(f"{site}_quantizer" in name for site in BIT_KEYS[key])
        assert (quantizer.bits == 5) == is_meant, name
    with torch.no_grad():
        assert not torch.equal(plain.eval()(tokens).logits, changed.eval()(tokens).logits)
    off = tiny(**{key: 16})
    assert any(quantizer.bits is None for quantizer in off.activation_quantizers().values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_percentile", 90.0),
        ("act_ema", 0.5),
        ("stochastic_rounding", False),
        ("act_scale", "absmax_token"),
        ("act_scale", "bound"),
        ("act_granularity", "channel"),
    ],
)
def test_m06_settings_of_scales_reach_every_site_and_change_training(key: str, value: Any) -> None:
    logits = []
    for overrides in ({}, {key: value}):
        model = observed(tiny(qdyt_alpha_warmup_steps=0, **overrides))
        inside = [q for n, q in model.activation_quantizers().items() if "layers" in n]
        assert {getattr(q.settings, key) for q in inside} == {getattr(model.settings, key)}
        model.begin_pass(3)
        logits.append(model(random_tokens(2, 11)).logits.detach())
    assert not torch.equal(*logits)


def test_the_bound_of_a_norm_is_the_scale_behind_it() -> None:
    model = observed(tiny(act_scale="bound", num_hidden_layers=4)).eval()
    for name, (_, after) in site_inputs(model, random_tokens(2, 11)).items():
        layer, norm = name.removeprefix("model.layers.")[0], None
        if name.endswith("self_attn.input_quantizer"):
            norm = model.get_submodule(f"model.layers.{layer}.attention_norm")
        elif name.endswith("mlp.input_quantizer") and int(layer) in (2, 3):  # no transform between norm and site
            norm = model.get_submodule(f"model.layers.{layer}.feed_forward_norm")
        if norm is not None:
            in_steps = after / (norm.bound() / 7)
            torch.testing.assert_close(in_steps, in_steps.round(), rtol=0, atol=1e-4)


def test_m06_the_head_rounds_at_its_own_bits_and_is_off_in_the_twin() -> None:
    for bits in (8, 6, 4):
        model = tiny(lm_head_bits=bits)
        decoder = model.lm_head.decoder
        model.refresh()
        assert decoder.mode.weight_bits == decoder.mode.activation_bits == bits
        assert decoder.codes.abs().max() == 2 ** (bits - 1) - 1
    assert tiny(lm_head_bits=16).lm_head.decoder.mode.weights == "none"
    model.set_mode(INT8)
    assert model.lm_head.decoder.mode.weight_bits == 8
    model.set_mode(FULL_PRECISION)
    assert model.lm_head.decoder.mode.weights == "none" and model.model.embed_quantizer.bits is None
    assert all(quantizer.bits is None for quantizer in model.activation_quantizers().values())


def test_the_dial_decides_the_bits_of_sites_without_their_own() -> None:
    model = tiny(QuantizationMode())
    assert model.model.layers[0].self_attn.input_quantizer.bits == 8
    model.set_mode(ABSMEAN)
    bits = {name.rpartition(".")[2].removesuffix("_quantizer"): q.bits for name, q in
            model.activation_quantizers().items()}  # fmt: skip
    assert bits == DEFAULT_BITS
    model.set_mode(INT8)
    assert {q.bits for q in model.activation_quantizers().values()} == {8}


def test_m02_qdrop_at_one_is_the_unrounded_model_and_at_zero_the_rounded_one() -> None:
    model, tokens = observed(tiny(TTQ, stochastic_rounding=False, num_hidden_layers=2)), random_tokens(2, 11)
    model.train()
    model.begin_pass(2)
    with torch.no_grad():
        rounded = model(tokens).logits
        model.perturb([Perturbation(drop=0.0)] * 2)
        assert torch.equal(model(tokens).logits, rounded)
        model.perturb([Perturbation(drop=1.0)] * 2)
        dropped = model(tokens).logits
        assert torch.equal(model.eval()(tokens).logits, observed_eval(model, tokens))
        model.perturb([Perturbation()] * 2)
        model.set_mode(FULL_PRECISION)
        full = model(tokens).logits
    torch.testing.assert_close(dropped, full, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dropped, rounded, atol=1e-2)


def observed_eval(model: Any, tokens: Tensor) -> Tensor:
    """Evaluation without any perturbation."""
    model.perturb([Perturbation()] * 2)
    return model.eval()(tokens).logits


def test_q11_every_parameter_gets_a_gradient_with_learned_scales() -> None:
    model = observed(tiny(TTQ))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("raw_clip"):
                parameter.fill_(-2.0 if "embed" in name else -3.0)
    train_pass(model, random_tokens(4, 21))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name
    scalars = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(("alpha", "scale", "raw_clip")) and ".quantizer." not in name
    ]
    assert len(scalars) == 5 + 5 + 4 + 1
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters() if ".quantizer." in name} == {
        "raw_scale", "raw_threshold",
    }  # fmt: skip


def test_q12_learned_scales_start_with_thirty_percent_zeros_and_a_small_error() -> None:
    model = tiny(TTQ, hidden_size=384, intermediate_size=512, num_attention_heads=6)
    model.refresh()
    for layer in model.bit_linears().values():
        shares = [(layer.codes == code).float().mean().item() for code in (-1, 0, 1)]
        assert shares == pytest.approx([0.35, 0.3, 0.35], abs=0.02)
        error = (layer.codes * layer.scale - layer.weight).square().sum() / layer.weight.square().sum()
        assert error < 0.25


def test_m03_m04_the_ramp_follows_the_step_alone_and_is_part_of_a_file() -> None:
    model = tiny()
    norms = [module for module in model.modules() if isinstance(module, QDyT)]
    assert [norm.ramp.item() for norm in norms] == pytest.approx([0.1] * 5)
    model.set_step(1000)
    for key in range(3):
        train_pass(model, random_tokens(2, 9), key)
    assert [norm.ramp.item() for norm in norms] == pytest.approx([0.55] * 5)
    assert sum(name.endswith(".ramp") for name in model.tensors()) == 5


def test_m09_training_and_evaluation_are_one_function_but_for_noise() -> None:
    model, tokens = observed(tiny(FULL_PRECISION)), random_tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)


def test_m06_dropout_is_drawn_from_the_global_generator_and_repeated_by_checkpointing() -> None:
    gradients, tokens = [], random_tokens(2, 11)
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = observed(tiny(gradient_checkpointing=checkpointing, hidden_dropout=0.2, attention_dropout=0.2))
        torch.manual_seed(4)
        train_pass(model, tokens)
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    for key in ("hidden_dropout", "attention_dropout"):
        model = observed(tiny(FULL_PRECISION, **{key: 0.5}))
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(model(tokens).logits)
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
        model.eval()
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_t17_sites_observe_once_per_pass_and_never_in_evaluation() -> None:
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing)
        sites = [q for name, q in model.activation_quantizers().items() if "layers" in name]
        train_pass(model, random_tokens(2, 9))
        assert {int(site.observed) for site in sites} == {1}
        before = model.activation_scales()
        with torch.no_grad():
            model.eval()(random_tokens(2, 9, seed=1))
        model.end_pass()
        assert all(torch.equal(a, b) for a, b in zip(before, model.activation_scales(), strict=True))


def test_sites_that_are_off_or_have_a_bound_are_saved_as_unobserved() -> None:
    model, tokens = tiny(act_scale="bound", gate_bits=16), random_tokens(2, 9)
    train_pass(model, tokens)
    for name, site in model.activation_quantizers().items():
        if site.settings.act_scale == "bound":
            is_bare = name.endswith(("self_attn.input_quantizer", "gate_quantizer"))
            assert is_bare <= (int(site.observed) == 0), name


def test_padding_is_not_observed() -> None:
    scales, tokens = [], random_tokens(3, 19)
    for filler in (tokens, (tokens + 30) % 61):
        model, lengths = tiny(), torch.tensor([19, 4, 8])
        padded = torch.where(torch.arange(19) < lengths[:, None], tokens, filler)
        model.begin_pass(1)
        model(padded, lengths=lengths)
        model.end_pass()
        scales.append(model.activation_scales())
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


def test_types_of_tokens_move_logits_and_default_to_zero() -> None:
    model, tokens = observed(tiny()).eval(), random_tokens(2, 11)
    with torch.no_grad():
        zero, one = torch.zeros_like(tokens), torch.ones_like(tokens)
        assert torch.equal(model(tokens).logits, model(tokens, types=zero).logits)
        assert not torch.allclose(model(tokens).logits, model(tokens, types=one).logits, atol=1e-3)


def test_m14_mixers_are_drawn_by_layer_and_site_and_follow_the_seed() -> None:
    model, again, other = (tiny_model("qdyt", seed=seed, hidden_size=96, intermediate_size=160) for seed in (3, 3, 4))
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, Mixer)}
    assert len(mixers) == 2 * 4 and all(module.k_mixer is None for module in attentions(model))
    permutations = {name: mixer.permutation for name, mixer in mixers.items()}
    alike = [mixers[f"model.layers.{i}.self_attn.{site}_mixer"].permutation for i in (0, 1) for site in ("qk", "v")]
    assert all(not torch.equal(a, b) for i, a in enumerate(alike) for b in alike[:i])
    for name, permutation in permutations.items():
        assert torch.equal(again.get_submodule(name).permutation, permutation)
        assert not torch.equal(other.get_submodule(name).permutation, permutation)
    assert all(module.k_mixer is not None for module in attentions(tiny(share_qk_mixer=False)))


def attentions(model: Any) -> list[Any]:
    return [block.self_attn for block in model.blocks()]


def test_mixing_alternates_at_the_feed_forward_input_and_is_everywhere_in_its_middle() -> None:
    blocks = list(tiny(num_hidden_layers=6).blocks())
    assert [block.mlp.input_mixer.block > 1 for block in blocks] == [True, True, False, False, True, True]
    assert all(block.mlp.middle_mixer.block == 8 for block in blocks)
    always = tiny(num_hidden_layers=6, alternate_ffn_mixing=False)
    assert all(block.mlp.input_mixer.block == 8 for block in always.blocks())
    assert not [module for module in tiny(mixers=False).modules() if isinstance(module, Mixer)]


@pytest.mark.parametrize("recipe", SEEDS)
def test_m13_every_seed_shape_runs_forward(recipe: str) -> None:
    values = load_recipe(recipe).values["model"] | {"vocab_size": 50, "num_hidden_layers": 2}
    model: Any = build_model(model_settings(values | {"mixed_precision_last_blocks": 1}), TTQ)
    model.initialize(0)
    assert model.eval()(random_tokens(1, 5, vocab_size=50)).logits.isfinite().all()
    e = model.settings.head_dim
    assert {attention.qk_mixer.block for attention in attentions(model)} == {64} == {e}


COUNTS = {
    "qdyt-small": (65_223_021, 65_120_621),
    "qdyt-base": (160_825_989, 160_592_517),
    "qdyt-large": (466_447_309, 465_820_621),
    "qdyt-rtx": (139_460_229, 139_260_549),
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_i05_seed_sizes_have_exactly_the_parameters_of_the_table(recipe: str) -> None:
    values = load_recipe(recipe).values
    settings = model_settings(values["model"])
    assert values["quantization"]["quantizer"] == "ttq"
    totals = []
    for quantizer in ("ttq", "absmean", "lsq"):
        with torch.device("meta"):
            totals.append(build_model(settings, QuantizationMode(quantizer=quantizer)).parameter_counts().total)
    assert (totals[0], totals[1]) == COUNTS[recipe]
    d, f, layers = settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers  # type: ignore[attr-defined]
    rows = layers * (5 * d + 2 * f) - 2 * d * settings.mixed_precision_last_blocks  # type: ignore[attr-defined]
    assert (totals[0] - totals[1], totals[2] - totals[1]) == (2 * rows, rows)


def test_i03_every_parameter_starts_with_its_documented_value() -> None:
    sizes = {"vocab_size": 600, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    model = tiny(**sizes, mixed_precision_last_blocks=1)
    expected = {"raw_clip": 3.0, "alpha": 0.5, "embed_scale": math.sqrt(128), "attention_scale": 0.5 / math.sqrt(3),
                "feed_forward_scale": 0.5 / math.sqrt(3)}  # fmt: skip
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.dim() == 2:
            deviation = 0.02 if "embed" in name or "head" in name else parameter.shape[1] ** -0.5
            rare = 0.12 if parameter.numel() < 1000 else 0.03
            assert parameter.std().item() == pytest.approx(deviation, rel=rare), name
        elif last in expected:
            assert parameter.item() == pytest.approx(expected[last]), name
        else:
            assert torch.equal(parameter, torch.zeros_like(parameter) + (last == "weight")), name
    assert tiny(head_init_std=None).lm_head.decoder.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)


def test_m19_the_number_of_operations_does_not_grow_with_rows_or_channels() -> None:
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operations += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for factor in (1, 3):
        model = tiny(TTQ, hidden_size=24 * factor, intermediate_size=40 * factor)
        train_pass(model, random_tokens(2, 9))
        with Count() as count:
            train_pass(model, random_tokens(2, 9 * factor))
        counts.append(count.operations)
    assert counts[0] == counts[1] < 5000


def test_published_sets_the_published_forms_and_yields_to_what_is_given() -> None:
    settings: Any = tiny_model_settings("qdyt", published=True)
    assert {name: getattr(settings, name) for name in PUBLISHED} == PUBLISHED
    given: Any = tiny_model_settings("qdyt", published=True, final_norm="rms", qk_bits=6)
    assert (given.final_norm, given.qk_bits, given.gate_bits, given.embed_scale) == ("rms", 6, 16, "none")
    assert model_settings(settings.model_dump()) == settings
    plain: Any = tiny_model_settings("qdyt", published=False)
    assert plain == tiny_model_settings("qdyt") and plain.final_norm == "rms"
    model = tiny(published=True)
    train_pass(model, random_tokens(2, 9))
    rounding = {name.rpartition(".")[2] for name, q in model.activation_quantizers().items() if q.bits is not None}
    assert rounding == {"v_quantizer", "output_quantizer", "up_quantizer", "down_quantizer"}
    assert isinstance(model.model.norm, QDyT) and model.lm_head.decoder.mode.weights == "none"


def test_the_control_is_a_plain_encoder() -> None:
    model = tiny(FULL_PRECISION, **CONTROL)
    assert not [m for m in model.modules() if isinstance(m, (QDyT, Mixer))]
    assert {p.dim() for p in model.parameters()} == {1, 2}
    assert all(q.bits is None for q in model.modules() if isinstance(q, ActivationQuantizer))
    assert not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 26}, "must be a multiple of model.num_attention_heads=4"),
        ({"qdyt_groups": 5}, "qdyt_groups=5 does not divide model.hidden_size=24; choose a divisor"),
        ({"block_hadamard_size": 48}, "must be a power of two"),
        ({"hadamard_exact": True}, "does not divide the head width .* = 6; choose model.block_hadamard_size=2, or"),
        ({"qk_bits": 12}, "qk_bits=12 must lie in 2 .. 8, or be 16"),
        ({"up_bits": 1}, "up_bits=1 must lie in"),
        ({"lm_head_bits": 5}, "lm_head_bits=5 must be 4, 6 or 8, or 16"),
        ({"mixed_precision_last_blocks": 3}, "exceeds model.num_hidden_layers=2"),
        ({"norm_type": "layer"}, "norm_type"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"qdyt_alpha_init": 0}, "qdyt_alpha_init"),
    ],
)
def test_shapes_and_bits_that_do_not_fit_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_model_settings("qdyt", **overrides)


def test_a_group_that_does_not_divide_the_width_is_refused_only_where_groups_are_used() -> None:
    for overrides in ({"qdyt_center": "token"}, {"norm_type": "rms"}):
        assert tiny_model_settings("qdyt", qdyt_groups=5, **overrides)
    assert tiny_model_settings("qdyt", hadamard_exact=True, block_hadamard_size=2)


def test_floating_point_operations_count_every_multiplied_matrix() -> None:
    settings = tiny_model_settings("qdyt")
    ternary = build_model(settings, ABSMEAN).parameter_counts().ternary
    assert settings.flops_per_token(0) == 6 * (ternary + 61 * 24)
    assert settings.flops_per_token(100) - settings.flops_per_token(0) == 12 * 2 * 24 * 100


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="38 tokens exceed max_position_embeddings=37"):
        tiny()(random_tokens(1, 38))


def collapse_readings(final_norm: str, mode: QuantizationMode) -> list[dict[str, Tensor]]:
    """What each norm sees after 300 steps of a micro masked model on bytes at a rate of 2e-3, input side first."""
    text = torch.frombuffer(bytearray(" ".join(stories("train", 300)).encode()), dtype=torch.uint8).long()
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "max_position_embeddings": 64}
    model = tiny(mode, **sizes, vocab_size=257, final_norm=final_norm, qdyt_groups=16, qdyt_alpha_warmup_steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        starts = torch.randint(0, len(text) - 64, (16, 1), generator=generator)
        tokens, scored = text[starts + torch.arange(64)], torch.rand(16, 64, generator=generator) < 0.15
        model.set_step(step)
        model.begin_pass(step)
        logits = model(tokens.masked_fill(scored, 256), scored=scored).logits
        F.cross_entropy(logits, tokens[scored]).backward()
        model.end_pass()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30)
        optimizer.step()
        optimizer.zero_grad()
    seen: list[dict[str, Tensor]] = []
    for module in model.modules():
        if isinstance(module, QDyT):
            module.register_forward_pre_hook(lambda norm, given: seen.append(norm.readings(given[0])))
    model.model.norm.register_forward_pre_hook(lambda _, given: seen.append({"std": given[0].std()}))
    with torch.no_grad():
        model.eval()(tokens)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", [TTQ, FULL_PRECISION], ids=["ternary", "twin"])
def test_m10_the_stream_does_not_grow_and_norms_do_not_clip_with_defaults(mode: QuantizationMode) -> None:
    seen = collapse_readings("rms", mode)
    assert len(seen) == 2 * 3 + 2
    assert max(readings["std"].item() for readings in seen) < 5
    assert max(readings["clip_rate"].item() for readings in seen if "clip_rate" in readings) < 0.05


@pytest.mark.slow
def test_m10_a_tanh_before_the_head_lets_the_stream_grow_until_everything_is_clipped() -> None:
    seen = collapse_readings("qdyt", FULL_PRECISION)
    assert seen[-1]["std"] > 5 and seen[-2]["clip_rate"] > 0.2
