"""The promises that every entry of `MODELS` keeps: what sees what, gradients, initial loss, files, the twin.

Causal families promise besides that the future is unseen and that decoding equals the full forward; encoders that
every token is seen and padding is not.

A family is tested by standing in the table; its size here is that of `builders.TINY_SIZES`.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builders import random_tokens, tiny_model, tiny_model_settings
from ternlm.checkpoint import load_tensors
from ternlm.errors import CheckpointError, SettingsError, TernlmError
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, QuantizationMode, build_model, model_settings
from ternlm.nn.linear import BitLinear
from ternlm.ops.quantize import ternarize
from ternlm.recipes import load_recipe, recipe_names
from ternlm.training.objective import ObjectiveSettings, loss_sums
from ternlm.training.optimizer import OptimizerSettings, build_optimizer, set_rates

TERNARY = QuantizationMode()
WEIGHTS_ONLY = QuantizationMode(activations="none")
MODES = {"ternary": TERNARY, "weights only": WEIGHTS_ONLY, "twin": FULL_PRECISION}
RECIPES = [name for name in recipe_names() if load_recipe(name).values["model"].get("family", "bitnet") in MODELS]

CHUNKINGS = {"hnet": 1}
"""Chunkings of the tiny models that have any: the number of chunks is read off the text, and shapes depend on it."""

CAUSAL = [family for family in MODELS if MODELS[family].model.is_causal]
ENCODERS = [family for family in MODELS if family not in CAUSAL]

every_family = pytest.mark.parametrize("family", MODELS)
every_causal_family = pytest.mark.parametrize("family", CAUSAL)
every_encoder = pytest.mark.parametrize("family", ENCODERS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def lively(family: str, mode: QuantizationMode = TERNARY, **overrides: object) -> LanguageModel:
    """A model whose blocks matter: initial weights would leave the residual stream nearly as it came.

    Activation scales have observed a batch, since those that never did go by whatever is in front of them.
    """
    model = tiny_model(family, mode, **overrides)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and is_drawn(parameter):
                parameter.mul_(15)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        model.set_step(10_000)
        if model.activation_quantizers():
            model(random_tokens(3, 19, seed=7))
            model.end_pass()
    return model


def is_drawn(parameter: Tensor) -> bool:
    """Whether initial values are random: those of norms, bounds, routers and residual projections are not."""
    return parameter.unique().numel() > 2


def backward(model: LanguageModel, tokens: Tensor) -> Tensor:
    sums = loss_sums(model(tokens[:, :-1]), tokens[:, 1:], ObjectiveSettings())
    (sums.objective / tokens[:, 1:].numel()).backward()
    return sums.nll / tokens[:, 1:].numel()


def agrees(logits: Tensor, expected: Tensor, mode: str) -> bool:
    """Equal up to the order of float sums, which may move one activation code in a quantized model."""
    difference = (logits - expected).abs().amax(dim=-1)
    if MODES[mode].activations == "none":
        return bool((difference < 1e-4).all())
    return bool((difference < 0.05 * expected.std()).all()) and (difference < 1e-4).float().mean().item() > 0.9


def stays(after: Tensor, before: Tensor, family: str, mode: str) -> bool:
    """Bit-equal; only up to the order of float sums where the number of chunks decides the shapes of products."""
    return agrees(after, before, mode) if family in CHUNKINGS else torch.equal(after, before)


@every_causal_family
@every_mode
def test_future_tokens_do_not_change_past_logits(family: str, mode: str) -> None:
    model, tokens = lively(family, MODES[mode]).eval(), random_tokens(3, 19)
    with torch.no_grad():
        before = model(tokens).logits
        for place in (1, 8, 18):
            changed = tokens.clone()
            changed[:, place:] = (changed[:, place:] + 7) % 61
            after = model(changed).logits
            assert stays(after[:, :place], before[:, :place], family, mode)
            assert bool((after[:, place] - before[:, place]).abs().amax(dim=-1).gt(1e-3).all())


@every_causal_family
def test_past_tokens_reach_all_future_logits(family: str) -> None:
    model, tokens = lively(family).eval(), random_tokens(1, 19)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 7) % 61
    with torch.no_grad():
        difference = (model(changed).logits - model(tokens).logits).abs().amax(dim=-1)
    assert bool((difference > 1e-4).all())


@every_family
def test_rows_of_a_batch_do_not_see_each_other(family: str) -> None:
    model, tokens = lively(family).eval(), random_tokens(3, 11)
    changed = tokens.clone()
    changed[1] = (changed[1] + 7) % 61
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    assert stays(after[[0, 2]], before[[0, 2]], family, "ternary")
    assert (after[1] - before[1]).abs().amax(dim=-1).gt(1e-3).all()


@every_causal_family
@every_mode
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_steps_equal_the_full_forward(family: str, batch: int, mode: str) -> None:
    model, tokens = lively(family, MODES[mode]).eval(), random_tokens(batch, 23)
    with torch.no_grad():
        full = model(tokens)
        output = model(tokens[:, :7], model.initial_state(batch))
        parts = [output.logits]
        for piece in tokens[:, 7:].split([1] * 9 + [4, 1, 2], dim=1):
            output = model(piece, output.state)
            parts.append(output.logits)
    assert full.state is None
    assert agrees(torch.cat(parts, dim=1), full.logits, mode)


@every_causal_family
@every_mode
def test_ragged_prompts_padded_on_the_right_decode_as_if_alone(family: str, mode: str) -> None:
    model, lengths, total = lively(family, MODES[mode]).eval(), torch.tensor([5, 1, 9]), 16
    tokens = random_tokens(3, total)
    prompt = tokens[:, :9].clone()
    prompt[torch.arange(9) >= lengths[:, None]] = 60
    with torch.no_grad():
        full = [model(tokens[[row]]).logits[0] for row in range(3)]
        output = model(prompt, model.initial_state(3), lengths)
        for row, length in enumerate(lengths.tolist()):
            assert agrees(output.logits[row, :length], full[row][:length], mode)
        for i in range(total - 9):
            output = model(tokens.gather(1, lengths[:, None] + i), output.state)
            for row, length in enumerate(lengths.tolist()):
                assert agrees(output.logits[row], full[row][[length + i]], mode)


@every_causal_family
def test_ragged_pieces_may_end_exactly_where_the_memory_does(family: str) -> None:
    model, tokens = lively(family, FULL_PRECISION, max_position_embeddings=10).eval(), random_tokens(2, 10)
    first, second = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    first[0], first[1, :1] = tokens[0, :5], tokens[1, :1]
    second[0, :5], second[1] = tokens[0, 5:], tokens[1, 1:]
    with torch.no_grad():
        full = model(tokens).logits
        output = model(first, model.initial_state(2), torch.tensor([5, 1]))
        output = model(second, output.state, torch.tensor([5, 9]))
    assert agrees(output.logits[0, :5], full[0, 5:], "twin")
    assert agrees(output.logits[1], full[1, 1:], "twin")


@every_encoder
@every_mode
def test_tokens_on_both_sides_change_logits(family: str, mode: str) -> None:
    model, tokens = lively(family, MODES[mode]).eval(), random_tokens(3, 19)
    with torch.no_grad():
        before = model(tokens).logits
        for place in (0, 8, 18):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 7) % 61
            difference = (model(changed).logits - before).abs().amax(dim=-1)
            assert (difference > 1e-6).float().mean() > 0.5
            for side in (difference[:, :place], difference[:, place:]):
                assert side.numel() == 0 or bool((side > 1e-3).any())


@every_encoder
@every_mode
def test_padding_changes_no_logits_of_real_tokens(family: str, mode: str) -> None:
    model, tokens, lengths = lively(family, MODES[mode]).eval(), random_tokens(3, 19), torch.tensor([19, 6, 11])
    other = torch.where(torch.arange(19) < lengths[:, None], tokens, (tokens + 30) % 61)
    with torch.no_grad():
        padded, elsewhere = model(tokens, lengths=lengths).logits, model(other, lengths=lengths).logits
        unpadded = [model(tokens[[row], :length]).logits[0] for row, length in enumerate(lengths.tolist())]
        seen = model(tokens).logits
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(padded[row, :length], elsewhere[row, :length])
        assert agrees(padded[row, :length], unpadded[row], mode)
        assert torch.allclose(padded[row, :length], seen[row, :length], atol=1e-3) == (length == 19)


@every_encoder
def test_an_encoder_has_no_memory(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(TernlmError, match="ternlm fill"):
        model.initial_state(2)
    with pytest.raises(TernlmError, match="keeps no memory"):
        model(random_tokens(1, 5), state=object())


@every_family
@every_mode
def test_logits_at_scored_positions_are_those_of_the_full_pass(family: str, mode: str) -> None:
    model, tokens = lively(family, MODES[mode]).eval(), random_tokens(3, 19)
    scored = torch.rand(3, 19, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        some = model(tokens, scored=scored).logits
        assert some.shape == (int(scored.sum()), 61)
        torch.testing.assert_close(some, model(tokens).logits[scored], rtol=1e-5, atol=1e-5)


@every_family
def test_every_parameter_gets_a_gradient_and_moves(family: str) -> None:
    for overrides in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        model = tiny_model(family, **overrides)
        with torch.no_grad():  # a learned bound moves only once an input exceeds it
            for name, parameter in model.named_parameters():
                if name.endswith("raw_clip"):
                    parameter.fill_(-2.0 if "embed" in name else -6.0)
        model.set_step(10_000)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        backward(model, random_tokens(4, 21))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad and parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any()), name
        build_optimizer(model, OptimizerSettings()).step()
        for name, parameter in model.named_parameters():
            assert not torch.equal(parameter, before[name]), name


@every_family
def test_q11_every_element_of_every_ternary_matrix_gets_a_gradient(family: str) -> None:
    model = lively(family)
    backward(model, random_tokens(5, 30))
    for name, layer in model.bit_linears().items():
        assert layer.weight.grad is not None
        assert (layer.weight.grad != 0).float().mean() > 0.99, name


@every_family
def test_t05_only_ternary_matrices_decay_and_every_parameter_is_in_one_group(family: str) -> None:
    model = tiny_model(family)
    optimizer = build_optimizer(model, OptimizerSettings())
    set_rates(optimizer, 0.5, 0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    matrices = set().union(*(members for name, members in groups.items() if name.startswith("matrices")))
    assert matrices == {f"{name}.weight" for name in model.bit_linears()}
    assert set().union(*groups.values()) == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {name: 0.25 if name.startswith("matrices") else 0.0 for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed" in name or "head" in name or "norm" in name:
            assert name not in matrices


@every_family
def test_q22_the_codes_are_made_once_per_step_and_follow_the_optimizer(family: str) -> None:
    model = tiny_model(family)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=0.05))
    layers = model.bit_linears()
    for step in range(3):
        for micro in range(4):
            backward(model, random_tokens(2, 9, seed=step * 4 + micro))
        assert {layer.quantizations for layer in layers.values()} == {step + 1}
        before = {name: layer.codes.clone() for name, layer in layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        model.refresh()
        for name, layer in layers.items():
            expected = torch.cat([ternarize(part)[0] for part in layer.weight.split(layer.sizes)])
            assert torch.equal(layer.codes, expected), name
            assert not torch.equal(layer.codes, before[name]), name


@every_family
def test_t17_gradient_checkpointing_recomputes_and_gives_bit_equal_gradients(family: str) -> None:
    tokens, gradients, calls, scales = random_tokens(3, 17), [], [], []
    for checkpointing in (False, True):
        model = lively(family, gradient_checkpointing=checkpointing)
        count: list[int] = []
        for block in model.blocks():
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.begin_pass(5)
        backward(model, tokens)
        model.end_pass()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(len(count))
        scales.append(model.activation_scales())
        assert {layer.quantizations for layer in model.bit_linears().values()} == {1}
    assert calls == [model.settings.total_blocks, 2 * model.settings.total_blocks]
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@every_family
def test_p01_a_training_pass_never_waits_for_the_device(family: str) -> None:
    class Reads(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operations.append(str(func))
            return func(*args, **(kwargs or {}))

    model, tokens = tiny_model(family), random_tokens(2, 9)
    with Reads() as reads:
        backward(model, tokens)
    assert len(reads.operations) > 50
    waiting = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal.default", "masked_select")
    waits = [name for name in reads.operations if any(f"aten.{word}" in name for word in waiting)]
    assert len(waits) == CHUNKINGS.get(family, 0), waits


@every_family
def test_the_codes_are_what_the_model_computes_with(family: str) -> None:
    """Latents that move without crossing a threshold or changing the scale change nothing."""
    model, tokens = lively(family).eval(), random_tokens(2, 9)
    twin = lively(family, FULL_PRECISION).eval()
    with torch.no_grad():
        before, twin_before = model(tokens).logits, twin(tokens).logits
        for layer in [*model.bit_linears().values(), *twin.bit_linears().values()]:
            row = layer.weight[0]
            scale = layer.weight.split(layer.sizes)[0].abs().mean()
            alike = (row > 0.6 * scale).nonzero()[:2, 0]
            row[alike] = row[alike.flip(0)]
        assert torch.equal(model(tokens).logits, before)
        assert not torch.equal(twin(tokens).logits, twin_before)
    assert all(layer.quantizations == 2 for layer in model.bit_linears().values())


@every_family
def test_the_twin_is_the_same_class_with_the_same_parameters(family: str) -> None:
    model, twin, tokens = lively(family), lively(family, FULL_PRECISION), random_tokens(2, 9)
    assert type(model) is type(twin)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        full = twin(tokens).logits
        assert not torch.allclose(model(tokens).logits, full, atol=1e-2)
        model.set_mode(FULL_PRECISION)
        assert torch.equal(model(tokens).logits, full)
    assert model.parameter_counts() == twin.parameter_counts()


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q04_half_precision_computes_near_float32_with_float32_latents(family: str, dtype: torch.dtype) -> None:
    model, tokens = tiny_model(family, seed=2), random_tokens(2, 9)  # where no router decides by a hair
    full = backward(model, tokens)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    model.compute_dtype = dtype
    half = backward(model, tokens)
    assert model(tokens).logits.dtype == dtype
    assert abs(half - full) < 0.01
    again = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (again - gradients).norm() < 0.1 * gradients.norm()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(layer.scale.dtype == torch.float32 for layer in model.bit_linears().values())


@every_family
def test_parameters_are_a_function_of_the_seed_alone(family: str) -> None:
    model, again, other = tiny_model(family, seed=3), tiny_model(family, seed=4), tiny_model(family, seed=5)
    state = torch.get_rng_state()
    again.initialize(3)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() < 2 or torch.equal(a, c) != is_drawn(a), name


@every_family
@every_mode
def test_tensors_go_into_another_model_and_make_it_equal(family: str, mode: str, tmp_path: Path) -> None:
    model, other, tokens = lively(family, MODES[mode]), tiny_model(family, MODES[mode], seed=2), random_tokens(2, 9)
    with torch.no_grad():
        assert not torch.equal(other(tokens).logits, model(tokens).logits)
        load_tensors(other, {name: tensor.clone() for name, tensor in model.tensors().items()}, tmp_path)
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.tensors().values(), other.tensors().values(), strict=True):
        assert torch.equal(a, b)
    saved = sum(tensor.numel() for tensor in model.tensors().values())
    kept = sum(b.numel() for name, b in model.named_buffers() if name in model.state_dict())
    assert saved == model.parameter_counts().total + kept


@every_family
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    good = {name: t + 1 if t.is_floating_point() else t.clone() for name, t in model.tensors().items()}
    before = [p.detach().clone() for p in model.parameters()]
    last = [name for name, tensor in good.items() if tensor.dim() > 0][-1]
    for broken, reason in (
        ({name: tensor for name, tensor in good.items() if name != last}, "lacks"),
        (good | {"extra.weight": torch.zeros(1)}, "unknown"),
        (good | {last: good[last][:-1]}, "shape"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_tensors(model, broken, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@every_family
def test_q16_all_projections_are_quantizable_and_nothing_else_is(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    ternary = {f"{name}.weight" for name in model.bit_linears()}
    kept = ("embed", "head", "lower_bounds", "router.", "residual.")
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert matrices - ternary == {name for name in matrices if any(word in name for word in kept)}
    for block in model.blocks():
        assert not [m for m in block.modules() if type(m) is torch.nn.Linear]
        assert [m for m in block.modules() if isinstance(m, BitLinear)]


@every_family
def test_counts_of_parameters_add_up(family: str) -> None:
    model = tiny_model(family)
    counts = model.parameter_counts()
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.ternary == sum(layer.weight.numel() for layer in model.bit_linears().values())
    assert counts.embedding == {
        "bitnet": 61 * 24, "qdyt": (61 + 37 + 2 + 61) * 24, "hgrn": 2 * 61 * 24, "hnet": 2 * 61 * 24
    }[family]  # fmt: skip


@every_family
def test_wrong_settings_are_refused_with_a_sentence(family: str) -> None:
    name = "num_blocks" if family == "hnet" else "num_hidden_layers"
    with pytest.raises(SettingsError, match=rf"Did you mean 'model\.{name}'"):
        tiny_model_settings(family, **{name.removesuffix("s"): 3})
    with pytest.raises(SettingsError, match=name):
        tiny_model_settings(family, **{name: [[0]] if family == "hnet" else 0})


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=f"unknown model family 'nope'. Choose one of: {', '.join(MODELS)}"):
        model_settings({"family": "nope"})


def recipe_model_values(recipe: str) -> dict[str, object]:
    values = load_recipe(recipe).values
    tokenizer = values["tokenizer"]
    vocabulary = 256 if tokenizer["name"] == "byte" else tokenizer.get("vocab_size")
    return {"vocab_size": vocabulary} | {name: value for name, value in values["model"].items() if value is not None}


@every_recipe
def test_i01_the_initial_loss_is_that_of_a_uniform_guess(recipe: str) -> None:
    values = recipe_model_values(recipe) | {"max_position_embeddings": 128}
    if values.get("family") == "hnet":
        values["num_blocks"] = [*([[1, 0, 1]] * (len(values["d_model"]) - 1)), [1]]  # type: ignore[arg-type]
    else:
        values["num_hidden_layers"] = 2
    settings = model_settings({name: min(value, 1) if name == "mixed_precision_last_blocks" else value
                               for name, value in values.items()})  # fmt: skip
    model = build_model(settings, TERNARY)
    model.initialize(0)
    vocabulary = settings.vocab_size
    assert vocabulary is not None
    tokens = random_tokens(2, 128, vocab_size=vocabulary)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    loss = (logits.logsumexp(dim=-1) - logits.mean(dim=-1)).mean()  # expected over targets drawn uniformly
    width = settings.d_model[0] if settings.family == "hnet" else settings.hidden_size  # type: ignore[attr-defined]
    spread = width * 0.02**2 / 2
    assert abs(loss.item() - math.log(vocabulary) - spread) < 0.2
    if model.is_causal or not settings.tie_word_embeddings:  # type: ignore[attr-defined]
        assert (logits.argmax(dim=-1) == tokens).float().mean() < 0.1


def bitnet_parameters(values: dict[str, int]) -> tuple[int, int, int]:
    """Ternary, embedding and other parameters of a `bitnet` model with sub-norms and a tied head."""
    d, layers, f = (values[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    heads, narrow = values["num_attention_heads"], values["num_key_value_heads"]
    e = d // heads
    ternary = layers * (d * heads * e + 2 * d * narrow * e + heads * e * d + 3 * d * f)
    return ternary, values["vocab_size"] * d, layers * (2 * d + heads * e + f) + d


def qdyt_parameters(values: dict[str, int]) -> tuple[int, int, int]:
    """Block matrices, embedding and other parameters of a `qdyt` model without learned scales of weights."""
    d, layers, f = (values[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    vocabulary, heads = values["vocab_size"], 1 if values.get("tie_word_embeddings") else 2
    embedding = (heads * vocabulary + values["max_position_embeddings"] + 2) * d
    return layers * (4 * d * d + 3 * d * f), embedding, 1 + (2 * layers + 1) * (2 * d + 2) + d + vocabulary + 2 * layers


def recurrent_stack(width: int, blocks: int) -> tuple[int, int]:
    """Ternary and other parameters of a stack of recurrent blocks, without short convolutions, its norm included."""
    gate = 256 * -(-int(width * 4 * 2 / 3) // 256)
    ternary = 4 * width * width + 3 * width * gate
    norms, inner, bounds = 2 * width + width, width + gate, width
    return blocks * ternary, blocks * (norms + inner + bounds) + width


def hgrn_parameters(values: dict[str, Any]) -> tuple[int, int, int]:
    """Ternary, embedding and other parameters of an `hgrn` model with all defaults but its shape."""
    width = values["hidden_size"]
    ternary, other = recurrent_stack(width, values["num_hidden_layers"])
    return ternary, 2 * values["vocab_size"] * width, other


def hnet_parameters(values: dict[str, Any]) -> tuple[int, int, int]:
    """Ternary, embedding and other parameters of an `hnet` model with all defaults but its shape."""
    widths = values["d_model"]
    ternary = other = 0
    for width, blocks in zip(widths, values["num_blocks"], strict=True):
        for stack in blocks if len(blocks) == 1 else (blocks[0], blocks[2]):
            matrices, rest = recurrent_stack(width, stack)
            ternary, other = ternary + matrices, other + rest
    other += sum(3 * width * width for width in widths[:-1]) + widths[-1] - widths[0]
    return ternary, 2 * values["vocab_size"] * widths[0], other


FORMULAS = {
    "bitnet": bitnet_parameters, "qdyt": qdyt_parameters, "hgrn": hgrn_parameters, "hnet": hnet_parameters
}  # fmt: skip

PUBLISHED = {
    "bitnet-95m": (70_778_880, 95_398_656),
    "bitnet-25m": (21_233_664, 25_448_448),
    "bitnet-50m": (47_185_920, 51_423_744),
    "bitnet-100m": (76_677_120, 101_892_352),
    "bitnet-350m": (320_864_256, 354_573_312),
    "qdyt-small": (33_554_432, 65_120_621),
    "qdyt-base": (113_246_208, 160_592_517),
    "qdyt-large": (402_653_184, 465_820_621),
    "qdyt-rtx": (92_012_544, 139_260_549),
    "qdyt-25m": (20_447_232, 24_926_759),
    "qdyt-50m": (33_554_432, 49_493_357),
    "qdyt-95m": (70_778_880, 94_684_293),
    "qdyt-100m": (77_856_768, 101_762_181),
    "qdyt-350m": (327_155_712, 359_068_621),
}


@every_recipe
def test_i05_recipes_have_exactly_the_parameters_of_the_formula(recipe: str) -> None:
    values = recipe_model_values(recipe)
    with torch.device("meta"):
        counts = build_model(model_settings(values), TERNARY).parameter_counts()
    formula = FORMULAS[str(values.get("family", "bitnet"))]
    assert tuple(counts) == formula(values)  # type: ignore[arg-type]
    if recipe in PUBLISHED:
        assert (counts.ternary, counts.total) == PUBLISHED[recipe]


def test_i05_every_published_size_is_still_shipped() -> None:
    assert set(PUBLISHED) <= set(RECIPES)
