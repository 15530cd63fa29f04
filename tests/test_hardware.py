import contextlib
import ctypes
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import Clock

import hardware
from config import UserError, parse
from hardware import Stopwatch, memory_metrics, peak_of
from train import Config, World


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("AMD Instinct MI250X", 191.5e12),
    ("NVIDIA A800-SXM4-80GB", 312e12), ("NVIDIA GH200 144G HBM3e", 989e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA RTX 6000 Ada Generation", 364.2e12), ("NVIDIA A40", 149.7e12), ("NVIDIA A400", None),
    ("AMD Instinct MI250X / MI250", None), ("Some Other GPU", None),
])
def test_a_peak_is_that_of_the_very_device_or_unknown(name, peak):
    assert peak_of(name) == peak


def test_a_gpu_that_this_pytorch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "NVIDIA", str(tmp_path / "nvidia[0-9]"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="too old for CUDA 13.0"):
        hardware.choose_device("auto")
    assert hardware.choose_device("cpu").type == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):  # on purpose, or by Slurm
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert hardware.choose_device("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia0").unlink()
    assert hardware.choose_device("auto").type == "cpu"


def test_metal_is_chosen_for_one_process_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.choose_device("auto").type == "mps" and hardware.choose_device("auto", alone=False).type == "cpu"


@pytest.mark.parametrize("capability, name", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_computes_in_what_its_tensor_cores_have(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert hardware.choose_precision(hardware.SpeedConfig(), device).name == name
    assert hardware.choose_precision(hardware.SpeedConfig(amp=False), device).name == "off"


def test_the_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 64)
    assert hardware.usable_cores() == 3


@pytest.mark.parametrize("limit, cores", [("max 100000", 6), ("250000 100000", 2), ("20000 100000", 1), ("", 6)])
def test_a_container_has_as_many_threads_as_its_limit_has_cores(monkeypatch, tmp_path, limit, cores):
    calls = []
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(hardware, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hardware.choose_device("cpu")
    assert hardware.usable_cores() == cores and calls == [cores] * (cores < 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    hardware.choose_device("cpu")
    assert len(calls) <= 1


def test_half_precision_on_metal_is_refused_where_its_mask_is_wrong(monkeypatch):
    cfg = hardware.SpeedConfig(amp_dtype="bf16")
    for version, refused in ("2.12.1", True), ("2.13.0", False):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        with pytest.raises(UserError, match="PyTorch 2.13 or newer") if refused else contextlib.nullcontext():
            assert hardware.choose_precision(cfg, torch.device("mps")).dtype == torch.bfloat16


@pytest.mark.parametrize("largest, asked", [(2**31, [1 << 30]), (1 << 25, [1 << 30, 1 << 25])])
def test_an_old_glibc_is_asked_for_the_threshold_it_can_have(monkeypatch, largest, asked):
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return int(option != -3 or value <= largest)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    hardware.keep_freed_memory()
    assert calls == [*((-3, value) for value in asked), (-1, 2**31 - 1)]


def test_what_metal_would_compute_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)
    speed, metal = hardware.SpeedConfig(), torch.device("mps")
    hardware.configure(speed, metal, dropout=0.5)
    hardware.configure(speed, metal, recomputes=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="^--dropout 0.5 --use-activation-checkpoint: .* leave one out, or take"):
        World(parse(Config, ["--device", "mps", "--dropout", "0.5", "--use-activation-checkpoint"]))


def test_a_lack_of_memory_becomes_one_line_and_other_errors_stay_as_they_are():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with (pytest.raises(UserError, match="^out of memory: .*; lower --batch-size$"),
              hardware.enough_memory("lower --batch-size")):
            raise error
    with pytest.raises(RuntimeError, match="^shapes$"), hardware.enough_memory("lower --batch-size"):
        raise RuntimeError("shapes")


def test_memory_that_is_reserved_is_held_and_then_free(monkeypatch):
    held, ones = [], torch.ones

    def noted(*args, **options):
        held.append(weakref.ref(tensor := ones(*args, **options)))
        return tensor

    monkeypatch.setattr(torch, "ones", noted)
    with hardware.reserved([1 << 20, 1 << 10], torch.device("cpu")):
        assert [tensor().nbytes for tensor in held] == [1 << 20, 1 << 10]
    assert [tensor() for tensor in held] == [None, None]


def test_gpu_memory_is_in_gigabytes_since_the_last_report(monkeypatch):
    assert memory_metrics(torch.device("cpu")) == {}
    reset = []
    for name, value in dict(memory_allocated=2e9, max_memory_allocated=6e9, memory_reserved=8e9).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 80e9))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    device = torch.device("cuda", 1)
    assert memory_metrics(device) == {"gpu/allocated_gb": 2, "gpu/peak_gb": 6, "gpu/reserved_gb": 8,
                                      "gpu/mem_utilization": 0.25}
    assert reset == [device]


def test_a_stopwatch_counts_what_is_inside_and_starts_anew_when_read(monkeypatch):
    clock = Clock(monkeypatch, hardware)
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            clock.sleep(0.05)
        clock.sleep(0.7)
    assert watch.read() == pytest.approx(0.1) and watch.read() == 0


def test_a_full_disk_is_a_line_that_names_the_file():
    import errno

    full = OSError(errno.ENOSPC, "No space left on device", "runs/c.log")
    assert hardware.explained(full) == "runs/c.log: No space left on device; make room there"
    assert hardware.explained(OSError(errno.EIO, "Input/output error", "c.log")) is None
