import contextlib
import ctypes
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Clock, environment

from mini_llm import hardware
from mini_llm.config import parse
from mini_llm.errors import UserError
from mini_llm.hardware import Stopwatch, memory_metrics, peak_of
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
    for shown in None, "0", "GPU-8932f937", "MIG-bed4bc2a":  # Slurm's and Kubernetes' names of them, too
        if shown:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(UserError, match="too old for CUDA 13.0"):
            hardware.choose_device("auto")
    assert hardware.choose_device("cpu").type == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):  # on purpose, or by Slurm
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert hardware.choose_device("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with monkeypatch.context() as without_cuda:
        without_cuda.setattr(torch.version, "cuda", None)
        assert hardware.choose_device("auto").type == "cpu"
    (tmp_path / "nvidia0").unlink()
    assert hardware.choose_device("auto").type == "cpu"
    (tmp_path / "nvidia0").mkdir()  # one that cannot be opened, as of another job
    assert hardware.choose_device("auto").type == "cpu"


def test_metal_is_chosen_for_one_process_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.choose_device("auto").type == "mps" and hardware.choose_device("auto", alone=False).type == "cpu"
    with pytest.raises(UserError, match="^--device mps: PyTorch has no collectives on Metal"):
        hardware.choose_device("mps", alone=False)
    assert hardware.peak_flops(torch.device("mps")) is None


def test_a_device_that_this_rank_has_not_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="^--device mps: .* no Metal support"):
        hardware.choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"local rank 2 has no GPU of its own, it sees 2;.*\(no --gpus-per-task"):
        hardware.choose_device("auto", local_rank=2)


def test_what_is_to_be_measured_on_a_gpu_does_not_pass_without_one():
    run = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", "check"], text=True, capture_output=True,
                         env=environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES=""))
    assert run.returncode == 1 and not run.stdout and "no CUDA device" in run.stderr, run.stdout + run.stderr


@pytest.mark.parametrize("capability, name", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_computes_in_what_its_tensor_cores_have(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert hardware.choose_precision(hardware.SpeedConfig(), device).name == name
    assert hardware.choose_precision(hardware.SpeedConfig(amp=False), device).name == "off"
    assert hardware.choose_precision(hardware.SpeedConfig(amp_dtype="bf16"), device).device == device


@pytest.mark.parametrize("amx, avx512", [(True, False), (False, True), (False, False)])
def test_a_cpu_computes_in_bf16_where_it_multiplies_that(monkeypatch, amx, avx512):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert hardware.choose_precision(hardware.SpeedConfig(), cpu).name == ("bf16" if amx or avx512 else "off")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # private: not every PyTorch has it
    assert hardware.choose_precision(hardware.SpeedConfig(), cpu).name == ("bf16" if avx512 else "off")


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_gradients_are_scaled_in_fp16_only(amp_dtype):
    precision = hardware.choose_precision(hardware.SpeedConfig(amp_dtype=amp_dtype), torch.device("cpu"))
    assert precision.scaler().is_enabled() == (amp_dtype == "fp16")


def test_unless_asked_only_what_triton_compiles_for_is_compiled(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, compiles in ((6, 1), False), ((7, 0), True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert hardware.should_compile(hardware.SpeedConfig(), cuda) == compiles
        assert hardware.should_compile(hardware.SpeedConfig(compile=True), cuda)
        assert not hardware.should_compile(hardware.SpeedConfig(compile=False), cuda)
    assert not hardware.should_compile(hardware.SpeedConfig(), cpu)


@pytest.mark.parametrize("kind, flags, dropout, expected", [
    ("cpu", {}, 0.0, "memory"), ("cpu", {}, 0.1, "memory cuDNN"), ("cpu", {}, 0.125, "memory"),
    ("cpu", dict(compile=True), 0.0, "memory deterministic"),
    ("cpu", dict(compile=True), 0.125, "memory deterministic seeded"),
    ("cpu", dict(deterministic=True), 0.0, "memory deterministic"),
    ("cuda", dict(compile=False), 0.1, "device TF32 cuDNN"),
    ("cuda", {}, 0.125, "device TF32 seeded"),
    ("cuda", dict(deterministic=True), 0.0, "device TF32 deterministic")], ids=str)
def test_pytorch_is_switched_to_what_the_flags_need(monkeypatch, kind, flags, dropout, expected):
    from torch._functorch import config as functorch

    device, switched = torch.device(kind, 1 if kind == "cuda" else None), set()
    for module, function, asked, name in [
            (torch.backends.cuda, "enable_cudnn_sdp", False, "cuDNN"), (torch.cuda, "set_device", device, "device"),
            (torch, "use_deterministic_algorithms", True, "deterministic"),
            (torch, "set_float32_matmul_precision", "high", "TF32"), (hardware, "keep_freed_memory", None, "memory")]:
        monkeypatch.setattr(module, function, lambda value=None, asked=asked, name=name:
                            switched.add(name if value == asked else (name, value)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with functorch.patch(graphsafe_rng_functionalization=True):
        hardware.configure(hardware.SpeedConfig(**flags), device, dropout)
        switched |= set() if functorch.graphsafe_rng_functionalization else {"seeded"}
    assert switched == set(expected.split())
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == ("deterministic" in expected), "without it, a product raises"


@pytest.mark.parametrize("strict", [True, False])
def test_after_a_sample_kernels_are_as_strict_as_before(monkeypatch, strict):
    states = [strict]  # to switch it would import torch's compiler
    monkeypatch.setattr(torch, "use_deterministic_algorithms", states.append)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: states[-1])
    for cudnn in True, False:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with pytest.raises(KeyboardInterrupt), hardware.allow_nondeterministic():
            assert not states[-1] and not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyboardInterrupt
        assert states[-1] == strict and torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_the_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 64)
    assert hardware.usable_cores() == 3
    monkeypatch.delattr(hardware.os, "sched_getaffinity")  # macOS
    assert hardware.usable_cores() == 64


@pytest.mark.parametrize("limit, cores", [("max 100000", 6), ("250000 100000", 2), ("20000 100000", 1),
                                          ("900000 100000", 6), ("", 6)])
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
        assert hardware.choose_precision(cfg, torch.device("cpu")).dtype == torch.bfloat16


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
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                  RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
                  RuntimeError("Invalid buffer size: 9.75 GiB"),  # Metal's, of a tensor that fits in no buffer
                  RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")):
        with (pytest.raises(UserError, match="^out of memory: .*; lower --batch-size, or take --device cpu$"),
              hardware.enough_memory()):
            raise error
    with pytest.raises(RuntimeError, match="^shapes$"), hardware.enough_memory():
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


def test_a_stopwatch_asks_a_gpu_for_nothing_that_it_has_not_done(monkeypatch):
    clock, done = Clock(monkeypatch, hardware), [False]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def query(self):
            return done[0]

        def elapsed_time(self, end):
            assert done[0], "it would wait"
            return 1e3 * (end.at - self.at)  # CUDA's are milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for done[0], pending in (False, 1), (False, 2), (True, 0), (False, 1):
        with watch:
            clock.sleep(0.05)
        assert len(watch.pending) == pending
    done[0] = True  # as once it is synchronized
    assert watch.read() == pytest.approx(0.2) and watch.read() == 0


def test_a_full_disk_is_a_line_that_names_the_file():
    import errno

    full = OSError(errno.ENOSPC, "No space left on device", "runs/c.log")
    assert hardware.explained(full) == "runs/c.log: No space left on device; make room there"
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")  # of a write, which knows no name
    assert hardware.explained(quota) == "the disk: Disk quota exceeded; make room there"
    assert hardware.explained(OSError(errno.EIO, "Input/output error", "c.log")) is None


def test_a_lack_of_memory_and_of_a_compiler_is_a_line_that_says_what_to_do():
    assert "; lower --batch-size and raise --grad-accum-steps" in hardware.explained(MemoryError())
    for module in "_dynamo", "_inductor":
        error = type("Failed", (RuntimeError,), dict(__module__=f"torch.{module}.exc"))("no compiler\nand more")
        assert hardware.explained(error) == "torch.compile failed: no compiler; add --no-compile"
        full = type(error)("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
        assert "; lower --batch-size and raise --grad-accum-steps" in hardware.explained(full)


def test_a_gpu_that_this_pytorch_has_no_kernels_for_is_a_line_that_says_what_to_do():
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nmore", 209)
    assert "take a build for an older or newer CUDA" in hardware.explained(error)
