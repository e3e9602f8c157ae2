"""The scan against its plain reference, in value and in gradient, on gates that break the usual shortcuts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builders import randn
from recurrences import GATES, assert_same, gates, results
from ternlm.errors import EnvironmentFault
from ternlm.ops import recurrence
from ternlm.ops.recurrence import freeze, reset, scan, scan_reference


@pytest.mark.parametrize("has_first_state", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 100])
def test_h06_chunks_equal_the_reference_at_each_length_in_value_and_gradient(chunk: int, has_first_state: bool) -> None:
    for length in [*range(1, 71), 130]:
        a, u = gates("any", 3, length, 5, seed=length).double(), randn(3, length, 5, seed=1).double()
        h0 = randn(3, 5, seed=2).double() if has_first_state else None
        fast = results(lambda a, u, h0: scan(a, u, h0, "chunk", chunk), a, u, h0)
        assert_same(fast, results(scan_reference, a, u, h0), 1e-11)


@pytest.mark.parametrize("width", [1, 13])
def test_every_way_through_time_that_auto_takes_equals_the_reference(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "STRAIGHT_WIDTH", 2 * 13)  # the narrow row is chunked, the wide one is not
    monkeypatch.setattr(recurrence, "SUMMARY_ELEMENTS", 16)
    monkeypatch.setattr(recurrence, "_POSITIONS_AT_A_TIME", 11)
    for length in (1, 2, 10, 11, 12, 64, 97):
        a, u, h0 = gates("any", 2, length, width).double(), randn(2, length, width).double(), randn(2, width).double()
        assert_same(results(scan, a, u, h0), results(scan_reference, a, u, h0), 1e-11)


@pytest.mark.parametrize("impl", ["auto", "chunk", "reference"])
@pytest.mark.parametrize("kind", GATES)
def test_h01_h02_no_gate_costs_digits_or_gives_nan_in_value_or_gradient(kind: str, impl: str) -> None:
    a, u, h0 = gates(kind, 2, 4096, 3), randn(2, 4096, 3), randn(2, 3, seed=5)
    u = u * (1 - a)
    exact = results(scan_reference, a.double(), u.double(), h0.double())
    fast = results(lambda a, u, h0: scan(a, u, h0, impl), a, u, h0)  # type: ignore[arg-type]
    for x, y in zip(fast, exact, strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all()
        assert (x - y).abs().max() < 1e-5 * y.abs().max().clamp_min(1.0)


def test_h02_gradients_near_a_closed_gate_are_those_of_float64() -> None:
    a, u = gates("almost zero", 2, 257, 3), randn(2, 257, 3)
    exact, fast = results(scan_reference, a.double(), u.double()), results(scan, a, u)
    torch.testing.assert_close(fast[2].double(), exact[2], rtol=1e-4, atol=1e-6)


def test_h05_the_state_does_not_drift_over_many_positions() -> None:
    a, u = gates("almost one", 1, 4096, 7), randn(1, 4096, 7)
    assert (scan(a, u)[0].double() - scan_reference(a.double(), u.double())[0]).abs().max() < 1e-4


def test_gradients_agree_with_finite_differences() -> None:
    a, u, h0 = (x.double().requires_grad_() for x in (gates("any", 2, 11, 3), randn(2, 11, 3), randn(2, 3)))
    assert torch.autograd.gradcheck(lambda *x: scan(*x, impl="chunk", chunk=3), (a, u, h0))


class Work(TorchDispatchMode):
    """Counts the numbers that all operators write."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = result if isinstance(result, tuple | list) else [result]
            self.elements += sum(x.numel() for x in outputs if isinstance(x, Tensor))
        return result


def work(function: Callable[..., tuple[Tensor, Tensor]], length: int) -> int:
    a, u = gates("any", 1, length, 3).requires_grad_(), randn(1, length, 3).requires_grad_()
    with Work() as counted:
        function(a, u)[0].sum().backward()
    return counted.elements


def slices(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The loop as it is often written; the backward of every slice is as long as the row."""
    states = [u[:, 0]]
    for t in range(1, a.shape[1]):
        states.append(a[:, t] * states[-1] + u[:, t])
    return torch.stack(states, dim=1), states[-1]


def test_h04_twice_the_length_is_twice_the_work() -> None:
    for function in (scan, lambda a, u: scan(a, u, impl="chunk"), scan_reference):
        assert work(function, 512) < 2.2 * work(function, 256)
    assert work(slices, 512) > 3 * work(slices, 256)


@pytest.mark.parametrize("impl", ["auto", "chunk"])
def test_the_second_half_goes_on_from_the_state_of_the_first(impl: Any) -> None:
    a, u, h0 = gates("mixed", 3, 77, 5), randn(3, 77, 5), randn(3, 5, seed=3)
    whole, last = scan(a, u, h0, impl)
    first, state = scan(a[:, :40], u[:, :40], h0, impl)
    second, state = scan(a[:, 40:], u[:, 40:], state, impl)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last)


def test_steps_of_one_position_equal_the_whole_row() -> None:
    a, u, h = gates("any", 3, 9, 5), randn(3, 9, 5), randn(3, 5, seed=3)
    whole, _ = scan(a, u, h)
    for t in range(9):
        state, h = scan(a[:, t : t + 1], u[:, t : t + 1], h)
        torch.testing.assert_close(state[:, 0], whole[:, t])


def test_an_empty_row_returns_the_state_it_was_given() -> None:
    h0 = randn(2, 5)
    h, last = scan(torch.ones(2, 0, 5), torch.ones(2, 0, 5), h0)
    assert h.shape == (2, 0, 5) and torch.equal(last, h0)
    assert torch.equal(scan(torch.ones(2, 0, 5), torch.ones(2, 0, 5))[1], torch.zeros(2, 5))


def rows(lengths: list[int]) -> Iterator[tuple[int, slice]]:
    place = 0
    for number, length in enumerate(lengths):
        yield number, slice(place, place + length)
        place += length


@pytest.mark.parametrize("impl", ["auto", "chunk", "reference"])
def test_h13_packed_equals_padded_equals_one_by_one_in_value_and_gradient(impl: Any) -> None:
    lengths = [1, 40, 2, 33, 7]
    total, longest = sum(lengths), max(lengths)
    a, u, weights = gates("any", 1, total, 5), randn(1, total, 5), randn(1, total, 5, seed=4)
    starts = torch.zeros(1, total, dtype=torch.bool)
    for _, place in rows(lengths):
        starts[:, place.start] = True

    def gradients(a: Tensor, u: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        a, u = a.clone().requires_grad_(), u.clone().requires_grad_()
        h = run(a, u)
        return [h.detach(), *torch.autograd.grad((h * weights).sum(), [a, u])]

    def padded(a: Tensor, u: Tensor) -> Tensor:
        ends = torch.tensor(lengths)
        wide = [torch.cat([x[0, p], x.new_full((longest - p.stop + p.start, 5), 0.37)]) for x in (a, u)
                for _, p in rows(lengths)]  # fmt: skip
        gate, value = freeze(torch.stack(wide[:5]), torch.stack(wide[5:]), ends)
        h, last = scan(gate, value, impl=impl)
        for number, place in rows(lengths):
            assert torch.equal(last[number], h[number, place.stop - place.start - 1])
        return torch.cat([h[n, : p.stop - p.start] for n, p in rows(lengths)]).unsqueeze(0)

    packed = gradients(a, u, lambda a, u: scan(reset(a, starts), u, impl=impl)[0])
    alone = gradients(a, u, lambda a, u: torch.cat([scan(a[:, p], u[:, p])[0] for _, p in rows(lengths)], dim=1))
    assert_same(packed, alone, 1e-5)
    assert_same(gradients(a, u, padded), alone, 1e-5)
    assert packed[1][starts].abs().max() == 0.0


def test_a_start_forgets_even_the_state_that_was_carried_in() -> None:
    a, u = gates("any", 1, 6, 5), randn(1, 6, 5)
    starts = torch.tensor([[True, False, False, True, False, False]])
    assert torch.equal(scan(reset(a, starts), u, randn(1, 5, seed=9))[0], scan(reset(a, starts), u)[0])


def test_a_frozen_row_keeps_its_last_valid_state_and_passes_no_gradient_to_what_follows() -> None:
    a, u, h0 = gates("any", 3, 9, 5).requires_grad_(), randn(3, 9, 5).requires_grad_(), randn(3, 5, seed=3)
    h, last = scan(*freeze(a, u, torch.tensor([0, 4, 9])), h0)
    assert torch.equal(last[0], h0[0])
    torch.testing.assert_close(last[1:], torch.stack([h[1, 3], h[2, 8]]))
    torch.testing.assert_close(last[1], scan(a[1:2, :4], u[1:2, :4], h0[1:2])[1][0])
    for grad in torch.autograd.grad(h.sum() + last.sum(), [a, u]):
        assert grad[0].abs().max() == 0.0 and grad[1, 4:].abs().max() == 0.0 and grad[1, :4].abs().min() > 0.0


def test_gradients_arrive_when_only_the_last_state_or_only_the_states_are_used() -> None:
    for pick in (lambda h, last: last, lambda h, last: h):
        inputs = [x.requires_grad_() for x in (gates("any", 2, 70, 3), randn(2, 70, 3), randn(2, 3))]
        fast = torch.autograd.grad(pick(*scan(*inputs, impl="chunk")).square().sum(), inputs)
        plain = torch.autograd.grad(pick(*scan_reference(*inputs)).square().sum(), inputs)
        assert_same(list(fast), list(plain), 1e-5)


def test_parts_of_a_wider_tensor_scan_as_their_copies_do_and_stay_as_they_are() -> None:
    merged, h0 = gates("any", 2, 70, 10), randn(2, 3, 2).transpose(1, 2)[:, 1].contiguous()
    before = merged.clone()
    a, u = merged.split(5, dim=-1)
    h0 = torch.cat([h0, h0], dim=1)[:, :5]
    assert torch.equal(scan(a, u, h0)[0], scan(a.contiguous(), u.contiguous(), h0)[0])
    assert torch.equal(merged, before)


@pytest.mark.parametrize("impl", ["auto", "chunk"])
def test_a_compiler_takes_the_scan_whole_and_for_any_length(impl: Any) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        assert len(graph.graph.nodes) < 40, "the loop over time was unrolled"
        return graph

    def gated(a: Tensor, u: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return scan(torch.sigmoid(a), 2 * u, h0, impl)

    captured = torch.compile(gated, fullgraph=True, dynamic=True, backend=backend)
    compiled = torch.compile(gated, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 70, 131):
        inputs = randn(3, length, 5), randn(3, length, 5, seed=1), randn(3, 5, seed=2)
        captured(*inputs)
        assert_same(results(compiled, *inputs), results(gated, *inputs), 1e-6)
    assert graphs == 1


def test_h05_autocast_leaves_the_scan_in_float32() -> None:
    a, u, h0 = gates("any", 2, 40, 3), randn(2, 40, 3), randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        h, last = scan(a, u, h0)
    assert h.dtype == last.dtype == torch.float32
    assert torch.equal(h, scan(a, u, h0)[0])


def test_h05_narrow_gates_inputs_and_states_are_refused() -> None:
    a, u, h0 = gates("any", 2, 4, 3), randn(2, 4, 3), randn(2, 3)
    for bad in [(a.bfloat16(), u.bfloat16(), None), (a, u.half(), None), (a, u, h0.bfloat16()), (a.double(), u, None)]:
        with pytest.raises(TypeError, match="all must be float32"):
            scan(*bad)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    a, u = gates("any", 2, 4, 3), randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"first state \(3, 2\) do not fit"):
        scan(a, u, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="do not fit"):
        scan(a, u[:, :3])
    with pytest.raises(ValueError, match="'associative' is unknown; choose auto"):
        scan(a, u, impl="associative")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk of 0 positions"):
        scan(a, u, chunk=0)


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "_triton_is_installed", lambda: False)
    with pytest.raises(EnvironmentFault, match="needs the package 'triton'"):
        scan(gates("any", 2, 4, 3), randn(2, 4, 3), impl="kernel")
