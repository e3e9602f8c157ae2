"""Experiment files in the keys of another trainer: every key has a place here, or a sentence says why not."""

import json
from pathlib import Path
from typing import Any

import pytest

from ternlm.errors import SettingsError
from ternlm.experiment import Experiment, load_experiment
from ternlm.training.settings import RunSettings, resolve_settings

HGRN = {"model_type": "simplified_slm", "vocab_size": 256, "hidden_size": 40, "num_hidden_layers": 3, "num_heads": 1}
HNET = {"model_type": "hnet_bit", "vocab_size": 256, "d_model": [24, 40], "num_blocks": [[1, 0, 2], [3]]}
SECTIONS: dict[str, Any] = {
    "experiment_name": "their_try",
    "description": "as they write it",
    "model": {"config_file": "configs/small.json", "type": "flat"},
    "data": {
        "dataset": "tinystories",
        "data_dir": "./prepared",
        "max_seq_length": 96,
        "val_ratio": 0.15,
        "test_ratio": 0.05,
    },
    "training": {
        "batch_size": 6, "gradient_accumulation_steps": 3, "effective_batch_size": 18,
        "learning_rate": 7e-4, "weight_decay": 0.02, "max_grad_norm": 0.7,
        "max_steps": 90, "warmup_steps": 11, "scheduler": "cosine",
        "eval_interval": 31, "save_interval": 41, "log_interval": 7,
        "mixed_precision": "bf16", "compile_model": False,
    },
    "evaluation": {"batch_size": 13, "num_generation_samples": 8, "generation_max_tokens": 77},
    "output": {"checkpoint_dir": "./c", "log_dir": "./l", "results_dir": "./r"},
    "hardware": {"device": "cuda", "num_workers": 4},
    "seed": 5,
}  # fmt: skip
FLAT: dict[str, Any] = {
    "output_dir": "./out/here", "data_path": None, "dataset": "someone/Stories", "dataset_config": "small",
    "text_column": "auto", "text_columns": None, "separator": " ", "streaming": False, "max_samples": 300,
    "train_split": "train", "val_split": "validation", "max_steps": 50, "batch_size": 4,
    "gradient_accumulation_steps": 2, "learning_rate": 2e-4, "weight_decay": 0.1, "warmup_steps": 3,
    "lr_scheduler": "linear", "max_seq_length": 64, "max_grad_norm": 1.0, "adam_beta1": 0.85, "adam_beta2": 0.97,
    "adam_eps": 1e-7, "eval_interval": 20, "save_interval": 10, "log_interval": 5, "fp16": False, "bf16": False,
    "resume_from": None, "lr_multipliers": [1.5, 1.0], "lambda_lb": 0.02, "downsampling_factor": 2.5, "seed": 9,
}  # fmt: skip


def loaded(folder: Path, values: dict[str, Any], model: dict[str, Any] = HGRN, by_option: bool = False) -> Experiment:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "small.json").write_text(json.dumps(model))
    (folder / "configs" / "try.json").write_text(json.dumps(values))
    model_file = folder / "configs" / "small.json" if by_option else None
    return load_experiment(str(folder / "configs" / "try.json"), model_file)


def settings_of(experiment: Experiment) -> RunSettings:
    return RunSettings.from_mapping(resolve_settings(experiment.layers).values)


def with_changes(values: dict[str, Any], section: str, **changes: Any) -> dict[str, Any]:
    return {**values, section: {**values[section], **changes}}


def test_sections_become_ours_value_by_value(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, SECTIONS)
    run = settings_of(experiment)
    assert (experiment.name, experiment.directory) == ("their_try", None)
    assert (run.model.family, run.model.total_blocks, run.model.vocab_size) == ("hgrn", 3, 256)
    assert (run.tokenizer.name, run.data.source, run.data.sequence_length) == ("byte", "tinystories", 96)
    assert (run.data.validation_fraction, run.data.test_fraction) == (0.15, 0.05)
    assert (run.training.batch_size, run.training.micro_batch_size) == (18, 6)
    assert (run.optimizer.learning_rate, run.optimizer.weight_decay, run.training.grad_clip) == (7e-4, 0.02, 0.7)
    assert (run.training.max_steps, run.schedule.warmup_steps, run.schedule.name) == (90, 11, "cosine")
    assert (run.schedule.min_lr_ratio, run.schedule.weight_decay_until) == (0.0, 1.0)
    assert (run.evaluation.every_steps, run.training.checkpoint_every_steps, run.tracking.every_steps) == (31, 41, 7)
    assert (run.training.precision, run.training.device, run.training.seed) == ("auto", "auto", 5)
    assert run.evaluation.batch_size == 13
    assert experiment.generation.samples == 8
    assert experiment.generation.sampling == {"max_new_tokens": 77}


def test_everything_left_out_or_converted_is_said(tmp_path: Path) -> None:
    said = "\n".join(loaded(tmp_path, SECTIONS).notes)
    for word in ("small.json", "num_heads", "data_dir=./prepared", "val_ratio=0.15 has no effect", "batch_size=18",
                 "bf16", "checkpoint_dir, log_dir", "output.directory", "device=cuda", "num_workers",
                 "weight decay"):  # fmt: skip
        assert word in said


def test_a_flat_list_of_settings_takes_its_model_from_the_option(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, FLAT, HNET, by_option=True)
    run = settings_of(experiment)
    assert experiment.directory == Path("out/here")
    assert (run.data.source, run.data.max_documents, run.data.text_column) == ("hf:someone/Stories:small", 300, "text")
    assert (run.optimizer.betas, run.optimizer.eps, run.training.precision) == ((0.85, 0.97), 1e-7, "fp32")
    assert (run.training.batch_size, run.data.sequence_length, run.schedule.name) == (8, 64, "linear")
    model: Any = run.model
    assert (model.lr_multipliers, model.ratio_loss_weight, model.targets) == ((1.5, 1.0), 0.02, (2.5,))


def test_settings_of_chunks_are_left_out_of_a_model_without_chunks(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, FLAT, HGRN, by_option=True)
    settings_of(experiment)
    assert sum("this model has no chunks" in note for note in experiment.notes) == 3


def test_a_model_may_stand_in_the_file_itself(tmp_path: Path) -> None:
    values = {**SECTIONS, "model": {"type": "hnet_bit", "params": HNET}}
    assert settings_of(loaded(tmp_path, values)).model.family == "hnet"


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ({"data_dir": "./data/tinystories"}, "tinystories"),
        ({"data_dir": "./my/texts"}, "./my/texts"),
        ({"data_path": "book.txt"}, "book.txt"),
        ({"dataset": "roneneldan/TinyStories"}, "tinystories"),
        ({"dataset": "owner/name"}, "hf:owner/name"),
        ({"dataset": "Salesforce/wikitext", "dataset_config": "wikitext-2-raw-v1"}, "wikitext-2"),
    ],
)
def test_where_the_text_comes_from(tmp_path: Path, data: dict[str, Any], source: str) -> None:
    assert settings_of(loaded(tmp_path, {**SECTIONS, "data": data})).data.source == source


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({**SECTIONS, "model": {"config_file": "configs/none.json"}}, "config_file='configs/none.json' is not found"),
        (with_changes(SECTIONS, "model", type="x", params={"model_type": "gpt"}, config_file=None), "model_type='gpt'"),
        (with_changes(SECTIONS, "data", text_columns=["question", "answer"]), "joins several columns"),
        (with_changes(SECTIONS, "data", train_split="half"), "train_split must be 'train'"),
        (with_changes(SECTIONS, "training", resume_from="x.pt"), "goes on where it was stopped"),
        (
            with_changes(SECTIONS, "training", batch_size="six"),
            r"training\.batch_size='six' is refused: it must be a whole",
        ),
        (with_changes(SECTIONS, "training", gradient_accumulation_steps=0.5), r"steps=0\.5 is refused"),
        (with_changes(SECTIONS, "data", dataset=5), r"data\.dataset=5 is refused: it must be a text"),
        (with_changes(SECTIONS, "data", data_dir=["a"]), r"data\.data_dir=\['a'\] is refused"),
        (with_changes(SECTIONS, "data", text_columns=7), r"data\.text_columns=7 is refused"),
        (with_changes(SECTIONS, "model", params=[1]), r"section 'model\.params' must hold settings"),
        (with_changes(SECTIONS, "hardware", gpus=3), "unknown setting 'hardware.gpus'"),
        (FLAT, "no model. Add the file of a model with --model-config"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_sentence(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        loaded(tmp_path, values)


def test_a_key_that_nobody_knows_is_an_error_as_everywhere(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, with_changes(SECTIONS, "training", label_smoothing=0.1))
    with pytest.raises(SettingsError, match=r"unknown setting 'training\.label_smoothing'"):
        settings_of(experiment)
