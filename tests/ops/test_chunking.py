"""Dynamic chunking: probabilities, the chunks of each layout, smoothing, and the ratio loss, against definitions."""

import pytest
import torch
from torch import Tensor

from builders import randn
from ragged import inside, packed, starts_of
from ternlm.ops.chunking import (
    Chunks,
    boundary_probability,
    boundary_probability_reference,
    cap_boundaries,
    dechunk_reference,
    lift,
    locate,
    ratio_loss,
    select,
    smooth,
    straight_through,
    straight_through_reference,
    upsample,
)

LENGTHS = (11, 1, 7, 11, 4)
WIDTH = 5


def rows_of_boundaries(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> Tensor:
    """Ragged rows that begin with a boundary, one of them with no other."""
    boundary = randn(len(lengths), max(lengths), seed=seed) > 0.3
    boundary[:, 0] = True
    boundary[-1, 1:] = False
    return boundary & inside(lengths)


def dechunk(z: Tensor, probability: Tensor, chunks: Chunks, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    at_boundaries = probability.gather(1, chunks.positions)
    smoothed, last = smooth(z, at_boundaries, previous, chunks.starts, chunks.lengths, chunk=3)
    return upsample(smoothed, chunks, previous), last


def gradients(output: Tensor, *inputs: Tensor, seed: int = 8) -> tuple[Tensor, ...]:
    weight = randn(*output.shape, seed=seed).to(output.dtype)
    return torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_probability_equals_its_definition_in_value_and_gradient(size: float) -> None:
    q, k = ((randn(3, 13, 7, seed=i) * size).requires_grad_() for i in (1, 2))
    first = randn(3, 13, seed=5) > 1
    fast, plain = boundary_probability(q, k, first), boundary_probability_reference(q, k, first)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(fast[first], torch.ones(int(first.sum())))
    for a, b in zip(gradients(fast, q, k), gradients(plain, q, k), strict=True):
        torch.testing.assert_close(a * size, b * size, rtol=1e-4, atol=1e-5)
        assert torch.equal(a[first], torch.zeros_like(a[first]))


def test_equal_directions_never_part_opposite_ones_always_do_and_a_zero_vector_is_undecided() -> None:
    x, nowhere = randn(1, 6, 9), torch.zeros(1, 6, dtype=torch.bool)
    torch.testing.assert_close(boundary_probability(x, 3 * x, nowhere), torch.zeros(1, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(boundary_probability(x, -x, nowhere), torch.ones(1, 6), rtol=0, atol=1e-6)
    for length in (0.0, 1e-30, 1e-15):
        short = torch.full((1, 6, 9), length, requires_grad=True)
        undecided = boundary_probability(short, x, nowhere)
        torch.testing.assert_close(undecided, torch.full((1, 6), 0.5), rtol=0, atol=1e-6)
        assert gradients(undecided, short)[0].abs().max() < 1


def test_n15_probability_and_smoothing_are_float32_for_bfloat16_inputs_and_near_float64() -> None:
    q, k, z = (randn(2, 9, 33, seed=i).bfloat16() for i in (1, 2, 3))
    boundary = rows_of_boundaries((9, 9))
    first = torch.zeros_like(boundary)
    chunks = locate(boundary)
    z = z[:, : chunks.positions.shape[1]]
    probability = boundary_probability(q, k, first)
    spread, last = dechunk(z, probability, chunks)
    assert probability.dtype == spread.dtype == last.dtype == torch.float32
    wide = boundary_probability(q.double(), k.double(), first)
    assert (probability - wide).abs().max() < 1e-6
    assert (spread - dechunk(z.double(), wide, chunks)[0]).abs().max() < 1e-6


def test_chunks_lie_where_boundaries_are_in_rows_and_in_packed_rows() -> None:
    boundary = rows_of_boundaries()
    chunks = locate(boundary)
    assert chunks.starts is None and chunks.lengths is not None
    for row, count in enumerate(boundary.sum(1).tolist()):
        assert chunks.lengths[row] == count
        assert chunks.positions[row, :count].tolist() == boundary[row].nonzero().flatten().tolist()
        assert not chunks.positions[row, count:].any()
    assert torch.equal(chunks.of_position, boundary.cumsum(1))
    starts = starts_of(LENGTHS)
    inner = locate(packed(boundary, LENGTHS), starts)
    assert inner.lengths is None and inner.starts is not None
    assert torch.equal(inner.starts, starts[:, inner.positions[0]])
    assert int(inner.starts.sum()) == len(LENGTHS)


def test_select_takes_the_vectors_of_boundaries_and_zeros_and_sends_gradients_back_there_only() -> None:
    boundary, h = rows_of_boundaries(), randn(len(LENGTHS), max(LENGTHS), WIDTH).requires_grad_()
    chunks = locate(boundary)
    assert chunks.lengths is not None
    z = select(h, chunks)
    real = torch.arange(z.shape[1]) < chunks.lengths[:, None]
    assert torch.equal(z[real], h[boundary])
    assert torch.equal(z[~real], torch.zeros_like(z[~real]))
    (gradient,) = gradients(z, h)
    assert torch.equal(gradient[~boundary], torch.zeros_like(gradient[~boundary]))
    assert torch.equal(gradient[boundary], randn(*z.shape, seed=8)[real])
    row = locate(boundary[:1])
    assert row.lengths is None and torch.equal(select(h[:1], row)[0], h[0][boundary[0]])


@pytest.mark.parametrize("with_state", [False, True])
def test_n01_the_average_over_chunks_equals_a_loop_in_value_and_gradient(with_state: bool) -> None:
    boundary = rows_of_boundaries()
    if with_state:
        boundary[1] = boundary[2, 0] = boundary[4, 0] = False
    chunks = locate(boundary)
    z = randn(len(LENGTHS), chunks.positions.shape[1], WIDTH, seed=1).double().requires_grad_()
    probability = randn(*boundary.shape, seed=2).double().sigmoid().requires_grad_()
    previous = randn(len(LENGTHS), WIDTH, seed=4).double().requires_grad_() if with_state else None
    spread, last = dechunk(z, probability, chunks, previous)
    expected = dechunk_reference(z, probability, boundary, previous)
    real = inside(LENGTHS)
    torch.testing.assert_close(spread[real], expected[real])
    torch.testing.assert_close(last, expected[:, -1])
    inputs = (z, probability) if previous is None else (z, probability, previous)
    loss, expected_loss = spread[real], expected[real]
    for a, b in zip(gradients(loss, *inputs), gradients(expected_loss, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_n01_the_result_is_constant_inside_chunks_and_an_average_over_positions_is_another_one() -> None:
    boundary = rows_of_boundaries((13,))
    chunks = locate(boundary)
    z, probability = randn(1, chunks.positions.shape[1], WIDTH), torch.full((1, 13), 0.7)
    spread, _ = dechunk(z, probability, chunks)
    inside_chunks = ~boundary[0, 1:]
    assert inside_chunks.any()
    assert torch.equal(spread[0, 1:][inside_chunks], spread[0, :-1][inside_chunks])
    over_positions, _ = smooth(upsample(z, chunks), probability)
    assert (over_positions - spread).abs().max() > 0.1


def test_the_first_chunk_is_nearly_itself_and_certain_probabilities_are_clipped() -> None:
    z = randn(1, 2, WIDTH)
    smoothed, _ = smooth(z, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(smoothed[:, 0], 0.9999 * z[:, 0])
    torch.testing.assert_close(smoothed[:, 1], 1e-4 * z[:, 1] + 0.9999 * smoothed[:, 0])


def test_packed_rows_equal_ragged_rows_equal_rows_by_themselves() -> None:
    boundary, starts, real = rows_of_boundaries(), starts_of(LENGTHS), inside(LENGTHS)
    h = randn(len(LENGTHS), max(LENGTHS), WIDTH, seed=1).double().requires_grad_()
    probability = randn(*boundary.shape, seed=2).double().sigmoid().requires_grad_()
    ragged_chunks, packed_chunks = locate(boundary), locate(packed(boundary, LENGTHS), starts)
    ragged, _ = dechunk(select(h, ragged_chunks).sin(), probability, ragged_chunks)
    one_row, _ = dechunk(select(packed(h, LENGTHS), packed_chunks).sin(), packed(probability, LENGTHS), packed_chunks)
    alone = []
    for row, length in enumerate(LENGTHS):
        chunks = locate(boundary[row : row + 1, :length])
        z = select(h[row : row + 1, :length], chunks).sin()
        alone.append(dechunk(z, probability[row : row + 1, :length], chunks)[0][0])
    expected = torch.cat(alone)
    for result in (ragged[real], one_row[0]):
        torch.testing.assert_close(result, expected)
        for a, b in zip(gradients(result, h, probability), gradients(expected, h, probability), strict=True):
            torch.testing.assert_close(a, b)


def test_rows_without_a_chunk_keep_the_chunk_they_are_in() -> None:
    boundary, previous = torch.zeros(3, 4, dtype=torch.bool), randn(3, WIDTH)
    chunks = locate(boundary)
    z = select(randn(3, 4, WIDTH), chunks)
    assert z.shape == (3, 0, WIDTH)
    spread, last = dechunk(z, torch.zeros(3, 4), chunks, previous)
    assert torch.equal(spread, previous[:, None].expand(3, 4, WIDTH))
    assert torch.equal(last, previous)
    assert torch.equal(dechunk(z, torch.zeros(3, 4), chunks)[0], torch.zeros(3, 4, WIDTH))


def test_the_straight_through_product_is_exact_forward_and_equals_its_definition_backward() -> None:
    x = randn(2, 7, WIDTH).requires_grad_()
    confidence = (0.5 + randn(2, 7, seed=1).sigmoid() / 2).requires_grad_()
    fast, plain = straight_through(x, confidence), straight_through_reference(x, confidence)
    assert torch.equal(fast, x) and torch.equal(plain, x)
    for a, b in zip(gradients(fast, x, confidence), gradients(plain, x, confidence), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("boundaries", "probability", "target", "expected"),
    [
        (2, 1 / 6, 6.0, 1.0),
        (12, 1.0, 6.0, 6.0),
        (0, 0.0, 6.0, 1.2),
        (6, 0.5, 6.0, 1.8),
        (4, 1 / 3, 3.0, 1.0),
        (12, 1.0, 2.5, 2.5),
    ],
)
def test_the_ratio_loss_has_its_documented_values(
    boundaries: int, probability: float, target: float, expected: float
) -> None:
    boundary = (torch.arange(12) < boundaries).view(3, 4)
    loss, rate, mean = ratio_loss(boundary, torch.full((3, 4), probability), target)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert rate.item() == pytest.approx(boundaries / 12)
    assert mean.item() == pytest.approx(probability)


@pytest.mark.parametrize("boundaries", [0, 1, 2, 9])
def test_the_ratio_loss_pushes_probabilities_towards_the_target_through_their_mean_alone(boundaries: int) -> None:
    boundary, target = (torch.arange(12) < boundaries).view(1, 12), 6.0
    probability = randn(1, 12).sigmoid().requires_grad_()
    (gradient,) = torch.autograd.grad(ratio_loss(boundary, probability, target).loss, probability)
    slope = target / (target - 1) * (target * boundaries / 12 - 1)
    torch.testing.assert_close(gradient, torch.full((1, 12), slope / 12))


def test_n05_the_ratio_loss_does_not_see_padding() -> None:
    boundary, probability = rows_of_boundaries(), randn(len(LENGTHS), max(LENGTHS)).sigmoid().requires_grad_()
    padded = ratio_loss(boundary, probability, 3.0, torch.tensor(LENGTHS))
    exact = ratio_loss(packed(boundary, LENGTHS), packed(probability, LENGTHS), 3.0)
    torch.testing.assert_close(padded, exact)
    gradient, expected = (torch.autograd.grad(each.loss, probability)[0] for each in (padded, exact))
    torch.testing.assert_close(gradient, expected)
    assert not gradient[~inside(LENGTHS)].any()
    assert ratio_loss(boundary & False, probability, 3.0, torch.zeros(5, dtype=torch.int64)).loss.isfinite()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4, 1.0])
def test_n13_a_cap_drops_the_last_boundaries_of_each_row_alike_in_all_layouts(fraction: float) -> None:
    boundary = rows_of_boundaries()
    capped = cap_boundaries(boundary, fraction, lengths=torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        most = max(1, -int(-fraction * length // 1))
        kept = boundary[row].nonzero().flatten()[:most]
        assert capped[row].nonzero().flatten().tolist() == kept.tolist()
        assert torch.equal(cap_boundaries(boundary[row : row + 1, :length], fraction)[0], capped[row, :length])
    one_row = cap_boundaries(packed(boundary, LENGTHS), fraction, starts_of(LENGTHS))
    assert torch.equal(one_row, packed(capped, LENGTHS))


def test_a_share_that_is_a_whole_number_of_chunks_is_not_rounded_up() -> None:
    boundary = torch.ones(1, 30, dtype=torch.bool)
    assert cap_boundaries(boundary, 0.1).sum() == 3


def test_lifted_values_stand_where_their_chunks_begin() -> None:
    boundary = rows_of_boundaries()
    chunks = locate(boundary)
    inner = randn(*chunks.positions.shape, seed=6)
    lifted = lift(inner, chunks, torch.nan)
    assert torch.equal(lifted.isnan(), ~boundary)
    assert chunks.lengths is not None
    for row, count in enumerate(chunks.lengths.tolist()):
        assert torch.equal(lifted[row, boundary[row]], inner[row, :count])
    assert not lift(inner > 9, chunks, False).any()
    empty = locate(boundary & False)
    assert lift(inner[:, :0], empty, torch.nan).isnan().all()


def test_an_average_of_equal_outputs_is_that_output_times_what_has_been_seen() -> None:
    weight = 0.6
    smoothed, _ = smooth(torch.ones(1, 9, 1), torch.full((1, 9), weight))
    expected = 1 - (1 - weight) ** torch.arange(1, 10)
    torch.testing.assert_close(smoothed.flatten(), expected)
