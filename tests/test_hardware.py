import pytest
import torch
from conftest import Clock

import hardware
from hardware import Stopwatch, peak_of


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H200 NVL", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("Some Other GPU", None),
])
def test_a_peak_is_that_of_the_very_device_or_unknown(name, peak):
    assert peak_of(name) == peak


def test_a_stopwatch_counts_what_is_inside_and_starts_anew_when_read(monkeypatch):
    clock = Clock(monkeypatch, hardware)
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            clock.sleep(0.05)
        clock.sleep(0.7)
    assert watch.read() == pytest.approx(0.1) and watch.read() == 0
