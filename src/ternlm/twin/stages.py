"""Making a twin, in the order choose learning rates, train both arms, score them, time them, compare them.

What is on disk decides what is still to do, so a twin can be stopped anywhere and given again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ternlm.errors import Diverged, TernlmError
from ternlm.files import replace_durably, to_json
from ternlm.report.sweep import read_trial
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import End
from ternlm.training.sweep_trials import TrialRunner, end_of, is_settled, pending
from ternlm.twin.arms import definition_of, final_trials_of, naming, validated, with_trials
from ternlm.twin.comparing import compare, read_before
from ternlm.twin.definition import ADJECTIVES, ARMS, RATE, ArmName, of_sweep
from ternlm.twin.record import TwinDirectory, TwinRecord

if TYPE_CHECKING:
    from ternlm.data import DataSettings
    from ternlm.data.preparation import Prepared
    from ternlm.tokenizers import TokenizerSettings
    from ternlm.training.settings import RunSettings
    from ternlm.twin.measuring import Measurer

Prepare = Callable[["DataSettings", "TokenizerSettings"], "Prepared"]


class Hooks(NamedTuple):
    """What the command line does while a twin is made.

    Attributes:
        prepare: Makes tokens of a text, with a progress line.
        say: Called with a sentence before something slow begins.
        began, ended: Called with a trial before it starts, and with how it ended.
        show: Whether a trial's own output is shown.
    """

    prepare: Prepare
    say: Callable[[str], None] = lambda text: None
    began: Callable[[Trial], None] = lambda trial: None
    ended: Callable[[Trial, End], None] = lambda trial, end: None
    show: bool = False


def run_twin(folder: TwinDirectory, record: TwinRecord, hooks: Hooks, retry_failed: bool = False) -> dict[str, Any]:
    """Do what is left of a twin, and write its result.

    Args:
        folder: The twin's folder, held by this process.
        record: What it is.
        hooks: What the command line does meanwhile.
        retry_failed: Try trials again that failed.

    Returns:
        The comparison, which is written however the arms ended.

    Raises:
        Interrupted, Preempted: A signal arrived; the message says how to go on.
        TernlmError: Data, a text or a setting is refused before anything begins.
    """
    settings = validated(record, record.trials)
    _prepare(record, settings, hooks)
    folder.write(record)
    _train(folder, record, hooks, retry_failed)
    record = _choose(folder, record, hooks)
    record = with_trials(record, final_trials_of(record))
    folder.write(record)
    _train(folder, record, hooks, retry_failed)
    return measure_twin(folder, record, hooks)


def measure_twin(folder: TwinDirectory, record: TwinRecord, hooks: Hooks) -> dict[str, Any]:
    """Score, time and compare what is trained, and write `comparison.json`."""
    from ternlm.training.interruption import Interruption
    from ternlm.twin.measuring import Measurer

    interruption = Interruption()
    with interruption.watched():
        definition = definition_of(record)
        measurer = Measurer(folder, definition.texts, hooks.prepare, hooks.say, interruption.check)
        done = [trial for trial in compared_trials(record) if _has_finished(folder, record, trial)]
        scores: dict[str, dict[str, Any]] = {}
        for trial in done:
            scores[trial.id] = {"after": measurer.scores(folder.run(trial))}
        for arm in ARMS:
            first = next((trial for trial in done if trial.arm == arm), None)
            if first is not None:
                scores[first.id] |= {
                    "before": measurer.scores(folder.run(first), "before"),
                    "facts": measurer.facts(folder.run(first)),
                }
        if definition.ptq:
            _score_rounded(folder, record, measurer, done, scores)
        timing = _timing(folder, measurer, done, hooks) if definition.timing else None
    found = compare(folder, record, scores, timing)
    replace_durably(folder.comparison, to_json(found))
    return found


def plan_trials(record: TwinRecord) -> list[Trial]:
    """All trials of a twin whose rates may not be chosen yet: those are shown without one."""
    known = {trial.id for trial in record.trials}
    swept = [arm for arm in ARMS if definition_of(record).is_swept(arm)]
    waiting = record._replace(chosen={arm: record.chosen.get(arm) or 0.0 for arm in swept})
    finals = [trial for trial in final_trials_of(waiting) if trial.id not in known]
    return [
        *record.trials,
        *(trial._replace(settings={k: v for k, v in trial.settings.items() if k != RATE or v}) for trial in finals),
    ]


def refuse_unfinished(folder: TwinDirectory, record: TwinRecord) -> None:
    """Say what failed or diverged.

    Raises:
        Diverged: An arm diverged, or every point of its sweep.
        TernlmError: One failed, or was killed.
    """
    for arm in ARMS:
        trials = [trial for trial in compared_trials(record) if trial.arm == arm]
        words = f"{ADJECTIVES[arm]} arm"
        if not trials:
            trials, words = [trial for trial in record.trials if of_sweep(trial) == arm], f"every rate of the {words}"
        ends = {trial.id: end_of(folder, record, trial) for trial in trials}
        diverged = [name for name, end in ends.items() if end is not None and end.code == Diverged.exit_code]
        failed = [name for name, end in ends.items() if not is_settled(end)]
        if failed:
            raise TernlmError(
                f"{words}: {', '.join(failed)} did not finish. The last words are in '{folder.path}'/*.log; try again "
                f"with: {folder.resume_command} --retry-failed"
            )
        if diverged:
            raise Diverged(
                f"{words}: {', '.join(diverged)} diverged, so there is no gap. Give lower rates in a new twin: "
                "--learning-rates for the ternary arm, --twin-learning-rates for the other."
            )


def compared_trials(record: TwinRecord) -> list[Trial]:
    """The trials that are compared, in the order in which they ran."""
    return [trial for trial in record.trials if of_sweep(trial) is None]


def _train(folder: TwinDirectory, record: TwinRecord, hooks: Hooks, retry_failed: bool) -> None:
    left = pending(folder, record, retry_failed)
    if left:
        TrialRunner(folder, record, 1, hooks.show, hooks.began, hooks.ended).run(left)


def _choose(folder: TwinDirectory, record: TwinRecord, hooks: Hooks) -> TwinRecord:
    """The record with the best learning rate of every arm that was swept; a choice that was made stays."""
    chosen = dict(record.chosen)
    for arm in ARMS:
        trials = [trial for trial in record.trials if of_sweep(trial) == arm]
        if not trials or chosen.get(arm) is not None:
            continue
        results = [(read_trial(folder, record, trial, "val/loss").value, trial.settings[RATE]) for trial in trials]
        known = [(value, rate) for value, rate in results if value is not None]
        chosen[arm] = min(known)[1] if known else None
        if known:
            hooks.say(f"{ADJECTIVES[arm]}: learning rate {min(known)[1]:g} of {len(trials)} has the lowest loss")
    return record._replace(chosen=chosen)


def _has_finished(folder: TwinDirectory, record: TwinRecord, trial: Trial) -> bool:
    end = end_of(folder, record, trial)
    return end is not None and end.code == 0


def _prepare(record: TwinRecord, settings: "dict[str, RunSettings]", hooks: Hooks) -> None:
    """Prepare the data, read the texts, and find what would stop a trial or the measurement before the first begins."""
    from ternlm.data.corpus import Corpus
    from ternlm.training.launch import with_vocab_size
    from ternlm.twin.arms import arm_settings
    from ternlm.twin.texts import require_held_out

    both = {arm: arm_settings(record, arm) for arm in ARMS}
    own, texts = both["ternary"], definition_of(record).texts
    if own.data.stream:  # read by each run on its own, into its own folder
        require_held_out(texts, own.data, None)
        return
    prepared = hooks.prepare(own.data, own.tokenizer)
    for name, each in [*both.items(), *settings.items()]:
        with naming(Trial(name, name, None, {})):
            with_vocab_size(each, prepared)
            each.windows(prepared.tokenizer)  # a masked objective needs a mask token
    assert isinstance(prepared.corpus, Corpus)
    require_held_out(texts, own.data, prepared.corpus.split("train"))


def _score_rounded(
    folder: TwinDirectory,
    record: TwinRecord,
    measurer: "Measurer",
    done: list[Trial],
    scores: dict[str, dict[str, Any]],
) -> None:
    """Score the full-precision models with their weights rounded after training, as the ternary arm's are."""
    from ternlm.twin.arms import arm_settings

    section = arm_settings(record, "ternary").quantization.model_dump(mode="json")
    for trial in done:
        if trial.arm == "full":
            scores[trial.id]["rounded"] = measurer.scores(folder.run(trial), "rounded", section)


def _timing(folder: TwinDirectory, measurer: "Measurer", done: list[Trial], hooks: Hooks) -> dict[str, Any] | None:
    """How fast the two models are beside each other; None unless both are trained."""
    first: dict[ArmName, Trial] = {}
    for arm in ARMS:
        found = next((trial for trial in done if trial.arm == arm), None)
        if found is None:
            return None
        first[arm] = found
    from ternlm.twin.timing import time_arms

    marks = {arm: str(folder.run(trial).path.name) for arm, trial in first.items()}
    before = read_before(folder).get("timing")
    if isinstance(before, dict) and before.get("runs") == marks:
        return before
    hooks.say("timing both models in turns")
    return {"runs": marks, **time_arms({arm: folder.run(trial) for arm, trial in first.items()}, measurer)}
