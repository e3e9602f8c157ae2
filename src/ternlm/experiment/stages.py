"""An experiment from its file to its summary: prepare, train, evaluate, generate, each stage once.

What lies on disk decides what is left to do, so an experiment can be killed anywhere and given again: data and
training go on from where they were, and a measurement is made again exactly when the checkpoint, the text or its own
settings have changed.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ternlm.errors import CheckpointError, DataError, EnvironmentFault, Interrupted, Preempted, SettingsError
from ternlm.experiment.definition import Experiment
from ternlm.experiment.record import SCHEMA, STAGES, ExperimentDirectory, now
from ternlm.experiment.results import Results
from ternlm.settings.resolve import Resolved, read_mapping

if TYPE_CHECKING:
    from ternlm.data.corpus import Corpus
    from ternlm.data.preparation import Prepared
    from ternlm.training.settings import RunSettings

_LIMITS = {"training.max_steps", "training.max_tokens", "training.max_epochs"}


class Hooks(NamedTuple):
    """What the command line adds.

    Attributes:
        prepare: Gives the data of a run, with a progress line; streamed ones go through the folder.
        began: Called with the name of a stage and a sentence when it begins, or is found done.
        show_data: Called with a corpus that was prepared, and the length of a window.
        quiet: Whether training shows nothing.
    """

    prepare: Callable[["RunSettings", Path], "Prepared"]
    began: Callable[[str, str], None] = lambda stage, text: None
    show_data: Callable[["Prepared", int], None] = lambda prepared, length: None
    quiet: bool = False


def run_experiment(
    experiment: Experiment, resolved: Resolved, directory: ExperimentDirectory, hooks: Hooks
) -> dict[str, Any]:
    """Do what is left to do.

    Args:
        experiment: What it is.
        resolved: Its settings with those of the command line, each with its origin.
        directory: Where it goes.
        hooks: What the command line adds.

    Returns:
        The summary, as it is in `experiment_summary.json`.

    Raises:
        SettingsError: A setting is refused, or the folder holds an experiment with other settings.
        Interrupted, Preempted: A signal arrived; what was done is kept.
        TernlmError: As the stages say.
    """
    from ternlm.training import launch

    sitting = _Sitting(experiment, resolved, launch.settings_from(resolved), directory, hooks)
    try:
        return sitting.run()
    except (Interrupted, Preempted) as error:
        raise type(error)(f"{error} The same 'ternlm experiment' command goes on from here.") from None


class _Sitting:
    """One process that works on an experiment."""

    def __init__(
        self,
        experiment: Experiment,
        resolved: Resolved,
        settings: "RunSettings",
        directory: ExperimentDirectory,
        hooks: Hooks,
    ) -> None:
        from ternlm.experiment.measuring import sampling_of

        self.experiment, self.resolved, self.settings = experiment, resolved, settings
        self.directory, self.hooks = directory, hooks
        self.results = Results(experiment, settings, directory, hooks.began)
        sampling_of(experiment.generation)  # what is wrong in it must not show after days of training
        self.changes = self._changes()
        self.seconds = directory.read_seconds()
        self.data: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        from ternlm.training.interruption import Interruption

        prepared = self._timed("prepare", self._prepare)
        try:
            self._timed("train", lambda: self._train(prepared))
        except BaseException:
            with suppress(EnvironmentFault):  # the folder is another process's, or is full: what stopped is said
                self._summarize_alone("training")
            raise
        interruption = Interruption()
        with self.directory.run.locked(), interruption.watched():
            self._summarize("evaluating")
            corpus = self._corpus(prepared)
            splits = self._splits(corpus.splits)
            self._timed("evaluate", lambda: self.results.evaluate(corpus, splits, interruption.check))
            self._summarize("generating")
            self._timed("generate", lambda: self.results.generate(interruption.check))
            return self._summarize("finished")

    def _prepare(self) -> "Prepared | None":
        """The data, unless they are streamed: then the run reads them itself."""
        settings = self.settings
        if settings.data.stream:
            self._splits(("validation",))
            self.hooks.began("prepare", f"'{settings.data.source}' is read while training")
            self.data = {"source": settings.data.source, "stream": True}
            return None
        self.hooks.began("prepare", f"'{settings.data.source}'")
        prepared = self.hooks.prepare(settings, self.directory.run.stream)
        self.hooks.show_data(prepared, settings.data.sequence_length)
        self._refuse_unmeasurable(prepared)
        self.data = describe_data(prepared, settings)
        return prepared

    def _splits(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """The splits that are measured.

        Raises:
            DataError: The data do not have one of them.
        """
        splits = self.experiment.measurement.splits or ("test" if "test" in known else "validation",)
        missing = [name for name in splits if name not in known]
        if missing:
            asked = "to measure the model on" if self.experiment.measurement.splits is None else "which it names"
            raise DataError(
                f"evaluation.splits: the data have no {missing[0]} split, {asked}. They have: {', '.join(known)}. Add "
                f"text, set data.{missing[0]}_path, or raise data.{missing[0]}_fraction."
            )
        return splits

    def _refuse_unmeasurable(self, prepared: "Prepared") -> None:
        """Find what would stop the measurement, before days of training.

        Raises:
            DataError, SettingsError: A split is missing, or the model cannot be read by the protocol.
        """
        import torch

        from ternlm.evaluation.protocols import end_of_whole_documents, require_streamable
        from ternlm.models import build_model
        from ternlm.training.launch import with_vocab_size

        measurement, corpus = self.experiment.measurement, self._corpus(prepared)
        splits = self._splits(corpus.splits)
        if measurement.protocol == "stream":
            settings = with_vocab_size(self.settings, prepared)
            with torch.device("meta"):
                model = build_model(settings.model, settings.quantization.base())
            for stream in map(corpus.split, splits):
                last = end_of_whole_documents(stream, measurement.measured_tokens)
                require_streamable(model, stream, prepared.tokenizer, last)

    def _train(self, prepared: "Prepared | None") -> None:
        from ternlm.training import launch

        run = self.directory.run

        def prepare(settings: "RunSettings", folder: Path) -> "Prepared":
            same = (settings.data, settings.tokenizer) == (self.settings.data, self.settings.tokenizer)
            return prepared if prepared is not None and same else self.hooks.prepare(settings, folder)

        if not run.config.exists():
            self.hooks.began("train", f"{self.settings.model.family}, {run.path}")
            launch.start(self.resolved, run, prepare, quiet=self.hooks.quiet)
        elif self._is_trained():
            self.hooks.began("train", "done")
        else:
            self.hooks.began("train", f"going on in {run.path}")
            launch.resume(run, self.changes, prepare, quiet=self.hooks.quiet)

    def _is_trained(self) -> bool:
        from ternlm import checkpoint

        try:
            checkpoint.verify(checkpoint.resolve(f"{self.directory.path}@final", self.directory.path.parent))
        except CheckpointError:
            return False
        return _LIMITS.isdisjoint(self.changes)

    def _corpus(self, prepared: "Prepared | None") -> "Corpus":
        from ternlm.data.corpus import Corpus, load_corpus

        if prepared is None:  # what a stream holds back for validation is a corpus in the run's folder
            return load_corpus(self.directory.run.stream / "validation")
        assert isinstance(prepared.corpus, Corpus)
        return prepared.corpus

    def _changes(self) -> dict[str, Any]:
        """Settings that differ from those that the run in the folder was begun with.

        Raises:
            SettingsError: One of them would make it another run.
        """
        from ternlm.training import launch
        from ternlm.training.settings import RunSettings

        run = self.directory.run
        if not run.config.exists():
            return {}
        begun = RunSettings.from_mapping(read_mapping(run.config)).model_dump(mode="json")
        changes = changed_settings(begun, self.settings.model_dump(mode="json"))
        for name, value in changes.items():
            try:
                launch.require_changeable([name])
            except SettingsError:
                section, _, field = name.partition(".")
                other = "experiment_name (--name)" if self.experiment.directory is None else "output.directory"
                raise SettingsError(
                    f"the experiment in '{run.path}' was begun with {name}={begun[section].get(field)}; now it is "
                    f"{value}. Choose another {other}, or delete the folder."
                ) from None
        return changes

    def _timed(self, stage: str, action: Callable[[], Any]) -> Any:
        """The result of a stage, its seconds added to those of earlier sittings."""
        started = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 3)

    def _summarize_alone(self, state: str) -> None:
        """`_summarize`, unless nothing was begun.

        Raises:
            EnvironmentFault: Another process works in the folder, or it cannot be written.
        """
        if self.directory.run.config.exists():
            with self.directory.run.locked():
                self._summarize(state)

    def _summarize(self, state: str) -> dict[str, Any]:
        experiment, directory = self.experiment, self.directory
        summary = {
            "schema": SCHEMA,
            "experiment": experiment.name,
            "description": experiment.description,
            "origin": experiment.origin,
            "notes": list(experiment.notes),
            "timestamp": now(),
            "state": state,
            "seconds": {stage: self.seconds[stage] for stage in STAGES if stage in self.seconds},
            "config": {
                **read_mapping(directory.run.config),
                "measurement": experiment.measurement.model_dump(mode="json"),
                "generation": experiment.generation.model_dump(mode="json") | {"prompts": list(self.results.prompts)},
            },
            "data": self.data,
            "training": directory.training_facts(),
            "results": {name: value for name, value in directory.read_results().items() if name != "made_from"},
            "files": directory.files(),
        }
        directory.write_json(directory.summary, summary)
        return summary


def describe_data(prepared: "Prepared", settings: "RunSettings") -> dict[str, Any]:
    """What a summary says of a prepared corpus."""
    from ternlm.data.corpus import Corpus
    from ternlm.data.scripts import script_mix
    from ternlm.data.statistics import statistics

    corpus = prepared.corpus
    assert isinstance(corpus, Corpus)
    return {
        "source": settings.data.source,
        "directory": str(corpus.directory),
        "tokenizer": prepared.tokenizer.name,
        "splits": statistics(corpus, settings.data.sequence_length),
        "scripts": script_mix(corpus.split("train"), prepared.tokenizer),
        "invalid_bytes": corpus.invalid_bytes(),
    }


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ, by dotted name; what a run fills in when it begins is equal where it is left open."""
    filled_in = {"model.vocab_size", "distillation.teacher"}
    return {
        f"{section}.{field}": value
        for section, fields in after.items()
        for field, value in fields.items()
        if before.get(section, {}).get(field) != value
        and not (f"{section}.{field}" in filled_in and (value is None or field == "teacher"))
    }
