"""Router, smoothing and ratio loss against the independent implementation `h-net-dynamic-chunking`, if installed.

That one compares the first position with a learned key instead of always beginning a chunk, and does not clip, hence
a key that makes the first probability 1, and tolerances of a few 1e-4.
"""

import pytest
import torch

from builders import randn
from ternlm.nn.dynamic_chunking import DeChunk, Router
from ternlm.ops.chunking import locate, ratio_loss, select, straight_through

other = pytest.importorskip("h_net_dynamic_chunking.h_net_dynamic_chunking")

WIDTH, TIME = 9, 37


@pytest.mark.parametrize("target", [2.5, 6.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_boundaries_values_losses_and_gradients_agree(seed: int, target: float) -> None:
    torch.manual_seed(seed)
    theirs = other.DynamicSequenceChunker(
        WIDTH,
        target_avg_token_length=target,
        ratio_loss_weight=1.0,
        learning_rate_difference=1.0,
        straight_through_frac_vecs=False,
    )
    router, x = Router(WIDTH), randn(1, TIME, WIDTH, seed=seed).requires_grad_()
    with torch.no_grad():
        q, k = theirs.to_queries_keys.weight.chunk(2)
        router.q_proj.weight.copy_(q)
        router.k_proj.weight.copy_(k)
        theirs.start_key_token.copy_(-(x[0, 0] @ q.T))
    (chosen, spread, their_ratio), between = theirs(x, return_intermediates=True)
    expected = spread(chosen)

    routing, _ = router(x)
    chunks = locate(routing.boundary)
    ours, _ = DeChunk(WIDTH)(select(x, chunks), routing.probability, chunks)
    ours = straight_through(ours, routing.confidence)
    ratio = ratio_loss(routing.boundary, routing.probability, target).loss

    assert torch.equal(routing.boundary, between.boundary_mask)
    torch.testing.assert_close(routing.probability, between.probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(ratio, their_ratio)
    weight = randn(*ours.shape, seed=9)
    matrices = (x, router.q_proj.weight, router.k_proj.weight)
    gradients = torch.autograd.grad((ours * weight).sum() + ratio, matrices)
    wanted = torch.autograd.grad((expected * weight).sum() + their_ratio, (x, theirs.to_queries_keys.weight))
    for a, b in zip(gradients, (wanted[0], *wanted[1].chunk(2)), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
