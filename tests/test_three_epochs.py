"""The whole path, family by family: three epochs over a small corpus, and held-out text is predicted ever better."""

import json
from pathlib import Path

import pytest

from ternlm import cli
from ternlm.models import MODELS
from ternlm.run_directory import RunDirectory, read_jsonl

RECIPES = {"bitnet": "bitnet-1m", "hgrn": "hgrn-nano", "hnet": "hnet-nano"}
CAUSAL = [name for name, family in MODELS.items() if family.model.is_causal]
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "d_model": "[32, 48]", "num_blocks": "[[2, 0, 2], [2]]"}  # fmt: skip
ANIMALS, PLACES = ("fox", "hen", "cat", "goose", "mole"), ("hill", "barn", "pond", "mill")


def write_tales(folder: Path, count: int) -> None:
    """Documents that follow one pattern, which held-out ones follow as well."""
    folder.mkdir()
    for number in range(count):
        animal, place = ANIMALS[number % 5], PLACES[number // 5 % 4]
        friends = f"There it met {number % 9} friends of the {animal}."
        (folder / f"{number:03}.txt").write_text(
            f"The {animal} went to the {place}. {friends} They all went home.\n" * 2
        )


@pytest.mark.parametrize("family", CAUSAL)
def test_three_epochs_lower_the_loss_on_held_out_text_epoch_by_epoch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tales(tmp_path / "tales", 180)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = MODELS[family].settings.model_fields
    words = ["ternlm", "train", RECIPES[family], "--quiet", "--data", str(tmp_path / "tales"), "--epochs", "3",
             "--runs-dir", str(tmp_path), "--run-id", "three", "data.sequence_length=64",
             "data.validation_fraction=0.1", "training.batch_size=16", "optimizer.learning_rate=4e-3",
             "schedule.warmup_steps=5", "training.threads=1", "evaluation.every_steps=30",
             "evaluation.sample_every_steps=none",
             *(f"model.{name}={value}" for name, value in SMALL.items() if name in known)]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    run = RunDirectory(tmp_path / "three")
    evaluations = read_jsonl(run.evaluations)
    last = read_jsonl(run.scalars)[-1]
    assert last["train/epoch"] == pytest.approx(3, abs=0.05)
    losses = [row["val/loss"] for row in evaluations]
    assert len(losses) >= 3
    assert evaluations[-1]["step"] == last["step"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3
    assert json.loads(run.status.read_text())["state"] == "finished"
