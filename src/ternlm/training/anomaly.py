"""Judges every measurement of a run: is it an anomaly, and what is to be done about it?

`Detector` only keeps books: it reads no file, touches no tensor and carries nothing out. Who calls it
skips, rolls back or stops as the verdict says. Its memory is JSON and goes into checkpoints, so that a
resumed run decides as one that never stopped. docs/anomalies.md has the table of rules.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ternlm.training.anomaly_books import Action, Bookkeeping, Event, Level, Severity, Verdict
from ternlm.training.anomaly_chunks import complaints, rates_of, remember
from ternlm.training.anomaly_settings import AnomalySettings

__all__ = ["Detector", "Event", "Verdict"]

_STRENGTH: tuple[Action, ...] = ("update", "warn", "skip", "roll_back", "stop")
_OF_ONE_BATCH = {"nan_inf_loss", "nan_inf_grad", "loss_spike", "grad_spike", "divergence"}
"""Events with a batch and gradients to keep as evidence."""

_ROLL_BACK_SPAN = 10_000
_NON_FINITE_SPAN = 1000

_BYTE_VOCABULARY = 300
"""Vocabularies up to this size spell bytes: 256 of them, and special tokens."""

_FEWEST_TOKENS = 20
"""Shorter samples repeat nothing and say nothing about entropy."""

_MOST_REPEATED = 0.4
_ZERO_SHARES = (0.05, 0.95)
_FROZEN_STEPS = 1000
_STORM = 5.0
_FLIP_ROWS, _FEWEST_FLIP_ROWS = 32, 16
_FEWEST_RATES = 16


class Detector:
    """The rules, and what they remember.

    Args:
        settings: Thresholds and decisions.
        vocab_size: Decides what entropy is too low.
        boundaries: Updates that begin a new stage: the statistics start afresh there.
        chunk_targets: Bytes per chunk that each stage of a hierarchical model aims at.

    Attributes:
        roll_backs: Steps at which the run went back. Survives a roll-back, as `dumps` does.
        dumps: Folders of evidence asked for so far.
    """

    def __init__(
        self,
        settings: AnomalySettings,
        vocab_size: int,
        boundaries: Iterable[int] = (),
        chunk_targets: Sequence[float] = (),
    ) -> None:
        self.settings, self.boundaries = settings, tuple(boundaries)
        self._chunk_targets = {f"stage{number}": target for number, target in enumerate(chunk_targets)}
        is_bytes = vocab_size <= _BYTE_VOCABULARY
        self.entropy_limit = 0.06 * math.log(256) if is_bytes else 0.1 * math.log(vocab_size)
        self.roll_backs: list[int] = []
        self.dumps = 0
        self._books = Bookkeeping()
        self._last_reported: dict[str, int] = {}
        # Throughput belongs to the machine, not to the run: it is neither saved nor forgotten in a roll-back.
        self._throughput = Level()
        self._slow_s: float | None = None

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Decide about an update that is about to be made.

        Medians, spreads and averages are those of earlier steps; this one enters them afterwards, if it
        is finite and no spike.

        Args:
            step: Index of the update, as in `Schedule`.
            loss: Nats per target.
            grad_norm: Norm of the whole gradient before clipping.
        """
        books = self._at(step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._judge_non_finite(step, loss, grad_norm)
        books.in_a_row = 0
        settings = self.settings
        events: list[Event] = []
        action: Action
        median, loss_limit, grad_limit = None, math.inf, math.inf
        if self._speaks(books.loss):
            median, spread = books.loss.median_and_spread()
            loss_limit = min(median + settings.spike_scale * spread, settings.spike_ratio * books.loss.average)
        if self._speaks(books.grad_norm):
            usual, spread = books.grad_norm.median_and_spread()
            grad_limit = usual + settings.spike_scale * spread
        values = {"loss": loss, "grad_norm": grad_norm}
        if self._has_diverged(loss, median):
            action, outlook = self._give_up()
            message = (
                f"the loss ({loss:.4g}) has been more than {settings.divergence_nats:g} nats above "
                f"{books.reference:.4g} for {books.above} steps; {outlook}"
            )
            events += self._report("divergence", step, message, action, values | {"reference": books.reference})
        elif loss > loss_limit:
            message = f"the loss ({loss:.4g}) is above {loss_limit:.4g}; its median is {median:.4g}."
            events += self._report("loss_spike", step, message, "update", values | {"limit": loss_limit})
        books.loss.take(loss, step, loss > loss_limit, settings)
        is_spike = grad_norm > grad_limit
        entered = books.grad_norm.take(grad_norm, step, is_spike, settings)
        if is_spike:
            action = "skip" if settings.grad_spike == "skip" and not entered else "update"
            outlook = "the update is skipped" if action == "skip" else "the update is made"
            message = f"the gradient norm ({grad_norm:.4g}) is above {grad_limit:.4g}; {outlook}."
            events += self._report("grad_spike", step, message, action, values | {"limit": grad_limit})
        return Verdict(max((event.action for event in events), key=_STRENGTH.index, default="update"), events)

    def judge_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Look at generated text: `entropy_collapse`, `repetition_surge`.

        Only the ``typical`` mode counts, as greedy text of small models repeats by nature; of several
        prompts the median. Nothing is said before the loss has a median, nor in the first steps of a run
        or stage. An entropy is a collapse only if it is also below half of the loss: a model that is
        certain and right has learned its text.

        Args:
            step: Completed steps.
            rows: Sample rows with `mode`, `mean_entropy`, `repetition_frac` and `total_tokens`.
        """
        typical = [row for row in rows if row.get("mode") == "typical" and row["total_tokens"] >= _FEWEST_TOKENS]
        loss = self._books.loss
        if not typical or step < self.settings.grace_steps or not self._speaks(loss):
            return []
        entropy = statistics.median(float(row["mean_entropy"]) for row in typical)
        repeated = statistics.median(float(row["repetition_frac"]) for row in typical)
        events: list[Event] = []
        if entropy < self.entropy_limit and entropy < loss.median() / 2:
            message = (
                f"the samples' mean entropy is {entropy:.3g} nats, below {self.entropy_limit:.3g}, "
                f"while the loss is {loss.median():.3g}: the model is certain and wrong."
            )
            events += self._report("entropy_collapse", step, message, "warn", {"mean_entropy": entropy})
        if repeated > _MOST_REPEATED:
            message = f"one token makes up {repeated:.0%} of the samples (limit {_MOST_REPEATED:.0%})."
            events += self._report("repetition_surge", step, message, "warn", {"repetition_frac": repeated})
        return events

    def judge_ternary(
        self, step: int, row: Mapping[str, Any], learning_rate: float, loss_is_flat: bool = False
    ) -> list[Event]:
        """Look at the codes of every matrix: `zero_fraction_drift`, `flip_freeze`, `flip_storm`.

        A matrix is reported once until it has recovered. If the loss is flat as well and at least half
        of all matrices are dead, the run is to stop.

        Args:
            step: Completed steps.
            row: A ternary row, with `ternary/<matrix>/frac_zero` and `.../flip_rate`.
            learning_rate: The latest; without one nothing can flip.
            loss_is_flat: Whether training makes no progress any more.
        """
        zeros, flips = _per_matrix(row, "frac_zero"), _per_matrix(row, "flip_rate")
        least, most = _ZERO_SHARES
        drifted = {name: share for name, share in zeros.items() if not least <= share <= most}
        frozen, stormy = self._frozen(step, flips, learning_rate), self._stormy(step, flips)
        events = []
        for event, found, unit in (
            ("zero_fraction_drift", drifted, "of its codes are zero"),
            ("flip_freeze", frozen, "steps without a flip"),
            ("flip_storm", stormy, "times its usual rate of flips"),
        ):
            known = self._books.reported.get(event, [])
            self._books.reported[event] = sorted(found)
            is_dead = event != "flip_storm" and loss_is_flat and 2 * len(found) >= len(zeros)
            if not found or (not is_dead and found.keys() <= set(known)):
                continue
            worst = max(found, key=lambda name: (abs(found[name] - 0.5), name))
            amount = f"{found[worst]:.1%}" if event == "zero_fraction_drift" else f"{found[worst]:.4g}"
            message = f"{worst}: {amount} {unit} ({len(found)} of {len(zeros)} matrices are like this)."
            if is_dead:
                message = f"{message[:-1]}, and the loss is flat; the run stops."
            values = {"matrices": float(len(found)), "worst": found[worst]}
            events += self._report(event, step, message, "stop" if is_dead else "warn", values)
        return events

    def judge_chunks(self, step: int, telemetry: Mapping[str, float]) -> list[Event]:
        """Look at the routers of a hierarchical model, as `complaints` has the rules.

        A stage is reported once until it has recovered.

        Args:
            step: Completed steps.
            telemetry: What the model said about its passes, with `hnet/<stage>/boundary_rate`.
        """
        rates, books = rates_of(telemetry), self._books
        remember(books.boundary_rates, rates)
        is_settled = step >= books.quiet_until + self.settings.grace_steps
        wrong: dict[str, dict[str, str]] = {}
        for stage in rates:
            found = complaints(books.boundary_rates[stage], self._chunk_targets.get(stage), is_settled)
            for event, sentence in found.items():
                if event != "router_start" or step == 1:
                    wrong.setdefault(event, {})[stage] = sentence
        events: list[Event] = []
        for event in sorted({*wrong, *(name for name in books.reported if name.startswith("router_"))}):
            stages, known = wrong.get(event, {}), books.reported.get(event, [])
            new = sorted(stages.keys() - set(known))
            said: list[Event] = []
            if new:
                message = "; ".join(f"{stage}: {stages[stage]}" for stage in new) + "."
                said = self._report(event, step, message, "warn", {stage: rates[stage] for stage in new})
            # A stage that was not mentioned because the event cools down has its turn afterwards.
            books.reported[event] = sorted(stages if said else stages.keys() & set(known))
            events += said
        return events

    def judge_throughput(self, step: int, tokens_per_sec: float, seconds_since_last: float) -> list[Event]:
        """Look at the speed: `slow`.

        Args:
            step: Completed steps.
            tokens_per_sec: Mean since the last call, without evaluation and saving.
            seconds_since_last: Time since the last call.
        """
        level, events = self._throughput, []
        is_slow = len(level.values) >= _FEWEST_RATES and tokens_per_sec < level.median() / 2
        if not is_slow:
            self._slow_s = None
        elif self._slow_s is None:
            self._slow_s = 0.0  # since when within this interval is unknown; it may hold an evaluation
        else:
            self._slow_s += seconds_since_last
            if self._slow_s >= self.settings.slow_for:
                message = (
                    f"{tokens_per_sec:,.0f} tokens/s, below half of the usual {level.median():,.0f}, for "
                    f"{self._slow_s / 60:.3g} minutes; look for another process, heat, or a slow disk."
                )
                events = self._report("slow", step, message, "warn", {"tokens_per_sec": tokens_per_sec})
                self._slow_s = 0.0
        level.take(tokens_per_sec, step, is_slow, self.settings)
        return events

    def rolled_back(self, step: int, then: Mapping[str, Any] | None = None) -> None:
        """Note that the run goes on from an earlier step.

        Roll-backs and dumps stay counted; everything else is as it was at that step.

        Args:
            step: Index of the next update.
            then: `state_dict()` of that step, from the checkpoint; without it the statistics start
                afresh, and rules that need a median are silent until there is one.
        """
        self.roll_backs.append(self._books.step)
        self._books = Bookkeeping(step=step - 1) if then is None else Bookkeeping.from_dict(then["books"])
        self._books.in_a_row, self._books.above, self._books.non_finite = 0, 0, []
        self._last_reported = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as strict JSON values; throughput excepted."""
        return {
            "books": self._books.as_dict(),
            "roll_backs": list(self.roll_backs),
            "dumps": self.dumps,
            "last_reported": dict(self._last_reported),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError, TypeError: It is none.
        """
        self._books = Bookkeeping.from_dict(state["books"])
        self.roll_backs, self.dumps = list(state["roll_backs"]), int(state["dumps"])
        self._last_reported = dict(state["last_reported"])

    def _at(self, step: int) -> Bookkeeping:
        """The books, opened at this step; new ones if a stage began since the last."""
        if any(self._books.step < boundary <= step for boundary in self.boundaries):
            before, quiet_until = self._books, step + self.settings.grace_steps
            self._books = Bookkeeping(
                quiet_until=quiet_until,
                in_a_row=before.in_a_row,
                non_finite=before.non_finite,
                boundary_rates=before.boundary_rates,
                reported={event: found for event, found in before.reported.items() if event.startswith("router_")},
            )  # fmt: skip (a stage may move the loss, but not make it non-finite, nor move a router)
        self._books.step = step
        return self._books

    def _speaks(self, level: Level) -> bool:
        return len(level.values) >= self.settings.min_values and self._books.step >= self._books.quiet_until

    def _judge_non_finite(self, step: int, loss: float, grad_norm: float) -> Verdict:
        books, settings = self._books, self.settings
        books.in_a_row += 1
        books.non_finite = [*(old for old in books.non_finite if old > step - _NON_FINITE_SPAN), step]
        count = len(books.non_finite)
        action: Action = "skip"
        outlook = "the update is skipped."
        if books.in_a_row >= settings.non_finite_in_a_row or count >= settings.non_finite_in_1000:
            action, outlook = self._give_up()
            outlook = f"{books.in_a_row} in a row, {count} in {_NON_FINITE_SPAN} steps; {outlook}"
        name = "nan_inf_grad" if math.isfinite(loss) else "nan_inf_loss"
        message = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite; {outlook}"
        return Verdict(action, self._report(name, step, message, action, {"loss": loss, "grad_norm": grad_norm}))

    def _has_diverged(self, loss: float, median: float | None) -> bool:
        """Count steps in a row above a median that stays the one from before the first of them."""
        books, nats = self._books, self.settings.divergence_nats
        if median is None:
            books.above = 0
            return False
        if not books.above:
            books.reference = median
        books.above = books.above + 1 if loss > books.reference + nats else 0
        return books.above >= self.settings.divergence_steps

    def _give_up(self) -> tuple[Action, str]:
        """Roll back or stop, and how to say it."""
        settings = self.settings
        if settings.action == "stop":
            return "stop", "anomaly.action=stop ends the run."
        used = sum(old > self._books.step - _ROLL_BACK_SPAN for old in self.roll_backs)
        if used >= settings.max_roll_backs:
            allowance = f"anomaly.max_roll_backs={settings.max_roll_backs} per {_ROLL_BACK_SPAN:,} steps"
            return "stop", f"{allowance} are used up, the run stops."
        return "roll_back", "the run goes back to an earlier checkpoint."

    def _frozen(self, step: int, flips: Mapping[str, float], learning_rate: float) -> dict[str, float]:
        since = self._books.frozen_since
        for name, rate in flips.items():
            if rate > 0 or learning_rate == 0:
                since.pop(name, None)
            else:
                since.setdefault(name, step)
        return {name: float(step - first) for name, first in since.items() if step - first >= _FROZEN_STEPS}

    def _stormy(self, step: int, flips: Mapping[str, float]) -> dict[str, float]:
        stormy = {}
        for name, rate in flips.items():
            history = self._books.flip_rates.setdefault(name, [])
            usual = statistics.median(history) if len(history) >= _FEWEST_FLIP_ROWS else 0.0
            if usual and rate > _STORM * usual:
                stormy[name] = rate / usual
            history.append(float(f"{rate:.4g}"))  # short in the checkpoint
            del history[:-_FLIP_ROWS]
        return stormy if step >= self._books.quiet_until else {}

    def _report(self, name: str, step: int, message: str, action: Action, values: dict[str, float]) -> list[Event]:
        """The event as a list of one; of none while it cools down, if it decides nothing."""
        last = self._last_reported.get(name)
        is_cooling = last is not None and step - last < self.settings.cooldown_steps
        if is_cooling and action in ("update", "warn"):
            return []
        dump = name in _OF_ONE_BATCH and not is_cooling and self.dumps < self.settings.max_dumps
        self.dumps += dump
        if not is_cooling:
            self._last_reported[name] = step
        severity: Severity = "error" if action in ("roll_back", "stop") else "warning"
        return [Event(name, step, severity, message, action, values, dump)]


def _per_matrix(row: Mapping[str, Any], quantity: str) -> dict[str, float]:
    """One quantity of a ternary row by matrix; what is missing or None is left out."""
    names = {key: key.split("/") for key in row if key.startswith("ternary/") and key.endswith(f"/{quantity}")}
    return {parts[1]: float(row[key]) for key, parts in names.items() if parts[1] != "all" and row[key] is not None}
