"""From a verified checkpoint to a model, or to the state that training goes on from."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternlm.checkpoint.manifest import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    PACKED,
    STATE,
    parse_object,
    parse_tensors,
    read_manifest,
    read_verified,
)
from ternlm.checkpoint.packed import load_packed, parse_metadata, require_packed_fitting
from ternlm.checkpoint.snapshot import environment
from ternlm.checkpoint.store import first_good
from ternlm.device import choose_dtype
from ternlm.errors import CheckpointError, SettingsError
from ternlm.models import LanguageModel, ModelSettings, QuantizationMode, build_model, model_settings
from ternlm.models.stages import QuantizationSettings, Stages
from ternlm.tokenizers import Tokenizer, load_tokenizer


class Loaded(NamedTuple):
    """A model ready to use, and what it was trained with."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    state: dict[str, Any]
    path: Path


class Opened(NamedTuple):
    """What training goes on from; every file of the checkpoint was hashed, once, before any was parsed.

    Attributes:
        path: The checkpoint folder.
        manifest: Its manifest.
        model: Tensors by their names in files.
        optimizer: Optimizer tensors by name.
        state: Counters and scalars, with `step` and `tokenizer_fingerprint`.
    """

    path: Path
    manifest: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def load(path: Path, device: torch.device | str = "cpu", mode: QuantizationMode | None = None) -> Loaded:
    """Verify a checkpoint and build its model, in evaluation mode.

    Args:
        path: A checkpoint folder; with packed weights the model has codes and scales, and no latent weights.
        device: Where the model goes.
        mode: Rounding to use instead of the one it was trained with, which is that of its last update.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit its own settings.
    """
    is_packed = path.is_dir() and PACKED in read_manifest(path)["files"]
    weights = PACKED if is_packed else MODEL
    _, files = read_verified(path, only=(weights, CONFIG, STATE))
    config, state = parse_object(path, CONFIG, files), parse_object(path, STATE, files)
    try:
        settings = model_settings(config["model"])
        if settings.vocab_size is None:
            raise ValueError("model.vocab_size is not set")
        quantization = QuantizationSettings.from_mapping(config["quantization"], "quantization")
        stages = Stages(quantization, settings.total_blocks, int(state.get("total_steps", 0)))
        last_update = int(state["step"]) - 1
        dtype = choose_dtype(config["training"]["precision"], torch.device(device))
    except (LookupError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise CheckpointError(f"'{path / CONFIG}' describes no model ({error}). Use another checkpoint.") from None
    tensors = parse_tensors(path, weights, files[weights])
    metadata = parse_metadata(files[weights], path / weights) if is_packed else {}
    fits = partial(require_packed_fitting, metadata=metadata) if is_packed else require_fitting
    model = _built(settings, quantization.base(), device, tensors, path, fits)
    model.compute_dtype = dtype
    if not is_packed:
        load_tensors(model, tensors, path)
    stages.apply(model, last_update)
    if is_packed:
        load_packed(model, tensors, metadata, path / weights)
    if mode is not None:
        model.set_mode(mode)
    tokenizer = load_tokenizer(path)
    expected = state.get("tokenizer_fingerprint")
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            f"the tokenizer in '{path}' (fingerprint {tokenizer.fingerprint[:12]}) is not the one the model was "
            f"trained with ({str(expected)[:12]}). Copy the original tokenizer files back."
        )
    return Loaded(model.eval(), tokenizer, config, state, path)


def _built(
    settings: ModelSettings,
    mode: QuantizationMode,
    device: torch.device | str,
    tensors: Mapping[str, Tensor],
    path: Path,
    require: Callable[..., None],
) -> LanguageModel:
    """An uninitialized model, built only if `require` lets tensors be loaded into it."""
    try:
        if settings.total_blocks > len(tensors):
            raise RuntimeError(f"more layers than the {len(tensors)} tensors of the file")
        with torch.device("meta"):  # sizes are compared before any memory is taken for them
            require(build_model(settings, mode), tensors, path=path)
        with torch.device(device):
            return build_model(settings, mode)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"'{path / CONFIG}' describes no model ({reason}). Use another checkpoint.") from None


def open_checkpoint(path: Path) -> Opened:
    """Verify a checkpoint and read what training goes on from.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    manifest, files = read_verified(path, only=(MODEL, OPTIMIZER, STATE))
    state = parse_object(path, STATE, files)
    model, optimizer = (parse_tensors(path, name, files.pop(name)) for name in (MODEL, OPTIMIZER))
    return Opened(path, manifest, model, optimizer, state)


def open_newest(root: Path, report: Callable[[str], None] | None = None) -> Opened:
    """The checkpoint with the highest step that verifies, read in the same pass.

    Args:
        root: A run's checkpoints folder.
        report: Called with one sentence for each newer checkpoint that is damaged, and with one if
            the checkpoint was written by other versions than those that run now.

    Raises:
        CheckpointError: None is usable.
    """
    opened = first_good(root, open_checkpoint, report)
    then, now = opened.manifest.get("env", {}), environment()
    changed = [f"{name} {then[name]} (now {now[name]})" for name in now if then.get(name, now[name]) != now[name]]
    if changed and report is not None:
        report(f"checkpoint '{opened.path}' was written with {', '.join(changed)}: last bits may differ.")
    return opened


def load_tensors(model: LanguageModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a model, all or nothing.

    Raises:
        CheckpointError: Names, shapes or types differ from the model's.
    """
    require_fitting(model, tensors, path)
    with torch.no_grad():
        for name, tensor in model.tensors().items():
            tensor.copy_(tensors[name])


def require_fitting(model: LanguageModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not a model's; the model may be on the meta device.

    Raises:
        CheckpointError: Names, shapes or types differ from the model's.
    """
    wanted = model.tensors()
    for problem, names in (("lacks", wanted.keys() - tensors), ("has the unknown", tensors.keys() - wanted)):
        if names:
            example = min(names)
            raise CheckpointError(
                f"checkpoint '{path}' {problem} tensor {example!r} ({len(names)} in all); it was written for "
                f"another model than {model.settings.family}. Choose another checkpoint or drop the overrides."
            )
    for name, tensor in wanted.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"tensor '{name}' in '{path}' has shape {tuple(found.shape)} and type {_plain(found.dtype)}, the model "
                f"wants {tuple(tensor.shape)} and {_plain(tensor.dtype)}. Choose another checkpoint or drop the "
                "overrides."
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
