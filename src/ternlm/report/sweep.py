"""What came out of a sweep, read from the runs of its trials: the last evaluation of each, arm by arm.

Numbers are taken from the runs' own files at every look, so the summary of a sweep that is running, was stopped, or
whose trials were resumed by hand is right without anybody keeping books.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ternlm.report.history import Curve, Follower, extend
from ternlm.report.status import Disk, read_status
from ternlm.report.tail import mapping, number, tail_rows
from ternlm.training.sweep import Trial, base_arm, shown_value
from ternlm.training.sweep_record import SweepDirectory, SweepRecord, TrialFolder, TrialRecord

HIGHER_IS_BETTER = ("val/accuracy",)
TIE_DEVIATIONS = 2.0


class Comparison(NamedTuple):
    """An arm beside the others.

    Attributes:
        mean, spread: Of its seeds; the spread is the sample standard deviation, None for one seed.
        rank: From 1, the best.
        difference: To the base arm.
        ties_base, ties_best: Whether the difference to the base, and to the best, is under `TIE_DEVIATIONS` of the
            pooled standard deviation of both; None where one of them has fewer than two seeds, or both are the same.
    """

    mean: float
    spread: float | None
    rank: int
    difference: float | None
    ties_base: bool | None
    ties_best: bool | None


@dataclass(frozen=True)
class TrialResult:
    """One run.

    Attributes:
        id, arm, seed: Of the trial.
        path: The run's folder.
        state: As `ternlm status` has it, or ``waiting``.
        value: The metric at the end; None while there is none.
        step, tokens, seconds: How far, on how many tokens, for how long.
        error: Why it failed.
        curve: The metric over optimizer steps.
    """

    id: str
    arm: str
    seed: int | None
    path: str
    state: str
    value: float | None
    step: int | None
    tokens: int | None
    seconds: float | None
    error: str | None
    curve: Curve


@dataclass(frozen=True)
class ArmResult:
    """An arm with all its seeds; `compared` is None until one of them has ended well."""

    name: str
    settings: dict[str, Any]
    trials: list[TrialResult]
    compared: Comparison | None

    @property
    def tokens(self) -> float | None:
        """Mean of its runs."""
        return _mean([trial.tokens for trial in self.trials])

    @property
    def seconds(self) -> float | None:
        """Mean of its runs."""
        return _mean([trial.seconds for trial in self.trials])

    @property
    def state(self) -> str:
        """``finished``, or ``2 finished, 1 diverged``."""
        states = [trial.state.replace("_", " ") for trial in self.trials]
        if len(set(states)) == 1:
            return states[0]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


@dataclass(frozen=True)
class Summary:
    """A sweep at one moment; arms in the order of its definition."""

    id: str
    path: str
    name: str
    description: str
    recipe: str
    metric: str
    base: str
    arms: list[ArmResult]

    @property
    def trials(self) -> list[TrialResult]:
        """All runs."""
        return [trial for arm in self.arms for trial in arm.trials]

    @property
    def ranked(self) -> list[ArmResult]:
        """The best arm first; those without a result last."""
        return sorted(self.arms, key=lambda arm: arm.compared.rank if arm.compared else math.inf)

    @property
    def has_seeds(self) -> bool:
        """Whether arms are repeated."""
        return any(len(arm.trials) > 1 for arm in self.arms)

    def labels(self) -> dict[str, str]:
        """What each arm changes, in few words: ``mixers=false, gate_bits=4``."""
        keys = {key for arm in self.arms for key in arm.settings}
        return {
            arm.name: ", ".join(f"{short_key(key, keys)}={shown_value(value)}" for key, value in arm.settings.items())
            for arm in self.arms
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the curves."""
        heads = {name: value for name, value in vars(self).items() if name != "arms"}
        return {**heads, "tie_deviations": TIE_DEVIATIONS, "arms": [_arm_fields(arm) for arm in self.arms]}


def read_summary(sweep: SweepDirectory, record: SweepRecord) -> Summary:
    """Read every run of a sweep; nothing is raised for what they lack."""
    results: dict[str, list[TrialResult]] = {}
    for trial in record.trials:
        results.setdefault(trial.arm, []).append(read_trial(sweep, record, trial, record.metric))
    values = {name: [t.value for t in trials if t.value is not None] for name, trials in results.items()}
    base = base_arm(list(results))
    compared = compare(values, base, record.metric in HIGHER_IS_BETTER)
    settings = {trial.arm: trial.settings for trial in record.trials}
    arms = [ArmResult(name, settings[name], trials, compared.get(name)) for name, trials in results.items()]
    path = str(sweep.path)
    return Summary(sweep.id, path, record.name, record.description, record.recipe, record.metric, base, arms)


def compare(values: Mapping[str, Sequence[float]], base: str, higher_is_better: bool = False) -> dict[str, Comparison]:
    """Means, spreads, ranks and ties of arms with at least one value.

    With s_a and s_b the standard deviations over seeds, two arms tie if their means differ by less than
    2 sqrt((s_a^2 + s_b^2) / 2). With three seeds that is a hint, not a test.

    Args:
        values: The metric of every seed, by arm.
        base: The arm that others are compared with.
        higher_is_better: Of the metric.
    """
    means = {name: fmean(found) for name, found in values.items() if found}
    spreads = {name: stdev(values[name]) if len(values[name]) > 1 else None for name in means}
    order = sorted(means, key=lambda name: -means[name] if higher_is_better else means[name])

    def ties(one: str, other: str | None) -> bool | None:
        mine, its = spreads[one], spreads.get(other or "")
        if other is None or one == other or mine is None or its is None:
            return None
        return abs(means[one] - means[other]) < TIE_DEVIATIONS * math.sqrt((mine**2 + its**2) / 2)

    known_base = base if base in means else None
    return {
        name: Comparison(
            mean=means[name],
            spread=spreads[name],
            rank=order.index(name) + 1,
            difference=None if known_base is None or name == base else means[name] - means[known_base],
            ties_base=ties(name, known_base),
            ties_best=ties(name, order[0]),
        )
        for name in means
    }


def short_key(key: str, keys: set[str]) -> str:
    """The last part of a setting's name, where no other of these keys ends in it."""
    field = key.rpartition(".")[2]
    return field if sum(other.rpartition(".")[2] == field for other in keys) == 1 else key


def read_trial(folder: TrialFolder[Any], record: TrialRecord, trial: Trial, metric: str) -> TrialResult:
    """What is known of a trial now; nothing is raised for what it lacks."""
    run = folder.run(trial)
    status, end = read_status(run, Disk(0, 0, None)), record.ends.get(trial.id)
    state, error = status.state, status.error
    if state in ("missing", "damaged"):  # it ended before there was a run
        state, error = ("waiting", None) if end is None else ("failed", end.error)
    elif end is not None and end.code not in (0, status.exit_code) and state == "lost":
        error = end.error or f"its process ended with code {end.code}"
    curve: Curve = []
    extend(curve, Follower(run.evaluations).poll(), metric)
    is_complete = state == "finished" or status.exit_code == 0
    rows = [found for row in tail_rows(run.evaluations) if (found := number(row.get(metric))) is not None]
    return TrialResult(
        id=trial.id,
        arm=trial.arm,
        seed=trial.seed,
        path=str(run.path),
        state=state,
        value=rows[-1] if rows and is_complete else None,
        step=status.step,
        tokens=status.tokens_seen,
        seconds=status.elapsed_seconds,
        error=error,
        curve=curve,
    )


def _arm_fields(arm: ArmResult) -> dict[str, Any]:
    trials = [{name: value for name, value in vars(trial).items() if name != "curve"} for trial in arm.trials]
    compared = dict.fromkeys(Comparison._fields) if arm.compared is None else arm.compared._asdict()
    figures = {"tokens": arm.tokens, "seconds": arm.seconds, "state": arm.state}
    return {"name": arm.name, "settings": mapping(arm.settings), **compared, **figures, "trials": trials}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
