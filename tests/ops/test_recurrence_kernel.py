"""The Triton kernel against the reference: on the device where there is one, else by Triton's interpreter."""

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from builders import randn
from recurrences import assert_same, gates, results
from ternlm.errors import EnvironmentFault
from ternlm.ops.recurrence import scan, scan_reference

pytest.importorskip("triton", reason="Triton is not installed")

KERNEL = "ternlm.ops.recurrence_kernel"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernel runs; without a device, the module is loaded anew for the interpreter."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(KERNEL, None)
    importlib.import_module(KERNEL)
    yield "cpu"
    sys.modules.pop(KERNEL, None)


def kernel(chunk: int):  # type: ignore[no-untyped-def]
    return lambda a, u, h0=None: scan(a, u, h0, "kernel", chunk)


@pytest.mark.parametrize("has_first_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [2, 7, 32])
def test_h06_the_kernel_equals_the_reference_in_value_and_gradient(
    chunk: int, dtype: torch.dtype, has_first_state: bool, device: str
) -> None:
    for length in (2, 7, 8, 33, 70):
        a, u = gates("any", 3, length, 5).to(device, dtype), randn(3, length, 5).to(device, dtype)
        h0 = randn(3, 5, seed=2).to(device, dtype) if has_first_state else None
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        assert_same(results(kernel(chunk), a, u, h0), results(scan_reference, a, u, h0), tolerance)


def test_more_channels_than_one_program_takes_and_parts_of_a_wider_tensor(device: str) -> None:
    merged, h0 = gates("mixed", 2, 11, 2 * 131).to(device), randn(2, 131).to(device)
    a, u = merged.split(131, dim=-1)
    assert_same(results(kernel(4), a, u, h0), results(scan_reference, a, u, h0), 1e-5)


@pytest.mark.parametrize("kind", ["zero or one", "almost zero", "almost one", "mixed"])
def test_h03_no_gate_costs_the_kernel_digits(kind: str, device: str) -> None:
    a, u, h0 = (x.to(device) for x in (gates(kind, 1, 300, 3), randn(1, 300, 3), randn(1, 3, seed=5)))
    exact = results(scan_reference, a.double(), u.double(), h0.double())
    for x, y in zip(results(kernel(32), a, u, h0), exact, strict=True):
        assert x.isfinite().all()
        assert (x - y).abs().max() < 1e-5 * y.abs().max().clamp_min(1.0)


def test_gradients_arrive_when_only_the_last_state_is_used(device: str) -> None:
    inputs = [x.to(device).requires_grad_() for x in (gates("any", 2, 20, 3), randn(2, 20, 3), randn(2, 3))]

    def gradients(outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs[1].square().sum(), inputs))

    assert_same(gradients(kernel(7)(*inputs)), gradients(scan_reference(*inputs)), 1e-5)


def test_tensors_of_the_processor_are_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentFault, match="needs tensors on a CUDA device, these are on cpu"):
        scan(gates("any", 2, 4, 3), randn(2, 4, 3), impl="kernel")
