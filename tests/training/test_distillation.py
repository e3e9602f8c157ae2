"""Knowledge distillation: the term is its formula, the teacher is what it was and stays so, the loss stays the loss."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import random_tokens, tiny_corpus, tiny_model, tiny_settings, tiny_trainer
from ternlm import checkpoint
from ternlm.data.batch import Batch
from ternlm.data.preparation import Prepared
from ternlm.errors import CheckpointError, SettingsError
from ternlm.models import FULL_PRECISION, LanguageModel
from ternlm.models.prediction import predict
from ternlm.ops.divergence import plain_divergence
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Layer, resolve
from ternlm.training import launch
from ternlm.training.distillation import (
    Distillation,
    DistillationSettings,
    build_distillation,
    require_same_teacher,
    require_teacher,
    teacher_bytes,
)
from ternlm.training.objective import ObjectiveSettings
from ternlm.training.plan import make_plan
from ternlm.training.settings import RunSettings, setting_names
from ternlm.training.step import Stepper

FAMILIES = ["bitnet", "qdyt"]


def settings(**values: Any) -> DistillationSettings:
    return DistillationSettings.from_mapping({"teacher": "t", "ramp_steps": 0} | values, "distillation")


def taught(teacher: LanguageModel, total_steps: int = 10, **values: Any) -> Distillation:
    return Distillation(teacher, settings(**values), total_steps, {})


def ragged(rows: int = 6, time: int = 11) -> Batch:
    """Rows in which some positions are not scored."""
    tokens, targets = random_tokens(rows, time, seed=7), random_tokens(rows, time, seed=8)
    for row in range(rows):
        targets[row, time - row :] = -100
    targets[0, 3] = -100
    return Batch(tokens, targets)


def plain_term(teacher: LanguageModel, student: LanguageModel, batch: Batch, tau: float, weight: float) -> torch.Tensor:
    with torch.no_grad():
        wanted = teacher.eval()(batch.tokens).logits
    scored = (batch.targets != -100).flatten()
    logits = student(batch.tokens).logits
    return weight * tau**2 * plain_divergence(logits.flatten(0, 1), wanted.flatten(0, 1), scored, tau)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("values", "table"),
    [
        ({"ramp_steps": 8}, {0: 0.0, 2: 0.25 * (1 - math.sqrt(0.5)), 4: 0.25, 8: 0.5, 9: 0.5, 99: 0.5}),
        ({"ramp_steps": None, "ramp_fraction": 0.4}, {0: 0.0, 20: 0.25, 40: 0.5, 99: 0.5}),
        ({"ramp_steps": 0, "weight": 3}, {0: 3.0, 99: 3.0}),
        ({"weight": 0}, {0: 0.0, 99: 0.0}),
    ],
)
def test_the_weight_rises_along_half_a_cosine_and_follows_from_the_step_alone(
    values: dict[str, Any], table: dict[int, float]
) -> None:
    section = settings(**values)
    assert {k: section.weight_at(k, 100) for k in table} == pytest.approx(table)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.5])
def test_the_term_equals_its_formula_in_value_and_in_the_gradient_of_every_parameter(family: str, tau: float) -> None:
    teacher, student, batch = tiny_model(family, FULL_PRECISION, seed=2), tiny_model(family, FULL_PRECISION), ragged()
    student.eval()  # without dropout, two passes are the same
    expected = plain_term(teacher, student, batch, tau, 0.7)
    expected.backward()
    wanted = gradients(student)
    logits = predict(student, batch.tokens, batch.targets).logits
    term = taught(teacher, temperature=tau, weight=0.7).term(batch.tokens, batch.targets, logits, 3)
    assert expected.item() > 0.01 and term.item() == pytest.approx(expected.item(), rel=1e-4)
    term.backward()
    got = gradients(student)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


def test_m18_padding_and_what_is_not_scored_have_no_effect() -> None:
    teacher, student, batch = tiny_model("bitnet", seed=2), tiny_model("bitnet"), ragged()
    distillation = taught(teacher)
    short = distillation.term(batch.tokens, batch.targets, student(batch.tokens).logits, 0)
    for width in (1, 9):
        tokens = torch.cat([batch.tokens, random_tokens(6, width, seed=width)], dim=1)
        targets = torch.nn.functional.pad(batch.targets, (0, width), value=-100)
        padded = distillation.term(tokens, targets, student(tokens).logits, 0)
        assert padded.item() == pytest.approx(short.item(), rel=1e-4)
    nothing = torch.full_like(batch.targets, -100)
    assert distillation.term(batch.tokens, nothing, student(batch.tokens).logits, 0).item() == 0


def test_the_term_does_not_ask_what_the_targets_are() -> None:
    teacher, student, batch = tiny_model("bitnet", seed=2), tiny_model("bitnet"), ragged()
    other = torch.where(batch.targets == -100, -100, 5)
    logits, distillation = student(batch.tokens).logits, taught(teacher)
    terms = [distillation.term(batch.tokens, targets, logits, 0).item() for targets in (batch.targets, other)]
    assert terms[0] == terms[1] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(family: str) -> None:
    student, batch = tiny_model(family, FULL_PRECISION, seed=2).eval(), ragged()
    logits = predict(student, batch.tokens, batch.targets).logits
    term = taught(tiny_model(family, FULL_PRECISION, seed=2)).term(batch.tokens, batch.targets, logits, 0)
    assert abs(term.item()) < 1e-4
    assert all(gradient.abs().max() < 1e-4 for gradient in torch.autograd.grad(term, logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_only_read(family: str) -> None:
    teacher, student, batch = tiny_model(family, seed=2), tiny_model(family), ragged()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    logits = predict(student, batch.tokens, batch.targets).logits
    taught(teacher).term(batch.tokens, batch.targets, logits, 0).backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_while_the_weight_is_zero_the_teacher_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, batch = tiny_model("bitnet", seed=2), tiny_model("bitnet"), ragged()
    distillation, logits = taught(teacher, ramp_steps=5), student(batch.tokens).logits
    monkeypatch.setattr(teacher, "forward", lambda *args, **options: pytest.fail("the teacher was asked"))
    assert distillation.term(batch.tokens, batch.targets, logits, 0).item() == 0
    with pytest.raises(pytest.fail.Exception):
        distillation.term(batch.tokens, batch.targets, logits, 1)


class Gradients:
    """An optimizer that updates nothing and keeps the gradients."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.found = model, {}

    def step(self) -> None:
        self.found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none)


def one_step(distillation: Distillation | None, micro: int, k: int = 4) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model("bitnet")
    kept: Any = Gradients(model)
    stepper = Stepper(model, kept, ObjectiveSettings(), 0.0, micro, False, print, distillation=distillation)
    return stepper(ragged(), k=k), kept.found


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_t11_the_term_is_weighted_by_tokens_over_the_whole_batch_however_it_is_cut(micro: int) -> None:
    distillation = taught(tiny_model("bitnet", seed=2), weight=2)
    (whole, gradient), (parts, summed) = one_step(distillation, 6), one_step(distillation, micro)
    assert parts.distillation == pytest.approx(whole.distillation, rel=1e-5)
    for name, value in gradient.items():
        assert torch.allclose(summed[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max())), name


def test_t09_the_loss_is_reported_without_the_term_and_the_gradient_holds_both() -> None:
    teacher = tiny_model("bitnet", seed=2)
    alone, of_loss = one_step(None, 3)
    both, of_both = one_step(taught(teacher, weight=2), 3)
    assert both.loss == alone.loss and alone.distillation is None
    student, batch = tiny_model("bitnet"), ragged()
    term = plain_term(teacher, student, batch, 2.0, 2.0) / batch.num_targets
    assert both.distillation == pytest.approx(term.item(), rel=1e-4)
    term.backward()
    for name, added in gradients(student).items():
        expected = of_loss[name] + added
        assert torch.allclose(of_both[name], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


# ---- as part of a run ----


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return tiny_corpus(tmp_path)


@pytest.fixture
def teacher(tmp_path: Path, prepared: Prepared) -> Path:
    """The last checkpoint of a small ternary run."""
    trainer = tiny_trainer(tmp_path / "runs" / "teacher", prepared, tiny_settings(tmp_path, training={"seed": 5}))
    trainer.run()
    return checkpoint.newest_valid(tmp_path / "runs" / "teacher" / "checkpoints")


def student_settings(tmp_path: Path, teacher: object, **sections: Any) -> RunSettings:
    section = {"teacher": str(teacher), "ramp_steps": 2} | sections.pop("distillation", {})
    return tiny_settings(tmp_path, distillation=section, **{"tracking": {"every_steps": 1}} | sections)


def test_a_run_logs_the_term_beside_the_loss_and_remembers_its_teacher(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    trainer = tiny_trainer(tmp_path / "runs" / "student", prepared, student_settings(tmp_path, teacher))
    trainer.run()
    rows = read_jsonl(tmp_path / "runs" / "student" / "metrics" / "scalars.jsonl")
    assert [row["train/distillation_weight"] for row in rows] == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert rows[0]["train/distillation_loss"] == 0 and all(row["train/distillation_loss"] > 0 for row in rows[1:])
    plain = tiny_trainer(tmp_path / "runs" / "plain", prepared, tiny_settings(tmp_path, tracking={"every_steps": 1}))
    plain.run()
    others = read_jsonl(tmp_path / "runs" / "plain" / "metrics" / "scalars.jsonl")
    assert rows[0]["train/loss"] == others[0]["train/loss"] and rows[1]["train/loss"] == others[1]["train/loss"]
    assert rows[2]["train/loss"] != others[2]["train/loss"] and "train/distillation_loss" not in others[0]
    newest = checkpoint.newest_valid(tmp_path / "runs" / "student" / "checkpoints")
    state = json.loads((newest / "trainer_state.json").read_text())
    manifest = json.loads((teacher / "manifest.json").read_text())
    assert state["distillation"] == {
        "path": str(teacher), "manifest_sha256": manifest["sha256"], "run_id": "teacher", "step": 6,
    }  # fmt: skip


def test_the_teacher_has_full_precision_unless_its_rounding_is_wanted(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    batch, student = ragged(), tiny_model("bitnet", vocab_size=256)
    terms = {}
    for rounds in (False, True):
        section = settings(teacher=str(teacher), teacher_quantized=rounds)
        built = build_distillation(section, student, 16, prepared.tokenizer, tmp_path / "runs", 10)
        assert built is not None
        modes = {layer.mode.weights for layer in built.teacher.bit_linears().values()}
        assert modes == ({"ternary"} if rounds else {"none"})
        terms[rounds] = built.term(batch.tokens, batch.targets, student(batch.tokens).logits, 3).item()
    assert terms[False] != terms[True]
    student.compute_dtype = torch.bfloat16
    built = build_distillation(section, student, 16, prepared.tokenizer, tmp_path / "runs", 10)
    assert built is not None and built.teacher.compute_dtype == torch.bfloat16
    assert build_distillation(DistillationSettings(), student, 16, prepared.tokenizer, tmp_path / "runs", 10) is None


def test_a_stopped_and_resumed_student_is_the_one_that_never_stopped(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    made = student_settings(tmp_path, teacher, training={"checkpoint_every_steps": 3, "keep_last": 5})
    whole = tiny_trainer(tmp_path / "runs" / "whole", prepared, made)
    whole.run()
    middle = tmp_path / "runs" / "whole" / "checkpoints" / "step_000003"
    resumed = tiny_trainer(tmp_path / "runs" / "resumed", prepared, made, middle)
    resumed.run()
    for name, tensor in whole.model.tensors().items():
        assert torch.equal(resumed.model.tensors()[name], tensor), name


def test_a_student_comes_closer_to_its_teacher_than_one_without(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    distances = []
    for weight in (0.0, 4.0):
        training = {"max_steps": 30, "seed": 1}
        made = student_settings(tmp_path, teacher, distillation={"weight": weight}, training=training)
        trainer = tiny_trainer(tmp_path / "runs" / f"weight{weight}", prepared, made)
        trainer.run()
        batch = trainer.loader.batch(1000)
        model = trainer.model.eval()
        with torch.no_grad():
            ours, theirs = (m(batch.tokens).logits.flatten(0, 1) for m in (model, trainer.distillation.teacher))
        distances.append(plain_divergence(ours, theirs, None, 1.0).item())
    assert distances[1] < 0.9 * distances[0]


# ---- what is refused, and when ----


def start(tmp_path: Path, prepared: Prepared, made: RunSettings, name: str = "student") -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / name)
    resolved = resolve([Layer("test", made.model_dump(mode="json", exclude_unset=True))], setting_names())
    launch.start(resolved, run, lambda settings, folder: prepared, quiet=True)
    return run


def test_a_run_that_is_named_becomes_the_checkpoint_it_has_now(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    run = start(tmp_path, prepared, student_settings(tmp_path, "teacher"))
    assert json.loads(run.config.read_text())["distillation"]["teacher"] == str(teacher)
    sitting = json.loads(run.provenance.read_text())["sittings"][0]
    assert (sitting["teacher"]["step"], sitting["teacher"]["run_id"]) == (6, "teacher")


def test_a_resumed_run_must_have_its_teacher_wherever_that_lies_now(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    run = start(tmp_path, prepared, student_settings(tmp_path, teacher))
    other = tiny_trainer(tmp_path / "runs" / "other", prepared, tiny_settings(tmp_path, training={"seed": 6}))
    other.run()
    another = checkpoint.newest_valid(tmp_path / "runs" / "other" / "checkpoints")

    def resume(**overrides: Any) -> int:
        prepare = lambda settings, folder: prepared  # noqa: E731
        changes = {"training.max_steps": 8, **{f"distillation.{name}": value for name, value in overrides.items()}}
        return launch.resume(run, changes, prepare, quiet=True).step

    with pytest.raises(CheckpointError, match=r"was trained with the teacher .*step_000006.* another one"):
        resume(teacher=str(another))
    with pytest.raises(CheckpointError, match="this is no teacher"):
        resume(teacher="none")
    with pytest.raises(SettingsError, match="cannot change"):
        resume(weight=1)
    teacher.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"distillation\.teacher=.*step_000006 cannot be used"):
        resume()
    assert resume(teacher=str(tmp_path / "moved")) == 8


def test_a_run_without_a_teacher_gets_none_on_resuming(teacher: Path) -> None:
    identity = {"path": str(teacher), "manifest_sha256": "a" * 64}
    with pytest.raises(CheckpointError, match="trained without a teacher"):
        require_same_teacher(identity, {"distillation": None}, teacher)
    with pytest.raises(CheckpointError, match="trained without a teacher"):
        require_same_teacher(identity, {}, teacher)
    require_same_teacher(None, {}, teacher)
    require_same_teacher(identity, {"distillation": {**identity, "path": "elsewhere"}}, teacher)


def test_a_teacher_that_is_not_there_or_damaged_is_refused_before_anything_is_made(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    for name in ("nowhere", str(tmp_path / "runs" / "teacher" / "checkpoints" / "step_000099")):
        with pytest.raises(CheckpointError, match=rf"distillation\.teacher={name} cannot be used") as caught:
            start(tmp_path, prepared, student_settings(tmp_path, name))
        assert "\n" not in str(caught.value)
    weights = teacher / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"cannot be used: .*model\.safetensors.*sha256"):
        start(tmp_path, prepared, student_settings(tmp_path, teacher))
    assert not (tmp_path / "runs" / "student").exists()


def test_a_teacher_with_another_vocabulary_tokenizer_length_or_kind_is_refused(
    tmp_path: Path, prepared: Prepared, teacher: Path
) -> None:
    section = settings(teacher=str(teacher))
    known = tiny_settings(tmp_path).model
    wide = known.model_copy(update={"vocab_size": 300})
    with pytest.raises(SettingsError, match=r"vocabulary of 256 ids.* one of 300.*model\.vocab_size=256"):
        require_teacher(section, wide, 16, prepared.tokenizer, tmp_path)
    with pytest.raises(SettingsError, match=r"reads 37 tokens at most.*sequence_length=38"):
        require_teacher(section, known, 38, prepared.tokenizer, tmp_path)
    other = tiny_model("qdyt", vocab_size=256).settings
    with pytest.raises(SettingsError, match="predicts the next token, the model of the run masked tokens"):
        require_teacher(section, other, 16, prepared.tokenizer, tmp_path)

    class Foreign:
        name, fingerprint = "foreign", "0" * 64

    with pytest.raises(SettingsError, match="trained with another tokenizer than 'foreign'"):
        require_teacher(section, known, 16, Foreign(), tmp_path)  # type: ignore[arg-type]
    assert require_teacher(section, known, 37, prepared.tokenizer, tmp_path) == teacher


def test_the_memory_of_a_teacher_is_that_of_its_weights(tmp_path: Path, teacher: Path) -> None:
    size = sum(
        tensor.numel() * tensor.element_size() for tensor in tiny_model("bitnet", vocab_size=256).tensors().values()
    )
    counted = teacher_bytes(settings(teacher="teacher"), tmp_path / "runs")
    assert size <= counted < size + 10_000
    assert teacher_bytes(DistillationSettings(), tmp_path) == 0
    plans = [make_plan(made) for made in (tiny_settings(tmp_path), student_settings(tmp_path, teacher))]
    assert [plan.teacher_bytes for plan in plans] == [0, counted]
    assert plans[0].activation_bytes_estimate < plans[1].activation_bytes_estimate
    with pytest.raises(CheckpointError, match=r"distillation\.teacher=nowhere cannot be used"):
        make_plan(student_settings(tmp_path, "nowhere"))
