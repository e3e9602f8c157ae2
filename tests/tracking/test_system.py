"""System rows: the right names with and without devices, and never an exception."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ternlm.tracking.system import SystemMonitor

MACHINE = {
    "system/cpu_percent", "system/process_cpu_percent", "system/ram_percent", "system/process_ram_mb",
    "system/disk_free_gb",
}  # fmt: skip
DEVICE = {"util", "mem_used_mb", "mem_percent", "temp_c", "power_w"}


class FakeNvml:
    """Two devices, numbered by what they report; `broken` names calls that raise."""

    NVML_TEMPERATURE_GPU = 0
    uuids = ("GPU-aaaa-1", "GPU-bbbb-2")

    def __init__(self, *broken: str) -> None:
        self.broken, self.calls = broken, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        results = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: 7,
            "nvmlDeviceGetUUID": lambda handle: self.uuids[handle],
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=10 + handle, memory=1),
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**30, total=2**32),
            "nvmlDeviceGetTemperature": lambda handle, sensor: 40 + handle,
            "nvmlDeviceGetPowerUsage": lambda handle: 250_000,
        }

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if name in self.broken:
                raise RuntimeError("Not Supported")
            return results[name](*args)

        if name not in results:
            raise AttributeError(name)
        return call


@pytest.fixture(autouse=True)
def all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_nvml(monkeypatch: pytest.MonkeyPatch, *broken: str) -> FakeNvml:
    nvml = FakeNvml(*broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    return nvml


@pytest.mark.parametrize("broken", ["package", "nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_without_a_driver_the_row_has_the_machine_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        with_nvml(monkeypatch, broken)
    row = SystemMonitor(tmp_path).read()
    assert row.keys() == MACHINE
    assert all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in row.values())
    assert row["system/process_ram_mb"] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.5)


def test_every_device_has_its_set_of_names_and_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvml(monkeypatch)
    row = SystemMonitor(tmp_path).read()
    assert row.keys() == MACHINE | {f"system/gpu{number}/{name}" for number in (0, 1) for name in DEVICE}
    second = {name: row[f"system/gpu1/{name}"] for name in DEVICE}
    assert second == {"util": 11.0, "mem_used_mb": 1024.0, "mem_percent": 25.0, "temp_c": 41.0, "power_w": 250.0}


def test_what_fails_once_is_left_out_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = with_nvml(monkeypatch, "nvmlDeviceGetPowerUsage")
    monitor = SystemMonitor(tmp_path)
    rows = [monitor.read() for _ in range(3)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert not any("power" in name for name in rows[0])
    assert nvml.calls.count("nvmlDeviceGetPowerUsage") == 2, "once for each device"
    assert nvml.calls.count("nvmlDeviceGetTemperature") == 2 * 4


def test_l10_a_folder_that_goes_away_is_no_error(tmp_path: Path) -> None:
    assert SystemMonitor(tmp_path / "missing").read().keys() == MACHINE - {"system/disk_free_gb"}


@pytest.mark.parametrize(
    ("visible", "utils"),
    [
        ("0,1", [10, 11]),
        ("1", [11]),
        ("1,0", [11, 10]),
        ("GPU-bbbb", [11]),
        ("MIG-cccc", [17]),
        ("0,5,1", [10]),
        ("-1", []),
        ("", []),
    ],
)
def test_devices_are_those_and_in_the_order_the_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, utils: list[int]
) -> None:
    with_nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    row = SystemMonitor(tmp_path).read()
    assert [value for name, value in row.items() if name.endswith("/util")] == utils
    assert ("system/gpu0/util" in row) == bool(utils)
