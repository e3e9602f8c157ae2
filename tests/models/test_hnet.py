"""What is particular to `hnet`: stages as equations, chunks, memory by row, ratio loss, rates by stage, sizes."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from builders import random_tokens, tiny_model, tiny_model_settings
from ternlm.errors import SettingsError
from ternlm.models import FULL_PRECISION, QuantizationMode, build_model, hnet_stage, model_settings
from ternlm.models.hnet_stage import InnermostStage, OuterStage
from ternlm.nn.linear import BitLinear
from ternlm.recipes import load_recipe, recipe_names
from ternlm.training.objective import ObjectiveSettings, loss_sums
from ternlm.training.optimizer import OptimizerSettings, build_optimizer, set_rates

TWO = {"d_model": (24, 28, 40), "num_blocks": ((2, 0, 2), (2, 0, 2), (3,)), "chunk_targets": 2.5}
ATTENTION = {"innermost_use_attention": True, "attention_num_heads": 4, "attention_window_size": 3}
CONVOLUTIONS = {"use_short_conv": True}
SHARED = {"use_short_conv": True, "share_conv_kernel": True, "conv_size": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "one chunking": {},
    "two chunkings": TWO,
    "equal widths": {"d_model": (24, 24)},
    "attention": {**TWO, **ATTENTION},
    "short convolutions": {**TWO, **CONVOLUTIONS},
    "a shared convolution, a wide memory": {**SHARED, "expand_ratio": 2},
    "norms in each layer": {"bitlinear_norm": "rms", "quantize_lm_head": True, "output_gate": "norm_g_silu_h"},
    "without norms": {"norm_type": "dyt", "bitlinear_norm": "none", "use_lower_bound": False},
    "the plain scan": {**TWO, "scan_impl": "reference"},
    "the scan in chunks": {**TWO, "scan_impl": "chunk", "scan_chunk": 5},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_layout = pytest.mark.parametrize("layout", ["packed", "padded"])
text = "The quick brown fox, named Ann, jumps over 13 lazy dogs. It is late; the dogs do not care. "


def lively(wide: bool = True, **overrides: Any) -> Any:
    """A model in full precision whose every part matters, in float64 unless told otherwise."""
    model = tiny_model("hnet", FULL_PRECISION, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            is_drawn = parameter.dim() == 2 and parameter.unique().numel() > 2
            parameter.mul_(15) if is_drawn else parameter.add_(0.1 * noise)
    if wide:
        model.double()
        model.compute_dtype = torch.float64
    return model.eval()


def with_settings(model: Any, **overrides: Any) -> Any:
    """The same weights under other settings that change no shape."""
    other = copy.deepcopy(model)
    other.settings = model.settings.model_copy(update=overrides)
    return other


def decode(model: Any, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits of all tokens, read piece by piece."""
    state, parts = model.initial_state(tokens.shape[0]), []
    for piece in tokens.split(pieces, dim=1):
        output = model(piece, state)
        state = output.state
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def close(variant: str) -> dict[str, float]:
    """How near sums in float64 are; the rotations of attention are float32."""
    return {"rtol": 1e-4, "atol": 1e-5} if "attention" in variant else {"rtol": 1e-9, "atol": 1e-9}


def tensors_of(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in tensors_of(part)]


def stage_by_equations(stage: Any, x: Tensor) -> Tensor:
    """One sequence, (time, width), through a stage as the documentation defines it, chunk by chunk in a loop."""
    if isinstance(stage, InnermostStage):
        return stage.stack(stage.widen(x)[None])[0][0, :, : x.shape[1]]
    h = stage.encoder(stage.widen(x)[None])[0][0]
    q, k = h @ stage.router.q_proj.weight.t(), h @ stage.router.k_proj.weight.t()
    p = [1.0] + [((1 - F.cosine_similarity(q[t], k[t - 1], dim=0)) / 2).item() for t in range(1, len(h))]
    begins = [t for t in range(len(h)) if p[t] > 0.5]
    z = stage_by_equations(stage.inner, h[begins])
    smoothed, spread = torch.zeros_like(z[0]), []
    for t in range(len(h)):
        if t in begins:
            weight = min(max(p[t], 1e-4), 1 - 1e-4)
            smoothed = weight * z[begins.index(t)] + (1 - weight) * smoothed
        spread.append(smoothed)
    y = torch.stack(spread) + h @ stage.residual.weight.t()
    return stage.decoder(y[None])[0][0, :, : x.shape[1]]


@pytest.mark.parametrize("variant", ["one chunking", "two chunkings", "equal widths"])
@every_layout
def test_n01_the_model_equals_its_equations(variant: str, layout: str) -> None:
    model, tokens = lively(chunk_layout=layout, **VARIANTS[variant]), random_tokens(3, 23)
    with torch.no_grad():
        rows = [stage_by_equations(model.model, model.embed_tokens(row)) for row in tokens]
        expected = torch.stack(rows) @ model.lm_head.weight.t()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-9, atol=1e-9)


@every_layout
@pytest.mark.parametrize("variant", ["two chunkings", "attention", "the plain scan", "the scan in chunks"])
def test_n10_future_bytes_change_neither_logits_nor_boundaries(variant: str, layout: str) -> None:
    model, tokens = lively(chunk_layout=layout, **VARIANTS[variant]), random_tokens(3, 29)
    with torch.no_grad():
        before, cuts = model(tokens).logits, model.chunkings(tokens)
        for place in (1, 13, 28):
            changed = tokens.clone()
            changed[:, place:] = (changed[:, place:] + 7) % 61
            after = model(changed).logits
            torch.testing.assert_close(after[:, :place], before[:, :place], **close(variant))
            assert bool((after[:, place] - before[:, place]).abs().amax(dim=-1).gt(1e-3).all())
            for chunks, now in zip(cuts, model.chunkings(changed), strict=True):
                assert torch.equal(chunks.boundary[:, :place], now.boundary[:, :place])


@every_variant
def test_n07_steps_with_rows_that_cut_at_different_places_equal_the_full_forward(variant: str) -> None:
    model, tokens = lively(**VARIANTS[variant]), random_tokens(3, 33)
    with torch.no_grad():
        cuts = model.chunkings(tokens)[0].boundary
        assert not torch.equal(cuts[0], cuts[1]) and bool((cuts.sum(dim=0) % 3).any())
        full = model(tokens)
        assert full.state is None
        for pieces in ([1] * 33, [9] + [1] * 20 + [3, 1], [2, 31]):
            torch.testing.assert_close(decode(model, tokens, pieces), full.logits, **close(variant))
        for row in range(3):
            alone = decode(model, tokens[[row]], [9] + [1] * 24)
            torch.testing.assert_close(alone, full.logits[[row]], **close(variant))


@every_variant
def test_n08_ragged_prompts_and_empty_rows_continue_as_if_alone(variant: str) -> None:
    model, lengths = lively(**VARIANTS[variant]), torch.tensor([7, 0, 11, 1])
    tokens = random_tokens(4, 20)
    prompt = torch.where(torch.arange(11) < lengths[:, None], tokens[:, :11], 60)
    with torch.no_grad():
        full = [model(row[None]).logits[0] for row in tokens]
        output = model(prompt, model.initial_state(4), lengths)
        for i in range(9):
            for row, length in enumerate(lengths.tolist()):
                if i == 0:
                    torch.testing.assert_close(output.logits[row, :length], full[row][:length], **close(variant))
            output = model(tokens.gather(1, lengths[:, None] + i), output.state)
            for row, length in enumerate(lengths.tolist()):
                torch.testing.assert_close(output.logits[row, 0], full[row][length + i], **close(variant))


def test_the_inner_memory_of_a_row_moves_only_where_the_row_begins_a_chunk() -> None:
    model, tokens = lively(**TWO, **CONVOLUTIONS), random_tokens(3, 30)
    cuts = model.chunkings(tokens)[0].boundary
    state, moved = model.initial_state(3), 0
    with torch.no_grad():
        for t, piece in enumerate(tokens.split(1, dim=1)):
            after = model(piece, state).state
            before, now = tensors_of([state.inner, state.smoothed]), tensors_of([after.inner, after.smoothed])
            for row in range(3):
                is_same = all(torch.equal(a[row].to(b.dtype), b[row]) for a, b in zip(before, now, strict=True))
                assert is_same != bool(cuts[row, t])
                moved += not is_same
            state = after
    assert 3 < moved < 90


def test_h09_memory_does_not_grow_and_has_no_limit_of_positions() -> None:
    model = lively(max_position_embeddings=10, **TWO, **ATTENTION)
    with torch.no_grad():
        sizes = [
            sum(leaf.numel() for leaf in tensors_of(model(random_tokens(2, time), model.initial_state(2)).state))
            for time in (1, 9, 70)
        ]
    assert len(set(sizes)) == 1
    assert tensors_of(model.initial_state(5))[0].shape == (5, 24)


@every_variant
def test_h13_packed_equals_padded_equals_one_by_one(variant: str) -> None:
    packed, tokens = lively(chunk_layout="packed", **VARIANTS[variant]), random_tokens(3, 21)
    padded = with_settings(packed, chunk_layout="padded")
    gradients = []
    for model in (packed, padded):
        output = model(tokens)
        torch.testing.assert_close(output.logits, torch.cat([model(row[None]).logits for row in tokens]),
                                   **close(variant))  # fmt: skip
        (output.logits.square().mean() + output.auxiliary["ratio_loss"]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(packed(tokens).telemetry.values(), padded(tokens).telemetry.values(), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_n05_padding_changes_neither_rates_nor_the_ratio_loss() -> None:
    model, lengths = lively(**TWO), torch.tensor([17, 5, 9])
    tokens = random_tokens(3, 17)
    other = torch.where(torch.arange(17) < lengths[:, None], tokens, (tokens + 30) % 61)
    first, second = model(tokens, lengths=lengths), model(other, lengths=lengths)
    assert torch.equal(first.auxiliary["ratio_loss"], second.auxiliary["ratio_loss"])
    rate = torch.cat([model.chunkings(row[None, :n])[0].boundary[0] for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(first.telemetry["hnet/stage0/boundary_rate"], rate.float().mean())


def test_chunks_of_inner_stages_lie_on_the_bytes_where_outer_ones_begin() -> None:
    model, tokens, lengths = lively(**TWO), random_tokens(3, 31), torch.tensor([31, 12, 20])
    outer, inner = model.chunkings(tokens, lengths)
    real = torch.arange(31) < lengths[:, None]
    assert bool(outer.boundary[:, 0].all()) and bool(inner.boundary[:, 0].all())
    assert not bool((outer.boundary & ~real).any()) and not bool((inner.boundary & ~outer.boundary).any())
    assert torch.equal(outer.probability.isnan(), ~real)
    assert torch.equal(inner.probability.isnan(), ~outer.boundary)
    for chunks in (outer, inner):
        assert torch.equal(chunks.boundary, chunks.probability.nan_to_num(0) > 0.5)
    assert inner.boundary.sum() < outer.boundary.sum() < real.sum()
    telemetry = model(tokens, lengths=lengths).telemetry
    assert telemetry["hnet/stage0/bytes_per_chunk"].item() == pytest.approx(int(real.sum()) / int(outer.boundary.sum()))
    assert telemetry["hnet/stage1/bytes_per_chunk"].item() == pytest.approx(int(real.sum()) / int(inner.boundary.sum()))
    one = model.chunkings(tokens[[1], :12])
    for chunks, alone in zip((outer, inner), one, strict=True):
        assert torch.equal(chunks.boundary[1, :12], alone.boundary[0])


def test_n06_the_reported_loss_does_not_know_the_weight_of_the_ratio_loss() -> None:
    tokens, losses, objectives = random_tokens(3, 20), [], []
    for weight in (0.0, 0.03, 2.0):
        model = with_settings(lively(wide=False, **TWO), ratio_loss_weight=weight)
        output = model(tokens[:, :-1])
        assert ("ratio_loss" in output.auxiliary) == (weight > 0)
        sums = loss_sums(output, tokens[:, 1:], ObjectiveSettings())
        losses.append(sums.nll.item())
        objectives.append(sums.objective.item())
        ratios = [output.telemetry[f"hnet/stage{stage}/ratio_loss"].item() for stage in range(2)]
    assert losses[0] == losses[1] == losses[2] == objectives[0]
    for weight, objective in zip((0.03, 2.0), objectives[1:], strict=True):
        assert objective - losses[0] == pytest.approx(weight * sum(ratios) * 3 * 19, rel=1e-3)


def test_n02_the_ratio_loss_is_on_by_default_and_leads_to_its_target() -> None:
    assert tiny_model_settings("hnet").ratio_loss_weight == 0.03  # type: ignore[attr-defined]
    model = tiny_model("hnet", ratio_loss_weight=1.0, chunk_targets=4)
    optimizer, rates = build_optimizer(model, OptimizerSettings(learning_rate=3e-3)), []
    for step in range(60):
        output = model(random_tokens(4, 32, seed=step))
        output.auxiliary["ratio_loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(output.telemetry["hnet/stage0/boundary_rate"].item())
    assert rates[0] > 0.45
    assert abs(sum(rates[-10:]) / 10 - 0.25) < 0.1


@pytest.mark.parametrize("cut", ["nothing", "the straight-through path", "the smoothing"])
def test_n09_the_router_learns_from_the_loss_alone_on_either_path(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(ratio_loss_weight=0.0, **TWO)
    if cut == "the straight-through path":
        monkeypatch.setattr(hnet_stage, "straight_through", lambda x, confidence: x)
    if cut == "the smoothing":
        for stage in (model.model, model.model.inner):
            real = stage.dechunk.forward
            monkeypatch.setattr(stage.dechunk, "forward", detached(real))
    model(random_tokens(3, 25)).logits.square().mean().backward()
    for stage in (model.model, model.model.inner):
        for matrix in (stage.router.q_proj, stage.router.k_proj):
            assert matrix.weight.grad.abs().max() > 1e-9


def detached(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda z, probability, chunks, state: real(z, probability.detach(), chunks, state)


def test_n03_routers_and_residual_projections_are_not_ternary_and_start_where_they_should() -> None:
    model = tiny_model("hnet", **TWO)
    for stage in (model.model, model.model.inner):
        assert isinstance(stage, OuterStage)
        width = stage.residual.weight.shape[0]
        assert torch.equal(stage.router.q_proj.weight, torch.eye(width))
        assert torch.equal(stage.router.k_proj.weight, torch.eye(width))
        assert not bool(stage.residual.weight.any()) and not bool(stage.encoder.lower_bounds.any())
        assert not bool(stage.inner.widen.vector.any())
        assert not [m for m in (*stage.router.modules(), *stage.residual.modules()) if isinstance(m, BitLinear)]
    h = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    widened = model.model.inner.widen(h)
    assert torch.equal(widened[..., :24], h) and not bool(widened[..., 24:].any())


def test_n15_between_the_stages_everything_is_float32_in_half_precision() -> None:
    model, tokens = tiny_model("hnet"), random_tokens(2, 17)
    model.compute_dtype = torch.bfloat16
    seen: dict[str, torch.dtype] = {}
    stage = model.model
    assert isinstance(stage, OuterStage)
    stage.router.register_forward_hook(lambda *a: seen.update(router=a[2][0].probability.dtype))
    stage.dechunk.register_forward_hook(lambda *a: seen.update(dechunk=a[2][0].dtype))
    stage.residual.register_forward_hook(lambda *a: seen.update(residual=a[2].dtype))
    stage.decoder.register_forward_hook(lambda *a: seen.update(decoder=a[2][0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, model.initial_state(2))
    wide = torch.float32
    assert seen == {"router": wide, "dechunk": wide, "residual": wide, "decoder": torch.bfloat16}
    assert {leaf.dtype for leaf in tensors_of(output.state)} == {wide, torch.bool}


@every_layout
def test_n13_a_cap_merges_surplus_chunks_in_training_and_reports_the_uncapped_rate(layout: str) -> None:
    tokens, sizes = random_tokens(3, 40), []
    model = lively(chunk_layout=layout)
    capped = lively(chunk_layout=layout, max_chunk_fraction=0.2)
    for each in (model, capped):
        each.model.inner.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:2].numel()))
    free, bound = model(tokens), capped(tokens)
    assert torch.equal(free.logits, bound.logits)
    training = capped.train()(tokens)
    assert sizes[0] == sizes[1] > sizes[2] == 3 * 8
    assert training.telemetry["hnet/stage0/boundary_rate"] == free.telemetry["hnet/stage0/boundary_rate"]
    assert not torch.allclose(training.logits, free.logits)
    assert bool(torch.isfinite(training.logits).all())


def test_i03_every_parameter_starts_with_its_documented_deviation() -> None:
    sizes = {"d_model": (96, 128, 160), "intermediate_size": 192, "vocab_size": 256, "use_short_conv": False}
    model = tiny_model("hnet", **{**TWO, **sizes, **ATTENTION})
    additions = (8, 16, 22)
    for name, tensor in model.tensors().items():
        if name.endswith("proj.weight") and "router" not in name:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(additions[name.count("inner.")]) if is_output else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.tensors()["embed_tokens.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    assert model.tensors()["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith("hnet-") and "0m" not in name])
def test_i01_a_router_begins_with_cuts_at_about_half_of_the_bytes_of_a_text(recipe: str) -> None:
    values = load_recipe(recipe).values["model"] | {"vocab_size": 256}
    values["num_blocks"] = [entry if len(entry) == 3 else [1] for entry in values["num_blocks"]]
    values["d_model"] = values["d_model"][:2]
    values["num_blocks"] = [values["num_blocks"][0], [1]]
    model = build_model(model_settings(values), QuantizationMode())
    model.initialize(0)
    tokens = torch.tensor(list((text * 3).encode()))[None]
    assert 0.3 < model.chunkings(tokens)[0].boundary.float().mean().item() < 0.7  # type: ignore[operator]


BOTH = {"expand_ratio": 2, "use_short_conv": True, "share_conv_kernel": True}
SHAPES: dict[str, tuple[list[int], list[list[int]], dict[str, Any], int, float]] = {
    "nano": ([128, 192], [[2, 0, 2], [4]], {}, 2_943_744, 95.7),
    "one chunking": ([256, 384], [[4, 0, 4], [8]], {}, 21_340_160, 98.3),
    "two chunkings": ([512, 768, 1024], [[4, 0, 4], [4, 0, 4], [8]], {}, 189_612_032, 98.4),
    "the guide's example": ([384, 512, 768], [[3, 0, 3], [3, 0, 3], [6]], {}, 75_037_312, 98.0),
    "small two-stage": ([256, 384, 512], [[3, 0, 3], [3, 0, 3], [6]], {}, 37_002_496, 97.8),
    "one chunking, norms": ([256, 384], [[4, 0, 4], [8]], {"bitlinear_norm": "rms"}, 21_360_640, 98.2),
    "two chunkings, norms": (
        [512, 768, 1024], [[4, 0, 4], [4, 0, 4], [8]], {"bitlinear_norm": "rms"}, 189_685_760, 98.4),
    "wide one": ([256, 384], [[4, 0, 4], [8]], BOTH, 28_191_744, 98.6),
    "wide two": ([512, 768, 1024], [[4, 0, 4], [4, 0, 4], [8]], BOTH, 250_558_464, 98.8),
    "wide 100M": ([576, 768], [[4, 0, 4], [10]], BOTH, 138_311_744, 98.9),
    "wide 350M": ([640, 896, 1152], [[4, 0, 4], [4, 0, 4], [12]], BOTH, 419_328_640, 99.0),
    "with attention": (
        [256, 512], [[4, 0, 4], [12]], {**BOTH, "innermost_use_attention": True, "attention_num_heads": 4},
        56_519_936, 88.1),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_i05_known_shapes_have_exactly_their_parameters(shape: str) -> None:
    widths, blocks, overrides, total, percent = SHAPES[shape]
    values = {"family": "hnet", "vocab_size": 256, "d_model": widths, "num_blocks": blocks, **overrides}
    with torch.device("meta"):
        counts = build_model(model_settings(values), QuantizationMode()).parameter_counts()
    assert counts.total == total
    assert 100 * counts.ternary / counts.total == pytest.approx(percent, abs=0.05)


FORMULA = {
    ((256, 384), 6): (3.00, 1), ((576, 768), 6): (2.83, 1), ((256, 512), 6): (3.46, 1),
    ((256, 384, 512), 3): (4.24, 2.00, 1), ((512, 768, 1024), (3, 3)): (4.24, 2.00, 1),
    ((384, 512, 768), 3): (4.24, 2.12, 1), ((640, 896, 1152), 3): (4.02, 1.96, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", FORMULA)
def test_multipliers_of_the_formula_are_those_of_the_paper(shape: Any) -> None:
    widths, targets = shape
    settings: Any = tiny_model_settings("hnet", d_model=widths, num_blocks=((1, 0, 1),) * (len(widths) - 1) + ((1,),),
                                        chunk_targets=targets, lr_multipliers="formula")  # fmt: skip
    assert settings.multipliers == pytest.approx(FORMULA[shape], abs=0.011)


def test_defaults_follow_the_number_of_chunkings() -> None:
    one: Any = tiny_model_settings("hnet")
    two: Any = tiny_model_settings("hnet", **(TWO | {"chunk_targets": None}))
    assert (one.targets, one.multipliers) == ((6.0,), (1.5, 1.0))
    assert (two.targets, two.multipliers) == ((3.0, 3.0), (2.0, 1.5, 1.0))
    assert tiny_model_settings("hnet", **(TWO | {"chunk_targets": "2.5"})).targets == (2.5, 2.5)  # type: ignore[attr-defined]


def test_n16_each_stage_learns_at_its_own_rate_from_the_first_group_on() -> None:
    model = tiny_model("hnet", lr_multipliers=[3, 2, 1], **TWO)
    optimizer = build_optimizer(model, OptimizerSettings())
    set_rates(optimizer, 0.01, 0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx((0.03, 0.02, 0.01)[name.count("inner.")]), name
    assert {name.count("inner.") for name, _ in model.named_parameters()} == {0, 1, 2}


def test_blocks_come_in_the_order_of_computation() -> None:
    model, order = tiny_model("hnet", **TWO), []
    for number, block in enumerate(model.blocks()):
        block.register_forward_hook(lambda *_, number=number: order.append(number))
    model(random_tokens(1, 9))
    assert order == list(range(model.settings.total_blocks)) == list(range(11))


def test_attention_blocks_stand_where_the_pattern_says() -> None:
    model = tiny_model("hnet", **(TWO | ATTENTION | {"num_blocks": ((2, 0, 2), (2, 0, 2), (5,))}),
                       attention_layers_pattern="xxa")  # fmt: skip
    inner: Any = model.model.inner.inner  # type: ignore[union-attr]
    assert [block.is_recurrent for block in inner.stack.layers] == [True, True, False, True, True]
    assert inner.stack.lower_bounds.shape[0] == 4
    settings: Any = model.settings
    assert settings.innermost_layers == "xxaxx"
    assert settings.model_copy(update={"attention_layers_pattern": None}).innermost_layers == "xaxax"


def test_floating_point_operations_count_each_stage_by_its_share_of_positions() -> None:
    settings: Any = tiny_model_settings("hnet", **(TWO | {"chunk_targets": (2, 5)}))
    outer, middle, inner = (settings.block_flops(width) for width in (24, 28, 40))
    expected = 4 * outer + 18 * 24**2 + (4 * middle + 18 * 28**2) / 2 + 3 * inner / 10 + 6 * 61 * 24
    assert settings.flops_per_token(100) == pytest.approx(expected)
    mixed: Any = tiny_model_settings("hnet", **(TWO | ATTENTION | {"chunk_targets": (2, 5)}))
    attention = 6 * 40 * (4 * 40 + 3 * 40 + 2 * 3)
    assert mixed.flops_per_token(100) == pytest.approx(expected + (attention - inner) / 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_blocks": [[4, 2, 4], [8]]}, "n14.*the entry \\[4, 2, 4\\]"),
        ({"num_blocks": [[4, 4], [8]]}, "must be \\[encoder blocks, 0, decoder blocks\\]"),
        ({"num_blocks": [[0, 0, 4], [8]]}, "both at least 1"),
        ({"num_blocks": [[4, 0, 4], [8, 0, 8]]}, "the innermost stage, must be \\[blocks\\]"),
        ({"num_blocks": [[4, 0, 4], [0]]}, "at least 1"),
        ({"num_blocks": [[4, 0, 4], [4, 0, 4], [8]]}, "3 entries and model.d_model 2 widths"),
        ({"num_blocks": []}, "last entry"),
        ({"d_model": [48, 24]}, "narrower"),
        ({"d_model": [24]}, "family hgrn"),
        ({"d_model": [24] * 9}, "2 to 8 widths"),
        ({"d_model": 24}, "d_model"),
        ({"chunk_targets": 1}, "must lie above 1"),
        ({"chunk_targets": [3, 3]}, "one number for each of the 1 chunkings"),
        ({"lr_multipliers": [1]}, "must be one number above 0 for each of the 2 stages"),
        ({"lr_multipliers": [0, 1]}, "above 0"),
        ({"lr_multipliers": "paper"}, "lr_multipliers"),
        ({"max_chunk_fraction": 0}, "max_chunk_fraction"),
        ({"max_chunk_fraction": 1.5}, "max_chunk_fraction"),
        ({"ratio_loss_weight": -1}, "ratio_loss_weight"),
        ({"chunk_layout": "dense"}, "chunk_layout"),
        ({"attention_layers_pattern": "xyz"}, "x for a recurrent one, a for attention"),
        ({"attention_layers_pattern": "xax"}, "1 to 2 letters"),
        ({"innermost_use_attention": True, "attention_num_heads": 3}, "whose double divides it"),
        ({"innermost_use_attention": True, "d_model": [24, 41]}, "width of 41; choose an even width"),
    ],
)
def test_n14_shapes_that_do_not_fit_are_refused_with_the_rule(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.removeprefix("n14.*")):
        tiny_model_settings("hnet", **overrides)
