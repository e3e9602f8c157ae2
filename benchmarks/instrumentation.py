"""What a run's own records cost: training with everything on at default intervals, against a bare loop.

    python benchmarks/instrumentation.py --recipe bitnet-1m --steps 2000

Two copies of one model train in one process and take turns. The bare loop draws a batch, sets the rates, runs the
step and nothing else. The full one is the trainer at its default intervals: rows and status file, TensorBoard, codes
and activations, system readings, the anomaly rules, checkpoints written in the background, and samples in three
modes every 1000 steps. Evaluation is left out of both: it is work the user asks for, not bookkeeping.

Two answers, both in CPU time of the whole process, background threads included. `alternating` is the full loop over the
bare one, block against block; on a shared machine its noise is larger than what it measures. `accounted` is taken
within the full loop: everything the process did, over what it did inside batch and step. Nothing that the rules,
records and checkpoints do happens in there, so their share is the ratio minus one.
Writes benchmarks/results/instrumentation-RECIPE-DATE.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ternlm.data.preparation import prepare_data
from ternlm.recipes import load_recipe
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import Layer, parse_overrides, resolve
from ternlm.training import launch
from ternlm.training.optimizer import set_rates
from ternlm.training.settings import setting_names
from ternlm.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
Loop = tuple[Callable[[], None], Callable[[], None]]
"""A step, and what ends a block of them."""


def main() -> None:
    """Alternate blocks of both loops and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", default="bitnet-1m")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each loop")
    parser.add_argument("--block", type=int, default=100, help="steps before the other loop's turn")
    parser.add_argument("settings", nargs="*", help="further settings, key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bare, full = (make(arguments, Path(folder) / name) for name in ("bare", "full"))
        full.recorder.start(full.device, {})
        account = Account(full)
        loops = {"bare": (lambda: bare_step(bare), lambda: None), "full": (account.step, account.settle)}
        for loop, settle in loops.values():  # first steps allocate
            block(loop, 3, settle)
        account.clear()
        pairs = alternate(loops, arguments.steps // arguments.block, arguments.block)
        with account.everything():
            full.saves.writer.close()
            full.recorder.close()
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "recipe": arguments.recipe, "settings": arguments.settings,
        "steps_per_loop": arguments.steps, "block": arguments.block,
        "parameters": bare.model.parameter_counts().total,
        "tokens_per_step": bare.settings.training.batch_size * bare.settings.data.sequence_length,
        "bare_step_cpu_ms": 1e3 * statistics.median(pair["bare"][0] for pair in pairs) / arguments.block,
        "accounted": account.ratio(),
        "alternating": {name: summary(pairs, index) for index, name in enumerate(("cpu", "wall"))},
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"instrumentation-{arguments.recipe}-{result['date']}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


def make(arguments: argparse.Namespace, path: Path) -> Trainer:
    """A trainer of the recipe in its own run folder, which never reaches its last step."""
    recipe = load_recipe(arguments.recipe)
    fixed = {"training.max_steps": 10 * arguments.steps, "training.max_tokens": None, "training.max_epochs": None,
             "training.threads": 1, "evaluation.every_steps": 10**9, "evaluation.sample_every_steps": 1000}  # fmt: skip
    layers = [Layer("recipe", recipe.values), Layer("benchmark", fixed),
              Layer("command line", parse_overrides(arguments.settings))]  # fmt: skip
    settings = launch.settings_from(resolve(layers, setting_names()))
    prepared = prepare_data(settings.data, settings.tokenizer)
    settings = launch.with_vocab_size(settings, prepared)
    run = RunDirectory(path)
    run.create()
    return Trainer(settings, prepared.corpus, prepared.tokenizer, run, quiet=True)


class Account:
    """CPU time of one trainer's loop: all of it, and what batch and step take.

    Args:
        trainer: Its loader and stepper are timed from now on.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.clear()
        draw, stepper = trainer.loader.batch, trainer.stepper
        trainer.loader.batch = lambda counter: self._timed(draw, counter)  # type: ignore[method-assign, assignment]

        def step(batch: Any, judge: Any) -> Any:
            def timed_judge(result: Any) -> bool:
                started = time.thread_time()
                verdict = judge(result)
                self.work_s -= time.thread_time() - started
                return bool(verdict)

            return self._timed(stepper, batch, timed_judge)

        step.__dict__.update(micro_batch_size=stepper.micro_batch_size, scaler=stepper.scaler)
        trainer.stepper = step  # type: ignore[assignment]

    def clear(self) -> None:
        """Begin again."""
        self.total_s = self.work_s = 0.0

    def step(self) -> None:
        """One step of the trainer."""
        with self.everything():
            self._trainer._one_step()

    def settle(self) -> None:
        """Let the checkpoint that is being written end."""
        with self.everything():
            self._trainer.saves.writer.wait()

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Count what the process does in the block."""
        started = time.process_time()
        yield
        self.total_s += time.process_time() - started

    def ratio(self) -> float:
        """Everything over batch and step."""
        return self.total_s / self.work_s

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.thread_time()
        result = call(*arguments)
        self.work_s += time.thread_time() - started
        return result


def bare_step(trainer: Trainer) -> None:
    """One step and its counters."""
    k = trainer.progress.step
    set_rates(trainer.optimizer, trainer.schedule.learning_rate(k), trainer.schedule.weight_decay(k))
    trainer.stepper(trainer.loader.batch(trainer.progress.samples))
    trainer.progress.step += 1
    trainer.progress.samples += trainer.settings.training.batch_size


def alternate(loops: dict[str, Loop], rounds: int, steps: int) -> list[dict[str, tuple[float, float]]]:
    """(CPU, wall) seconds of a block of each loop per round; who goes first changes."""
    pairs = []
    for number in range(rounds):
        order = list(loops) if number % 2 else list(reversed(loops))
        measured = {name: block(loops[name][0], steps, loops[name][1]) for name in order}
        pairs.append(measured)
    return pairs


def block(step: Callable[[], None], steps: int, settle: Callable[[], None]) -> tuple[float, float]:
    """(CPU, wall) seconds of some steps and of what they left to threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    settle()
    return time.process_time() - cpu, time.perf_counter() - wall


def summary(pairs: list[dict[str, tuple[float, float]]], index: int) -> dict[str, float]:
    """Full over bare: of the sums, and quartiles over rounds."""
    ratios = [pair["full"][index] / pair["bare"][index] for pair in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    total = sum(pair["full"][index] for pair in pairs) / sum(pair["bare"][index] for pair in pairs)
    return {"ratio_of_sums": total, "median_ratio": middle, "quartiles": [low, high]}


if __name__ == "__main__":
    main()
