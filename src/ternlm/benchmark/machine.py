"""What a measurement was made on, as far as it explains the numbers."""

import platform
from datetime import UTC, datetime
from typing import Any

import psutil
import torch

import ternlm
from ternlm.training.provenance import hardware, package_versions
from ternlm.training.utilization import peak_flops


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, GPUs, versions, threads, the device's peak, and how busy the machine was."""
    peak = peak_flops(device)
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        **hardware(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "peak": None if peak is None else peak._asdict(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "ternlm": ternlm.__version__,
    }


def available_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses at present."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
