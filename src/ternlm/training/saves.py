"""The checkpoints of a run while it trains: which are pinned and pointed at, what a failed one means, what is kept."""

from collections.abc import Callable
from contextlib import suppress

from ternlm import checkpoint
from ternlm.checkpoint import Contents, Opened, Saved
from ternlm.errors import CheckpointError, StorageFault
from ternlm.run_directory import RunDirectory
from ternlm.training import roll_back
from ternlm.training.anomaly import Event
from ternlm.training.progress import Progress
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings

MOST_FAILED = 2


class Saves:
    """Saves a run's checkpoints beside its training.

    One that cannot be written is reported and training goes on; the second in a row ends the run, while the last
    good one is still young.

    Args:
        run: The run.
        settings: Its settings.
        schedule: Its stages and end.
        progress: The trainer's own position.
        tell: Called with an event.

    Attributes:
        last_step: Step of the checkpoint begun last, or gone on from; -1 if there is none.
        samples: Position in the data of the last checkpoint that is known to be good.
        writer: Writes them.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: RunSettings,
        schedule: Schedule,
        progress: Progress,
        tell: Callable[[Event], None],
    ) -> None:
        self._run, self._settings, self._schedule, self._progress, self._tell = run, settings, schedule, progress, tell
        training = settings.training
        self.writer = checkpoint.Writer(run.checkpoints, training.keep_last, training.keep_every)
        self.last_step = -1
        self.samples = self._samples_begun = self._failed = 0

    def are_due(self, step: int) -> bool:
        """Whether a checkpoint is saved after so many steps: by the interval, and at the end and stage boundaries."""
        is_end = step == self._schedule.total_steps
        return step % self._settings.training.checkpoint_every_steps == 0 or is_end or self._near_boundary(step)

    def begin(self, contents: Callable[[], Contents]) -> Saved | None:
        """Begin to save this step; what became of the save before, if that has not been told.

        Args:
            contents: Gives what to save, with the best loss brought up to date.

        Raises:
            Diverged: A value is not finite; nothing is written.
            StorageFault: This is the second checkpoint in a row that could not be written.
        """
        progress, before = self._progress, self._progress.best_loss
        step, evaluation = progress.step, progress.last_evaluation
        pinned = "stage boundary" if self._near_boundary(step) else None
        if step == self._schedule.total_steps:
            pinned = pinned or "end"
        if evaluation.get("step") == step and (before is None or evaluation["loss"] < before):
            progress.best_loss = evaluation["loss"]
        saved = None
        try:
            saved = self._good(self.writer.submit(step, contents(), pinned, self._pointers(), self._anchors()))
        except StorageFault as error:
            progress.best_loss = before
            self._bad(error)
        self.last_step, self._samples_begun = step, progress.samples
        return saved

    def look(self) -> Saved | None:
        """What became of the last one, if that is known by now.

        Raises:
            StorageFault: This is the second in a row that could not be written.
        """
        return self._told(self.writer.poll)

    def wait(self) -> Saved | None:
        """What became of the last one, as soon as that is known.

        Raises:
            StorageFault: As `look`.
        """
        return self._told(self.writer.wait)

    def finish(self) -> None:
        """Wait for the last one.

        Raises:
            StorageFault: It could not be written.
        """
        self._good(self.writer.wait())

    def settle(self, saved: Opened) -> None:
        """Do what follows a save, pointers and retention, for one that a process was killed right after.

        Raises:
            StorageFault: The folder cannot be written.
        """
        root, training, step = self._run.checkpoints, self._settings.training, self._progress.step
        for name in self._pointers():
            checkpoint.point(root, name, saved.path)
        kept = {step, *self._anchors()}
        checkpoint.prune(root, training.keep_last, training.keep_every, self._run.id, step + 1, kept)

    def before(self, limit: int) -> Opened | None:
        """The newest valid checkpoint of a step up to a limit, or else the oldest valid one."""
        root = self._run.checkpoints
        steps = checkpoint.steps(root)
        for step in sorted((s for s in steps if s <= limit), reverse=True) + [s for s in steps if s > limit]:
            with suppress(CheckpointError):
                return checkpoint.open_checkpoint(checkpoint.folder(root, step))
        return None

    def _told(self, ask: Callable[[], Saved | None]) -> Saved | None:
        try:
            return self._good(ask())
        except StorageFault as error:
            self._bad(error)
            return None

    def _good(self, saved: Saved | None) -> Saved | None:
        if saved is not None:
            self._failed, self.samples = 0, self._samples_begun
            roll_back.forget(self._run.checkpoints, len(self._progress.roll_backs))
        return saved

    def _bad(self, error: StorageFault) -> None:
        self._failed += 1
        self._tell(Event("disk_low", self._progress.step, "error", str(error), "warn", {}))
        if self._failed >= MOST_FAILED:
            raise error

    def _near_boundary(self, step: int) -> bool:
        """Whether `step` completed updates are right before or right after a stage's first update."""
        return any(step in (boundary, boundary + 1) for boundary in self._schedule.boundaries())

    def _pointers(self) -> list[str]:
        """Names of the pointers to a checkpoint of this step."""
        step, evaluation = self._progress.step, self._progress.last_evaluation
        is_best = evaluation.get("step") == step and evaluation["loss"] == self._progress.best_loss
        is_end = step == self._schedule.total_steps
        return ["last", *(["best"] if is_best else []), *(["final"] if is_end else [])]

    def _anchors(self) -> set[int]:
        """The checkpoint that a roll-back from here would return to, which is not to be pruned."""
        limit = self._progress.step - self._settings.anomaly.roll_back_steps
        old_enough = [step for step in checkpoint.steps(self._run.checkpoints) if step <= limit]
        return set(old_enough[-1:])
