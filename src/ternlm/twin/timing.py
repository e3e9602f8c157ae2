"""The two trained models beside each other on this machine: training step, reading and writing, in turns."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ternlm.benchmark.inference import compare_inference
from ternlm.benchmark.subject import OwnSubject, Work
from ternlm.benchmark.training import compare_training
from ternlm.run_directory import RunDirectory
from ternlm.training.optimizer import OptimizerSettings
from ternlm.twin.definition import ADJECTIVES, ArmName
from ternlm.twin.measuring import Measurer

_MOST_ROWS_TOKENS = 8192
_NEW_TOKENS = 32
_REPEATS = 8


def time_arms(runs: Mapping[ArmName, RunDirectory], measurer: Measurer) -> dict[str, Any]:
    """Training steps, and for causal models prefill and decoding, of both final checkpoints in turns.

    A step reads as many rows of the run's own length as fit into `_MOST_ROWS_TOKENS` tokens, at most its batch.

    Args:
        runs: Both arms, trained.
        measurer: Loads them, and reads held-out tokens for them.

    Returns:
        `training` and `inference` as `ternlm.benchmark` has them, `by_arm` with the name of each arm's row, and
        `threads`.
    """
    subjects, length, rows = [], 1, 1
    for arm, run in runs.items():
        loaded = measurer.load(run)
        config = loaded.config
        length = config["data"]["sequence_length"]
        rows = max(1, min(config["training"]["batch_size"], _MOST_ROWS_TOKENS // length))
        optimizer = OptimizerSettings.from_mapping(config["optimizer"], "optimizer")
        subject = OwnSubject(ADJECTIVES[arm], loaded.model, optimizer)
        subject.tokens = torch.from_numpy(measurer.sample(run, (rows + 1) * length).astype(np.int64))
        subjects.append(subject)
    check = measurer.check
    training = compare_training(subjects, Work(rows, length), repeats=_REPEATS, check=check)
    written = min(_NEW_TOKENS, max(length // 2, 1))
    inference = compare_inference(subjects, max(length - written, 1), written, repeats=_REPEATS, check=check)
    names = {arm: ADJECTIVES[arm] for arm in runs}
    return {"training": training, "inference": inference, "by_arm": names, "threads": torch.get_num_threads()}
