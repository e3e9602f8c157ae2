"""The loss: a hand-computed cross-entropy of the next token, in nats, summed over scored targets."""

import math

import pytest
import torch

from builders import randn, random_tokens, tiny_bitnet
from ternlm.data.batch import Batch
from ternlm.models import Output
from ternlm.training.objective import ObjectiveSettings, loss_sums


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -ln softmax at the target, element by element in float64."""
    total = 0.0
    for row, wanted in zip(logits.flatten(0, 1).double().tolist(), targets.flatten().tolist(), strict=True):
        if wanted != -100:
            top = max(row)
            total += math.log(sum(math.exp(value - top) for value in row)) + top - row[wanted]
    return total


def output(logits: torch.Tensor, **auxiliary: torch.Tensor) -> Output:
    return Output(logits, None, auxiliary)


def test_the_loss_is_the_cross_entropy_computed_by_hand() -> None:
    logits, targets = 3 * randn(3, 5, 7, seed=1), random_tokens(3, 5, vocab_size=7, seed=2)
    targets[0, 3:] = -100
    targets[2] = -100
    sums = loss_sums(output(logits), targets, ObjectiveSettings())
    assert sums.nll.item() == pytest.approx(by_hand(logits, targets), rel=1e-6)
    assert sums.objective.item() == sums.nll.item()


def test_d01_a_models_loss_scores_the_token_right_after_each_position() -> None:
    model = tiny_bitnet().eval()
    windows = random_tokens(2, 10, seed=3)
    batch = Batch.from_windows(windows, bos_id=None)
    logits = model(windows[:, :-1]).logits.detach()
    total = 0.0
    for row in range(2):
        for t in range(9):
            probabilities = torch.softmax(logits[row, t].double(), dim=-1)
            total -= math.log(probabilities[windows[row, t + 1]])
    sums = loss_sums(model(batch.tokens), batch.targets, ObjectiveSettings())
    assert sums.nll.item() == pytest.approx(total, rel=1e-5)
    assert batch.num_targets == 18


def test_d01_a_model_that_knows_the_next_token_reaches_zero_and_one_that_copies_does_not() -> None:
    windows = torch.arange(12).remainder(5)[None]
    batch = Batch.from_windows(windows, bos_id=None)
    knows_next = 50 * torch.nn.functional.one_hot((batch.tokens + 1) % 5, 5).float()
    copies = 50 * torch.nn.functional.one_hot(batch.tokens, 5).float()
    two_ahead = 50 * torch.nn.functional.one_hot((batch.tokens + 2) % 5, 5).float()
    settings = ObjectiveSettings()
    assert loss_sums(output(knows_next), batch.targets, settings).nll.item() < 1e-6
    assert loss_sums(output(copies), batch.targets, settings).nll.item() > 100
    assert loss_sums(output(two_ahead), batch.targets, settings).nll.item() > 100


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = (8 * randn(2, 4, 300, seed=4)).bfloat16()
    targets = random_tokens(2, 4, vocab_size=300, seed=5)
    sums = loss_sums(output(logits), targets, ObjectiveSettings())
    assert sums.nll.dtype == torch.float32
    assert sums.nll.item() == pytest.approx(by_hand(logits, targets), rel=1e-6)


def test_nothing_to_score_is_zero_and_gives_zero_gradient() -> None:
    logits = randn(2, 3, 5).requires_grad_()
    sums = loss_sums(output(logits), torch.full((2, 3), -100), ObjectiveSettings(z_loss=0.1))
    sums.objective.backward()
    assert sums.objective.item() == sums.nll.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_t09_auxiliary_terms_move_the_objective_and_never_the_reported_loss() -> None:
    logits, targets = randn(2, 3, 5, seed=6), random_tokens(2, 3, vocab_size=5, seed=7)
    targets[0, 0] = -100
    plain = loss_sums(output(logits), targets, ObjectiveSettings())
    extra = loss_sums(output(logits, ratio=torch.tensor(0.25)), targets, ObjectiveSettings())
    assert extra.nll.item() == plain.nll.item()
    assert extra.objective.item() == pytest.approx(plain.nll.item() + 5 * 0.25, rel=1e-6)
    assert not extra.nll.requires_grad


def test_the_z_loss_is_the_squared_log_normalizer_over_scored_positions() -> None:
    logits, targets = randn(2, 3, 5, seed=8), random_tokens(2, 3, vocab_size=5, seed=9)
    targets[1, 2] = -100
    sums = loss_sums(output(logits), targets, ObjectiveSettings(z_loss=0.5))
    normalizers = torch.logsumexp(logits.double(), dim=-1)[targets != -100]
    assert (sums.objective - sums.nll).item() == pytest.approx(0.5 * normalizers.square().sum().item(), rel=1e-5)
