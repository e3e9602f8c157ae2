"""One model in a process of its own: to see what memory the whole process takes, or because it is too large."""

import json
import subprocess
import sys
from typing import Any

import torch

from ternlm.benchmark.candidate import Candidate, described
from ternlm.benchmark.inference import compare_inference
from ternlm.benchmark.memory import process_growth_mb
from ternlm.benchmark.subject import Work
from ternlm.benchmark.training import compare_training
from ternlm.device import peak_memory_mb, set_up

_STEPS = 3


def process_memory(candidate: Candidate, task: dict[str, Any]) -> float | None:
    """Growth of the largest memory of a process from before the model is built, in MiB; None if it came to grief.

    Args:
        candidate: The model.
        task: `threads`, and either `work` of a training step or `prompt_length`, `new_tokens` and `rows`.
    """
    answer = _ask({"candidate": candidate.as_dict(), **task})
    return None if answer is None else float(answer)


def train_apart(candidate: Candidate, task: dict[str, Any]) -> dict[str, Any] | None:
    """`compare_training` of one model, with `model`, who it is; None if its process came to grief.

    Args:
        candidate: The model.
        task: `device`, `threads`, `work`, `warmup`, `repeats`, and `tokens`, ids to read or None.
    """
    answer = _ask({"candidate": candidate.as_dict(), "train": True, **task})
    return None if answer is None else dict(json.loads(answer))


def main() -> None:
    """Answer a question from standard input on the last line of standard output."""
    task = json.load(sys.stdin)
    device = torch.device(task.get("device", "cpu"))
    set_up(device, task["threads"])
    candidate = Candidate.from_dict(task["candidate"])
    if task.get("train"):
        print(json.dumps(_trained(candidate, device, task)))
    else:
        print(_grown(candidate, device, task))


def _trained(candidate: Candidate, device: torch.device, task: dict[str, Any]) -> dict[str, Any]:
    before = peak_memory_mb(device)
    subject = candidate.build(device, trains=True)
    subject.tokens = None if task["tokens"] is None else torch.tensor(task["tokens"])
    result = compare_training([subject], Work(*task["work"]), task["warmup"], task["repeats"])
    if device.type == "cpu":
        result["rows"][0]["process_mb"] = peak_memory_mb(device) - before
    return result | {"model": described(candidate, subject)}


def _grown(candidate: Candidate, device: torch.device, task: dict[str, Any]) -> float:
    def begin_training() -> Any:
        subject = candidate.build(device, trains=True)
        subject.begin_training(Work(*task["work"]), lambda sentence: None)
        return subject.training_step

    def begin_inference() -> Any:
        subject = candidate.build(device, trains=False)
        sizes = (task["prompt_length"], task["new_tokens"], task["rows"])
        return lambda: compare_inference([subject], *sizes, repeats=2, measures_memory=False)

    if "work" in task:
        return process_growth_mb(begin_training, _STEPS)
    return process_growth_mb(begin_inference, 1)


def _ask(question: dict[str, Any]) -> str | None:
    """The last line that a process answers; None if it failed or was killed."""
    command = [sys.executable, "-m", "ternlm.benchmark.process"]
    answer = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    return None if answer.returncode else answer.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
