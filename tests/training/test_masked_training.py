"""Training on hidden tokens: the gradient counts tokens, a resumed run hides what it would have hidden, records fit."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders import TRAIN, let_data_be_bad, random_tokens, tiny_corpus, tiny_settings
from encoders import PIECES, table, wordpiece
from ternlm import checkpoint
from ternlm.data.batch import IGNORED, Batch
from ternlm.data.masking import MaskingSettings
from ternlm.data.preparation import Prepared
from ternlm.errors import Interrupted, SettingsError
from ternlm.models import LanguageModel, Output
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.training import launch
from ternlm.training.objective import ObjectiveSettings, loss_sums, require_matching
from ternlm.training.preflight import preflight
from ternlm.training.replay import replay
from ternlm.training.settings import RunSettings
from ternlm.training.step import Stepper
from ternlm.training.trainer import Trainer

STEPS, V = 9, len(PIECES)
QDYT = {"family": "qdyt", "qdyt_groups": 4}
MLM = ObjectiveSettings(name="mlm", mask_fraction=0.3)


class TableModel(LanguageModel):
    """Logits by the token that is read, computed where they are scored."""

    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(table())
        self.rows: list[int] = []

    def forward(
        self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None, scored: Tensor | None = None
    ) -> Output:
        assert scored is not None
        self.rows.append(len(tokens))
        return Output(self.table[tokens[scored]], None, {})

    def initial_state(self, batch_size: int) -> None:
        return None

    def initialize(self, seed: int) -> None:
        return None

    def blocks(self) -> Iterator[nn.Module]:
        yield from ()


def uneven_batch() -> Batch:
    """Rows with 1, 5, 0 and 3 targets."""
    tokens, targets = random_tokens(4, 7, vocab_size=V), torch.full((4, 7), IGNORED)
    for row, count in enumerate((1, 5, 0, 3)):
        targets[row, :count] = random_tokens(count, vocab_size=V, seed=row)
    return Batch(tokens, targets, kinds=(targets != IGNORED).to(torch.int8))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_m18_the_gradient_is_that_of_the_mean_over_hidden_tokens_however_the_batch_is_cut(
    micro_batch_size: int,
) -> None:
    batch, whole = uneven_batch(), TableModel()
    scored = batch.targets != IGNORED
    nats = nn.functional.cross_entropy(whole.table[batch.tokens[scored]], batch.targets[scored])
    nats.backward()
    model, kept = TableModel(), []
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.0), MLM, 0.0, micro_batch_size, False, print)

    def judge(result: Any) -> bool:
        assert model.table.grad is not None
        kept.append(model.table.grad.clone())
        return True

    result = stepper(batch, judge)
    assert result.loss == pytest.approx(nats.item(), rel=1e-6) and result.targets == 9
    assert torch.allclose(kept[0], whole.table.grad, atol=1e-7)  # type: ignore[arg-type]
    assert len(model.rows) == math.ceil(4 / micro_batch_size)


def test_flattened_logits_give_the_loss_of_full_ones() -> None:
    batch, settings = uneven_batch(), ObjectiveSettings(name="mlm", z_loss=0.3)
    full = table()[batch.tokens]
    auxiliary = {"ratio": torch.tensor(0.25)}
    flat = loss_sums(Output(full[batch.targets != IGNORED], None, auxiliary), batch.targets, settings)
    wide = loss_sums(Output(full, None, auxiliary), batch.targets, settings)
    assert flat.nll.item() == pytest.approx(wide.nll.item(), rel=1e-6)
    assert flat.objective.item() == pytest.approx(wide.objective.item(), rel=1e-6)


def test_a_row_in_which_nothing_is_scored_costs_nothing() -> None:
    logits = torch.empty(0, V, requires_grad=True)
    sums = loss_sums(Output(logits, None, {}), torch.full((2, 3), IGNORED), ObjectiveSettings(name="mlm", z_loss=0.1))
    sums.objective.backward()
    assert sums.objective.item() == sums.nll.item() == 0


def test_masking_belongs_to_the_masked_objective_alone() -> None:
    assert ObjectiveSettings().masking is None
    assert MLM.masking is not None and MLM.masking.mask_fraction == 0.3
    assert isinstance(MLM.masking, MaskingSettings)


def test_an_objective_that_the_family_cannot_have_is_refused(tmp_path: Path) -> None:
    require_matching(MLM, "qdyt", is_causal=False)
    require_matching(ObjectiveSettings(), "bitnet", is_causal=True)
    with pytest.raises(SettingsError, match=r"objective\.name=mlm.*model\.family=bitnet sees only.*qdyt"):
        tiny_settings(tmp_path, objective={"name": "mlm"})
    with pytest.raises(SettingsError, match=r"objective\.name=causal.*model\.family=qdyt.*objective\.name=mlm"):
        tiny_settings(tmp_path, model=QDYT)


@pytest.mark.parametrize("fraction", [0, 1])
def test_a_fraction_that_hides_nothing_or_everything_is_refused(tmp_path: Path, fraction: int) -> None:
    with pytest.raises(SettingsError, match=r"objective\.mask_fraction=.*hidden and something"):
        tiny_settings(tmp_path, model=QDYT, objective={"name": "mlm", "mask_fraction": fraction})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    from ternlm.tokenizers import TokenizerSettings

    folder = tmp_path_factory.mktemp("corpus")
    wordpiece(folder / "tokenizer")
    validation = [f"{text} The old fox slept." for text in TRAIN[:9]]
    return tiny_corpus(folder, TRAIN[:12], validation, TokenizerSettings(name=str(folder / "tokenizer")))


def settings(path: Path, **sections: dict[str, Any]) -> RunSettings:
    base: dict[str, dict[str, Any]] = {
        "model": QDYT | {"vocab_size": V},
        "objective": {"name": "mlm", "mask_fraction": 0.3},
        "training": {"max_steps": STEPS, "batch_size": 4, "micro_batch_size": 3, "checkpoint_every_steps": 5},
        "evaluation": {"every_steps": 4, "sample_every_steps": 4, "prompts": ["the [MASK] fox", "no gap"]},
        "tracking": {"every_steps": 1, "tensorboard": False},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return tiny_settings(path, **base)


def start(path: Path, prepared: Prepared, **sections: Any) -> RunDirectory:
    run = RunDirectory(path)
    made = settings(path.parent, **sections)
    launch.start(Resolved(made.model_dump(mode="json"), {}), run, lambda *_: prepared, quiet=True)
    return run


def weights(run: RunDirectory) -> dict[str, bytes]:
    opened = checkpoint.open_newest(run.checkpoints)
    return {name: tensor.numpy().tobytes() for name, tensor in (opened.model | opened.optimizer).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> RunDirectory:
    return start(tmp_path_factory.mktemp("runs") / "whole", prepared)


def test_a_resumed_run_hides_the_same_tokens_and_ends_with_the_same_weights(
    tmp_path: Path, prepared: Prepared, whole: RunDirectory
) -> None:
    one_step = Trainer._one_step

    def interrupted(self: Trainer) -> None:
        if self.progress.step == 6:
            self.interruption.received = 2
        one_step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_one_step", interrupted)
        start(tmp_path / "cut", prepared)
    run = RunDirectory(tmp_path / "cut")
    launch.resume(run, {}, lambda *_: prepared, quiet=True)
    assert weights(run) == weights(whole)
    losses = [[row["train/loss"] for row in read_jsonl(each.scalars)] for each in (run, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_rows_count_the_tokens_that_are_read_and_have_no_bits_per_byte(whole: RunDirectory) -> None:
    rows = read_jsonl(whole.scalars)
    assert [row["tokens_seen"] for row in rows] == [4 * 16 * row["step"] for row in rows]
    assert all(row["train/bpb"] is None and row["perf/tokens_per_sec"] > 0 for row in rows)


def test_every_evaluation_scores_the_same_hidden_tokens(whole: RunDirectory) -> None:
    rows = read_jsonl(whole.evaluations)
    assert len(rows) == 3 and len({(row["mask_id"], row["eval_id"], row["n_targets"]) for row in rows}) == 1
    for row in rows:
        assert row["protocol"] == "masked" and row["val/bpb"] is None and 0 <= row["mask_accuracy"] <= 1


def test_samples_fill_the_prompts_that_have_a_gap(whole: RunDirectory) -> None:
    rows = read_jsonl(whole.samples)
    assert [(row["step"], row["mode"], row["prompt"]) for row in rows] == [
        (step, "fill", "the [MASK] fox") for step in (4, 8, 9)
    ]
    assert all(len(row["top5"]) == 1 and len(row["top5"][0]) == 5 for row in rows)


def test_an_anomalous_step_is_computed_again_on_the_same_hidden_tokens(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_data_be_bad(monkeypatch, {4 * 7})
    run = start(tmp_path / "edgy", prepared)
    (folder,) = run.anomalies.iterdir()
    found = replay(folder, lambda *_: prepared, str)
    nats = [row["loss"] for row in json.loads((folder / "batch.json").read_bytes())["rows"]]
    assert all(0 < loss < 20 for loss in nats)  # of every row's hidden tokens
    assert found.same_batch is True and found.verdict == "reproduced bit for bit"


def test_a_preflight_of_an_encoder_passes(tmp_path: Path, prepared: Prepared) -> None:
    made = settings(tmp_path)
    checks = preflight(Resolved(made.model_dump(mode="json"), {}), RunDirectory(tmp_path / "run"), lambda *_: prepared)
    assert [check for check in checks if not check.passed] == []


def test_a_tokenizer_without_a_mask_token_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    plain = tiny_corpus(tmp_path / "data")
    with pytest.raises(SettingsError, match="'byte' has no mask token"):
        start(tmp_path / "run", plain, model={"vocab_size": None})
    assert not (tmp_path / "run").exists()


def test_a_trainer_reads_windows_of_its_objective(tmp_path: Path, prepared: Prepared) -> None:
    trainer = Trainer(
        settings(tmp_path), prepared.corpus, prepared.tokenizer, RunDirectory(tmp_path / "run"), quiet=True
    )
    batch = trainer.loader.batch(0)
    assert batch.kinds is not None and batch.tokens.shape == (4, 16)
    again = settings(tmp_path).windows(prepared.tokenizer)
    assert torch.equal(prepared.corpus.loader(4, again, 0).batch(0).tokens, batch.tokens)
