"""The loop: next batch, schedules, step, then log, evaluate, sample and save, each when due."""

import math
import time
from functools import partial
from typing import Any

import psutil
import torch

from ternlm import checkpoint
from ternlm.checkpoint import Opened
from ternlm.data.batch import Batch
from ternlm.data.corpus import Corpus
from ternlm.data.stream import StreamedCorpus
from ternlm.data.stream_loader import StreamLoader
from ternlm.device import choose_device, choose_dtype
from ternlm.errors import (
    CheckpointError,
    DataError,
    Diverged,
    Interrupted,
    Preempted,
    SettingsError,
    StorageFault,
    TernlmError,
)
from ternlm.evaluation.analysis import held_out_batches
from ternlm.evaluation.chunks import chunk_statistics, has_chunks
from ternlm.evaluation.evaluate import EvaluationResult, evaluate, require_fitting
from ternlm.evaluation.samples import sample_modes
from ternlm.evaluation.ternary import TernaryStatistics
from ternlm.models import LanguageModel, build_model
from ternlm.models.prediction import predict
from ternlm.run_directory import RunDirectory, runs_around
from ternlm.tokenizers import Tokenizer
from ternlm.tracking.console import short_duration
from ternlm.training import evidence, roll_back
from ternlm.training.anomaly import Detector, Event
from ternlm.training.compilation import compile_blocks
from ternlm.training.distillation import build_distillation
from ternlm.training.interruption import Interruption
from ternlm.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_rates
from ternlm.training.plan import activation_bytes
from ternlm.training.progress import Progress
from ternlm.training.recorder import Recorder
from ternlm.training.saves import Saves
from ternlm.training.settings import RunSettings
from ternlm.training.status import StatusFile
from ternlm.training.step import Judge, Stepper, StepResult

MEMORY_SHARE = 0.4
"""Of the machine's memory, what the activations of one micro-batch may be estimated at."""

CHUNKED_TOKENS = 16_384
"""Held-out tokens whose chunks are counted at each evaluation."""

FLAT_TREND = 0.02
"""Nats per 1000 steps below which a loss counts as flat."""

LOWER_RATE = (
    "The last checkpoint is good. Start from it with a lower rate: "
    "ternlm train --resume-from RUN --run-id NEW optimizer.learning_rate=..."
)


class Trainer:
    """Trains one model from its settings, or goes on from a checkpoint.

    Args:
        settings: Resolved settings, with the model's vocabulary size filled in.
        corpus: Prepared or streamed data.
        tokenizer: The one the data was prepared with.
        run: Where everything is written; created by the caller.
        resume_from: A checkpoint to continue, or None to start.
        quiet: Show nothing on the console.
        status: The run's status file, if the caller already has it.
    """

    def __init__(
        self,
        settings: RunSettings,
        corpus: Corpus | StreamedCorpus,
        tokenizer: Tokenizer,
        run: RunDirectory,
        resume_from: Opened | None = None,
        quiet: bool = False,
        status: StatusFile | None = None,
    ) -> None:
        self.settings, self.corpus, self.tokenizer, self.run_directory = settings, corpus, tokenizer, run
        training = settings.training
        self.device = choose_device(training.device)
        self.model = self._build_model()
        require_fitting(self.model, tokenizer)
        self.optimizer = build_optimizer(self.model, settings.optimizer)
        self.loader = corpus.loader(training.batch_size, settings.windows(tokenizer), training.seed, self.device)
        self.total_steps = settings.total_steps(self.loader.windows_per_epoch)
        self.schedule, self.stages = settings.rates(self.total_steps), settings.stages(self.total_steps)
        self.progress = Progress()
        self.interruption = Interruption()
        self.status = status or StatusFile(run, self._say)
        self.distillation = build_distillation(
            settings.distillation, self.model, settings.data.sequence_length, tokenizer, runs_around(run),
            self.total_steps,
        )  # fmt: skip
        self.stepper = Stepper(
            self.model, self.optimizer, settings.objective, training.grad_clip, self._first_micro_batch_size(),
            training.micro_batch_size == "auto", self._say, training.seed, self.distillation,
        )  # fmt: skip
        new_stages = [*self.schedule.boundaries(), self.schedule.weight_decay_end]
        chunk_targets = getattr(settings.model, "targets", ())
        self.detector = Detector(settings.anomaly, self.model.settings.vocab_size or 0, new_stages, chunk_targets)
        self.statistics = TernaryStatistics(self.model)
        self.stages.apply(self.model, 0)
        if resume_from is not None:
            self._restore(resume_from)
        self.recorder = Recorder(run, settings, self.schedule, self.progress, self.status, quiet)
        self.saves = Saves(run, settings, self.schedule, self.progress, self.recorder.event)
        self.saves.last_step = self.progress.step if resume_from is not None else -1
        self._action = "update"
        self._last_row_s = self.progress.elapsed_s
        self._complaint: str | None = None
        if isinstance(self.loader, StreamLoader):
            self.loader.while_waiting, self.loader.say = self._wait_for_data, self._say

    def run(self) -> Progress:
        """Train to the end of the schedule, or to `max_time`.

        Raises:
            Interrupted, Preempted: A signal arrived; the run was saved.
            Diverged: The anomaly policy is exhausted; the last checkpoint is good.
            MemoryExhausted: Not even one sequence fits.
            StorageFault: Two checkpoints in a row could not be written.
        """
        if self.settings.training.compile:
            self.status.update(state="compiling")
            compile_blocks(self.model, self.warm_up, self._say)
        self.recorder.start(self.device, self._facts())
        self.model.train()
        if self._is_due(self.settings.tracking.ternary_every_steps, self.progress.step):
            self.statistics.remember()
        try:
            with self.interruption.watched():
                if not self.is_evaluated():
                    self.evaluate()
                while self.progress.step < self.total_steps and not self._out_of_time():
                    self._one_step()
                self._finish()
        except (Interrupted, Preempted):
            raise self._saved_after_signal() from None
        except DataError:  # what was trained so far is not lost with the source
            if self.saves.last_step != self.progress.step:
                self.save()
                self.saves.wait()
            raise
        finally:
            progress = self.progress  # the last row may be some steps old
            self.status.update(step=progress.step, tokens_seen=progress.tokens, elapsed_seconds=progress.elapsed_s)
            try:
                self.saves.writer.close()
            except StorageFault as error:  # what ended the run matters more
                self._say(str(error))
            self.recorder.close()
        return self.progress

    def _one_step(self) -> None:
        self.interruption.check()
        self.status.update(state="training")
        k, self._action = self.progress.step, "update"
        started = time.perf_counter()
        batch = self.loader.batch(self.progress.samples)
        data_s = time.perf_counter() - started
        result = self.train_step(batch, partial(self._judge, k, batch))
        self.recorder.clock.count(batch.num_tokens, time.perf_counter() - started, data_s)
        self.progress.elapsed_s = self.recorder.clock.elapsed()
        if self._action == "roll_back":
            self._roll_back()
            return

        step = self.progress.step
        if result.telemetry:
            self._note(self.detector.judge_chunks(step, result.telemetry))
        if self._is_due(self.settings.tracking.every_steps, step) or step == 1:
            self._log_step(k, result)
        if self._is_due(self.settings.tracking.ternary_every_steps, step):
            self._measure_codes(batch, k)
        self.recorder.system_when_due()
        if not self.is_evaluated():
            self.evaluate()
        if self._is_due(self.settings.evaluation.sample_every_steps, step):
            self.sample()
        if self.saves.are_due(step):
            self.save()
        self._saved(self.saves.look())

    def train_step(self, batch: Batch, judge: Judge) -> StepResult:
        """Set the rates, make the update if the judge allows it, and move on; nothing is logged or saved.

        Args:
            batch: That of `progress.samples`.
            judge: Asked while the gradients are there.
        """
        k = self.progress.step
        set_rates(self.optimizer, self.schedule.learning_rate(k), self.schedule.weight_decay(k))
        self.stages.apply(self.model, k)
        if k in self.stages.boundaries():
            self.progress.best_loss = None  # the best of integer weights is not the best ternary model
        result = self.stepper(batch, judge, k)
        self.progress.step += 1
        self.progress.samples += self.settings.training.batch_size
        self.progress.tokens += batch.num_tokens
        if not result.skipped:
            self.progress.accept(result.loss)
        return result

    def is_evaluated(self) -> bool:
        """Whether the evaluation that is due at this step, if any, has been made; a signal may have cut it off."""
        step = self.progress.step
        is_due = step > 0 and self._is_due(self.settings.evaluation.every_steps, step)
        return not is_due or self.progress.last_evaluation.get("step") == step

    def evaluate(self) -> EvaluationResult:
        """Score the validation split and log the result.

        Raises:
            Diverged: The loss is not finite.
        """
        settings = self.settings.evaluation
        self.status.update(state="evaluating")
        result = evaluate(
            self.model,
            self.corpus.split("validation"),
            self.tokenizer,
            self.settings.data.sequence_length,
            settings.batch_size or self.stepper.micro_batch_size,
            settings.max_tokens,
            self.interruption.check,
            self.settings.objective.masking,
        )
        if not math.isfinite(result.loss):
            raise Diverged(f"the validation loss is {result.loss} at step {self.progress.step}. {LOWER_RATE}")
        self.recorder.evaluation(result, self._chunk_statistics())
        self.progress.last_evaluation = {"step": self.progress.step, "loss": result.loss, "bpb": result.bpb}
        return result

    def _chunk_statistics(self) -> dict[str, float | None]:
        """Where a hierarchical model cuts the beginning of the validation split; nothing of any other model."""
        if not has_chunks(self.model):
            return {}
        batches = held_out_batches(
            self.model, self.corpus.split("validation"), self.tokenizer, self.settings.data.sequence_length,
            self.stepper.micro_batch_size, CHUNKED_TOKENS,
        )  # fmt: skip
        return chunk_statistics(self.model, batches, self.tokenizer)

    def sample(self) -> None:
        """Generate from the configured prompts in all modes; training's randomness is untouched."""
        rows = sample_modes(self.model, self.tokenizer, self.settings.evaluation, self.settings.training.seed)
        self.recorder.samples(rows)
        self._note(self.detector.judge_samples(self.progress.step, rows))

    def save(self) -> None:
        """Begin to write a checkpoint of this step; it is on disk once `saves.finish` returns.

        Raises:
            Diverged: Weights are not finite and there is nothing to return to.
            StorageFault: This is the second checkpoint in a row that could not be written.
        """
        self.recorder.flush()
        try:
            self._saved(self.saves.begin(self._contents))
        except Diverged as error:
            self.recorder.event(Event("nan_inf_state", self.progress.step, "error", str(error), "roll_back", {}))
            self._roll_back()

    def _judge(self, k: int, batch: Batch, result: StepResult) -> bool:
        """Ask the detector about a gradient; what it finds is recorded with evidence before anything changes."""
        verdict = self.detector.judge(k, result.loss, result.grad_norm)
        self._action = verdict.action
        for event in verdict.events:
            self._record(event, batch)
        if verdict.action == "stop":
            raise Diverged(f"step {k + 1}: {verdict.events[-1].message} {LOWER_RATE}")
        return verdict.action == "update"

    def _record(self, event: Event, batch: Batch) -> None:
        if event.dump:
            situation = evidence.Situation(
                self.model, self.tokenizer, batch, self.loader, self.progress.samples, self.stepper.micro_batch_size
            )
            evidence.dump(self.run_directory.anomalies, event, situation, self._say)
        self.recorder.event(event)

    def _roll_back(self) -> None:
        """Return to an earlier checkpoint and go on past the data that led here.

        Raises:
            Diverged: There is no checkpoint to return to, or the allowance is used up.
        """
        self._saved(self.saves.wait())
        policy, root, step = self.settings.anomaly, self.run_directory.checkpoints, self.progress.step
        opened = self.saves.before(step - policy.roll_back_steps)
        if opened is None:
            raise Diverged(
                f"there is no checkpoint to go back to at step {step}. Start anew with a lower optimizer.learning_rate."
            )
        passed_over = policy.skip_batches * self.settings.training.batch_size
        saved_at = Progress.from_state(opened.state, opened.path)
        entry = {"from_step": step, "to_step": saved_at.step, "samples_from": saved_at.samples,
                 "samples_to": max(self.progress.samples, saved_at.samples + passed_over)}  # fmt: skip
        roll_back.begin(root, saved_at.step, [*self.progress.roll_backs, entry])
        self.run_directory.cut_after(saved_at.step)
        self._restore(opened)
        passed = entry["samples_to"] - entry["samples_from"]
        message = f"back from step {step} to step {saved_at.step}, and on past {passed:,} sequences"
        self.recorder.event(Event("roll_back", step, "error", message, "roll_back", {}))
        self.saves.last_step = self.progress.step

    def _log_step(self, k: int, result: StepResult) -> None:
        bytes_per_token = self.corpus.bytes_per_token() if self.model.is_causal else None
        row = self.recorder.step(k, result, self.loader.epoch(self.progress.samples), bytes_per_token)
        since = row["wall_s"] - self._last_row_s
        self._last_row_s = row["wall_s"]
        self._note(self.detector.judge_throughput(self.progress.step, row["perf/tokens_per_sec"], since))

    def _note(self, events: list[Event]) -> None:
        for event in events:
            self.recorder.event(event)
            if event.action == "stop":
                raise Diverged(f"{event.message} {LOWER_RATE}")

    def _measure_codes(self, batch: Batch, k: int) -> None:
        row = self.statistics.measure(batch.tokens)
        self.recorder.ternary(row)
        trend, rate = self.status.loss_trend, self.schedule.learning_rate(k)
        is_flat = trend is not None and abs(trend) < FLAT_TREND
        self._note(self.detector.judge_ternary(self.progress.step, row, rate, is_flat))

    def _saved(self, saved: checkpoint.Saved | None) -> None:
        if saved is not None:
            self.status.update(last_checkpoint=saved.step)
            self.loader.release(self.saves.samples)

    def _build_model(self) -> LanguageModel:
        training = self.settings.training
        with torch.device(self.device):
            rounding = self.settings.quantization.base()
            model = build_model(self.settings.model, rounding, training.gradient_checkpointing)
        model.compute_dtype = choose_dtype(training.precision, self.device)
        if model.compute_dtype == torch.float16 and getattr(self.settings.model, "hidden_act", "") == "relu2":
            raise SettingsError(
                f"model.hidden_act=relu2 overflows in fp16, which is what training.precision={training.precision} "
                f"means on {self.device}. Use training.precision=fp32."
            )
        model.initialize(training.seed)
        return model

    def _first_micro_batch_size(self) -> int:
        """As the settings say; `auto` starts on a CPU with what should fit, as a system kills where CUDA reports."""
        training = self.settings.training
        size = training.first_micro_batch_size()
        if training.micro_batch_size == "auto" and self.device.type == "cpu":
            room = MEMORY_SHARE * psutil.virtual_memory().total
            while size > 1 and activation_bytes(self.model, self.settings, size) > room:
                size = -(-size // 2)
        return size

    def _restore(self, opened: Opened) -> None:
        """Take over weights, optimizer, position and the detector's memory from a checkpoint."""
        progress = Progress.from_state(opened.state, opened.path)
        # As built, so that integer weights of this step, if any, make learned scales that are loaded stale.
        self.model.set_mode(self.settings.quantization.base())
        checkpoint.load_tensors(self.model, opened.model, opened.path)
        load_optimizer_tensors(self.model, self.optimizer, opened.optimizer)
        self.stages.apply(self.model, progress.step - 1)
        memory = opened.state.get("detector")
        try:
            if memory is not None:
                self.detector.load_state_dict(memory)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{opened.path}' holds a damaged memory of anomalies ({error}). Use another one."
            ) from None
        if roll_back.complete(self.run_directory.checkpoints, progress):
            self.detector.rolled_back(progress.step, memory)
        self.detector.roll_backs = [entry["from_step"] for entry in progress.roll_backs]
        vars(self.progress).update(vars(progress))  # the recorder holds the same object
        training, split = self.settings.training, opened.state.get("micro_batch_size")
        if training.micro_batch_size == "auto" and training.gradient_accumulation_steps is None and split:
            self.stepper.micro_batch_size = int(split)  # where sums are split decides their last bits
        if opened.state.get("loss_scale"):
            self.stepper.scaler.load_state_dict(opened.state["loss_scale"])

    def _contents(self) -> checkpoint.Contents:
        state = {
            "progress": vars(self.progress),
            "detector": self.detector.state_dict(),
            "loss_scale": self.stepper.scaler.state_dict(),
            "micro_batch_size": self.stepper.micro_batch_size,
            "data_fingerprint": self.corpus.fingerprint,
            "total_steps": self.total_steps,
            "run_id": self.run_directory.id,
            "distillation": None if self.distillation is None else self.distillation.identity,
        }
        return checkpoint.Contents(
            self.model.tensors(),
            optimizer_tensors(self.model, self.optimizer),
            state,
            self.settings.model_dump(mode="json"),
            self.tokenizer,
        )

    def _is_due(self, every: int | None, step: int) -> bool:
        """Whether something done every so many steps, and at the end, is done now."""
        return every is not None and (step % every == 0 or step == self.total_steps)

    def _finish(self) -> None:
        if self.saves.last_step != self.progress.step:
            self.save()
        self.saves.finish()
        if self.progress.step < self.total_steps:
            limit = short_duration(self.settings.training.max_time or 0)
            self.status.update(reason="training.max_time")
            self._say(f"stopped after training.max_time={limit} at step {self.progress.step}; saved.")
        rate = self.progress.tokens / max(self.progress.elapsed_s, 1e-9)
        self._say(
            f"done: {self.progress.step} steps, {self.progress.tokens:,} tokens in "
            f"{short_duration(self.progress.elapsed_s)} ({rate:,.0f} tokens/s)"
        )

    def _saved_after_signal(self) -> TernlmError:
        if self.saves.last_step != self.progress.step and self.progress.step > 0:
            self.save()
        self.saves.finish()
        where = self.run_directory.path
        return self.interruption.error(
            f"saved at step {self.progress.step}. Continue with: ternlm resume {where}"
            if self.progress.step
            else f"nothing was trained yet. Start again with: ternlm resume {where}"
        )

    def _out_of_time(self) -> bool:
        limit = self.settings.training.max_time
        return limit is not None and self.recorder.clock.elapsed() >= limit

    def _facts(self) -> dict[str, Any]:
        """What trackers record beside the settings."""
        counts = self.model.parameter_counts()
        return {
            **self.settings.model_dump(mode="json"),
            "total_parameters": counts.total,
            "trainable_parameters": counts.total,
            "ternary_parameters": counts.ternary,
            "vocab_size": self.model.settings.vocab_size,
            "total_training_steps": self.total_steps,
            "device": str(self.device),
            "world_size": 1,
            "dataset": self.corpus.describe(),
        }

    def _say(self, text: str) -> None:
        self.recorder.say(text)

    def _wait_for_data(self, complaint: str | None) -> None:
        """Called while the stream has no block to give; what it complains about is said once."""
        self.interruption.check()
        self.status.update(state="waiting")
        if complaint is not None and complaint != self._complaint:
            self._say(complaint)
        self._complaint = complaint

    def warm_up(self) -> None:
        """A training and an evaluation pass whose results are thrown away, to compile with."""
        batch = self.loader.batch(self.progress.samples, self.stepper.micro_batch_size)
        predict(self.model.train(), batch.tokens, batch.targets).logits.float().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            predict(self.model.eval(), batch.tokens, batch.targets)
