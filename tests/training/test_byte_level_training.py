"""Whole runs of the byte-level families: stopped and resumed equals uninterrupted, what is logged, what is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TRAIN, tiny_corpus, tiny_settings
from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.errors import Interrupted
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.training import launch
from ternlm.training.trainer import Trainer

FAMILIES: dict[str, dict[str, Any]] = {
    "hgrn": {"family": "hgrn"},
    "hnet": {
        "family": "hnet", "d_model": (24, 28, 40), "num_blocks": ((2, 0, 2), (1, 0, 1), (2,)),
        "innermost_use_attention": True, "attention_num_heads": 2, "use_short_conv": True,
    },
}  # fmt: skip
STEPS, STOP = 7, 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train=TRAIN[:8])


def start(run: RunDirectory, prepared: Prepared, family: str) -> None:
    settings = tiny_settings(
        run.path.parent,
        model=FAMILIES[family],
        training={"max_steps": STEPS, "batch_size": 5, "micro_batch_size": 3, "checkpoint_every_steps": 3},
        tracking={"every_steps": 1, "tensorboard": False},
        evaluation={"every_steps": 4, "sample_every_steps": 4, "sample_tokens": 3, "prompts": ["The"]},
    )
    launch.start(Resolved(settings.model_dump(mode="json"), {}), run, lambda *_: prepared, None, quiet=True)


def stop(self: Trainer) -> None:
    if self.progress.step == STOP:
        self.interruption.received = 2
    one_step(self)


one_step = Trainer._one_step


def weights(run: RunDirectory) -> dict[str, bytes]:
    opened = checkpoint.open_checkpoint(run.checkpoints / f"step_{STEPS:06d}")
    return {name: tensor.numpy().tobytes() for name, tensor in (opened.model | opened.optimizer).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_l01_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, prepared: Prepared, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    start(whole, prepared, family)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stop)
        with pytest.raises(Interrupted):
            start(stopped, prepared, family)
    launch.resume(stopped, {}, lambda *_: prepared, quiet=True)
    assert weights(stopped) == weights(whole)
    losses, again = ([row["train/loss"] for row in read_jsonl(run.scalars)] for run in (whole, stopped))
    assert losses == again and len(losses) == STEPS
    samples, again = ([row["generated_ids"] for row in read_jsonl(run.samples)] for run in (whole, stopped))
    assert samples == again and samples


def test_a_run_of_hnet_logs_its_chunks_and_its_checkpoint_computes_as_it_did(
    tmp_path: Path, prepared: Prepared
) -> None:
    run = RunDirectory(tmp_path / "run")
    start(run, prepared, "hnet")
    for row in read_jsonl(run.scalars):
        for stage in (0, 1):
            rate, mean = (row[f"hnet/stage{stage}/boundary_{name}"] for name in ("rate", "probability"))
            assert 0 < rate <= 1 and 0 < mean <= 1
            assert row[f"hnet/stage{stage}/bytes_per_chunk"] >= 1
        assert row["hnet/stage1/bytes_per_chunk"] > row["hnet/stage0/bytes_per_chunk"]
    loaded = checkpoint.load(run.checkpoints / f"step_{STEPS:06d}")
    again = checkpoint.load(run.checkpoints / f"step_{STEPS:06d}")
    tokens = torch.tensor([list(b"The red fox met 3 hens.")])
    with torch.no_grad():
        logits = loaded.model(tokens).logits
        assert torch.equal(logits, again.model(tokens).logits)
        state, parts = loaded.model.initial_state(1), []
        for piece in tokens.split(1, dim=1):
            output = loaded.model(piece, state)
            state = output.state
            parts.append(output.logits)
    difference = (torch.cat(parts, dim=1) - logits).abs().amax(dim=-1)
    assert (difference < 1e-4).float().mean() > 0.8
