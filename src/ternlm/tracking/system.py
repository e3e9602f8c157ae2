"""Load of the machine: processor, memory, disk, and every visible NVIDIA device, in about a millisecond."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_MIB, _GIB = 2**20, 2**30

Reading = Callable[[], dict[str, float]]


class SystemMonitor:
    """Reads quantities whose names begin with ``system/``; what cannot be read here has no name in the row.

    A reading that fails once is not tried again. Percentages of processor time are of the time since the last call.

    Args:
        folder: The free space of its disk is read.
    """

    def __init__(self, folder: Path) -> None:
        self._readings = [*_machine(folder), *_devices()]
        self.read()  # the first percentages mean nothing yet

    def read(self) -> dict[str, float]:
        """One row of quantities, without step and time."""
        row: dict[str, float] = {}
        for reading in list(self._readings):
            try:
                row.update(reading())
            except Exception:  # noqa: BLE001 - drivers and systems fail in many ways, none of which matters to training
                self._readings.remove(reading)
        return row


def _machine(folder: Path) -> list[Reading]:
    process = psutil.Process()
    return [
        lambda: {"system/cpu_percent": psutil.cpu_percent()},
        lambda: {"system/process_cpu_percent": process.cpu_percent()},
        lambda: {"system/ram_percent": psutil.virtual_memory().percent},
        lambda: {"system/process_ram_mb": process.memory_info().rss / _MIB},
        lambda: {"system/disk_free_gb": shutil.disk_usage(folder).free / _GIB},
    ]


def _devices() -> list[Reading]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = _visible(pynvml)
    except Exception:  # noqa: BLE001 - no package, no driver, no device: all the same
        return []
    return [reading for number, handle in enumerate(handles) for reading in _device(pynvml, number, handle)]


def _device(nvml: Any, number: int, handle: Any) -> list[Reading]:
    name = f"system/gpu{number}"

    def memory() -> dict[str, float]:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return {f"{name}/mem_used_mb": info.used / _MIB, f"{name}/mem_percent": 100 * info.used / info.total}

    return [
        lambda: {f"{name}/util": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)},
        memory,
        lambda: {f"{name}/temp_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))},
        lambda: {f"{name}/power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3},
    ]


def _visible(nvml: Any) -> list[Any]:
    """Handles in the order of CUDA_VISIBLE_DEVICES, so that gpu0 is the process's first device."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    names = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    chosen = []
    for part in (part.strip() for part in wanted.split(",")):
        if part.isdigit() and int(part) < len(handles):
            chosen.append(handles[int(part)])
        elif part.startswith("MIG-"):
            chosen.append(nvml.nvmlDeviceGetHandleByUUID(part))
        elif part.startswith("GPU-") and any(name.startswith(part) for name in names):
            chosen.append(handles[[name.startswith(part) for name in names].index(True)])
        else:
            break  # as CUDA does: what follows an unknown name is hidden
    return chosen
