"""Fault detection: when one rank dies, hangs, fails or diverges, all exit, and one line says which and why.

Each rank has a `Heartbeat`, a thread: once a second it publishes the rank's progress in torchrun's key-value store and
checks the next rank's. It runs no collectives and waits for no device. (For --heartbeat-file, see watchdog.py.)
"""

import collections
import contextlib
import datetime
import functools
import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from mini_llm.errors import RunFailed, first_line
from mini_llm.hardware import explained
from optim import local

MAX_MISSED = 120  # seconds without a heartbeat, which continues during any work, before a rank counts as stopped
LAST_SAVE = 20  # seconds that a save in progress gets to finish; torchrun kills after 30
RESUME = "--resume auto goes on from the last checkpoint"
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on


class RankFault(RunFailed):
    """A fault that ends a distributed run: a rank's weights differ, or torchrun's store is unreachable."""


class RankEnded(RuntimeError):
    """A rank has ended that this one was waiting for in a collective."""


def limit_of(timeout):
    """The limit of a collective: the heartbeat reports a fault before that."""
    return datetime.timedelta(seconds=timeout + 60)


class NoHeartbeat:
    """Null object: how a rank exits before the process group exists."""

    def fail(self, reason, code):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # if rank 0 fails likewise, it reports the error, and its exit ends this rank meanwhile
        _say(reason)
        self.leave(code)

    def crash(self, error):
        """Nothing to add to the traceback."""

    def leave(self, code):
        # Skip interpreter shutdown: it waits for ranks that are gone, and aborts if gloo's threads are still at work.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


class Heartbeat(NoHeartbeat):
    """Publishes this rank's heartbeat and monitors the next rank's. A rank that finds another gone or stalled stores
    the reason; every rank exits with that reason, and one prints it: rank 0, if it can."""

    def __init__(self, store, rank, size, timeout):
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.counters = []  # functions that return how many collectives this rank has begun
        self._count(dist.group.WORLD)
        # What is published. The others wait in a collective for a rank with less progress.
        self.me = dict(name=f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})", pid=os.getpid(),
                       node=os.environ["GROUP_RANK"], beat=0, progress=0, step=0, left=False)
        # Time is counted in this rank's beats, so that a machine that was suspended does not miss the others'.
        self.peer, self.missed = {}, 0  # the next rank's latest record, and the beats since it changed
        self.max_missed = min(timeout, MAX_MISSED)
        self.last_progress, self.stalled = -1, 0  # this rank's at its last beat, and the beats since it changed
        self.answers = 0  # from the store
        self.leaving = threading.Lock()  # held by the thread that ends this process
        self.saving = threading.Lock()  # held while a checkpoint is written
        self.publishing = threading.RLock()  # held while `me` is published; twice if _on_sigterm interrupts that
        self._publish()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()
        threading.Thread(target=self._watch_store, args=(os.getppid(),), daemon=True, name="store").start()

    def mesh(self, device_type, shards):
        """Collective. A DeviceMesh (dp_replicate, dp_shard) of all ranks, `shards` consecutive ones to a replica; only
        (dp_shard,) if there is a single replica."""
        names = ("dp_replicate", "dp_shard")
        if shards == self.size:
            return init_device_mesh(device_type, (shards,), mesh_dim_names=names[1:])
        # Not by init_device_mesh, whose groups have a timeout of their own.
        mesh, groups = torch.arange(self.size).view(-1, shards), []
        for ranks in (mesh.T, mesh):  # the lists of ranks along each dimension
            group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit_of(self.timeout))
            self._count(group)
            groups.append(group)
        return DeviceMesh.from_group(groups, device_type, mesh, mesh_dim_names=names)

    def _count(self, group):
        """Counts the group's collectives as progress from now on."""
        with contextlib.suppress(AttributeError):  # private functions of torch; without them, steps alone count
            self.counters += [group._get_backend(device)._get_sequence_number_for_group
                              for device in group._device_types]

    def _where(self):
        # This rank's step; that of another, faulty rank is the same or one off.
        return f"at step {self.me['step']}" if self.me["step"] else "before the first step"

    def _publish(self):
        with self.publishing:  # else a beat of the thread might overwrite that this rank has left
            self.me["progress"] = self.me["step"] + sum(count() for count in self.counters)
            self.store.set(str(self.rank), json.dumps(self.me))

    def _read(self, rank):
        return json.loads(self.store.get(str(rank)))

    def _run(self):
        while True:
            time.sleep(1)
            self.me["beat"] += 1
            try:
                self._publish()
                if self.store.check(["reason"]):
                    self.fail()
                self._check_peer()
                self._check_progress()
                self.answers += 1
            except Exception:  # the connection is lost, or torchrun, which holds the store, is gone: stop_when_orphaned
                with contextlib.suppress(Exception):
                    self.store = self.store.clone()

    def _check_peer(self):
        """Ends all ranks if the next one in the ring is gone or frozen: the cost does not grow with their number."""
        # Asked before its record is read: a rank that leaves says so there before it is gone.
        is_gone = self.peer and self.peer["node"] == self.me["node"] and not pid_exists(self.peer["pid"])
        peer = self._read((self.rank + 1) % self.size)
        self.missed = 0 if peer["left"] or peer["beat"] != self.peer.get("beat") else self.missed + 1
        self.peer = peer
        if is_gone and not peer["left"]:
            self.fail(f"{peer['name']} is gone {self._where()}: it was killed, perhaps for want of memory "
                      f"(see dmesg), or crashed, or NCCL has aborted it, as it says above; {RESUME}")
        elif self.missed >= self.max_missed:
            self.fail(self._stopped([peer], self.missed), frozen=peer)

    def _check_progress(self):
        """Ends all ranks if this one has waited --timeout seconds for some of them."""
        self.stalled = 0 if self.me["progress"] != self.last_progress else self.stalled + 1
        self.last_progress = self.me["progress"]
        if not self.stalled or self.stalled % self.timeout:
            return
        everyone = [self._read(rank) for rank in range(self.size)]
        least = min(who["progress"] for who in everyone)  # ranks in between may themselves wait in another group
        slow = [who for who in everyone if who["progress"] == least < self.me["progress"]]
        if slow and not any(who["left"] for who in everyone):
            self.fail(self._stopped(slow, self.stalled))
        # NCCL counts what was enqueued: if a GPU hangs, no rank is behind, and NCCL aborts them all.
        if not slow and self.rank == 0:
            _say(f"no rank has moved for {self.stalled} s {self._where()}: unless text is tokenized or much of it "
                 f"evaluated, a GPU or the network hangs (see dmesg)", "warning")

    def _watch_store(self, launcher):
        """Ends this rank if the store is lost while its own torchrun lives: on several nodes, if the store's node is
        gone. A thread apart, because operations on the store may then never return, whatever their timeout."""
        waited = seen = 0  # seconds without an answer, and the answers before
        while waited < self.max_missed + 2 or os.getppid() != launcher:  # an orphan saves first: see stop_when_orphaned
            time.sleep(1)
            waited, seen = 0 if self.answers != seen else waited + 1, self.answers
        _say(f"torchrun's store at {os.environ['MASTER_ADDR']} has not answered for {waited} s {self._where()}: "
             f"torchrun has ended there, and says why, or that node or the network has failed; {RESUME}")
        self.saving.acquire(timeout=LAST_SAVE)
        os._exit(1)

    def _stopped(self, who, seconds):
        names = ", ".join(one["name"] for one in who)
        have, them = ("have", "them") if who[1:] else ("has", "it")
        limit = " (--timeout)" if seconds >= self.timeout else ""
        return f"{names} {have} stopped {self._where()}: nothing from {them} for {seconds} s{limit}; {RESUME}"

    def fail(self, reason="", code=1, frozen=None):
        """Exit, and make all ranks exit, with the first reason that any of them stored. `frozen`: the record of a rank
        that cannot exit by itself: it is killed if it is on this node. Does not return."""
        with self.leaving:  # the main thread or the heartbeat's, whichever comes first
            try:
                if code == 2 and self.rank and not self._appears("reason", 5):  # else rank 0 has found the wrong flag
                    reason = f"{self.me['name']}: {reason}"
                first = self.store.compare_set("reason", "", f"{code} {reason}").decode()
                code, reason = first.split(" ", 1)
                if self.rank:
                    self._appears("printed", 3)  # rank 0 comes first: people look at its stderr
                if self.store.add("printing", 1) == 1:
                    _say(reason)
                    self.store.set("printed", "")
                    time.sleep(0.5)  # the others see this before the store, which may end with this process, is gone
            except Exception:  # the store is gone
                _say(reason)
            if frozen and frozen["node"] == self.me["node"]:
                with contextlib.suppress(OSError):
                    os.kill(frozen["pid"], signal.SIGKILL)
            self.saving.acquire(timeout=LAST_SAVE)
            os._exit(int(code))

    def _appears(self, key, seconds):
        """Whether the store has the key within so many seconds."""
        for _ in range(10 * seconds):
            if self.store.check([key]):
                return True
            time.sleep(0.1)
        return False

    def leave(self, code):
        self._take_leave()
        if code > 128 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            code = 0  # stopped as requested: on any other exit code, torchrun would restart the ranks
        super().leave(code)

    def _take_leave(self):
        self.me["left"] = True  # so that the others do not report this rank as gone
        with contextlib.suppress(Exception):
            self._publish()

    def _on_sigterm(self, number, frame):
        """For SIGTERM outside the loop (inside, StopSignal handles it). torchrun sends it when a rank has died: this
        one waits, so that the rank that notices can say which."""
        if not self.leaving.locked():
            self._take_leave()
            time.sleep(10)
            os._exit(128 + number)

    def crash(self, error):
        """Exit because of an exception in this rank. An exception in a collective means that another rank failed or is
        gone: the rank that detects this ends this process, too."""
        advice = explained(error)
        if (isinstance(error, (dist.DistError, RankEnded))
                or isinstance(error, RuntimeError) and re.search(r"\bgloo\b", str(error))):
            self.max_missed = min(self.max_missed, 5)  # only by missed beats is a rank of another node seen to be gone
            time.sleep(15)  # the rank that detects it ends this process meanwhile
        elif not advice:
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
        what = advice or f"{type(error).__name__}: {first_line(error)}"
        self.fail(f"{self.me['name']} failed {self._where()}: {what}; {RESUME}")


def _say(what, kind="error"):
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"{kind}: {what}", file=sys.stderr, flush=True)


def pid_exists(pid):
    """Whether a process of this user exists on this host (a zombie does, too)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # another user's process has that pid now
        os.kill(pid, 0)
        return True
    return False


def portable(error):
    """The error itself if other ranks can unpickle it, else a RunFailed with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its constructor raises
        return RunFailed(f"{type(error).__name__}: {error}")
    return error


def from_main(make, is_main):
    """Collective. The result of `make()` on the main rank, with meta tensors on the others. Raises its error on all."""
    result = shapes = error = None
    if is_main:
        try:
            result = make()
            shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), result)
        except Exception as caught:
            error = portable(caught)
    sent = [error, shapes]
    dist.broadcast_object_list(sent)
    error, shapes = sent
    if error is not None:
        raise error
    return result if is_main else shapes


def gather(values):
    """Collective. Every rank's numbers, as floats, in rank order."""
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def shared_out(compute, batch, group):
    """Collective in `group` (None: all ranks). `compute(batch)`, (n, …) → (n, …): each rank computes a share of it."""
    if not len(batch):
        return compute(batch)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-len(batch) // size)
    part = compute(batch[rank * share:][:share])  # (share, …); the last ranks may have fewer, or none
    mine = part.new_zeros((share, *batch.shape[1:]))
    mine[:len(part)] = part
    everyone = part.new_empty((size * share, *batch.shape[1:]))
    all_gather(everyone, mine, group=group)
    return everyone[:len(batch)]


def require_same(mine, what, error, advice, apart=1):
    """Collective. Raises `error` on every rank if any rank's dict differs from the majority's, naming rank and keys.
    Only ranks whose numbers are a multiple of `apart` apart are compared."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    alike = [{rank: everyone[rank] for rank in range(first, len(everyone), apart)} for first in range(apart)]
    if found := "; ".join(filter(None, map(differences, alike))):
        raise error(f"the ranks have different {what}: {found}; {advice}")


def differences(ranks):
    """Rank → its dict, in rank order → text saying which ranks differ from most, and in what; "" if all are equal."""
    tally = collections.Counter(json.dumps(one) for one in ranks.values())
    usual = json.loads(tally.most_common(1)[0][0])  # of two different ranks, the first's
    found = []
    for rank, one in ranks.items():
        keys = [key for key in usual | one if one.get(key) != usual.get(key)]
        if keys:
            these = ", ".join(f"{key} {one.get(key)} instead of {usual.get(key)}" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            found.append(f"rank {rank} has {these}{more}")
    more = [f"and {len(found) - 4} ranks more"] if len(found) > 4 else []
    return "; ".join(found[:4] + more)


def digests(tree):
    """Nested dicts and lists → {path of each tensor: its digest}, of DTensors that of this rank's shard."""
    tensors = {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, torch.Tensor)}
    return dict(zip(tensors, map(digest, local(tensors.values())), strict=True))


def digest(tensor, block=1 << 18):
    """A digest of a tensor's bits, of any dtype and device, as 16 hexadecimal digits: the sum of its 32-bit words, each
    multiplied by an odd number that depends on its position, modulo 2^64. Computed on the device. A change of one word
    is always detected, one of several is missed with a probability of about 2^-32; NaNs and the sign of zero count. One
    CPU core takes 0.5 s for the weights and moments of 124M parameters."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := len(octets) % 4:
        octets = F.pad(octets, (0, 4 - rest))
    words = octets.view(torch.int32)
    odd = _odd_numbers(min(block, 1 << len(words).bit_length()), tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in words.split(len(odd)):
        total = total * 0x2545F4914F6CDD1D + (part * odd[:len(part)]).sum()
    return f"{total.item() % 2**64:016x}"


@functools.cache
def _odd_numbers(n, device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-2**63, 2**63 - 1, (n,), generator=generator).bitwise_or_(1).to(device)
