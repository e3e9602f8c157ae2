"""Progressive quantization in real runs: codes tell the stage, and stopping and resuming changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_corpus, tiny_settings, tiny_trainer
from encoders import wordpiece
from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.tokenizers import TokenizerSettings
from ternlm.training import launch
from ternlm.training.trainer import Trainer

STEPS = 20  # stages begin at 4 and 10

BITNET: dict[str, Any] = {}
QDYT: dict[str, Any] = {
    "model": {"family": "qdyt", "hidden_dropout": 0.1, "attention_dropout": 0.1, "qdyt_alpha_warmup_steps": 15,
              "num_hidden_layers": 4},
    "objective": {"name": "mlm"},
    "quantization": {"quantizer": "ttq", "activations": "int4", "qdrop": 0.3, "dither": 0.5, "dither_steps": 3,
                     "ternary_dropout": 0.1, "ternary_dropout_steps": 13, "blend_steps": 2},
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", ["bitnet", "qdyt"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    folder = tmp_path_factory.mktemp("corpus")
    wordpiece(folder / "tokenizer")
    pieces = TokenizerSettings(name=str(folder / "tokenizer"))
    return {"bitnet": tiny_corpus(folder / "bytes"), "qdyt": tiny_corpus(folder / "pieces", tokenizer=pieces)}


def sections(family: str) -> dict[str, Any]:
    own = BITNET if family == "bitnet" else QDYT
    base: dict[str, Any] = {
        "model": {"num_hidden_layers": 4},
        "training": {"max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "checkpoint_every_steps": 7,
                     "keep_last": 2},
        "quantization": {"progressive": True, "int8_until": 0.2, "partial_until": 0.5, "lr_ramp_steps": 4},
        "tracking": {"every_steps": 1, "tensorboard": False},
        "evaluation": {"every_steps": 5},
    }  # fmt: skip
    return {name: base.get(name, {}) | own.get(name, {}) for name in base | own}


def train(run: RunDirectory, prepared: Prepared, family: str) -> None:
    settings = tiny_settings(run.path.parent, **sections(family))
    launch.start(Resolved(settings.model_dump(mode="json"), {}), run, lambda *_: prepared, quiet=True)


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run stop right after so many updates, as when the process is killed."""
    make_step = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        if self.progress.step == step:
            raise KeyboardInterrupt
        return make_step(self, *arguments)

    patch.setattr(Trainer, "train_step", train_step)


@FAMILIES
@pytest.mark.parametrize("stopped", [8, 11, 15])  # the last checkpoints are at 7, 10 and 14
def test_a_run_killed_in_any_stage_goes_on_bit_for_bit(
    data: dict[str, Prepared], tmp_path: Path, family: str, stopped: int
) -> None:
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    train(whole, data[family], family)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, stopped)
        train(cut, data[family], family)
    launch.resume(cut, {}, lambda *_: data[family], quiet=True)
    ends = [checkpoint.open_checkpoint(checkpoint.folder(run.checkpoints, STEPS)) for run in (whole, cut)]
    for kind in ("model", "optimizer"):
        left, right = (getattr(end, kind) for end in ends)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    keys = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/stage")
    rows = [[[row[key] for key in keys] for row in read_jsonl(run.scalars)] for run in (whole, cut)]
    assert rows[0] == rows[1]
    scores = [[row["val/loss"] for row in read_jsonl(run.evaluations)] for run in (whole, cut)]
    assert scores[0] == scores[1]


@FAMILIES
def test_m01_codes_of_checkpoints_on_both_sides_of_each_boundary_tell_the_stage(
    data: dict[str, Prepared], tmp_path: Path, family: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    train(run, data[family], family)
    assert {4, 5, 10, 11, STEPS} <= set(checkpoint.steps(run.checkpoints))
    for step, ternary in ((4, 0), (5, 2), (10, 2), (11, 4), (STEPS, 4)):
        model = checkpoint.load(checkpoint.folder(run.checkpoints, step)).model
        for number, block in enumerate(model.blocks()):
            for layer in (module for module in block.modules() if hasattr(module, "matrices")):
                for codes, _ in layer.matrices().values():
                    is_ternary = number >= 4 - ternary and layer.mode.weights == "ternary"
                    assert (len(codes.unique()) <= 3) is is_ternary, (step, number)
                    assert codes.abs().max() <= 127
        if family == "bitnet" or step != STEPS:
            kinds = [block_mode(block) for block in model.blocks()]
            assert kinds == ["int8"] * (4 - ternary) + ["ternary"] * ternary


def block_mode(block: torch.nn.Module) -> str:
    modes = [module.mode.weights for module in block.modules() if hasattr(module, "matrices")]
    return modes[0]  # query and key, which are never kept at more bits


@FAMILIES
def test_t01_t04_rows_and_the_optimizer_say_the_rate_and_stage_of_each_update(
    data: dict[str, Prepared], tmp_path: Path, family: str
) -> None:
    run, used = RunDirectory(tmp_path / "run"), []
    make_step = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        result = make_step(self, *arguments)
        used.append({group["name"]: group["lr"] for group in self.optimizer.param_groups}["matrices"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        train(run, data[family], family)
    rows = read_jsonl(run.scalars)
    assert [row["train/learning_rate"] for row in rows] == used
    assert [row["train/stage"] for row in rows] == [1] * 4 + [2] * 6 + [3] * 10
    assert [row["quantization/ternary_layers"] for row in rows] == [0] * 4 + [2] * 6 + [4] * 10
    assert [row["quantization/layer_00/ternary"] for row in rows] == [0] * 10 + [1] * 10
    assert [row["quantization/layer_03/ternary"] for row in rows] == [0] * 4 + [1] * 16
    assert rows[-1]["quantization/rate_factor"] == pytest.approx(0.7)
    status = json.loads(run.status.read_text())
    assert (status["stage"], status["stage_name"]) == (3, "fully ternary")


@FAMILIES
def test_a_checkpoint_is_scored_with_the_rounding_it_was_scored_with_in_training(
    data: dict[str, Prepared], tmp_path: Path, family: str
) -> None:
    from ternlm.evaluation.evaluate import evaluate

    run = RunDirectory(tmp_path / "run")
    train(run, data[family], family)
    logged = {row["step"]: row["val/loss"] for row in read_jsonl(run.evaluations)}
    for step in (5, 10, STEPS):
        path = checkpoint.folder(run.checkpoints, step)
        loaded, settings = checkpoint.load(path), tiny_settings(tmp_path, **sections(family))
        stream = data[family].corpus.split("validation")
        result = evaluate(loaded.model, stream, loaded.tokenizer, 16, masking=settings.objective.masking)
        assert result.loss == pytest.approx(logged[step], rel=1e-6), step


@pytest.mark.parametrize(("times", "fitted"), [(3, [False, False, True, True]), (6, [False] * 4)])
def test_a_longer_run_fits_learned_scales_anew_where_it_goes_back_to_integer_weights(
    data: dict[str, Prepared], tmp_path: Path, times: int, fitted: list[bool]
) -> None:
    run, values = RunDirectory(tmp_path / "run"), sections("bitnet")
    values["quantization"] |= {"quantizer": "ttq"}
    settings = tiny_settings(tmp_path, **values)
    launch.start(Resolved(settings.model_dump(mode="json"), {}), run, lambda *_: data["bitnet"], quiet=True)
    values["training"] |= {"max_steps": times * STEPS}  # stages begin at 12 and 30, or at 24 and 60
    longer = tiny_trainer(tmp_path / "longer", data["bitnet"], tiny_settings(tmp_path, **values),
                          checkpoint.folder(run.checkpoints, STEPS))  # fmt: skip
    assert [bool(block.mlp.down.quantizer.fitted) for block in longer.model.blocks()] == fitted
