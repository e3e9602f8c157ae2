"""Small things that many tests build: a model of any family, a prepared corpus, the settings of a run.

Sizes are odd on purpose, so that swapped dimensions do not fit by chance. Everything is a pure function
of its arguments.
"""

import errno
import math
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternlm.data.preparation import Prepared, prepare_data
from ternlm.data.settings import DataSettings
from ternlm.models import MODELS, LanguageModel, ModelSettings, QuantizationMode, build_model, model_settings
from ternlm.tokenizers import TokenizerSettings
from ternlm.training.settings import RunSettings

TINY_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 37,
    "qdyt_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "d_model": (24, 40),
    "num_blocks": ((2, 0, 2), (2,)),
}
"""Sizes by their common names; a family takes those that it declares."""

TRAIN = [
    f"Story {i}: the {'red' if i % 2 else 'blue'} fox met {i % 7} hens." + " And ran." * (i % 5) for i in range(60)
]
VALIDATION = ["The old fox slept.", "Hé, a 🙂 fox: naïve!", "Seven hens\nmet a blue hen and ran away from it."]


def tiny_model_settings(family: str, **overrides: Any) -> ModelSettings:
    """The smallest interesting model of a family, by settings."""
    known = MODELS[family].settings.model_fields
    sizes = {name: size for name, size in TINY_SIZES.items() if name in known}
    return model_settings({"family": family, **sizes, **overrides})


def tiny_model(
    family: str,
    mode: QuantizationMode | None = None,
    seed: int = 1,
    gradient_checkpointing: bool = False,
    **overrides: Any,
) -> LanguageModel:
    """The smallest interesting model of a family, initialized, in training mode.

    Args:
        family: Key in `MODELS`.
        mode: Rounding; ternary weights and 8-bit activations by default.
        seed: Decides the weights.
        gradient_checkpointing: As the model takes it.
        overrides: Model settings that differ from `TINY_SIZES`.
    """
    settings = tiny_model_settings(family, **overrides)
    model = build_model(settings, mode or QuantizationMode(), gradient_checkpointing)
    model.initialize(seed)
    return model


def tiny_bitnet(**overrides: Any) -> LanguageModel:
    """`tiny_model` of the family `bitnet`."""
    return tiny_model("bitnet", **overrides)


def random_tokens(*shape: int, vocab_size: int = TINY_SIZES["vocab_size"], seed: int = 0) -> Tensor:
    """Seeded token ids, int64."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded standard normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_corpus(
    tmp_path: Path,
    train: Sequence[str] = TRAIN,
    validation: Sequence[str] = VALIDATION,
    tokenizer: TokenizerSettings | None = None,
) -> Prepared:
    """Documents, prepared in `tmp_path`, with the byte tokenizer unless another is given."""
    return prepare_data(tiny_data_settings(tmp_path, train, validation), tokenizer or TokenizerSettings())


def tiny_data_settings(
    tmp_path: Path, train: Sequence[str] = TRAIN, validation: Sequence[str] = VALIDATION, **overrides: Any
) -> DataSettings:
    """Write documents below `tmp_path` and return the settings that read them."""
    paths = {}
    tmp_path.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("validation", validation)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    values = {
        "source": str(paths["train"]),
        "validation_path": str(paths["validation"]),
        "validation_fraction": 0,
        "test_fraction": 0,
        "sequence_length": 16,
        "cache": str(tmp_path / "cache"),
    }
    return DataSettings.from_mapping(values | overrides, "data")


def tiny_settings(tmp_path: Path, **sections: Any) -> RunSettings:
    """Settings of a run of a few steps on `tiny_data_settings`, on the CPU in float32.

    Args:
        tmp_path: Where documents and the prepared corpus go.
        sections: Values by section, put on top: ``training={"max_steps": 3}``.
    """
    family = sections.get("model", {}).get("family", "bitnet")
    known = MODELS[family].settings.model_fields
    sizes = {name: size for name, size in TINY_SIZES.items() if name in known} | {"vocab_size": 256}
    base: dict[str, dict[str, Any]] = {
        "model": {"family": family, **sizes},
        "data": tiny_data_settings(tmp_path).model_dump(),
        "training": {"max_steps": 6, "batch_size": 4, "precision": "fp32", "device": "cpu", "threads": 1},
        "evaluation": {"prompts": ["The"], "sample_tokens": 5},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return RunSettings.from_mapping(base)


def tiny_trainer(path: Path, prepared: Prepared, settings: RunSettings, resume_from: Path | None = None) -> Any:
    """A silent trainer of a run in `path`, which is made if it is not there."""
    from ternlm.checkpoint import open_checkpoint
    from ternlm.run_directory import RunDirectory
    from ternlm.training.trainer import Trainer

    run = RunDirectory(path)
    run.ensure_writable()
    opened = None if resume_from is None else open_checkpoint(resume_from)
    return Trainer(settings, prepared.corpus, prepared.tokenizer, run, opened, quiet=True)


def tiny_contents(model: LanguageModel, state: dict[str, Any]) -> Any:
    """What a checkpoint holds of a model that has made one step, with the byte tokenizer."""
    from ternlm.checkpoint import Contents
    from ternlm.tokenizers import ByteTokenizer
    from ternlm.training.optimizer import OptimizerSettings, build_optimizer, optimizer_tensors

    optimizer = build_optimizer(model, OptimizerSettings())
    model(random_tokens(2, 5)).logits.square().mean().backward()
    optimizer.step()
    config = {
        "model": model.settings.model_dump(mode="json"),
        "quantization": QuantizationMode().model_dump(mode="json"),
        "training": {"precision": "fp32"},
        "data": {"sequence_length": 9},
    }
    return Contents(model.tensors(), optimizer_tensors(model, optimizer), state, config, ByteTokenizer())


def let_data_be_bad(patch: Any, samples: Container[int]) -> None:
    """Let gradients of batches that begin at these samples be NaN, whoever computes them.

    Args:
        patch: A `MonkeyPatch`.
        samples: Positions in the data.
    """
    from ternlm.training.trainer import Trainer

    build = Trainer._build_model

    def with_hook(self: Trainer) -> LanguageModel:
        model = build(self)
        parameter = model.get_parameter("model.norm.weight")
        parameter.register_hook(lambda g: g * math.nan if self.progress.samples in samples else g)
        return model

    patch.setattr(Trainer, "_build_model", with_hook)


class Fault:
    """Makes the n-th file-system operation of the process fail, and all later ones as well if it sticks.

    Args:
        replace: `MonkeyPatch.setattr`, which undoes what is done here.
        n: Which operation, from 1.
        sticks: Whether the disk stays full.

    Attributes:
        met: Whether the operation was reached.
    """

    OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "close")

    def __init__(self, replace: Any, n: int, sticks: bool) -> None:
        self.count, self.met = 0, False
        for name in self.OPERATIONS:
            replace(os, name, self._failing(name, getattr(os, name), n, sticks))

    def _failing(self, name: str, real: Any, n: int, sticks: bool) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == n or (sticks and self.count > n):
                self.met = True
                if name == "close":
                    real(*args, **options)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return operation
