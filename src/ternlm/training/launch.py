"""From settings to a trained run: starting one, resuming one, and branching one from a checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ternlm import checkpoint
from ternlm.data.loader import require_one_window
from ternlm.data.preparation import Prepared
from ternlm.device import choose_device, set_up
from ternlm.errors import CheckpointError, SettingsError, TokenizerError
from ternlm.files import replace_durably, to_json
from ternlm.models import build_model
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import Layer, Resolved, read_mapping, resolve
from ternlm.tokenizers import load_tokenizer
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings, setting_names
from ternlm.training.trainer import Progress, Trainer

Prepare = Callable[[RunSettings], Prepared]
"""Gives the prepared data of a run; the command line shows a progress bar while it works."""

_FREE_ON_RESUME = {
    "training": {"max_steps", "max_tokens", "max_epochs", "max_time", "micro_batch_size",
                 "gradient_accumulation_steps", "device", "threads", "compile", "gradient_checkpointing",
                 "checkpoint_every_steps", "keep_last", "keep_every"},
    "tracking": None,
    "evaluation": None,
}  # fmt: skip
"""Settings that a resumed run may change without becoming another run; None means the whole section."""


def settings_from(resolved: Resolved) -> RunSettings:
    """Validated settings.

    Raises:
        SettingsError: A value breaks its rule.
    """
    return RunSettings.from_mapping(resolved.values)


def start(
    resolved: Resolved,
    run: RunDirectory,
    prepare: Prepare,
    resume_from: Path | None = None,
    quiet: bool = False,
) -> Progress:
    """Train a new run; with `resume_from` it goes on from a checkpoint of another one.

    Nothing is created before settings, data and tokenizer are known to fit.

    Raises:
        TernlmError: As its branches say.
    """
    settings = settings_from(resolved)
    _set_up(settings)
    prepared = prepare(settings)
    settings = with_vocab_size(settings, prepared)
    if resume_from is not None:
        _require_same_tokenizer(resume_from, prepared)
    require_one_window(prepared.corpus.split("train"), settings.data.sequence_length)
    prepared.corpus.split("validation")  # missing, it would stop the run at its first evaluation
    with torch.device("meta"):
        build_model(settings.model, settings.quantization)  # shapes that do not fit fail here
    run.create()
    with run.locked():
        write_config(run, settings, resolved.origins)
        trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, run, resume_from, quiet)
        _say_start(trainer, resume_from)
        if resume_from is not None:
            trainer.save()  # killed before its own first checkpoint, the branch must not restart from nothing
        return trainer.run()


def resume(run: RunDirectory, overrides: Mapping[str, Any], prepare: Prepare, quiet: bool = False) -> Progress:
    """Continue a run from its newest valid checkpoint, as if it had never stopped.

    Args:
        run: The run.
        overrides: Settings to change: limits, cadences and how the machine is used, nothing else.
        prepare: Gives the run's data, which must be what it was.
        quiet: Show nothing.

    Raises:
        SettingsError: An override would make it another run.
        CheckpointError: No checkpoint verifies, or the data are not those of the run.
    """
    names = setting_names()
    _refuse_other_changes(overrides, names.canonical)
    saved = Layer("run", read_mapping(run.config))
    resolved = resolve([saved, Layer("command line", overrides)], names)
    settings = settings_from(resolved)
    _set_up(settings)
    run.ensure_writable()
    with run.locked():
        checkpoint.remove_unfinished(run.checkpoints)
        first = _newest_or_none(run)
        prepared = prepare(settings)
        settings = with_vocab_size(settings, prepared)
        if first is not None:
            _require_same_tokenizer(first, prepared)
            _require_same_data(first, prepared)
        trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, run, first, quiet)
        if trainer.progress.step >= trainer.total_steps and trainer.is_evaluated():
            trainer.console.say(
                f"run '{run.id}' is complete at step {trainer.progress.step}. To train longer: "
                f"ternlm resume {run.path} --steps {2 * trainer.progress.step}"
            )
            trainer.trackers.close()
            return trainer.progress
        run.cut_after(trainer.progress.step)
        _say_moved_schedule(trainer, RunSettings.from_mapping(saved.values))
        _say_start(trainer, first)
        return trainer.run()


def with_vocab_size(settings: RunSettings, prepared: Prepared) -> RunSettings:
    """The settings with the model's vocabulary taken from the tokenizer where it was left open.

    Raises:
        TokenizerError: The model's vocabulary is smaller than the tokenizer's.
    """
    wanted = prepared.tokenizer.vocab_size
    size = settings.model.vocab_size
    if size is not None and size < wanted:
        raise TokenizerError(
            f"tokenizer '{prepared.tokenizer.name}' has {wanted:,} ids, model.vocab_size={size:,} is smaller. "
            f"Set model.vocab_size={wanted} or null, or choose the tokenizer the model was made for."
        )
    if size is not None:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"vocab_size": wanted})})


def _set_up(settings: RunSettings) -> None:
    training = settings.training
    set_up(choose_device(training.device), training.threads, training.deterministic)


def write_config(run: RunDirectory, settings: RunSettings, origins: Mapping[str, str]) -> None:
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    replace_durably(run.config, text.encode())
    replace_durably(run.config_origin, to_json(dict(origins)))


def _newest_or_none(run: RunDirectory) -> Path | None:
    """The newest valid checkpoint; None for a run that was stopped before its first one."""
    if not checkpoint.steps(run.checkpoints):
        return None
    return checkpoint.newest_valid(run.checkpoints, print)


def _require_same_tokenizer(path: Path, prepared: Prepared) -> None:
    if load_tokenizer(path).fingerprint != prepared.tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint '{path}' was trained with another tokenizer than '{prepared.tokenizer.name}'. "
            f"Use the one saved with it: tokenizer.name={path}"
        )


def _require_same_data(path: Path, prepared: Prepared) -> None:
    state = checkpoint.read_training_state(path)[2]
    if state.get("data_fingerprint") != prepared.corpus.fingerprint:
        raise CheckpointError(
            f"the prepared data in '{prepared.corpus.directory}' are not what '{path}' was trained on. "
            "Restore the source files, or start a new run with: ternlm train --resume-from CHECKPOINT --run-id NEW"
        )


def _refuse_other_changes(overrides: Mapping[str, Any], canonical: Callable[[str], str]) -> None:
    for name in overrides:
        section, _, field = canonical(name).partition(".")
        free = _FREE_ON_RESUME.get(section, set())
        if free is not None and field not in free:
            raise SettingsError(
                f"setting '{section}.{field}' cannot change when a run is resumed. "
                "Start a new run from it: ternlm train --resume-from CHECKPOINT --run-id NEW " + f"{name}=..."
            )


def _say_moved_schedule(trainer: Trainer, before: RunSettings) -> None:
    old_steps = before.total_steps(trainer.loader.windows_per_epoch)
    if old_steps == trainer.total_steps:
        return
    optimizer, k = before.optimizer, trainer.progress.step
    old = Schedule(before.schedule, optimizer.learning_rate, optimizer.weight_decay, old_steps)
    then = old.learning_rate(min(k, old_steps - 1))
    trainer.console.say(
        f"the run now ends at step {trainer.total_steps} instead of {old_steps}: "
        f"learning rate {then:.3g} -> {trainer.schedule.learning_rate(k):.3g} at step {k}"
    )


def _say_start(trainer: Trainer, first: Path | None) -> None:
    settings, counts = trainer.settings, trainer.model.parameter_counts()
    kind = {"ternary": "ternary", "int8": "8-bit", "none": "full-precision"}[settings.quantization.weights]
    data = trainer.loader.describe()
    epochs = trainer.total_steps * settings.training.batch_size / data["windows_per_epoch"]
    say = trainer.console.say
    if first is not None:
        say(f"continuing from {first} (step {trainer.progress.step})")
    say(
        f"run {trainer.run_directory.path}: {settings.model.family}, {counts.total:,} parameters "
        f"({counts.ternary:,} {kind}), {trainer.device}, {str(trainer.model.compute_dtype).removeprefix('torch.')}"
    )
    say(
        f"data '{settings.data.source}': {data['tokens']:,} training tokens ({trainer.tokenizer.name}); "
        f"{trainer.total_steps} steps x {settings.training.batch_size} x {settings.data.sequence_length} tokens "
        f"= {epochs:.2f} epochs"
    )
