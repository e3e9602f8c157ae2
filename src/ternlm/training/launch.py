"""From settings to a trained run: starting one, resuming one, and branching one from a checkpoint."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ternlm import checkpoint
from ternlm.checkpoint import Opened
from ternlm.data.preparation import Prepared
from ternlm.device import choose_device, set_up
from ternlm.errors import CheckpointError, SettingsError, TokenizerError
from ternlm.files import replace_durably, to_json
from ternlm.models import build_model
from ternlm.run_directory import RunDirectory, runs_around
from ternlm.settings.resolve import Layer, Resolved, read_mapping
from ternlm.training import provenance, roll_back
from ternlm.training.distillation import require_same_teacher, require_teacher
from ternlm.training.progress import Progress
from ternlm.training.settings import RunSettings, resolve_settings, setting_names
from ternlm.training.sitting import sitting
from ternlm.training.status import StatusFile
from ternlm.training.trainer import Trainer

Prepare = Callable[[RunSettings, Path], Prepared]
"""Gives the data of a run, streamed ones through the folder; the command line shows a progress bar meanwhile."""

_FREE_ON_RESUME = {
    "training": {"max_steps", "max_tokens", "max_epochs", "max_time", "micro_batch_size",
                 "gradient_accumulation_steps", "device", "threads", "compile", "gradient_checkpointing",
                 "checkpoint_every_steps", "keep_last", "keep_every"},
    "data": {"stream_buffer", "retry_for", "cache"},
    "distillation": {"teacher"},  # its place; that it is the same one is checked
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
    source = checkpoint.open_checkpoint(resume_from) if resume_from is not None else None
    with _opened_data(settings, run, prepare) as prepared:
        settings = with_vocab_size(settings, prepared)
        if source is not None:
            _require_same_tokenizer(source, prepared)
        _require_trainable(settings, prepared)
        settings = _with_teacher(settings, prepared, run)
        run.create()
        with begun(run, settings, resolved.origins) as status:
            trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, run, source, quiet, status)
            provenance.record(run, settings, trainer.progress.step, _teacher(trainer))
            provenance.record_data(run, prepared.corpus)
            _say_start(trainer, source)
            if source is not None:
                trainer.save()  # killed before its own first checkpoint, the branch must not restart from nothing
                trainer.saves.finish()
            return trainer.run()


@contextmanager
def begun(run: RunDirectory, settings: RunSettings, origins: Mapping[str, str]) -> Iterator[StatusFile]:
    """A new run's folder, held and with its settings written, and the end of the block recorded in it."""
    with run.locked():
        status = StatusFile(run, print)
        _write_settings(run, settings, origins)
        with sitting(run, status):
            yield status


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
    require_changeable(overrides)
    saved = Layer("run", read_mapping(run.config))
    settings = settings_from(resolve_settings([saved, Layer("command line", overrides)]))
    _set_up(settings)
    run.ensure_writable()
    with run.locked():
        checkpoint.remove_unfinished(run.checkpoints)
        roll_back.settle(run.checkpoints)
        first = checkpoint.open_newest(run.checkpoints, print) if checkpoint.steps(run.checkpoints) else None
        with _opened_data(settings, run, prepare) as prepared:
            settings = with_vocab_size(settings, prepared)
            if first is not None:
                _require_same_tokenizer(first, prepared)
                _require_same_data(first, prepared)
            status = StatusFile(run, print)
            trainer = Trainer(settings, prepared.corpus, prepared.tokenizer, run, first, quiet, status)
            if first is not None:
                require_same_teacher(_teacher(trainer), first.state, first.path)
                trainer.saves.settle(first)
            if trainer.progress.step >= trainer.total_steps and trainer.is_evaluated():
                _say_complete(trainer)
                return trainer.progress
            with sitting(run, status):
                provenance.record(run, settings, trainer.progress.step, _teacher(trainer))
                provenance.record_data(run, prepared.corpus)
                run.cut_after(trainer.progress.step)
                if overrides:
                    changed = {names.canonical(name): "command line, on resuming" for name in overrides}
                    _write_settings(run, settings, read_mapping(run.config_origin) | changed)
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


@contextmanager
def _opened_data(settings: RunSettings, run: RunDirectory, prepare: Prepare) -> Iterator[Prepared]:
    """The data of a run, closed at the end; of a run that was refused before it began nothing stays."""
    was_there = run.path.exists()
    try:
        prepared = prepare(settings, run.stream)
        try:
            yield prepared
        finally:
            prepared.corpus.close()
    finally:
        if not was_there and not run.config.exists():
            shutil.rmtree(run.path, ignore_errors=True)


def _write_settings(run: RunDirectory, settings: RunSettings, origins: Mapping[str, str]) -> None:
    replace_durably(run.config, to_json(settings.model_dump(mode="json")))
    replace_durably(run.config_origin, to_json(dict(origins)))


def _require_trainable(settings: RunSettings, prepared: Prepared) -> None:
    """Find what would stop the run, before anything is created."""
    prepared.corpus.loader(1, settings.windows(prepared.tokenizer), 0)
    prepared.corpus.split("validation")  # missing, it would stop the run at its first evaluation
    with torch.device("meta"):
        build_model(settings.model, settings.quantization.base())  # shapes that do not fit fail here


def _with_teacher(settings: RunSettings, prepared: Prepared, run: RunDirectory) -> RunSettings:
    """The settings with the teacher as the folder it is now: a run that is named may have a newer checkpoint later.

    Raises:
        CheckpointError, SettingsError: It cannot be used, or does not fit.
    """
    section = settings.distillation
    if section.teacher is None:
        return settings
    length = settings.data.sequence_length
    path = require_teacher(section, settings.model, length, prepared.tokenizer, runs_around(run))
    update = {"distillation": section.model_copy(update={"teacher": str(path.resolve())})}
    return settings.model_copy(update=update)


def _teacher(trainer: Trainer) -> dict[str, Any] | None:
    return None if trainer.distillation is None else trainer.distillation.identity


def _require_same_tokenizer(opened: Opened, prepared: Prepared) -> None:
    if opened.state.get("tokenizer_fingerprint") != prepared.tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint '{opened.path}' was trained with another tokenizer than '{prepared.tokenizer.name}'. "
            f"Use the one saved with it: tokenizer.name={opened.path}"
        )


def _require_same_data(opened: Opened, prepared: Prepared) -> None:
    if opened.state.get("data_fingerprint") != prepared.corpus.fingerprint:
        raise CheckpointError(
            f"the data in '{prepared.corpus.directory}' are not what '{opened.path}' was trained on. "
            "Restore the source files, or start a new run with: ternlm train --resume-from CHECKPOINT --run-id NEW"
        )


def require_changeable(overrides: Iterable[str]) -> None:
    """Refuse settings that would make a resumed run another run.

    Raises:
        SettingsError: One of them would.
    """
    canonical = setting_names().canonical
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
    k = trainer.progress.step
    then = before.rates(old_steps).learning_rate(min(k, old_steps - 1))
    trainer.recorder.say(
        f"the run now ends at step {trainer.total_steps} instead of {old_steps}: "
        f"learning rate {then:.3g} -> {trainer.schedule.learning_rate(k):.3g} at step {k}"
    )


def _say_complete(trainer: Trainer) -> None:
    step, run = trainer.progress.step, trainer.run_directory
    trainer.recorder.say(
        f"run '{run.id}' is complete at step {step}. To train longer: ternlm resume {run.path} --steps {2 * step}"
    )
    trainer.recorder.close()


def _say_start(trainer: Trainer, first: Opened | None) -> None:
    settings, counts = trainer.settings, trainer.model.parameter_counts()
    quantization = settings.quantization
    kinds = {"ternary": "ternary", "none": "full-precision"}
    kind = kinds.get(quantization.weights, f"{quantization.weight_bits}-bit")
    say = trainer.recorder.say
    if first is not None:
        say(f"continuing from {first.path} (step {trainer.progress.step})")
    say(
        f"run {trainer.run_directory.path}: {settings.model.family}, {counts.total:,} parameters "
        f"({counts.ternary:,} {kind}), {trainer.device}, {str(trainer.model.compute_dtype).removeprefix('torch.')}"
    )
    steps = f"{trainer.total_steps} steps x {settings.training.batch_size} x {settings.data.sequence_length} tokens"
    windows = trainer.loader.windows_per_epoch
    if windows is None:
        say(f"data '{settings.data.source}', streamed ({trainer.tokenizer.name}); {steps}")
        return
    tokens, epochs = trainer.loader.describe()["tokens"], trainer.total_steps * settings.training.batch_size / windows
    say(
        f"data '{settings.data.source}': {tokens:,} training tokens ({trainer.tokenizer.name}); {steps} "
        f"= {epochs:.2f} epochs"
    )
