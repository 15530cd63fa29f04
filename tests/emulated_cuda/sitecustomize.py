"""CUDA devices for a PyTorch without CUDA. They compute on the CPU: the GPU's branches of the code run, on real values.

    EMULATE_CUDA=4 PYTHONPATH=tests/emulated_cuda python -m pytest -m gpu
    EMULATE_CUDA=1 PYTHONPATH=tests/emulated_cuda python train.py --device cuda

Python imports this module at its start; torch's import is followed by that of emulated_cuda.cpp, which needs g++ and is
compiled once. torch.compile traces and differentiates as on a GPU, but generates no code (`aot_eager`); NCCL is gloo.
What no emulation shows: kernels, their rounding and speed, memory, asynchronous execution.
"""

import contextlib
import ctypes
import hashlib
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("emulated_cuda.cpp")
CAPABILITY = (9, 0)  # an H200's


def library(torch):
    """The path of emulated_cuda.cpp, compiled for the PyTorch in the folder `torch`."""
    version = (torch / "version.py").read_text()
    name = hashlib.sha256((version + SOURCE.read_text()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"emulated_cuda-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ImportError(f"{folder} is another user's: remove it, or set TMPDIR")
    path = folder / f"{name}.so"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        include, lib = torch / "include", torch / "lib"
        subprocess.run(["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", SOURCE, "-o", draft, f"-I{include}",
                        f"-I{include}/torch/csrc/api/include", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"],
                       check=True)
        draft.rename(path)
    return path


class Event:
    def __init__(self, enable_timing=False, **_):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def query(self):
        return True

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3

    def nothing(self, *_):
        """There is nothing to wait for."""

    synchronize = wait = nothing


class Stream:
    def __init__(self, device=None, priority=0):
        import torch

        self.device, self.stream_id, self.cuda_stream = torch.device("cuda", torch.cuda.current_device()), 0, 0

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def nothing(self, *_):
        """All work is done in order, and at once."""

    synchronize = wait_stream = wait_event = nothing


class Properties:
    name, (major, minor), total_memory, multi_processor_count = "NVIDIA H200", CAPABILITY, 150 * 10**9, 132


def emulate(torch, lib, count):
    """Give the imported `torch` so many CUDA devices."""
    def index(device):
        return device if isinstance(device, int) else torch.device(device).index

    def set_device(device):
        lib.set_device(index(device))

    def exchange_device(device):
        before = lib.current_device()
        if device is not None and device >= 0:
            lib.set_device(device)
        return before

    def megabyte(device=None):
        return 10**6

    def nothing(*_, **__):
        """An emulated device has nothing of this."""

    def again(function):
        """A function of its own: torch.compile has one rule for each, and another for each name."""
        return lambda *args, **options: function(*args, **options)

    torch.cuda.default_generators = (torch.default_generator,) * count  # the kernels draw from the CPU's
    for name, function in dict(
            is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: count, init=nothing,
            _lazy_init=nothing, current_device=lib.current_device, set_device=set_device,
            _exchange_device=exchange_device, _maybe_exchange_device=exchange_device,
            get_device_name=lambda device=None: Properties.name, get_device_capability=lambda device=None: CAPABILITY,
            get_device_properties=lambda device=None: Properties, synchronize=nothing, empty_cache=nothing,
            memory_allocated=megabyte, max_memory_allocated=megabyte, memory_reserved=megabyte,
            reset_peak_memory_stats=nothing, mem_get_info=lambda device=None: (10**11, Properties.total_memory),
            current_stream=lambda device=None: stream, default_stream=lambda device=None: stream,
            stream=lambda stream: contextlib.nullcontext(), set_stream=nothing,
            set_sync_debug_mode=lambda mode: lib.set_warns(mode == "warn")).items():
        setattr(torch.cuda, name, again(function))
    torch.cuda.Event, torch.cuda.Stream, stream = Event, Stream, Stream()
    torch._C._cuda_getDevice, torch._C._cuda_setDevice = again(lib.current_device), again(set_device)

    plain_resize = torch.UntypedStorage.resize_

    def resize(storage, size):
        if storage.device.type != "cuda":
            return plain_resize(storage, size)
        lib.resize_storage(ctypes.c_void_p(storage._cdata), ctypes.c_size_t(size))
        return storage

    torch.UntypedStorage.resize_ = resize
    plain_compile = torch.compile

    def traced(model=None, **options):
        return plain_compile(model, **options | dict(backend="aot_eager"))

    torch.compile = traced
    if torch.distributed.is_available():
        plain_start = torch.distributed.init_process_group

        def start(backend=None, *args, **options):
            return plain_start(backend and backend.replace("nccl", "gloo"), *args, **options)

        torch.distributed.init_process_group = start


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports torch, with the library before it: its hooks are looked for once."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        torch = Path(module.__file__).parent
        if (torch / "lib" / "libtorch_cuda.so").exists():
            raise ImportError("EMULATE_CUDA needs the CPU build of PyTorch, and this one has CUDA itself")
        lib = ctypes.CDLL(str(library(torch)), mode=ctypes.RTLD_GLOBAL)
        self.real.exec_module(module)
        emulate(module, lib, int(os.environ["EMULATE_CUDA"]))


if os.environ.get("EMULATE_CUDA"):
    sys.meta_path.insert(0, Importer())
    # Processes that this one starts in other folders find this module, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
