"""Peaks of devices, by name or by measurement, and the share of them that training uses."""

import re
from collections.abc import Iterator

import pytest
import torch

from ternlm.training import utilization as module
from ternlm.training.utilization import Peak, mfu, peak_flops


def peak_of(name: str, monkeypatch: pytest.MonkeyPatch) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"))
    if peak is not None:
        assert peak.source == f"data sheet of {name}, dense bfloat16"
    return None if peak is None else peak.flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_a_device_is_known_by_its_whole_name(name: str, tera: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of(name, monkeypatch) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA B300 SXM6 AC MIG 1g.34gb",
        "Tesla T4",
        "Quadro RTX 6000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_device_that_only_resembles_a_known_one_has_no_peak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of(name, monkeypatch) is None


def test_no_name_means_two_devices() -> None:
    names = [name for pattern in module._TERA for name in pattern.split("|") if re.fullmatch(r"[A-Z0-9a-z ]+", name)]
    assert len(names) > 40
    for name in names:
        assert sum(re.fullmatch(pattern, name) is not None for pattern in module._TERA) == 1, name


def test_a_device_without_a_table_and_without_a_measurement_has_no_peak() -> None:
    assert peak_flops(torch.device("mps")) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_a_processor_is_measured_by_its_fastest_product_on_one_thread(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[int] = []
    module._measured.cache_clear()

    def durations(matrix: torch.Tensor) -> float:
        assert matrix.shape == (1024, 1024)
        products.append(torch.get_num_threads())
        return 0.25 if len(products) == 4 else 0.5

    times: Iterator[float] = iter([0.0, 0.1, 0.2, 0.29, 0.31])
    monkeypatch.setattr(module, "_seconds_of_one", durations)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = peak_flops(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert products == [1] * 5
    assert peak is not None and peak.flops == threads * 2 * 1024**3 / 0.25
    assert re.fullmatch(rf"measured: (bfloat16|float32) product on one thread, times {threads}", peak.source)
    module._measured.cache_clear()


def test_measuring_a_processor_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"))
    assert peak is not None and peak.flops > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_utilization_is_the_share_of_the_peak() -> None:
    assert mfu(1000.0, 6e8, Peak(3e12, "here")) == pytest.approx(0.2)
    assert mfu(1000.0, 6e8, None) is None
