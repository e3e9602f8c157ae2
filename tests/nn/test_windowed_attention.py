"""Attention over a window against plain softmax attention, in each layout, and its memory against one pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from builders import randn
from ragged import arriving, even_pieces, inside, packed, starts_of
from ternlm.errors import SettingsError
from ternlm.nn.windowed_attention import AttentionState, WindowedAttention
from ternlm.ops.rotary import rotary_table, rotate

WIDTH, HEADS, HEAD_DIM = 24, 4, 6
LENGTHS = (17, 6, 0, 11)


def attention(window: int, dtype: torch.dtype = torch.float32) -> WindowedAttention:
    made = WindowedAttention(WIDTH, HEADS, window)
    made.initialize(0.4, 0.3, 1, "attention")
    return made.to(dtype)


def plain(made: WindowedAttention, x: Tensor) -> Tensor:
    """The formula, with the whole matrix of scores and rotary positions that begin at 0."""
    time = x.shape[1]
    q, k, v = (
        part(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in (made.q_proj, made.k_proj, made.v_proj)
    )
    table = rotary_table(time, HEAD_DIM, 10_000.0)
    q, k = rotate(q, *table.unbind()), rotate(k, *table.unbind())
    distance = torch.arange(time)[:, None] - torch.arange(time)
    hidden = (distance < 0) | (distance >= made.window)
    scores = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
    return made.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def inputs() -> Tensor:
    return randn(len(LENGTHS), max(LENGTHS), WIDTH, seed=3)


@pytest.mark.parametrize("window", [1, 2, 5, 17, 40])
@pytest.mark.parametrize("time", [1, 4, 5, 6, 17])
def test_a_window_in_blocks_equals_the_whole_matrix_of_scores_in_value_and_gradient(window: int, time: int) -> None:
    made = attention(window)
    x = randn(3, time, WIDTH).requires_grad_()
    weight = randn(3, time, WIDTH, seed=1)
    leaves = (x, *made.parameters())
    y, state = made(x)
    expected = plain(made, x)
    assert state is None
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_packed_rows_equal_ragged_rows_equal_rows_by_themselves() -> None:
    made, x = attention(5), inputs().requires_grad_()
    ragged, _ = made(x, lengths=torch.tensor(LENGTHS))
    one_row, _ = made(packed(x, LENGTHS), starts_of(LENGTHS))
    alone = torch.cat([made(x[row : row + 1, :length])[0][0] for row, length in enumerate(LENGTHS)])
    weight = randn(*alone.shape, seed=1)
    (wanted,) = torch.autograd.grad((alone * weight).sum(), x)
    for y in (ragged[inside(LENGTHS)], one_row[0]):
        torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad((y * weight).sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


PACES = [
    even_pieces(LENGTHS, (17,)),
    even_pieces(LENGTHS, (1,) * 17),
    even_pieces(LENGTHS, (9, 1, 7)),
    [(9, 1, 0, 2), (1, 1, 0, 1), (0, 3, 0, 7), (7, 1, 0, 1)],
]


@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("counts", PACES)
def test_n12_rows_of_any_lengths_arriving_at_any_pace_equal_one_pass(window: int, counts: list[Any]) -> None:
    made, x, lengths = attention(window), inputs(), torch.tensor(LENGTHS)
    expected, _ = made(x, lengths=lengths)
    state: AttentionState | None = made.initial_state(len(LENGTHS))
    for piece, here, places in arriving(x, counts):
        y, state = made(piece, state=state, lengths=here)
        real = torch.arange(piece.shape[1]) < here[:, None]
        torch.testing.assert_close(y[real], expected[places], rtol=1e-4, atol=1e-5)
    assert state is not None
    assert torch.equal(state.filled, lengths.clamp_max(window - 1))
    assert state.keys.shape == (len(LENGTHS), HEADS, window - 1, HEAD_DIM)


def test_h12_memory_in_another_order_of_rows_continues_in_that_order() -> None:
    made, x, order = attention(4), inputs(), torch.tensor([2, 0, 3, 3])
    _, state = made(x[:, :9], state=made.initial_state(len(LENGTHS)), lengths=torch.tensor([9, 2, 0, 5]))
    assert state is not None
    y, _ = made(x[:, 9:11], state=state)
    reordered, _ = made(x[order, 9:11], state=AttentionState(*(part[order] for part in state)))
    torch.testing.assert_close(reordered, y[order])


def test_neither_the_future_nor_what_lies_beyond_the_window_is_seen() -> None:
    made, x = attention(3), inputs()
    y, _ = made(x)
    changed = x.clone()
    changed[:, 8] += 1
    differs = (made(changed)[0] != y).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [8, 9, 10]


def test_a_text_without_end_needs_no_table_of_positions() -> None:
    made, x = attention(4), randn(1, 7, WIDTH)
    state = made.initial_state(1)
    for _ in range(50):
        _, after = made(randn(1, 31, WIDTH, seed=5), state=state)
        assert after is not None
        state = after
    late, _ = made(x, state=state)
    expected = plain(made, torch.cat((randn(1, 31, WIDTH, seed=5), x), dim=1))[:, -7:]
    torch.testing.assert_close(late, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_output_and_memory_have_their_documented_types() -> None:
    made, x = attention(4), inputs().bfloat16()
    y, state = made(x, state=made.initial_state(len(LENGTHS)))
    assert y.dtype == torch.bfloat16 and state is not None and state.keys.dtype == torch.float32
    expected, _ = made(x.float())
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


def test_gradients_of_rows_with_nothing_in_them_are_finite() -> None:
    made, x = attention(6), inputs().requires_grad_()
    y, _ = made(x, lengths=torch.tensor(LENGTHS))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    empty, _ = made(x[:, :0])
    assert empty.shape == (len(LENGTHS), 0, WIDTH)


@pytest.mark.parametrize(("width", "heads", "window"), [(24, 5, 4), (24, 8, 4), (24, 0, 4), (24, 4, 0)])
def test_shapes_that_do_not_fit_are_refused(width: int, heads: int, window: int) -> None:
    with pytest.raises(SettingsError, match="attention"):
        WindowedAttention(width, heads, window)


def test_packed_rows_do_not_continue_after_a_state() -> None:
    made = attention(4)
    with pytest.raises(ValueError, match="pad them"):
        made(randn(1, 5, WIDTH), torch.zeros(1, 5, dtype=torch.bool), made.initial_state(1))


def test_initial_values_are_a_pure_function_of_seed_and_name() -> None:
    first, second, other = attention(3), attention(5), WindowedAttention(WIDTH, HEADS, 3)
    other.initialize(0.4, 0.3, 2, "attention")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        a, b, c = (made.get_parameter(f"{name}.weight") for made in (first, second, other))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.std().item() == pytest.approx(0.3 if name == "o_proj" else 0.4, rel=0.1)
