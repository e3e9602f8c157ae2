"""One optimizer step: micro-batches add up to the whole batch, nothing non-finite passes, memory running out halves."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from builders import random_tokens, tiny_bitnet
from ternlm.data.batch import Batch
from ternlm.errors import MemoryExhausted
from ternlm.models import FULL_PRECISION, LanguageModel, QuantizationMode
from ternlm.training.objective import ObjectiveSettings
from ternlm.training.optimizer import OptimizerSettings, build_optimizer
from ternlm.training.step import Stepper, StepResult


class Recorder:
    """An optimizer that updates nothing and remembers the gradients it was given."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.gradients, self.steps = model, {}, 0

    def step(self) -> None:
        self.steps += 1
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none)


def make(
    model: LanguageModel, optimizer: Any = None, micro: int = 100, clip: float = 0.0, shrink: bool = True
) -> tuple[Stepper, list[str]]:
    said: list[str] = []
    optimizer = optimizer or build_optimizer(model, OptimizerSettings())
    return Stepper(model, optimizer, ObjectiveSettings(), clip, micro, shrink, said.append), said


def ragged(rows: int = 8, time: int = 11) -> Batch:
    """Rows with 11, 10, 9 ... scored targets, and holes."""
    windows = random_tokens(rows, time + 1, seed=7)
    targets = windows[:, 1:].clone()
    for row in range(rows):
        targets[row, time - row :] = -100
    targets[0, 3] = -100
    return Batch(windows[:, :-1].contiguous(), targets)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mode", [QuantizationMode(), FULL_PRECISION], ids=["ternary", "full"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_t11_micro_batches_of_any_size_equal_one_batch_in_loss_and_gradient(mode: QuantizationMode, micro: int) -> None:
    batch = ragged()
    results = {}
    for size in (8, micro):
        model = tiny_bitnet(mode=mode)
        recorder = Recorder(model)
        results[size] = make(model, recorder, size)[0](batch), recorder.gradients
    (whole, gradients), (parts, summed) = results[8], results[micro]
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    assert parts.targets == whole.targets == batch.num_targets
    assert gradients.keys() == summed.keys() == dict(tiny_bitnet().named_parameters()).keys()
    for name, gradient in gradients.items():
        assert torch.allclose(summed[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max())), name


@pytest.mark.parametrize(("micro", "loss_scale"), [(8, 2.0**16), (3, None), (1, 2.0**16)])
def test_rows_of_learned_scales_are_clamped_by_the_gradient_of_the_step(micro: int, loss_scale: float | None) -> None:
    mode, limit, seen = QuantizationMode(quantizer="ttq", lsq_grad_clip=0.002), 0.002, []
    for size, scale in ((8, None), (micro, loss_scale)):
        model = tiny_bitnet(mode=mode)
        stepper, _ = make(model, micro=size)
        if scale is not None:
            stepper.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        found: dict[str, torch.Tensor] = {}

        def look(result: StepResult, model: LanguageModel = model, found: dict[str, torch.Tensor] = found) -> bool:
            parameters = {name: p for name, p in model.named_parameters() if ".quantizer." in name}
            found |= {name: p.grad / p.detach().sigmoid() for name, p in parameters.items() if p.grad is not None}
            return False

        stepper(ragged(), look)
        seen.append(found)
    magnitudes = torch.cat([g.abs() for g in seen[0].values()])
    assert bool((magnitudes > 0.999 * limit).any()) and bool((magnitudes < 0.9 * limit).any())
    assert float(magnitudes.max()) <= 1.001 * limit
    for name, whole in seen[0].items():
        torch.testing.assert_close(seen[1][name], whole, rtol=1e-3, atol=1e-6)


def test_t11_the_mean_of_micro_batch_means_would_be_another_number() -> None:
    batch, model = ragged(), tiny_bitnet()
    weighted = make(model, Recorder(model), 2)[0](batch).loss
    means = []
    for part in range(0, 8, 2):
        rows = Batch(batch.tokens[part : part + 2], batch.targets[part : part + 2])
        means.append(make(model, Recorder(model))[0](rows).loss)
    assert abs(sum(means) / 4 - weighted) > 1e-4


def test_t09_the_loss_is_that_of_the_weights_before_the_update_over_all_targets() -> None:
    batch, model = ragged(), tiny_bitnet()
    with torch.no_grad():
        logits = model(batch.tokens).logits.double()
    scored = batch.targets != -100
    wanted = -torch.log_softmax(logits, -1)[scored].gather(1, batch.targets[scored][:, None]).mean().item()
    assert make(model, micro=3)[0](batch).loss == pytest.approx(wanted, rel=1e-5)


def test_t10_the_norm_is_that_of_the_whole_gradient_before_clipping() -> None:
    batch, model = ragged(), tiny_bitnet()
    recorder = Recorder(model)
    result = make(model, recorder)[0](batch)
    by_hand = math.sqrt(sum(gradient.double().square().sum().item() for gradient in recorder.gradients.values()))
    assert result.grad_norm == pytest.approx(by_hand, rel=1e-5)
    clipped = Recorder(model)
    again = make(model, clipped, clip=by_hand / 3)[0](batch)
    assert again.grad_norm == pytest.approx(by_hand, rel=1e-5)
    for name, gradient in clipped.gradients.items():
        assert torch.allclose(gradient, recorder.gradients[name] / 3, rtol=1e-3, atol=1e-9)


def test_a_gradient_below_the_limit_is_not_touched_and_zero_switches_clipping_off() -> None:
    batch, model = ragged(), tiny_bitnet()
    gradients = []
    for clip in (0.0, 1e6):
        recorder = Recorder(model)
        make(model, recorder, clip=clip)[0](batch)
        gradients.append(recorder.gradients)
    assert same(*gradients)


def test_gradients_are_gone_after_the_step() -> None:
    model = tiny_bitnet()
    make(model)[0](ragged())
    assert all(parameter.grad is None for parameter in model.parameters())


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    return hook


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_t18_one_bad_gradient_element_leaves_weights_and_moments_alone(value: float) -> None:
    model, batch = tiny_bitnet(), ragged()
    stepper, said = make(model, clip=1.0)
    stepper(batch)
    before = weights(model)
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in stepper.optimizer.state.items()}
    handle = model.get_parameter("model.layers.1.mlp.down.weight").register_hook(poison(value))
    result = stepper(batch)
    handle.remove()
    assert result.skipped
    assert same(weights(model), before)
    assert all(torch.equal(v, moments[p][k]) for p, s in stepper.optimizer.state.items() for k, v in s.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert said == [], "what is said about it is the judge's"
    after = stepper(batch)
    assert not after.skipped
    assert not same(weights(model), before), "the next good step trains again"


def test_t18_a_non_finite_loss_is_skipped_too() -> None:
    model, batch = tiny_bitnet(), ragged()
    stepper, _ = make(model)
    before = weights(model)
    forward = model.forward

    def broken(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        return output._replace(logits=output.logits * math.inf)

    model.forward = broken  # type: ignore[method-assign]
    assert stepper(batch).skipped
    assert same(weights(model), before)


def test_t18_the_judge_sees_the_whole_gradient_and_its_no_leaves_everything_alone() -> None:
    model, batch = tiny_bitnet(), ragged()
    stepper, _ = make(model)
    before, seen = weights(model), []

    def refuse(result: StepResult) -> bool:
        seen.append((result, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        return False

    result = stepper(batch, refuse)
    ((judged, gradients),) = seen
    assert result.skipped
    assert result == judged._replace(skipped=True)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert judged.grad_norm == pytest.approx(norm, rel=1e-5)
    assert same(weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not stepper.optimizer.state


def test_t18_not_even_a_judge_can_let_a_non_finite_gradient_pass() -> None:
    model, batch = tiny_bitnet(), ragged()
    model.get_parameter("model.norm.weight").register_hook(poison(math.nan))
    before = weights(model)
    assert make(model)[0](batch, lambda result: True).skipped
    assert same(weights(model), before)


def test_a_huge_finite_gradient_is_clipped_and_not_skipped() -> None:
    model = tiny_bitnet()
    model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * 1e12)
    result = make(model, clip=1.0)[0](ragged())
    assert not result.skipped
    assert result.grad_norm > 1e6
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def limited(model: LanguageModel, rows: int, error: BaseException) -> list[int]:
    """Let the model fail above so many rows; the sizes it was asked for."""
    asked: list[int] = []
    forward = model.forward

    def within(tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        asked.append(tokens.shape[0])
        if len(asked) > 1 and tokens.shape[0] > rows:
            raise error
        return forward(tokens, *args, **options)

    model.forward = within  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradient(error: BaseException) -> None:
    batch, model = ragged(), tiny_bitnet()
    recorder = Recorder(model)
    whole = make(model, recorder)[0](batch)
    expected = recorder.gradients
    asked = limited(model, 2, error)
    asked.append(0)  # the first call is limited as well
    stepper, said = make(model, recorder, micro=8)
    result = stepper(batch)
    assert stepper.micro_batch_size == 2
    assert asked[1:] == [8, 4, 2, 2, 2, 2]
    assert [("micro_batch_size=" in text) for text in said] == [True, True]
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, gradient in expected.items():
        scale = 1e-6 * float(gradient.abs().max())
        assert torch.allclose(recorder.gradients[name], gradient, rtol=1e-3, atol=scale), name
    assert recorder.steps == 2


def test_running_out_of_memory_between_micro_batches_forgets_the_half_gradient() -> None:
    batch, model = ragged(), tiny_bitnet()
    recorder = Recorder(model)
    make(model, recorder)[0](batch)
    expected = recorder.gradients
    asked = limited(model, 3, MemoryError())  # the first micro-batch of 4 passes, the second does not
    stepper, _ = make(model, recorder, micro=4)
    stepper(batch)
    assert asked[:3] == [4, 4, 2]
    for name, gradient in expected.items():
        scale = 1e-6 * float(gradient.abs().max())
        assert torch.allclose(recorder.gradients[name], gradient, rtol=1e-3, atol=scale), name


@pytest.mark.parametrize(("shrink", "advice"), [(True, "gradient_checkpointing"), (False, "micro_batch_size=auto")])
def test_memory_that_does_not_suffice_for_the_smallest_step_is_one_typed_error(shrink: bool, advice: str) -> None:
    model = tiny_bitnet()
    limited(model, 0, torch.OutOfMemoryError("CUDA out of memory.")).append(0)
    before = weights(model)
    stepper, _ = make(model, micro=8, shrink=shrink)
    with pytest.raises(MemoryExhausted, match=advice) as caught:
        stepper(ragged())
    assert caught.value.exit_code == 5
    assert stepper.micro_batch_size == (1 if shrink else 8)
    assert same(weights(model), before)


def test_other_failures_are_not_mistaken_for_memory() -> None:
    model = tiny_bitnet()
    limited(model, 0, RuntimeError("shapes do not match")).append(0)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make(model, micro=8)[0](ragged())


def test_t15_one_step_changes_every_latent_matrix_and_forty_flip_codes() -> None:
    model, batch = tiny_bitnet(), ragged()
    before = weights(model)
    codes = {name: layer.matrices() for name, layer in model.bit_linears().items()}
    codes = {(n, m): pair[0].clone() for n, parts in codes.items() for m, pair in parts.items()}
    stepper, _ = make(model)
    stepper(batch)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for _ in range(40):
        stepper(batch)
    for name, layer in model.bit_linears().items():
        for matrix, (now, _) in layer.matrices().items():
            assert not torch.equal(now, codes[name, matrix]), (name, matrix)
            assert set(now.unique().tolist()) == {-1, 0, 1}


def test_p02_weights_are_quantized_once_per_step_however_many_micro_batches_there_are() -> None:
    model = tiny_bitnet()
    stepper, _ = make(model, micro=1)
    for _ in range(3):
        stepper(ragged())
    assert {layer.quantizations for layer in model.bit_linears().values()} == {3}


def test_t08_latent_weights_stay_float32_and_move_under_bfloat16_activations() -> None:
    model, batch = tiny_bitnet(), ragged()
    model.compute_dtype = torch.bfloat16
    stepper, _ = make(model)
    for group in stepper.optimizer.param_groups:
        group["lr"] = 1e-6
    for _ in range(20):
        stepper(batch)
    gain = model.get_parameter("model.layers.0.input_layernorm.weight")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(value.dtype == torch.float32 for s in stepper.optimizer.state.values() for value in s.values())
    assert 1e-6 < float((gain.detach() - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_what_a_model_says_about_its_passes_is_averaged_over_targets(
    micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_bitnet(), ragged()
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens: forward(tokens)._replace(telemetry={"mean": tokens.float().mean()})
    )
    stepper, _ = make(model, micro=micro)
    counts = (batch.targets != -100).sum(dim=1)
    parts = zip(batch.tokens.float().split(micro), counts.split(micro), strict=True)
    expected = sum(float(tokens.mean() * targets.sum()) for tokens, targets in parts) / float(counts.sum())
    assert stepper(batch).telemetry == {"mean": pytest.approx(expected)}
