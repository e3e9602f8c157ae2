"""Router, de-chunking, residual projection and widening: initial values, layouts, states, and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from builders import randn
from ragged import arriving, even_pieces, inside, packed, starts_of
from ternlm.nn.dynamic_chunking import DeChunk, ResidualProjection, Router, Routing, Widening
from ternlm.ops.chunking import boundary_probability_reference, locate, select, straight_through

WIDTH = 7
LENGTHS = (13, 5, 1, 9)


def drawn_router(dtype: torch.dtype = torch.float64) -> Router:
    """A router away from its initial values."""
    router = Router(WIDTH)
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.add_(randn(*parameter.shape, seed=seed), alpha=0.3)
    return router.to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Ragged rows whose neighbors part about half of the time."""
    return randn(len(LENGTHS), max(LENGTHS), WIDTH, seed=11).to(dtype)


def outer_pass(
    router: Router, h: Tensor, starts: Tensor | None = None, state: Any = None, lengths: Tensor | None = None
) -> tuple[Tensor, Routing, Any]:
    """What a stage does between encoder and decoder, with the identity inside."""
    before = (None, None) if state is None else state
    routing, router_state = router(h, starts, before[0], lengths)
    chunks = locate(routing.boundary, starts)
    spread, last = DeChunk(WIDTH)(select(h, chunks), routing.probability, chunks, before[1])
    y = straight_through(spread, routing.confidence)
    return y, routing, None if state is None else (router_state, last)


def test_a_new_router_compares_neighbors_as_they_are_and_begins_a_chunk_at_the_first_position() -> None:
    router, h = Router(WIDTH), inputs(torch.float32)
    for weight in router.parameters():
        assert torch.equal(weight, torch.eye(WIDTH))
    routing, state = router(h)
    assert state is None
    first = torch.zeros(h.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    expected = boundary_probability_reference(h, h.roll(1, dims=1), first)
    torch.testing.assert_close(routing.probability, expected)
    assert torch.equal(routing.boundary, routing.probability > 0.5)
    assert 0.2 < routing.boundary.float().mean() < 0.8


def test_n04_queries_belong_to_the_present_and_keys_to_the_past() -> None:
    router, h = drawn_router(), inputs()
    q, k = h @ router.q_proj.weight.T, h @ router.k_proj.weight.T
    cosine = torch.cosine_similarity(q[:, 1:], k[:, :-1], dim=-1)
    torch.testing.assert_close(router(h)[0].probability[:, 1:], (1 - cosine) / 2)


def test_confidence_is_in_the_decision_taken() -> None:
    routing, _ = drawn_router()(inputs())
    expected = torch.maximum(routing.probability, 1 - routing.probability)
    assert torch.equal(routing.confidence, expected)
    assert routing.confidence.min() >= 0.5


def test_n03_parameters_stay_float32_and_no_model_wide_pass_over_linear_layers_finds_them() -> None:
    for module in (Router(WIDTH), ResidualProjection(WIDTH), Widening(WIDTH, WIDTH + 4)):
        assert not [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    router = drawn_router(torch.float32)
    assert router.q_proj.weight.unique().numel() > 3
    router.initialize()
    assert torch.equal(router.q_proj.weight, torch.eye(WIDTH))


def test_n15_router_and_residual_compute_in_float32_under_autocast_and_for_bfloat16_inputs() -> None:
    router, residual, h = drawn_router(torch.float32), ResidualProjection(WIDTH), inputs(torch.float32)
    torch.nn.init.normal_(residual.weight, generator=torch.Generator().manual_seed(1))
    expected = router(h)[0].probability, residual(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(h)[0].probability, residual(h)
    narrow = router(h.bfloat16())[0].probability, residual(h.bfloat16())
    exact = router(h.bfloat16().float())[0].probability, residual(h.bfloat16().float())
    for a, b in zip(expected + exact, under + narrow, strict=True):
        assert torch.equal(a, b)


def test_n08_positions_behind_the_end_of_a_row_neither_begin_chunks_nor_have_gradients() -> None:
    router, lengths = drawn_router(), torch.tensor(LENGTHS)
    h = inputs().requires_grad_()
    routing, state = router(h, lengths=lengths, state=router.initial_state(len(LENGTHS)))
    behind = torch.arange(max(LENGTHS)) >= lengths[:, None]
    assert not routing.boundary[behind].any() and not routing.probability[behind].any()
    assert (routing.confidence[behind] == 1).all()
    (gradient,) = torch.autograd.grad((routing.probability + routing.confidence).square().sum(), h)
    assert not gradient[behind].any() and gradient[~behind].any()
    assert state is not None
    assert torch.equal(state.last, h[torch.arange(len(LENGTHS)), lengths - 1])


def test_packed_rows_equal_ragged_rows_equal_rows_by_themselves() -> None:
    router, h = drawn_router(), inputs().requires_grad_()
    real, lengths = inside(LENGTHS), torch.tensor(LENGTHS)
    ragged, ragged_routing, _ = outer_pass(router, h, lengths=lengths)
    one_row, packed_routing, _ = outer_pass(router, packed(h, LENGTHS), starts_of(LENGTHS))
    alone = [outer_pass(router, h[row : row + 1, :length]) for row, length in enumerate(LENGTHS)]
    expected = torch.cat([y[0] for y, _, _ in alone])
    boundary = torch.cat([routing.boundary[0] for _, routing, _ in alone])
    assert torch.equal(ragged_routing.boundary[real], boundary)
    assert torch.equal(packed_routing.boundary[0], boundary)
    leaves = (h, *router.parameters())
    weight = randn(*expected.shape, seed=5).double()
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, retain_graph=True)
    for y in (ragged[real], one_row[0]):
        torch.testing.assert_close(y, expected)
        for a, b in zip(torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, b)


PACES = [
    even_pieces(LENGTHS, (13,)),
    even_pieces(LENGTHS, (1,) * 13),
    even_pieces(LENGTHS, (6, 1, 6)),
    [(5, 1, 0, 4), (0, 2, 1, 1), (7, 0, 0, 3), (1, 2, 0, 1)],
]


@pytest.mark.parametrize("counts", PACES)
def test_n07_n08_rows_of_any_lengths_arriving_at_any_pace_equal_one_pass(counts: list[Any]) -> None:
    router, h, lengths = drawn_router(), inputs(), torch.tensor(LENGTHS)
    expected, routing, _ = outer_pass(router, h, lengths=lengths)
    state: Any = (router.initial_state(len(LENGTHS)), DeChunk(WIDTH).initial_state(len(LENGTHS)))
    for piece, here, places in arriving(h, counts):
        y, decided, state = outer_pass(router, piece, state=state, lengths=here)
        real = torch.arange(piece.shape[1]) < here[:, None]
        assert torch.equal(decided.boundary[real], routing.boundary[places])
        torch.testing.assert_close(y[real], expected[places])
    router_state, last = state
    ends = torch.arange(len(LENGTHS)), lengths - 1
    assert router_state.has_seen.all()
    torch.testing.assert_close(router_state.last, h[ends])
    torch.testing.assert_close(last, expected[ends])


def test_n07_a_step_of_several_rows_equals_a_step_of_each() -> None:
    router, dechunk, h = drawn_router(), DeChunk(WIDTH), inputs()
    state: Any = (router.initial_state(len(LENGTHS)), dechunk.initial_state(len(LENGTHS)))
    _, _, (together, last) = outer_pass(router, h[:, :4], state=state)
    y, routing, _ = outer_pass(router, h[:, 4:5], state=(together, last))
    assert 0 < routing.boundary.sum() < len(LENGTHS)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        alone, _, _ = outer_pass(
            router, h[one, 4:5], state=(type(together)(*(part[one] for part in together)), last[one])
        )
        torch.testing.assert_close(alone, y[one])


def test_a_row_that_has_seen_nothing_begins_with_a_chunk_when_its_first_position_comes() -> None:
    router, h = drawn_router(), inputs()
    state = router.initial_state(len(LENGTHS))
    _, state = router(h[:, :3], state=state, lengths=torch.tensor([3, 0, 1, 0]))
    assert state is not None and state.has_seen.tolist() == [True, False, True, False]
    routing, _ = router(h[:, 3:4], state=state)
    assert (routing.probability[[1, 3]] == 1).all() and (routing.probability[[0, 2]] < 1).all()


def test_n10_later_positions_change_nothing_before_them() -> None:
    router, h = drawn_router(), inputs()
    before, routing, _ = outer_pass(router, h)
    for t in range(1, h.shape[1]):
        changed = h.clone()
        changed[:, t:] = randn(*changed[:, t:].shape, seed=t).double()
        after, other, _ = outer_pass(router, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert torch.equal(other.boundary[:, :t], routing.boundary[:, :t])


@pytest.mark.parametrize("path", ["smoothing", "confidence"])
def test_n09_the_router_learns_through_the_smoothing_and_through_the_confidence(path: str) -> None:
    router, h = drawn_router(), inputs()
    routing, _ = router(h)
    chunks = locate(routing.boundary)
    probability, confidence = routing.probability, routing.confidence
    if path == "smoothing":
        confidence = confidence.detach()
    else:
        probability = probability.detach()
    spread, _ = DeChunk(WIDTH)(select(h, chunks), probability, chunks)
    straight_through(spread, confidence).square().sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-3


def test_residual_and_widening_start_as_nothing_and_learn() -> None:
    residual, widening, x = ResidualProjection(WIDTH), Widening(WIDTH, WIDTH + 4), randn(3, 5, WIDTH)
    assert torch.equal(residual(x), torch.zeros(3, 5, WIDTH))
    wide = widening(x)
    assert torch.equal(wide, torch.cat((x, torch.zeros(3, 5, 4)), dim=-1))
    (residual(x) * x + wide[..., :WIDTH] * x).sum().backward()
    (widening(x) * randn(3, 5, WIDTH + 4, seed=2)).sum().backward()
    assert residual.weight.grad is not None and residual.weight.grad.norm() > 0
    assert widening.vector is not None and widening.vector.grad is not None and widening.vector.grad.norm() > 0


def test_every_position_is_widened_by_the_same_vector_and_equal_widths_need_none() -> None:
    widening = Widening(2, 5)
    assert widening.vector is not None
    with torch.no_grad():
        widening.vector.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(widening(torch.zeros(2, 3, 2))[..., 2:], torch.tensor([1.0, 2.0, 3.0]).expand(2, 3, 3))
    assert widening(torch.zeros(2, 3, 2).bfloat16()).dtype == torch.bfloat16
    widening.initialize()
    assert not widening.vector.any()
    same, x = Widening(4, 4), randn(2, 4)
    assert not list(same.parameters()) and same(x) is x
