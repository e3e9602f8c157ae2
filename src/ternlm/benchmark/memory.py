"""The most memory that a call needs: its live tensors, and the process around it."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ternlm.device import peak_memory_mb


def tensor_peak_mb(call: Callable[[], Any], held: Iterable[Tensor], device: torch.device) -> float:
    """Largest sum of live tensors during a call, in MiB.

    That is what is held all the time, and on top of it the largest balance of what the call allocates and frees: on
    CUDA by the allocator's own peak, elsewhere as the profiler sees it. Neither the libraries nor the holes that a heap
    keeps are in it, nor other models on the device, so it is the same in each run.

    Args:
        call: Made once; it must have been made before, or its caches would count as its own.
        held: Tensors that live before and after: parameters, buffers, the state of an optimizer.
        device: Where they are.
    """
    static = bytes_of(held)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (static + torch.cuda.max_memory_allocated(device) - before) / 2**20
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return (static + peak) / 2**20


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to the standard error of the process, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared storage counted once."""
    storages = {}
    for plain in (plain for tensor in tensors for plain in _plain(tensor)):
        storage = plain.untyped_storage()
        storages[storage.data_ptr() or id(plain)] = storage.nbytes()
    return sum(storages.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a wrapper consists of, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def process_growth_mb(build: Callable[[], Callable[[], Any]], repeats: int) -> float:
    """Growth of the process's largest memory by building something and calling it, in MiB.

    Only a process that has done nothing else yet can tell.
    """
    device = torch.device("cpu")
    before = peak_memory_mb(device)
    call = build()
    for _ in range(repeats):
        call()
    return peak_memory_mb(device) - before
