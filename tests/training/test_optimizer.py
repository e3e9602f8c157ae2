"""The optimizer: decay on quantizable matrices only, every parameter exactly once, state by name."""

import pytest
import torch

from builders import random_tokens, tiny_bitnet
from ternlm.errors import CheckpointError, SettingsError
from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode
from ternlm.training.optimizer import (
    OptimizerSettings,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rates,
)


def groups(model: LanguageModel) -> dict[str, list[torch.nn.Parameter]]:
    return {group["name"]: group["params"] for group in build_optimizer(model, OptimizerSettings()).param_groups}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["subln", "prenorm", "double"])
@pytest.mark.parametrize("full_precision", [False, True])
def test_t05_only_bitlinear_weights_decay_and_the_twin_decays_the_same_ones(
    tied: bool, layout: str, full_precision: bool
) -> None:
    mode = FULL_PRECISION if full_precision else None
    model = tiny_bitnet(mode=mode, tie_word_embeddings=tied, norm_layout=layout)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in groups(model)["matrices"]}
    assert decayed == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")
    }
    kinds = {kind: {names[id(parameter)] for parameter in members} for kind, members in groups(model).items()}
    assert all("norm" in name for name in kinds["rest"])
    assert kinds["embeddings"] == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert all(parameter.dim() == 2 for parameter in groups(model)["matrices"])


@pytest.mark.parametrize("tied", [True, False])
def test_t21_every_parameter_is_in_exactly_one_group_once(tied: bool) -> None:
    model = tiny_bitnet(tie_word_embeddings=tied)
    pointers = [parameter.data_ptr() for parameters in groups(model).values() for parameter in parameters]
    assert len(pointers) == len(set(pointers))
    assert set(pointers) == {parameter.data_ptr() for parameter in model.parameters()}


def test_rates_reach_every_group_and_decay_reaches_the_matrices_alone() -> None:
    optimizer = build_optimizer(tiny_bitnet(), OptimizerSettings())
    set_rates(optimizer, 1e-3, 0.2)
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        ("matrices", 1e-3, 0.2),
        ("embeddings", 1e-3, 0.0),
        ("rest", 1e-3, 0.0),
    }
    set_rates(optimizer, 2e-3, 0.0)
    assert all(g["lr"] == 2e-3 and g["weight_decay"] == 0.0 for g in optimizer.param_groups)


def test_each_kind_of_parameter_has_its_share_of_the_rate() -> None:
    model = tiny_bitnet(mode=QuantizationMode.model_validate({"quantizer": "ttq"}))
    settings = OptimizerSettings(embedding_lr_ratio=0.5, other_lr_ratio=0.25, quantizer_lr_ratio=0.125)
    optimizer = build_optimizer(model, settings)
    set_rates(optimizer, 8e-3, 0.2)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"matrices": 8e-3, "embeddings": 4e-3, "quantizers": 1e-3, "rest": 2e-3}
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        is_quantizer = [".quantizer." in names[id(parameter)] for parameter in group["params"]]
        assert all(is_quantizer) if group["name"] == "quantizers" else not any(is_quantizer)


def test_muon_updates_merged_matrices_as_if_they_were_separate() -> None:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings(name="muon", weight_decay=0.3))
    layer = model.bit_linears()["model.layers.0.self_attn.qkv"]
    separate = [torch.nn.Parameter(part.clone()) for part in layer.weight.detach().split(layer.sizes)]
    assert len(separate) == 3
    reference = torch.optim.Muon(separate, lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    set_rates(optimizer, 0.01, 0.3)
    for seed in range(3):
        optimizer.zero_grad()
        model(random_tokens(2, 9, seed=seed)).logits.square().mean().backward()
        assert layer.weight.grad is not None
        for part, gradient in zip(separate, layer.weight.grad.split(layer.sizes), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(layer.weight, torch.cat(separate))


def test_muon_leaves_everything_but_matrices_to_adamw() -> None:
    model, other = tiny_bitnet(), tiny_bitnet()
    muon = build_optimizer(model, OptimizerSettings(name="muon"))
    adamw = build_optimizer(other, OptimizerSettings())
    for each, optimizer in ((model, muon), (other, adamw)):
        each(random_tokens(2, 9)).logits.square().mean().backward()
        optimizer.step()
    matrices = {id(parameter) for parameter in groups(model)["matrices"]}
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right) is (id(left) not in matrices), name
        assert left.grad is not None
    assert {name.rpartition(".")[2] for name in optimizer_tensors(model, muon) if "qkv" in name} == {"momentum_buffer"}


def test_an_update_of_muon_makes_codes_stale() -> None:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings(name="muon"))
    set_rates(optimizer, 0.5, 0.0)
    layer = model.bit_linears()["model.layers.1.mlp.down"]
    model(random_tokens(2, 9)).logits.square().mean().backward()
    before, count = layer.codes.clone(), layer.quantizations
    optimizer.step()
    layer.refresh()
    assert layer.quantizations == count + 1
    assert not torch.equal(layer.codes, before)


def test_l01_the_state_of_muon_is_put_back_by_name_and_one_of_adamw_is_refused() -> None:
    models = [tiny_bitnet(), tiny_bitnet()]
    first, second = (build_optimizer(model, OptimizerSettings(name="muon")) for model in models)
    models[0](random_tokens(2, 9)).logits.square().mean().backward()
    first.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(models[0], first).items()}
    load_optimizer_tensors(models[1], second, tensors)
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, (first, second), strict=True):
        optimizer.zero_grad()
        model(random_tokens(2, 9, seed=3)).logits.square().mean().backward()
        optimizer.step()
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(CheckpointError, match=r"qkv\.weight\.step"):
        load_optimizer_tensors(models[1], build_optimizer(models[1], OptimizerSettings()), tensors)


def test_m07_a_loss_scaler_that_overflows_skips_the_update_of_muon_as_well() -> None:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings(name="muon"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(model(random_tokens(2, 9)).logits.square().mean()).backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_learned_scales_that_never_had_a_gradient_need_no_state() -> None:
    mode = QuantizationMode.model_validate({"quantizer": "ttq"})
    model, other = tiny_bitnet(mode=mode), tiny_bitnet(mode=mode)
    model.set_mode(QuantizationMode.model_validate({"weights": "int8", "quantizer": "ttq"}))
    first, second = (build_optimizer(m, OptimizerSettings()) for m in (model, other))
    model(random_tokens(2, 9)).logits.square().mean().backward()
    first.step()
    tensors = optimizer_tensors(model, first)
    assert not any(".quantizer." in name for name in tensors)
    load_optimizer_tensors(other, second, tensors)
    assert optimizer_tensors(other, second).keys() == tensors.keys()
    del tensors["model.norm.weight.step"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\.step"):
        load_optimizer_tensors(other, second, tensors)


def test_a_state_that_is_put_back_replaces_what_learned_scales_had_since() -> None:
    mode = QuantizationMode.model_validate({"quantizer": "ttq"})
    model, tokens = tiny_bitnet(mode=mode), random_tokens(2, 9)
    optimizer = build_optimizer(model, OptimizerSettings())
    model.set_mode(QuantizationMode.model_validate({"weights": "int8", "quantizer": "ttq"}))
    saved: list[set[str]] = []
    for next_mode in (mode, None):
        model(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
        saved.append(set(tensors))
        if next_mode is not None:
            before = tensors
            model.set_mode(next_mode)
    assert saved[0] < saved[1]
    load_optimizer_tensors(model, optimizer, before)
    assert set(optimizer_tensors(model, optimizer)) == saved[0]
    load_optimizer_tensors(model, optimizer, {})
    assert optimizer_tensors(model, optimizer) == {}


def test_t05_a_step_without_gradient_signal_shrinks_matrices_and_nothing_else() -> None:
    model = tiny_bitnet()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerSettings())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizer, 0.1, 0.5)
    optimizer.step()
    matrices = {id(parameter) for parameter in groups(model)["matrices"]}
    for name, parameter in model.named_parameters():
        wanted = before[name] * (0.95 if id(parameter) in matrices else 1.0)
        assert torch.allclose(parameter, wanted, rtol=1e-6, atol=0), name


def adamw_by_hand(start: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """AdamW with beta (0.9, 0.95) and eps 1e-8 in float64."""
    value, first, second = start.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        value = value * (1 - lr * decay)
        value = value - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
    return value


def test_the_update_is_adamw_computed_by_hand() -> None:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings())
    parameter = model.get_parameter("model.layers.0.mlp.down.weight")
    start = parameter.detach().clone()
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(parameter.shape, generator=generator) for _ in range(3)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        set_rates(optimizer, 3e-3, 0.1)
        optimizer.step()
    assert torch.allclose(parameter.double(), adamw_by_hand(start, gradients, 3e-3, 0.1), rtol=1e-5, atol=1e-8)


def trained() -> tuple[LanguageModel, torch.optim.AdamW]:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings())
    model(random_tokens(2, 7)).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_state_goes_out_and_in_by_name_bit_for_bit() -> None:
    model, optimizer = trained()
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    assert set(tensors) == {
        f"{name}.{quantity}" for name, _ in model.named_parameters() for quantity in ("step", "exp_avg", "exp_avg_sq")
    }
    other = build_optimizer(model, OptimizerSettings())
    load_optimizer_tensors(model, other, tensors)
    again = optimizer_tensors(model, other)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    optimizer.state.clear()
    assert all(torch.equal(again[name], value) for name, value in tensors.items()), "the state is a copy"


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    model, optimizer = trained()
    tensors = optimizer_tensors(model, optimizer)
    name = "model.norm.weight.exp_avg"
    for damaged in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: torch.zeros(3)},
    ):
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight\.exp_avg"):
            load_optimizer_tensors(model, build_optimizer(model, OptimizerSettings()), damaged)


def test_an_optimizer_that_never_stepped_has_no_state_and_takes_none_back() -> None:
    model = tiny_bitnet()
    optimizer = build_optimizer(model, OptimizerSettings())
    assert optimizer_tensors(model, optimizer) == {}
    load_optimizer_tensors(model, optimizer, {})
    assert not optimizer.state


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": ".nan"},
        {"weight_decay": -0.1},
        {"eps": 0},
        {"betas": [0.9, 1.0]},
        {"betas": [0.9]},
        {"name": "sgd"},
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        OptimizerSettings.from_mapping(values, "optimizer")


def test_n16_parameters_may_learn_at_a_rate_of_their_own_within_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bitnet()
    slow = "model.layers.1.mlp.down.weight"
    factors = {slow: 0.5, "model.layers.1.input_layernorm.weight": 2.0}
    monkeypatch.setattr(model, "rate_factors", lambda: factors)
    optimizer = build_optimizer(model, OptimizerSettings(other_lr_ratio=0.1))
    set_rates(optimizer, 1e-2, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates.pop(slow) == pytest.approx((5e-3, 0.3))
    assert rates.pop("model.layers.1.input_layernorm.weight") == pytest.approx((2e-3, 0.0))
    assert rates["model.layers.0.mlp.down.weight"] == pytest.approx((1e-2, 0.3))
    assert rates["model.layers.0.input_layernorm.weight"] == pytest.approx((1e-3, 0.0))
    assert [g["name"] for g in optimizer.param_groups] == [
        "matrices", "matrices x0.5", "embeddings", "rest", "rest x2",
    ]  # fmt: skip
    assert len(rates) + 2 == len(names)
