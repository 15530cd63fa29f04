"""The exchange of gradients and numbers between the ranks of one host, through memory that they share. gloo, over TCP,
takes 2.5 times as long for the gradients of 10 million parameters, and 15 times for a few numbers (LOG.md)."""

import contextlib
import mmap
import os
import platform
import tempfile
import time

import torch

from mini_llm.ranks import RankEnded, pid_exists

BUFFER = 3 << 20  # bytes that a rank hands over at a time: about the fastest; a container may have 64 MB for all ranks
MAX_RANKS = 8  # each rank reads what every other has written; the cost of gloo's ring does not grow with their number
SPIN = 0.0002  # seconds of waiting for another rank before the core is given up
PATIENCE = 1  # seconds of waiting before asking whether the others are still there
LINE = 64  # bytes of a cache line: one for each rank's counter and pid


def share(world):
    """Collective. The SharedMemory of a DDPWorld's ranks; None if they train on GPUs, have a hook of their own, are on
    several hosts or too many, or if there is no room."""
    path = world.from_main(lambda: _create(world))
    memory = path and _open(path)
    lacking = world.max([memory is None])[0]  # also a barrier: each has opened it
    if path and world.is_main:
        os.unlink(path)  # the memory is freed with the last rank, however that ends
    if lacking:
        return None
    shared = SharedMemory(memory, world.rank, world.size)
    world.heartbeat.counters.append(lambda: shared.count)
    return shared


def _create(world):
    """The path of a new file in memory, of the size that the ranks need; None where `share` returns None."""
    # Others must see a rank's data before its counter: on x86, writes become visible in order.
    if (world.comm_hook or world.device.type != "cpu" or not 1 < world.size == world.local_size <= MAX_RANKS
            or platform.system() != "Linux" or platform.machine() != "x86_64"):
        return None
    with contextlib.suppress(OSError):
        file, path = tempfile.mkstemp(prefix="mini-llm-", dir="/dev/shm")
        try:
            os.posix_fallocate(file, 0, world.size * (LINE + 2 * BUFFER))  # else a write to a full /dev/shm is a SIGBUS
        except OSError:  # a container may have 64 MB
            os.unlink(path)
            raise
        finally:
            os.close(file)
        return path
    return None


def _open(path):
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)
    return None  # another host, or a container of its own


class SharedMemory:
    """All ranks call the same methods in the same order. Each rank has a counter of its all-gathers, and two buffers
    used in turn: when a rank writes to one again, the others have read it, as each has begun the all-gather in between.
    `memory`: a buffer of size * (LINE + 2 * BUFFER) bytes, zero at first."""

    def __init__(self, memory, rank, size):
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.rank, self.size = rank, size
        self.count = 0  # all-gathers that this rank has begun
        lines = whole[:size * LINE].view(torch.int64).view(size, -1).numpy()  # (size, LINE / 8)
        self.counters, self.pids = lines[:, 0], lines[:, 1]
        self.pids[rank] = os.getpid()  # before that 0, which `pid_exists` takes for one that exists
        self.buffers = whole[size * LINE:].view(2, size, BUFFER)

    def all_gather(self, mine, scale=1):
        """Collective. (n,) of at most BUFFER bytes → (size, n): the tensor of every rank, multiplied by `scale`. Valid
        until the next all-gather. Raises RankEnded if a rank is gone."""
        self.count += 1
        everyone = self.buffers[self.count % 2, :, :mine.nbytes].view(mine.dtype)
        torch.mul(mine, scale, out=everyone[self.rank])
        self.counters[self.rank] = self.count  # after the data: the others see it in this order (see `_create`)
        began = time.perf_counter()
        while self.counters.min() < self.count:
            waited = time.perf_counter() - began
            os.sched_yield() if waited < SPIN else time.sleep(min(waited / 20, 0.01))
            if waited > PATIENCE:
                self._require_others()
        return everyone

    def _require_others(self):
        for rank, pid in enumerate(self.pids):
            if not pid_exists(pid) and self.counters[rank] < self.count:  # in this order: it may end after taking part
                raise RankEnded(f"rank {rank} has ended")

    def gather(self, values):
        """Collective. Every rank's list of numbers, as floats, in rank order."""
        return self.all_gather(torch.tensor(values, dtype=torch.float64)).tolist()

    def average(self, tensor):
        """Collective. Replaces a tensor (n,) by its mean over the ranks. All add in rank order, to the same bits."""
        for part in tensor.split(BUFFER // tensor.itemsize):
            first, *others = self.all_gather(part, 1 / self.size)
            torch.add(first, others[0], out=part)
            for other in others[1:]:
                part += other

    def comm_hook(self, state, bucket):
        """For DDP's `register_comm_hook`."""
        done = torch.futures.Future()
        self.average(bucket.buffer())
        done.set_result(bucket.buffer())
        return done
