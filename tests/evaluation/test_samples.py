"""Samples in the three fixed modes: what is drawn, with which seeds, what rows say, and that training never notices."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_bitnet, tiny_corpus, tiny_settings, tiny_trainer
from ternlm.errors import SettingsError
from ternlm.evaluation.samples import sample_modes
from ternlm.evaluation.settings import EvaluationSettings
from ternlm.generation import SamplingSettings, generate, row_seed
from ternlm.models import LanguageModel
from ternlm.run_directory import read_jsonl
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
SETTINGS = EvaluationSettings(prompts=("The fox", "Hé"), sample_tokens=14)


def model() -> LanguageModel:
    """A model whose distribution is far from uniform, and from one-hot."""
    made = tiny_bitnet(vocab_size=256, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return made


def sampled(**changes: Any) -> list[dict[str, Any]]:
    return sample_modes(model(), BYTE, SETTINGS.model_copy(update=changes), seed=7)


def without_floats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name in ("mode", "prompt", "seed", "generated_ids")}
            for row in rows]  # fmt: skip


def test_every_prompt_is_continued_in_every_mode() -> None:
    rows = sampled()
    assert [(row["mode"], row["prompt"]) for row in rows] == [
        (mode, prompt) for mode in ("greedy", "typical", "stress") for prompt in ("The fox", "Hé")
    ]
    assert len({tuple(row["generated_ids"]) for row in rows}) == 6
    assert [row["mode"] for row in sampled(sample_modes=("stress",))] == ["stress", "stress"]
    json.dumps(rows)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("greedy", {"temperature": 0}),
        ("typical", {"temperature": 0.9, "top_p": 0.95}),
        ("stress", {"temperature": 1.5, "top_k": 10, "top_p": 1}),
    ],
)
def test_the_modes_are_those_of_the_documentation(
    mode: str, values: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternlm.generation.decode.row_seed", lambda prompt, n, seed: row_seed(prompt, mode, seed))
    settings = SamplingSettings.from_mapping({"max_new_tokens": 14, "seed": 7, **values})
    expected = [sample.ids for sample in generate(model(), BYTE, SETTINGS.prompts, settings)]
    assert [row["generated_ids"] for row in sampled() if row["mode"] == mode] == expected


def test_g01_the_seed_of_a_row_is_a_hash_of_prompt_mode_and_the_seed_of_the_run() -> None:
    for row in sampled():
        digest = hashlib.sha256(f"{row['prompt']}|{row['mode']}|7".encode()).digest()
        assert row["seed"] == int.from_bytes(digest[:8], "little") >> 1


def test_a_row_does_not_depend_on_its_neighbours_nor_on_how_many_are_drawn_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = without_floats(sampled())
    monkeypatch.setattr("ternlm.evaluation.samples.AT_A_TIME", 4)
    assert without_floats(sampled()) == together
    alone = [without_floats(sampled(sample_modes=(row["mode"],), prompts=(row["prompt"],)))[0] for row in together]
    assert alone == together


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_samples import sampled, without_floats
print(without_floats(sampled()))
"""


def test_g01_processes_with_other_hash_seeds_and_other_global_states_draw_the_same() -> None:
    folder = Path(__file__).parent
    environment = {"PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "3"}
    command = [sys.executable, "-c", "import torch; torch.manual_seed(5)" + SCRIPT, str(folder)]
    there = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert there.stdout == f"{without_floats(sampled())}\n"


def test_g02_the_global_random_state_the_mode_and_the_gradients_are_left_alone() -> None:
    made = model()
    state = torch.get_rng_state()
    sample_modes(made, BYTE, SETTINGS, 0)
    assert torch.equal(torch.get_rng_state(), state) and made.training
    assert all(parameter.grad is None for parameter in made.parameters())


def test_g02_training_is_bit_identical_with_and_without_sampling(tmp_path: Path) -> None:
    def losses(name: str, sampling: bool) -> list[Any]:
        settings = tiny_settings(tmp_path, tracking={"every_steps": 1, "tensorboard": False})
        trainer = tiny_trainer(tmp_path / name, prepared, settings)
        step: Callable[..., Any] = trainer.stepper.__call__

        def sampling_step(batch: Any, judge: Any, k: int) -> Any:
            if sampling:
                sample_modes(trainer.model, trainer.tokenizer, SETTINGS, 0)
            return step(batch, judge, k)

        sampling_step.__dict__.update(vars(trainer.stepper))
        trainer.stepper = sampling_step
        trainer.run()
        rows = read_jsonl(trainer.run_directory.scalars)
        return [(row["train/loss"], row["train/grad_norm"]) for row in rows]

    prepared = tiny_corpus(tmp_path)
    plain = losses("plain", sampling=False)
    assert len(plain) == 6
    assert losses("sampled", sampling=True) == plain


def test_entropies_are_means_over_all_positions_and_over_the_first_ten() -> None:
    (row,) = sampled(prompts=("The fox",), sample_modes=("typical",))
    made, ids = model(), [254, *b"The fox", *row["generated_ids"]]
    with torch.no_grad():
        log_p = made(torch.tensor([ids])).logits[0, 7:-1].log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    assert len(entropies) == 14 and entropies.std() > 0.01
    assert row["mean_entropy"] == pytest.approx(entropies.mean().item(), abs=1e-4)
    assert row["mean_entropy_10"] == pytest.approx(entropies[:10].mean().item(), abs=1e-4)
    assert 0 < row["mean_entropy"] < math.log(256)
    assert len(row["logits_first_10"]) == 10
    top_id, top_logit = row["logits_first_10"][9][0]
    assert top_id == log_p[9].argmax()
    assert top_logit == pytest.approx(made(torch.tensor([ids])).logits[0, 16].max().item(), abs=1e-3)


def test_a_sample_that_ends_at_once_has_one_position_and_no_shares() -> None:
    class Silent(ByteTokenizer):
        eos_id = model()(torch.tensor([[254, *b"The fox"]])).logits[0, -1].argmax().item()

    settings = EvaluationSettings(prompts=("The fox", "a"), sample_modes=("greedy",), sample_tokens=14)
    row, neighbour = sample_modes(model(), Silent(), settings, 0)
    assert neighbour["total_tokens"] > 1
    assert row["finished"] and row["generated_text"] == "" and row["utf8_valid"]
    assert row["total_tokens"] == row["max_repetition"] == row["longest_run"] == row["unique_tokens"] == 0
    assert row["repetition_frac"] is row["distinct_1"] is row["seq_rep_4"] is None
    (alone,) = sample_modes(model(), Silent(), settings.model_copy(update={"prompts": ("The fox",)}), 0)
    assert len(row["logits_first_10"]) == 1
    assert row["mean_entropy"] == row["mean_entropy_10"] == pytest.approx(alone["mean_entropy"], abs=1e-4)


@pytest.mark.parametrize(
    "values",
    [{"sample_modes": []}, {"sample_modes": ["greedy", "greedy"]}, {"sample_modes": ["wild"]}, {"prompts": []},
     {"prompts": ["a", ""]}, {"prompts": ["\ud800"]}, {"sample_tokens": 0}, {"temperature": 1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        EvaluationSettings.from_mapping(values, "evaluation")
