"""Fault detection: when one rank dies, hangs, fails or diverges, all exit, and one line says which and why.

Each rank has a `Pulse`, a heartbeat thread: once a second it publishes the rank's progress in torchrun's key-value
store and checks the next rank's. The training step does not know of it: no collective, no device is waited for.
"""

import collections
import contextlib
import datetime
import functools
import json
import os
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
from torch.utils._pytree import keystr, tree_flatten_with_path

from config import RunFailed
from hardware import explained

CONNECT = 60  # seconds to connect to torchrun's store
SILENT = 120  # seconds without a heartbeat, which goes on through any work, until a rank counts as stopped
LAST_SAVE = 20  # seconds that a save in progress has to be completed in; torchrun kills after 30
RESUME = "--resume auto goes on from the last checkpoint"


class RankFault(RunFailed):
    """What ends a run of many ranks: other weights on one of them, no torchrun."""


def join(backend, timeout):
    """Join the process group that torchrun's variables describe. Returns this rank's Pulse."""
    limit = datetime.timedelta(seconds=timeout + 60)  # of a collective: the pulse reports before that
    # torchrun's store is up before its ranks start: one that does not answer has died, with its torchrun.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    connect = datetime.timedelta(seconds=CONNECT) if has_store else limit
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=connect))
    except dist.DistError:
        raise RankFault(f"rank {os.environ['RANK']} cannot reach torchrun's store at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']}: start again, with --resume auto") from None
    store.set_timeout(limit)
    if os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]:  # several nodes may have counted differently
        # torchrun restarts ranks on the store of those before, whose addresses are still in it.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    this_start = [f"pulse {os.getpid()} {time.time()}"]
    dist.broadcast_object_list(this_start)
    return Pulse(dist.PrefixStore(*this_start, store.clone()), rank, size, timeout)


class NoPulse:
    """Null object: how a rank ends before the process group exists."""

    def end(self, reason, code):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # the main rank reports the same, and its exit ends the others; else they report it
        _say(reason)
        self.leave(code)

    def fail(self, error):
        """Nothing to add to the traceback."""

    def leave(self, code):
        # Not through the interpreter's end: taking down the process group there waits for ranks that are gone, and has
        # aborted a finished run, with threads of gloo's still at work.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


class Pulse(NoPulse):
    """This rank's heartbeat, and its watch on the next rank's. Whoever finds a rank gone or stalled stores why; every
    rank exits with that reason, and one prints it: rank 0, if it can."""

    def __init__(self, store, rank, size, timeout):
        self.store, self.rank, self.size, self.timeout, self.silent = store, rank, size, timeout, min(timeout, SILENT)
        name = f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"
        self.backends = [dist.group.WORLD._get_backend(device) for device in dist.group.WORLD._device_types]
        # A rank with fewer moves than others is one that they wait for in a collective.
        self.me = dict(name=name, pid=os.getpid(), node=os.environ["GROUP_RANK"], beat=0, moves=0, step=0,
                       left=False)
        self.leaving, self.saving = threading.Lock(), threading.Lock()
        self._publish()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def _where(self):
        return f"at step {self.me['step']}" if self.me["step"] else "before the first step"  # as all, give or take one

    def _publish(self):
        collectives = sum(backend._get_sequence_number_for_group() for backend in self.backends)
        self.me["moves"] = self.me["step"] + collectives
        self.store.set(str(self.rank), json.dumps(self.me))

    def _read(self, rank):
        return json.loads(self.store.get(str(rank)))

    def _run(self):
        next_rank = (self.rank + 1) % self.size  # a ring: the cost does not grow with the number of ranks
        # Time is counted in own beats: a machine that was suspended, or slow, has not missed those of the others.
        heard = moved = 0
        last, moves = {}, -1
        while True:
            time.sleep(1)
            self.me["beat"] += 1
            try:
                self._publish()
                gone = last and last["node"] == self.me["node"] and not _exists(last["pid"])
                peer = self._read(next_rank)
                if self.store.check(["reason"]):
                    self.end()
                heard = 0 if peer["beat"] != last.get("beat") else heard + 1
                moved = 0 if self.me["moves"] != moves else moved + 1
                last, moves = peer, self.me["moves"]
                if peer["left"]:
                    heard = 0
                elif gone:
                    self.end(f"{peer['name']} is gone {self._where()}: it was killed, perhaps for want of memory "
                             f"(see dmesg), or crashed; {RESUME}")
                elif heard >= self.silent:
                    self.end(self._stopped([peer], heard), frozen=peer)
                if moved and moved % self.timeout == 0:
                    everyone = [self._read(rank) for rank in range(self.size)]
                    slow = [who for who in everyone if who["moves"] < self.me["moves"]]
                    if slow and not any(who["left"] for who in everyone):
                        self.end(self._stopped(slow, moved))
            except Exception:  # a lost connection; or torchrun, which holds the store, is gone: see stop_when_orphaned
                with contextlib.suppress(Exception):
                    self.store = self.store.clone()

    def _stopped(self, who, seconds):
        names, (have, them) = ", ".join(one["name"] for one in who), ("have", "them") if who[1:] else ("has", "it")
        return f"{names} {have} stopped {self._where()}: nothing from {them} for {seconds} s (--timeout); {RESUME}"

    def end(self, reason="", code=1, frozen=None):
        """Exit, and make all ranks exit, with the first reason that any of them stored. Does not return."""
        with self.leaving:  # the main thread or the pulse's own, whoever comes first
            try:
                code, reason = self.store.compare_set("reason", "", f"{code} {reason}").decode().split(" ", 1)
                for _ in range(30 * (self.rank > 0)):
                    if self.store.check(["said"]):
                        break
                    time.sleep(0.1)
                if self.store.add("speakers", 1) == 1:
                    _say(reason)
                    self.store.set("said", "")
            except Exception:  # no store any more
                _say(reason)
            if frozen and frozen["node"] == self.me["node"]:  # it cannot exit by itself
                with contextlib.suppress(OSError):
                    os.kill(frozen["pid"], signal.SIGKILL)
            self.saving.acquire(timeout=LAST_SAVE)
            os._exit(int(code))

    def leave(self, code):
        self._take_leave()
        if code > 128 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            code = 0  # stopped as it was asked to: at any other code torchrun would start the ranks again
        super().leave(code)

    def _take_leave(self):
        self.me["left"] = True  # not a fault: the others need not miss this rank
        with contextlib.suppress(Exception):
            self._publish()

    def _on_sigterm(self, number, frame):
        """Outside the loop (inside, StopSignal saves). torchrun sends it when a rank died: time to report which."""
        if not self.leaving.locked():
            self._take_leave()
            time.sleep(10)
            os._exit(128 + number)

    def fail(self, error):
        """Exit because of an exception in this rank. One in a collective means that another rank failed or is gone:
        whoever finds that ends this process, too."""
        advice = explained(error)
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(r"\bgloo\b", str(error)):
            self.silent = min(self.silent, 5)
            time.sleep(15)
        elif not advice:
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
        what = advice or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.end(f"{self.me['name']} failed {self._where()}: {what}; {RESUME}")


def _say(reason):
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"error: {reason}", file=sys.stderr, flush=True)


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def require_same(mine, what, error, advice):
    """Collective. Raises `error` on every rank if any rank's dict differs from most, naming the rank and the keys."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if found := differences(everyone):
        raise error(f"the ranks have different {what}: {found}; {advice}")


def differences(everyone):
    """The ranks' dicts, in order → which rank differs from most, and in what, in words; "" if all are equal."""
    tally = collections.Counter(json.dumps(one) for one in everyone)
    usual = json.loads(tally.most_common(1)[0][0])  # of two ranks: the first's
    found = []
    for rank, one in enumerate(everyone):
        keys = [key for key in usual | one if one.get(key) != usual.get(key)]
        if keys:
            these = ", ".join(f"{key} {one.get(key)} instead of {usual.get(key)}" for key in keys[:3])
            found.append(f"rank {rank} has {these}" + f" and {len(keys) - 3} more" * (len(keys) > 3))
    return "; ".join(found[:4] + [f"and {len(found) - 4} ranks more"] * (len(found) > 4))


def digests(tree):
    """A nest of dicts and lists → {where a tensor is: its digest}."""
    return {keystr(path): digest(leaf) for path, leaf in tree_flatten_with_path(tree)[0]
            if isinstance(leaf, torch.Tensor)}


def digest(tensor, block=1 << 18):
    """A tensor's bits, of any type and device, as 16 hexadecimal digits: the sum of its 32-bit words, each times an odd
    number by its position, modulo 2^64. Computed on the device. A change of one word always shows, one of several but
    for a chance of about 2^-32; NaNs and the sign of a zero count, too. One CPU core takes 0.5 s for the weights and
    moments of 124M parameters, 0.3 s for those of 10M (least of five on a busy machine)."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = F.pad(octets, (0, -len(octets) % 4)).view(torch.int32) if len(octets) % 4 else octets.view(torch.int32)
    odd = _odd_numbers(min(block, 1 << len(words).bit_length()), tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in words.split(len(odd)):
        total = total * 0x2545F4914F6CDD1D + (part * odd[:len(part)]).sum()
    return f"{total.item() % 2**64:016x}"


@functools.cache
def _odd_numbers(n, device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-2**63, 2**63 - 1, (n,), generator=generator).bitwise_or_(1).to(device)
