"""Signals to stop or save, processes whose launcher has died, and lock files."""

import contextlib
import fcntl
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from config import arg

STARTED = time.monotonic()  # of the process: --time-limit counts from here
HELD = set()  # lock files that this process holds until it ends
LAST_CALL = 600  # seconds from the request to stop until an orphan ends itself


@dataclass
class RanksConfig:
    """Ranks"""

    timeout: int = arg(1800, "seconds that ranks wait for a stalled one before all exit; must exceed the longest time "
                             "that one tokenizes, compiles or saves alone", ge=1, le=10**7, metavar="SECONDS")
    check_replicas: int = arg(0, "steps between comparisons of the ranks' weights and optimizer states, bit for bit; "
                                 "0: at the start and before each checkpoint only", ge=0)


def parent_of(pid):
    """Its parent's pid; 0 where that cannot be known (not Linux, or gone)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def child_processes(pid):
    """The pids of its children (Linux; none elsewhere)."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if parent_of(entry.name) == pid]


def stop_when_orphaned(generations):
    """Have this process asked to stop (SIGTERM: save and leave) once one of so many `generations` of its ancestors is
    gone. torchrun's ranks, and the trials of a sweep, would otherwise go on where those were killed."""

    def ancestors():
        found = [os.getppid()]
        while len(found) < generations:
            found.append(parent_of(found[-1]))
        return found[:generations]

    def watch(before):
        while ancestors() == before:
            time.sleep(1)
        with contextlib.suppress(OSError):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_CALL)  # it may hang in a collective with ranks that are gone
        os._exit(128 + signal.SIGTERM)

    if generations:
        threading.Thread(target=watch, args=(ancestors(),), daemon=True, name="orphan").start()


@contextlib.contextmanager
def only_one(path, patience=0):
    """Holds an exclusive lock on a file; yields whether it could be had within `patience` seconds."""
    with open(path, "a") as file:  # for writing, without which NFS gives no lock
        yield _locked(file, patience)


def lock_until_exit(path, patience=1):
    """Takes that lock for as long as this process lives, however it ends → whether it has it."""
    if (path := os.path.realpath(path)) not in HELD:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        if _locked(file, patience):  # a second, since whoever only asks whether it is free holds it for a moment, too
            HELD.add(path)
        else:
            os.close(file)
    return path in HELD


def _locked(file, patience):
    """Where the file system knows no locks, a file is taken to be free."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return True
        else:
            return True


class StopSignal:
    """Signals as requests that the loop reads between two steps: SIGTERM, SIGINT, SIGHUP and the end of --time-limit
    (SIGALRM) to save and leave, SIGUSR1 to save and go on. A second Ctrl-C, seconds after the first, interrupts at
    once."""

    STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM

    def __init__(self, world, time_limit=0.0):
        self.world, self.minutes, self.received, self.save, self.since = world, time_limit, 0, False, 0.0

    def __enter__(self):
        numbers = {*self.STOPS, signal.SIGUSR1}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        if self.minutes:
            left = self.minutes * 60 - (time.monotonic() - STARTED)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if number == signal.SIGUSR1:
            self.save = True
            return
        # torchrun passes on the Ctrl-C that the terminal has already sent to every process.
        if number == signal.SIGINT and self.received and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, time.monotonic()

    def agreed(self):
        """The signal to stop by (0: none) and whether to save now: what any rank has received, the same on each."""
        asked, self.save = self.save, False
        number, asked = self.world.max([self.received, asked])
        return number, bool(asked)
