"""The loop: next batch, schedules, step, then log, evaluate, sample and save, each when due."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ternlm import checkpoint
from ternlm.data.corpus import Corpus
from ternlm.data.loader import Loader
from ternlm.device import choose_device, choose_dtype, peak_memory_mb
from ternlm.errors import CheckpointError, Diverged, Interrupted, Preempted, SettingsError, TernlmError
from ternlm.evaluation.evaluate import EvaluationResult, evaluate, require_fitting
from ternlm.generation import SamplingSettings, generate
from ternlm.models import LanguageModel, build_model
from ternlm.run_directory import RunDirectory
from ternlm.tokenizers import Tokenizer
from ternlm.tracking import Trackers, build_trackers
from ternlm.tracking.console import ConsoleTracker, short_duration
from ternlm.training.clock import Clock
from ternlm.training.compilation import compile_blocks
from ternlm.training.interruption import Interruption
from ternlm.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_rates
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings
from ternlm.training.step import LOWER_RATE, Stepper, StepResult


@dataclass
class Progress:
    """Where a run is: everything that is neither weights nor settings, and all JSON.

    Attributes:
        step: Completed optimizer steps.
        samples: Sequences drawn so far: the whole state of the data.
        tokens: Targets trained on so far.
        elapsed_s: Seconds of training so far, over all sittings.
        best_loss: Lowest validation loss of a saved checkpoint.
        last_evaluation: Step and loss of the latest evaluation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    last_evaluation: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains one model from its settings, or goes on from a checkpoint.

    Args:
        settings: Resolved settings, with the model's vocabulary size filled in.
        corpus: Prepared data.
        tokenizer: The one the data was prepared with.
        run: Where everything is written; created by the caller.
        resume_from: A checkpoint to continue, or None to start.
        quiet: Show nothing on the console.
    """

    def __init__(
        self,
        settings: RunSettings,
        corpus: Corpus,
        tokenizer: Tokenizer,
        run: RunDirectory,
        resume_from: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.settings, self.corpus, self.tokenizer, self.run_directory = settings, corpus, tokenizer, run
        training = settings.training
        self.device = choose_device(training.device)
        self.model = self._build_model()
        require_fitting(self.model, tokenizer)
        self.optimizer = build_optimizer(self.model, settings.optimizer)
        self.loader = Loader(
            corpus.split("train"), training.batch_size, settings.data.sequence_length, training.seed,
            tokenizer.bos_id, self.device,
        )  # fmt: skip
        self.total_steps = settings.total_steps(self.loader.windows_per_epoch)
        optimizer = settings.optimizer
        self.schedule = Schedule(settings.schedule, optimizer.learning_rate, optimizer.weight_decay, self.total_steps)
        self.progress = Progress()
        self._loss_scale: dict[str, Any] | None = None
        if resume_from is not None:
            self._restore(resume_from)
        self.console = ConsoleTracker(self.total_steps, self.progress.step, run.log, quiet=quiet)
        built = build_trackers(run, settings.tracking, self.progress.step, self.console.say)
        self.trackers = Trackers([self.console, *built], self.console.say)
        self.stepper = Stepper(
            self.model, self.optimizer, settings.objective, training.grad_clip,
            training.first_micro_batch_size(), training.micro_batch_size == "auto", self.console.say,
        )  # fmt: skip
        if self._loss_scale:
            self.stepper.scaler.load_state_dict(self._loss_scale)
        self.interruption = Interruption()
        self._last_saved = self.progress.step if resume_from is not None else -1

    def run(self) -> Progress:
        """Train to the end of the schedule, or to `max_time`.

        Raises:
            Interrupted, Preempted: A signal arrived; the run was saved.
            Diverged: Non-finite numbers several times in a row; the last checkpoint is good.
            MemoryExhausted: Not even one sequence fits.
        """
        if self.settings.training.compile:
            compile_blocks(self.model, self._one_micro_batch, self.console.say)
        clock = Clock(self.progress.elapsed_s)
        self.model.train()
        try:
            with self.interruption.watched():
                if not self.is_evaluated():
                    self.evaluate()
                while self.progress.step < self.total_steps and not self._out_of_time(clock):
                    self._one_step(clock)
                self._finish(clock)
        except (Interrupted, Preempted):
            raise self._saved_after_signal(clock) from None
        finally:
            self.trackers.close()
        return self.progress

    def _one_step(self, clock: Clock) -> None:
        self.interruption.check()
        k = self.progress.step
        set_rates(self.optimizer, self.schedule.learning_rate(k), self.schedule.weight_decay(k))
        started = time.perf_counter()
        batch = self.loader.batch(self.progress.samples)
        data_s = time.perf_counter() - started
        result = self.stepper(batch)
        clock.count(result.targets, time.perf_counter() - started, data_s)
        self.progress.step += 1
        self.progress.samples += self.settings.training.batch_size
        self.progress.tokens += result.targets
        self.progress.elapsed_s = clock.elapsed()

        step, ends = self.progress.step, self.progress.step == self.total_steps
        if step % self.settings.tracking.every_steps == 0 or ends or step == 1:
            self.trackers.log("train", self._training_row(k, result, clock))
        if not self.is_evaluated():
            self.evaluate()
        sample_every = self.settings.evaluation.sample_every_steps
        if sample_every is not None and (step % sample_every == 0 or ends):
            self.sample()
        if step % self.settings.training.checkpoint_every_steps == 0 or ends or self._near_boundary(step):
            self.save()

    def is_evaluated(self) -> bool:
        """Whether the evaluation that is due at this step, if any, has been made; a signal may have cut it off."""
        step = self.progress.step
        is_due = step > 0 and (step % self.settings.evaluation.every_steps == 0 or step == self.total_steps)
        return not is_due or self.progress.last_evaluation.get("step") == step

    def evaluate(self) -> EvaluationResult:
        """Score the validation split and log the result.

        Raises:
            Diverged: The loss is not finite.
        """
        settings = self.settings.evaluation
        result = evaluate(
            self.model,
            self.corpus.split("validation"),
            self.tokenizer,
            self.settings.data.sequence_length,
            settings.batch_size or self.stepper.micro_batch_size,
            settings.max_tokens,
            self.interruption.check,
        )
        row = {
            **self._row(),
            "val/loss": result.loss,
            "val/perplexity": result.perplexity,
            "val/bpb": result.bpb,
            "val/accuracy": result.accuracy,
            "val/top5_accuracy": result.top5_accuracy,
            **{name: value for name, value in result.as_dict().items() if name not in ("loss", "perplexity", "wall_s")},
        }
        if not math.isfinite(result.loss):
            raise Diverged(f"the validation loss is {result.loss} at step {self.progress.step}. {LOWER_RATE}")
        self.trackers.log("eval", row)
        self.progress.last_evaluation = {"step": self.progress.step, "loss": result.loss, "bpb": result.bpb}
        return result

    def sample(self) -> None:
        """Generate from the configured prompts and log the text; training's randomness is untouched."""
        settings = self.settings.evaluation
        sampling = SamplingSettings(
            max_new_tokens=settings.sample_tokens, temperature=settings.temperature, top_p=settings.top_p,
            seed=self.settings.training.seed,
        )  # fmt: skip
        for sample in generate(self.model, self.tokenizer, settings.prompts, sampling):
            row = {**self._row(), "prompt": sample.prompt, "generated_text": sample.text}
            self.trackers.log("sample", {**row, "generated_ids": sample.ids, "seed": sampling.seed})

    def save(self, pinned: str | None = None) -> Path:
        """Write a checkpoint of this step, move the pointers, and prune by policy."""
        step, root = self.progress.step, self.run_directory.checkpoints
        if self._near_boundary(step):
            pinned = "stage boundary"
        elif step == self.total_steps:
            pinned = "end"
        evaluation = self.progress.last_evaluation
        best_loss = self.progress.best_loss
        is_best = evaluation.get("step") == step and (best_loss is None or evaluation["loss"] < best_loss)
        if is_best:
            self.progress.best_loss = evaluation["loss"]
        path = checkpoint.save(root, step, self._contents(), pinned)
        checkpoint.point(root, "last", path)
        if is_best:
            checkpoint.point(root, "best", path)
        if step == self.total_steps:
            checkpoint.point(root, "final", path)
        training = self.settings.training
        checkpoint.prune(root, training.keep_last, training.keep_every)
        self._last_saved = step
        return path

    def _build_model(self) -> LanguageModel:
        training = self.settings.training
        with torch.device(self.device):
            model = build_model(self.settings.model, self.settings.quantization, training.gradient_checkpointing)
        model.compute_dtype = choose_dtype(training.precision, self.device)
        if model.compute_dtype == torch.float16 and getattr(self.settings.model, "hidden_act", "") == "relu2":
            raise SettingsError(
                f"model.hidden_act=relu2 overflows in fp16, which is what training.precision={training.precision} "
                f"means on {self.device}. Use training.precision=fp32."
            )
        model.initialize(training.seed)
        return model

    def _restore(self, path: Path) -> None:
        tensors, optimizer, state = checkpoint.read_training_state(path)
        checkpoint.load_tensors(self.model, tensors, path)
        load_optimizer_tensors(self.model, self.optimizer, optimizer)
        try:
            self.progress, self._loss_scale = Progress(**state["progress"]), state["loss_scale"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"'{path}' holds no position to go on from ({error}). Use another one.") from None

    def _contents(self) -> checkpoint.Contents:
        state = {
            "progress": vars(self.progress),
            "loss_scale": self.stepper.scaler.state_dict(),
            "data_fingerprint": self.corpus.fingerprint,
            "total_steps": self.total_steps,
            "run_id": self.run_directory.id,
        }
        return checkpoint.Contents(
            self.model.tensors(),
            optimizer_tensors(self.model, self.optimizer),
            state,
            self.settings.model_dump(mode="json"),
            self.tokenizer,
        )

    def _near_boundary(self, step: int) -> bool:
        """Whether `step` completed updates are right before or right after a stage's first update."""
        return any(step in (boundary, boundary + 1) for boundary in self.schedule.boundaries())

    def _finish(self, clock: Clock) -> None:
        if self._last_saved != self.progress.step:
            self.save()
        if self.progress.step < self.total_steps:
            limit = short_duration(self.settings.training.max_time or 0)
            self.console.say(f"stopped after training.max_time={limit} at step {self.progress.step}; saved.")
        rate = self.progress.tokens / max(self.progress.elapsed_s, 1e-9)
        self.console.say(
            f"done: {self.progress.step} steps, {self.progress.tokens:,} tokens in "
            f"{short_duration(self.progress.elapsed_s)} ({rate:,.0f} tokens/s)"
        )

    def _saved_after_signal(self, clock: Clock) -> TernlmError:
        if self._last_saved != self.progress.step and self.progress.step > 0:
            self.save()
        where = self.run_directory.path
        return self.interruption.error(
            f"saved at step {self.progress.step}. Continue with: ternlm resume {where}"
            if self.progress.step
            else f"nothing was trained yet. Start again with: ternlm resume {where}"
        )

    def _out_of_time(self, clock: Clock) -> bool:
        limit = self.settings.training.max_time
        return limit is not None and clock.elapsed() >= limit

    def _row(self) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "tokens_seen": self.progress.tokens,
            "wall_s": round(self.progress.elapsed_s, 3),
            "time": time.time(),
        }

    def _training_row(self, k: int, result: StepResult, clock: Clock) -> dict[str, Any]:
        rates = clock.read()
        remaining = self.total_steps - self.progress.step
        bytes_per_token = self._bytes_per_token()
        return {
            **self._row(),
            "train/loss": result.loss,
            "train/perplexity": math.exp(min(result.loss, 700.0)),
            "train/bpb": None if bytes_per_token is None else result.loss / (math.log(2) * bytes_per_token),
            "train/learning_rate": self.schedule.learning_rate(k),
            "train/weight_decay": self.schedule.weight_decay(k),
            "train/grad_norm": result.grad_norm,
            "train/epoch": self.loader.epoch(self.progress.samples),
            "train/stage": self.schedule.stage(k),
            **rates,
            "perf/peak_memory_mb": peak_memory_mb(self.device),
            "eta_s": remaining * rates["perf/step_time_ms"] / 1e3,
        }

    def _bytes_per_token(self) -> float | None:
        """Raw bytes per target of the training split, to show bits per byte while training."""
        stream = self.corpus.split("train")
        markers = stream.documents * (self.tokenizer.bos_id is not None)
        targets = len(stream) - markers
        return stream.bytes / targets if targets else None

    def _one_micro_batch(self) -> None:
        """A training and an evaluation pass whose results are thrown away, to compile with."""
        batch = self.loader.batch(self.progress.samples, self.stepper.micro_batch_size)
        self.model.train()(batch.tokens).logits.float().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.eval()(batch.tokens)
