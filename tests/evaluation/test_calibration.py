"""Calibration: scales are the percentiles of what reaches the sites, kept only if nothing is lost, and then fixed."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from builders import random_tokens, tiny_model
from ternlm.data.batch import Batch
from ternlm.errors import Interrupted, SettingsError
from ternlm.evaluation import calibration as module
from ternlm.evaluation.calibration import calibrate, static_sites
from ternlm.models import FULL_PRECISION, LanguageModel
from ternlm.models.prediction import predict
from ternlm.ops.percentile import magnitude_percentile

METHODS = ["exact", "ema"]


def hidden(seed: int, rows: int = 5, time: int = 13) -> Batch:
    """Rows that mostly count upwards, with a seventh of their tokens hidden and scored."""
    drawn = random_tokens(rows, time, seed=seed)
    tokens = torch.where(drawn < 10, drawn, 20 + torch.arange(time))
    targets = torch.full_like(tokens, -100)
    targets[:, seed % 3 :: 7] = tokens[:, seed % 3 :: 7]
    return Batch(tokens.masked_fill(targets != -100, 3), targets)


BATCHES = [hidden(seed) for seed in range(10, 14)]


def trained(steps: int = 12, **overrides: Any) -> LanguageModel:
    """A model that has learned a little and whose sites have observed, in training mode."""
    model = tiny_model("qdyt", qdyt_alpha_warmup_steps=0, **overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = hidden(step)
        torch.manual_seed(step)
        model.begin_pass(step)
        logits = predict(model, batch.tokens, batch.targets).logits
        torch.nn.functional.cross_entropy(logits, batch.targets[batch.targets != -100]).backward()
        model.end_pass()
        optimizer.step()
        optimizer.zero_grad()
    return model


def scorer(model: LanguageModel) -> Callable[[], Any]:
    """The loss on text that is not measured."""

    def score() -> Any:
        model.eval()
        nats, count = 0.0, 0
        for seed in range(20, 24):
            batch = hidden(seed)
            wanted = batch.targets[batch.targets != -100]
            logits = predict(model, batch.tokens, batch.targets).logits
            nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            count += len(wanted)
        return SimpleNamespace(loss=nats / count, as_dict=lambda: {"loss": nats / count})

    return score


def scales(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: site.rho.clone() for name, site in static_sites(model).items()}


def inputs(model: LanguageModel) -> dict[str, list[torch.Tensor]]:
    """What reaches each site in evaluation mode, batch by batch."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in static_sites(model)}
    handles = [
        site.register_forward_pre_hook(lambda site, args, name=name: seen[name].append(args[0].clone()))
        for name, site in static_sites(model).items()
    ]
    model.eval()
    with torch.no_grad():
        for batch in BATCHES:
            predict(model, batch.tokens, batch.targets)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(site: Any, x: torch.Tensor) -> torch.Tensor:
    """The order statistic of rank ceil(p n) of |x|, sorted in full."""
    groups = x[None] if site.heads is None else x.transpose(0, 1)  # (heads, batch, time, features)
    flat = groups.flatten(1, -2) if site.settings.act_granularity == "channel" else groups.flatten(1)[..., None]
    ordered = flat.abs().sort(dim=1).values
    rank = math.ceil(round(site.settings.act_percentile * 1000) * flat.shape[1] / 100_000)
    return ordered[:, rank - 1].reshape(site.rho.shape)


def with_any_loss(model: LanguageModel, method: str = "exact") -> Any:
    """Calibrate and keep the result in any case."""
    return calibrate(model, BATCHES, lambda: SimpleNamespace(loss=1.0, as_dict=dict), method)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("percentile", [99.7, 80.0])
def test_exact_is_the_percentile_of_all_that_reached_a_site_in_all_batches(granularity: str, percentile: float) -> None:
    model = trained(act_granularity=granularity, act_percentile=percentile)
    seen = inputs(model)
    found = with_any_loss(model)
    assert found.batches == 4 and found.tokens == 4 * 5 * 13 and found.kept
    for name, site in static_sites(model).items():
        expected = by_hand(site, torch.cat(seen[name]))
        assert torch.equal(site.rho, expected), name
        assert found.scales[name]["measured"] == expected.flatten().tolist()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ema_is_the_average_of_the_batches_with_weights_that_fall_into_the_past(granularity: str) -> None:
    model = trained(act_granularity=granularity)
    seen = inputs(model)
    with_any_loss(model, "ema")
    weights = torch.tensor([0.99**3, 0.99**2, 0.99, 1.0])
    for name, site in static_sites(model).items():
        each = torch.stack([by_hand(site, x) for x in seen[name]])
        expected = (weights.view(-1, *[1] * site.rho.dim()) * each).sum(dim=0) / weights.sum()
        assert torch.allclose(site.rho, expected, rtol=1e-5), name


def test_a_sample_is_spread_over_the_batches_and_near_the_percentile_of_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "POOLED_VALUES", 400)
    model = trained(act_percentile=80.0)
    seen = inputs(model)
    with_any_loss(model)
    everything = {name: by_hand(site, torch.cat(seen[name])) for name, site in static_sites(model).items()}
    for name, site in static_sites(model).items():
        assert torch.allclose(site.rho, everything[name], rtol=0.35), name
    assert any(not torch.equal(site.rho, everything[name]) for name, site in static_sites(model).items())


@pytest.mark.parametrize("method", ["_Sample", "_Average"])
@pytest.mark.parametrize("heads", [None, 3])
def test_padding_is_not_observed(method: str, heads: int | None) -> None:
    valid = torch.arange(7) < torch.tensor([[7], [2], [0], [5]])
    site = SimpleNamespace(
        heads=heads, features=8, settings=SimpleNamespace(act_granularity="tensor", act_percentile=90.0),
        rho=torch.zeros(() if heads is None else (heads, 1, 1)),
    )  # fmt: skip
    x = torch.randn(4, 7, 8) if heads is None else torch.randn(4, heads, 7, 8)
    results = []
    for rubbish in (0.0, 1e6):
        padded = x.masked_fill(~(valid[..., None] if heads is None else valid[:, None, :, None]), rubbish)
        for named in ({"valid": valid}, None):
            observer = getattr(module, method)(site, *[1][: method == "_Sample"])
            observer(site, (padded,) if named else (padded, valid), named or {})
            results.append(observer.scale())
    expected = magnitude_percentile(x, 90.0, valid, heads is not None)
    for result in results:
        assert torch.allclose(result, expected)


@pytest.mark.parametrize("method", METHODS)
def test_m08_the_loss_is_not_worse_or_the_old_scales_are_in_force(method: str) -> None:
    model = trained()
    old, score = scales(model), scorer(model)
    found = calibrate(model, BATCHES, score, method)  # type: ignore[arg-type]
    assert found.before.loss != found.after.loss
    assert found.kept == (found.after.loss <= found.before.loss)
    now = score().loss
    assert now == min(found.before.loss, found.after.loss)
    assert found.kept != all(torch.equal(site.rho, old[name]) for name, site in static_sites(model).items())


def test_m08_a_bad_calibration_is_reverted_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss here is the distance from the trained model, which scales a fiftieth as large move away from it."""
    model, batch = trained(), hidden(30)
    old = scales(model)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return predict(model.eval(), batch.tokens, batch.targets).logits

    wanted = logits()

    def score() -> Any:
        loss = (logits() - wanted).square().mean().item()
        return SimpleNamespace(loss=loss, as_dict=lambda: {"loss": loss})

    monkeypatch.setattr(module, "_measure", lambda model, sites, *rest: {n: s.rho / 50 for n, s in sites.items()})
    found = calibrate(model, BATCHES, score)
    assert not found.kept and found.after.loss > found.before.loss == 0
    assert torch.equal(logits(), wanted)
    for name, site in static_sites(model).items():
        assert torch.equal(site.rho, old[name]) and bool(site.frozen)
    written = found.as_dict()
    assert written["kept"] is False and written["after"]["loss"] > written["before"]["loss"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_m08_a_loss_that_is_no_number_is_worse(loss: float) -> None:
    model = trained(steps=3)
    old, losses = scales(model), iter([1.0, loss])
    found = calibrate(model, BATCHES, lambda: SimpleNamespace(loss=next(losses), as_dict=dict))  # type: ignore[arg-type]
    assert not found.kept
    assert all(torch.equal(site.rho, old[name]) for name, site in static_sites(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_m08_nothing_but_scales_and_their_frozen_marks_changes(method: str) -> None:
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    with_any_loss(model, method)
    after = model.tensors()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert before.keys() == after.keys()
    assert changed <= {f"{name}.{kind}" for name in static_sites(model) for kind in ("rho", "frozen")}
    assert {f"{name}.frozen" for name in static_sites(model)} <= changed
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert all(not site._forward_pre_hooks for site in static_sites(model).values())


def test_a_calibrated_model_is_nearly_the_trained_one() -> None:
    """Within a fifth of the spread of its logits, and of the trained loss within 0.05 nats."""
    model = trained(40)
    score = scorer(model)
    before, batch = score().loss, hidden(30)
    with torch.no_grad():
        trained_logits = predict(model.eval(), batch.tokens, batch.targets).logits
        with_any_loss(model)
        logits = predict(model.eval(), batch.tokens, batch.targets).logits
    assert not torch.equal(logits, trained_logits)
    assert (logits - trained_logits).std() < 0.2 * trained_logits.std()
    assert abs(score().loss - before) < 0.05


def test_frozen_scales_do_not_move_in_further_training() -> None:
    model = trained()
    with_any_loss(model)
    before = scales(model)
    for step in range(3):
        batch = hidden(50 + step)
        model.train().begin_pass(step)
        predict(model, batch.tokens, batch.targets).logits.square().mean().backward()
        model.end_pass()
    assert all(torch.equal(site.rho, before[name]) for name, site in static_sites(model).items())
    free = trained()
    model.eval(), free.train()
    batch, old = hidden(60), scales(free)
    free.begin_pass(0)
    predict(free, batch.tokens, batch.targets)
    free.end_pass()
    assert any(not torch.equal(site.rho, old[name]) for name, site in static_sites(free).items()), "else all are frozen"


@pytest.mark.parametrize("where", ["measuring", "scoring"])
def test_a_stop_leaves_the_old_scales_free_to_move(where: str) -> None:
    model = trained(steps=3)
    old, count = scales(model), iter(range(10))

    def check() -> None:
        if where == "measuring" and next(count) == 2:
            raise Interrupted("stop")

    def score() -> Any:
        if where == "scoring" and next(count) == 1:
            raise Interrupted("stop")
        return SimpleNamespace(loss=1.0, as_dict=dict)

    with pytest.raises(Interrupted):
        calibrate(model, BATCHES, score, check=check)
    for name, site in static_sites(model).items():
        assert torch.equal(site.rho, old[name]) and not bool(site.frozen)
        assert not site._forward_pre_hooks


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("bitnet"),
        lambda: trained(steps=2, act_scale="absmax_token"),
        lambda: tiny_model("qdyt"),
        lambda: tiny_model("qdyt", FULL_PRECISION),
    ],
    ids=["bitnet", "absmax", "never trained", "full precision"],
)
def test_a_model_without_scales_from_observations_has_nothing_to_calibrate(make: Callable[[], LanguageModel]) -> None:
    with pytest.raises(SettingsError, match="there is nothing to calibrate") as caught:
        static_sites(make())
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
