"""The short convolution against PyTorch's own, and against itself run in pieces."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from builders import randn
from ternlm.ops import short_convolution as module
from ternlm.ops.short_convolution import short_convolution


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise conv1d, padded on the left."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0]).transpose(1, 2)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 11, 64])
def test_h10_it_equals_a_left_padded_depthwise_convolution_in_value_and_gradient(
    length: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 5 * 7)  # a row of 64 takes ten pieces
    outcomes = []
    for function in (lambda x, weight: short_convolution(x, weight)[0], oracle):
        x, weight = randn(3, length, 5).requires_grad_(), randn(5, kernel, seed=1).requires_grad_()
        y = function(x, weight)
        outcomes.append([y, *torch.autograd.grad((y * randn(3, length, 5, seed=2)).sum(), [x, weight])])
    for fast, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, plain)


def test_future_inputs_do_not_change_past_outputs() -> None:
    x, weight = randn(2, 9, 5), randn(5, 4, seed=1)
    y, _ = short_convolution(x, weight)
    x[:, 6] += 1.0
    changed, _ = short_convolution(x, weight)
    assert torch.equal(changed[:, :6], y[:, :6]) and not torch.equal(changed[:, 6], y[:, 6])


@pytest.mark.parametrize("pieces", [[1] * 9, [2, 7], [4, 1, 4], [0, 9]])
def test_h11_pieces_that_hand_on_their_last_inputs_equal_the_whole(pieces: list[int]) -> None:
    x, weight, previous = randn(3, 9, 5), randn(5, 4, seed=1), randn(3, 5, 3, seed=2)
    whole, last = short_convolution(x, weight, previous)
    parts = []
    for piece in x.split(pieces, dim=1):
        y, previous = short_convolution(piece, weight, previous)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert torch.equal(previous, last)
    assert torch.equal(last, x[:, -3:].transpose(1, 2))


@pytest.mark.parametrize("has_previous", [True, False])
def test_h11_each_row_hands_on_its_last_valid_inputs(has_previous: bool) -> None:
    x, weight, lengths = randn(6, 9, 5), randn(5, 4, seed=1), [0, 1, 2, 3, 5, 9]
    previous = randn(6, 5, 3, seed=2) if has_previous else None
    y, following = short_convolution(x, weight, previous, lengths=torch.tensor(lengths))
    assert following.shape == (6, 5, 3)
    for row, length in enumerate(lengths):
        before = None if previous is None else previous[row : row + 1]
        alone, last = short_convolution(x[row : row + 1, :length], weight, before)
        torch.testing.assert_close(y[row : row + 1, :length], alone)
        assert torch.equal(following[row : row + 1], last)


@pytest.mark.parametrize("kernel", [1, 2, 4, 6])
@pytest.mark.parametrize("lengths", [[1, 2, 5, 3], [7, 1], [1, 1, 1, 1]])
def test_h13_packed_sequences_do_not_see_each_other_in_value_or_gradient(lengths: list[int], kernel: int) -> None:
    x, weight = randn(1, sum(lengths), 5).requires_grad_(), randn(5, kernel, seed=1).requires_grad_()
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    parts, place = [], 0
    for length in lengths:
        starts[0, place] = True
        y, last = short_convolution(x[:, place : place + length], weight)
        parts.append(y)
        place += length
    packed, following = short_convolution(x, weight, starts=starts)
    separate = torch.cat(parts, dim=1)
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(following, last)
    upstream = randn(1, sum(lengths), 5, seed=3)
    gradients = [torch.autograd.grad((y * upstream).sum(), [x, weight]) for y in (packed, separate)]
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain)


def test_positions_before_the_first_start_go_on_from_the_previous_inputs() -> None:
    x, weight, previous = randn(1, 6, 5), randn(5, 4, seed=1), randn(1, 5, 3, seed=2)
    starts = torch.tensor([[False, False, True, False, False, False]])
    y, _ = short_convolution(x, weight, previous, starts)
    torch.testing.assert_close(y[:, :2], short_convolution(x[:, :2], weight, previous)[0])
    torch.testing.assert_close(y[:, 2:], short_convolution(x[:, 2:], weight)[0])


def test_starts_and_ends_hold_in_the_same_rows() -> None:
    x, weight = randn(2, 9, 5), randn(5, 4, seed=1)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 2] = True
    y, following = short_convolution(x, weight, starts=starts, lengths=torch.tensor([6, 8]))
    for row, (start, end) in enumerate([(4, 6), (2, 8)]):
        alone, last = short_convolution(x[row : row + 1, start:end], weight)
        torch.testing.assert_close(y[row : row + 1, start:end], alone)
        assert torch.equal(following[row : row + 1], last)


def test_bfloat16_inputs_are_summed_in_float32_and_keep_their_type() -> None:
    x, weight = randn(2, 9, 5).bfloat16(), randn(5, 4, seed=1)
    y, following = short_convolution(x, weight)
    assert y.dtype == following.dtype == torch.bfloat16
    assert torch.equal(y, short_convolution(x.float(), weight)[0].bfloat16())
    assert short_convolution(x, weight, torch.zeros(2, 5, 3))[1].dtype == torch.float32


def test_a_compiler_takes_the_convolution_whole() -> None:
    torch._dynamo.reset()
    x, weight, starts = randn(1, 11, 5), randn(5, 4, seed=1), torch.zeros(1, 11, dtype=torch.bool)
    starts[0, 6] = True
    compiled = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
    for given in (None, starts):
        torch.testing.assert_close(compiled(x, weight, starts=given)[0], short_convolution(x, weight, starts=given)[0])
