"""The hardware: choice of device and precision, peak FLOP/s, seeding, device timing, memory."""

import contextlib
import ctypes
import errno
import glob
import os
import platform
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mini_llm.config import arg
from mini_llm.errors import UserError, first_line

# Dense bf16 FLOP/s (without sparsity) of the data sheets, by full device name: NVL, PCIe, Ti and Laptop ones differ.
PEAK_FLOPS = {r"H100( SXM5)? \d+GB HBM3": 989e12, r"H100 PCIe": 756e12, r"H100 NVL": 835e12, r"H200": 989e12,
              r"H200 NVL": 835e12, r"H800": 989e12, r"H20": 148e12,
              r"GH200 \d+GB?( HBM3e)?": 989e12, r"B200": 2250e12, r"GB200": 2500e12,
              r"A[18]00-(SXM4|SXM|PCIE)-\d+GB|A[18]00 \d+GB PCIe": 312e12, r"A40": 149.7e12, r"A30": 165e12,
              r"A10": 125e12, r"A10G": 70e12, r"L40S": 362e12, r"L40": 181e12, r"L4": 121e12,
              r"RTX A6000": 154.8e12, r"RTX 6000 Ada Generation": 364.2e12,
              r"GeForce RTX 5090": 209.5e12, r"GeForce RTX 4090": 165e12, r"GeForce RTX 3090": 71e12,
              r"AMD Instinct MI250X": 191.5e12, r"AMD Instinct MI300X": 1307e12}  # an MI250X shows as two devices

CPU_LIMIT = "/sys/fs/cgroup/cpu.max"  # a container's (docker --cpus, Kubernetes' limits.cpu): quota and period in µs
NVIDIA = "/dev/nvidia[0-9]*"  # GPUs, whether PyTorch can use them or not


@dataclass
class PrecisionConfig:
    """Device and precision"""

    device: str = arg("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cuda", "cpu", "mps"))
    amp: bool = arg(True, "mixed precision: matrix products in --amp-dtype, weights and optimizer in fp32")
    amp_dtype: str = arg("auto", "auto: bf16 where the device does it fast, else fp16 on a GPU",
                         choices=("auto", "bf16", "fp16"))


@dataclass
class SpeedConfig(PrecisionConfig):
    """Precision and speed"""

    compile: bool | None = arg(None, "torch.compile; unset: on a GPU only")
    deterministic: bool = arg(False, "deterministic kernels only, slower: for the same bits on every run on a GPU; on "
                                     "a CPU they are the same in any case")


@dataclass(frozen=True)
class Precision:
    """The autocast `dtype` (None: no autocast), the `reason` for it, and the gradient scaler that it needs."""

    device: torch.device
    dtype: torch.dtype | None
    reason: str

    @property
    def name(self):
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[self.dtype]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self):
        """fp16 gradients underflow unscaled (Micikevicius et al. 2018); bf16 has the range of fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_device(name, local_rank=0, alone=True):
    """auto|cuda|cpu|mps → torch.device. `alone`: this process is not one of several ranks. On a CPU, limits PyTorch's
    threads to the cores that this process may use. Raises UserError if the device is not available."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":  # Metal has no collectives
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps and alone else "cpu"
        if name == "cpu" and torch.version.cuda and _has_nvidia():
            raise UserError(f"--device auto: this machine has an NVIDIA GPU, which this PyTorch cannot use: its driver "
                            f"is too old for CUDA {torch.version.cuda}, or does not work (see nvidia-smi); update it, "
                            f"take a PyTorch for its CUDA, or say --device cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu, or check nvidia-smi "
                            "and that torch is the CUDA build")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--device cuda: local rank {local_rank} has no GPU of its own, it sees "
                            f"{torch.cuda.device_count()}; lower --nproc-per-node, or let each rank see all GPUs (no "
                            f"--gpus-per-task)")
        return torch.device("cuda", local_rank)
    if name == "mps" and not has_mps:
        raise UserError("--device mps: this PyTorch has no Metal support; use --device cpu")
    if name == "mps" and not alone:
        raise UserError("--device mps: PyTorch has no collectives on Metal; use --device cpu, or python train.py")
    if name == "cpu" and "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        # PyTorch counts the affinity, not a container's limit, and threads that wait would use that up.
        torch.set_num_threads(usable_cores())
    return torch.device(name)


def _has_nvidia():
    """Whether this process has been given an NVIDIA GPU: one that is not hidden, nor denied by the job's cgroup."""
    if not re.search(r"^\d|GPU|MIG", os.environ.get("CUDA_VISIBLE_DEVICES", "0")):  # "", -1, Slurm's NoDevFiles
        return False
    for file in glob.glob(NVIDIA):
        with contextlib.suppress(OSError), open(file, "rb"):
            return True
    return False


def choose_precision(cfg, device):
    """The Precision that `cfg` asks for or, if auto, the fast one on this device, with the reason in words."""
    if not cfg.amp:
        return Precision(device, None, "--no-amp: fp32 (TF32 in matrix products on a GPU)")
    if cfg.amp_dtype != "auto":
        if device.type == "mps" and torch.__version__ < (2, 13):  # pytorch #195910
            raise UserError(f"--amp-dtype {cfg.amp_dtype}: PyTorch {torch.__version__} evaluates with a wrong mask in "
                            f"it on Metal; leave it out, or take PyTorch 2.13 or newer")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.amp_dtype]
        return Precision(device, dtype, f"--amp-dtype {cfg.amp_dtype}")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision(device, torch.bfloat16, "this GPU multiplies bf16 in its tensor cores")
        return Precision(device, torch.float16, "this GPU has no fast bf16; gradients are scaled")
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private functions
    if device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return Precision(device, torch.bfloat16, "this CPU multiplies bf16 (AMX or AVX512-BF16)")
    return Precision(device, None, f"this {device.type} has no fast bf16: fp32")


def configure(cfg, device, dropout=0.0, recomputes=False):
    """Set torch's process-wide switches according to the flags. `recomputes`: by activation checkpoints."""
    if device.type == "mps" and dropout and recomputes:  # pytorch #127676
        raise UserError(f"--dropout {dropout} --use-activation-checkpoint: on Metal PyTorch recomputes with other "
                        f"dropout masks, so that gradients are wrong; leave one out, or take --device cpu")
    if dropout * 16 % 1:
        torch.backends.cuda.enable_cudnn_sdp(False)  # some of its kernels round dropout to sixteenths (pytorch #174245)
    if dropout and should_compile(cfg, device):
        # Else the compiler gives attention in a checkpointed block a generator of its own, which `seed_step` does not
        # reach: masks are the same on all ranks, and differ after a resume.
        from torch._functorch import config as functorch

        functorch.graphsafe_rng_functionalization = False
    # On a CPU, only the compiled embedding gradient is not deterministic; the deterministic one is at least as fast.
    if cfg.deterministic or device.type == "cpu" and should_compile(cfg, device):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: nothing here reads such memory
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 where autocast leaves fp32. Not on CPUs: some with AMX would use it for all products under --no-amp.
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()


def seed_step(seed, step, rank, device):
    """Seed dropout as a function of (seed, step, rank), so that a resumed run reproduces it."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # Not torch.manual_seed: without a GPU, it formats the stack for each kind of GPU, which takes 1.2 ms per step.
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)
    elif device.type == "mps":
        torch.mps.manual_seed(state)


@contextlib.contextmanager
def allow_nondeterministic():
    """Allow nondeterministic kernels despite --deterministic, for sampling, which does not affect training. Disables
    cuDNN attention, which builds a new plan for every sequence length."""
    strict, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    if strict:  # the call imports torch's compiler, which takes two seconds
        torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if strict:
            torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def keep_freed_memory(up_to=1 << 30):
    """Make glibc keep blocks of up to this many bytes, which each step frees and reallocates, instead of returning them
    to the kernel, which zeroes every page again. No effect with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, up_to) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: mmap above; old glibc has at most 32 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap


def should_compile(cfg, device):
    """Whether to use torch.compile; if unset, only on GPUs that Triton supports."""
    if cfg.compile is None:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return cfg.compile


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def peak_flops(device):
    """Peak dense bf16 FLOP/s of the device, or None if unknown: better no MFU than a wrong one."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name):
    """NVIDIA H200 → 989e12; None for a device that is not in the table."""
    name = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def to_device(device, *arrays):
    """NumPy arrays as tensors on the device; copies to a GPU are asynchronous."""
    for array in arrays:
        tensor = torch.from_numpy(array)
        yield tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def usable_cores():
    """The cores that this process may use: by its affinity and, in a container, by its share of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit in it ("max")
        quota, period = map(int, Path(CPU_LIMIT).read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Seconds that the device spends inside `with` blocks; on a GPU, timed by CUDA events, without synchronizing."""

    def __init__(self, device):
        self.on_gpu, self.pending, self.seconds = device.type == "cuda", deque(), 0.0

    def __enter__(self):
        self.began = self._now()

    def __exit__(self, *_):
        self.pending.append((self.began, self._now()))
        self._add_ended()

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_ended(self):
        while self.pending and (not self.on_gpu or self.pending[0][1].query()):
            began, ended = self.pending.popleft()
            self.seconds += began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began

    def read(self):
        """The seconds accumulated since the last read. The device must be synchronized."""
        self._add_ended()
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def out_of_memory(error, advice="lower --batch-size and raise --grad-accum-steps, or --use-activation-checkpoint"):
    """The message for an out-of-memory error; None for any other error."""
    # In this order: the CPU's allocator; Metal, NCCL and CUDA; cuBLAS; Metal, for one large tensor.
    words = "DefaultCPUAllocator|out of memory|_ALLOC_FAILED|Invalid buffer size"
    said = isinstance(error, RuntimeError) and re.search(words, str(error))
    if said or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {first_line(error)}; {advice}"
    return None


@contextlib.contextmanager
def enough_memory():
    """Turn an out-of-memory error in this block, of a command that runs a model, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if said := out_of_memory(error, advice="lower --batch-size, or take --device cpu"):
            raise UserError(said) from None
        raise


def explained(error):
    """The message for an error whose cause is known; None for any other error."""
    if said := out_of_memory(error):  # before the compiler's, which allocates, too
        return said
    if "no kernel image is available" in str(error):
        return "this PyTorch has no kernels for this GPU: take a build for an older or newer CUDA, or --device cpu"
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return f"torch.compile failed: {first_line(error)}; add --no-compile"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'}: {error.strerror}; make room there"
    return None


@contextlib.contextmanager
def reserved(sizes, device):
    """Holds memory in blocks of these `sizes`, in bytes, for later tensors, which CUDA's allocator then has cached."""
    held = [torch.ones(n, dtype=torch.uint8, device=device) for n in sizes]  # not empty: a CPU holds only written pages
    yield
    del held


def memory_metrics(device):
    """GPU memory metrics, the peak since the last call; {} on other devices."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    metrics = {"gpu/allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
               "gpu/peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
               "gpu/reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
               "gpu/mem_utilization": 1 - free / total}
    torch.cuda.reset_peak_memory_stats(device)
    return metrics
