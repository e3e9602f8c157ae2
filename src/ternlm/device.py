"""Where the arithmetic happens: device, precision, threads, the allocator, and random seeds."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

import torch

from ternlm.errors import EnvironmentFault, SettingsError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        SettingsError: No device has this name.
        EnvironmentFault: The device exists, but not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"unknown device '{name}'. Use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"device '{name}' is not available: this torch sees no CUDA GPU. Use device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"device '{name}' is not available: this machine has {torch.cuda.device_count()} GPUs. "
            f"Use cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentFault("device 'mps' is not available on this machine. Use device=cpu.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"device '{name}' is not supported. Use auto, cpu, cuda, cuda:N or mps.")
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of activations; ``auto`` is bfloat16 where the hardware multiplies it fast, else float32.

    Parameters and optimizer state are float32 in every precision: updates of a latent weight are
    smaller than a bfloat16 can hold.
    """
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def set_up(device: torch.device, threads: int | None = None, deterministic: bool = False) -> None:
    """Configure the process once, before tensors are made.

    Args:
        device: The device that will be used.
        threads: CPU threads; None keeps torch's choice.
        deterministic: Refuse operations whose result depends on scheduling.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        # Integer sums must stay exact (docs/architecture.md).
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    else:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Ask glibc to keep large freed blocks instead of returning them to the system.

    A training step frees and allocates the same large blocks again and again; by default each
    allocation is a fresh mapping whose pages fault one by one.

    Returns:
        Whether the C library accepted the request.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = 2**31 - 1
    requests = ((m_mmap_threshold, 2**30), (m_trim_threshold, largest), (m_top_pad, 2**26))
    accepted = [bool(mallopt(option, value)) for option, value in requests]
    return all(accepted)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a tensor did not fit, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory in use so far, in MiB: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would also count the process that started this one
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
