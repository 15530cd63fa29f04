"""Which code a process runs, signals to stop or save, processes orphaned by their launcher, lock files, and the limit
of open files."""

import contextlib
import fcntl
import hashlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from mini_llm.errors import UserError

STARTED = time.monotonic()  # when this process started: --time-limit counts from here
HELD = set()  # lock files that this process holds until it ends
LAST_CALL = 600  # seconds from the request to stop until an orphan forces its own exit


def refuse_torchrun():
    """Raises UserError if torchrun has started this process and others: each would train by itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
        if os.environ["RANK"] != "0":
            time.sleep(10)  # the first one says it, and torchrun ends the others
        raise UserError("torchrun: train.py trains on one device; start train_ddp.py or train_fsdp.py instead")


def source_digest():
    """A hash of our source files that this process has loaded: ranks that run different versions must not train."""
    folder = Path(__file__).parent
    loaded = {Path(vars(module).get("__file__") or "") for module in list(sys.modules.values()) if module}
    ours = sorted(file for file in loaded if file.parent in (folder, folder.parent))
    return hashlib.sha256(b"".join(file.read_bytes() for file in ours)).hexdigest()[:12]


def parent_of(pid):
    """The pid of a process's parent; 0 if unknown (not Linux, or the process is gone)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def child_processes(pid):
    """The pids of a process's children (on Linux; [] elsewhere)."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if parent_of(entry.name) == pid]


def kill(pids):
    """End these processes at once, those that are still there."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def stop_when_orphaned(generations):
    """Send this process SIGTERM (save and exit) once one of its nearest `generations` ancestors (launchers) is gone."""

    def ancestors():
        found = [os.getppid()]
        while len(found) < generations:
            found.append(parent_of(found[-1]))
        return found

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
    """Hold an exclusive lock on a file; yields whether it was acquired within `patience` seconds."""
    try:
        file = open(path, "a")  # noqa: SIM115 - open for writing, as NFS requires for this lock
    except OSError:  # nobody can write there, so nobody holds the lock
        yield True
        return
    with file:
        yield _locked(file, patience)


def lock_until_exit(path, patience=1):
    """Acquire that lock and hold it until this process ends, however it ends → whether it is held. Raises OSError."""
    path = os.path.realpath(path)
    if path not in HELD:
        # To append: an object store that cannot fails now, before files are replaced. Nothing closes a bare descriptor.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if _locked(file, patience):
            HELD.add(path)
        else:
            os.close(file)
    return path in HELD


def _locked(file, patience):
    deadline = time.monotonic() + patience
    with contextlib.suppress(OSError):  # a file system without locks counts as having granted it
        while not try_lock(file):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
    return True


def try_lock(file):
    """Lock the file exclusively → whether no other process has. Raises OSError where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def allow_many_files():
    """Raise the limit of open files, which is 256 on macOS: each path of --val-data, say, takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10240 if hard == resource.RLIM_INFINITY else min(hard, 10240)  # more, macOS refuses
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class StopSignal:
    """Signals as requests that the training loop reads between steps: SIGTERM, SIGINT, SIGHUP and --time-limit's
    SIGALRM to save and exit, SIGUSR1 to save and continue. A second Ctrl-C after two seconds interrupts at once."""

    STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM

    def __init__(self, world, time_limit=0.0):
        self.world, self.minutes = world, time_limit
        self.received = 0  # the first signal to stop
        self.save = False  # whether a save has been asked for
        self.interrupted = 0.0  # when the first Ctrl-C came; 0: none has

    def listen(self):
        """Install the handlers: from here on, until the end of a `with` block."""
        numbers = {*self.STOPS, signal.SIGUSR1}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        if self.minutes:
            left = self.minutes * 60 - (time.monotonic() - STARTED)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            # Uploads may go on for a while: a request to save, of what is saved, must not end them.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else handler)

    def _on_signal(self, number, frame):
        if number == signal.SIGUSR1:
            self.save = True
            return
        if number == signal.SIGINT:
            # torchrun forwards the Ctrl-C that the terminal has already sent to every process: not a second one.
            if self.interrupted and time.monotonic() - self.interrupted > 2:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or time.monotonic()
        if not self.received and self.world.is_main:
            with contextlib.suppress(OSError):  # stderr may be gone
                # Not by print or logging, which this handler may have interrupted.
                os.write(2, f"{self.cause(number)}: saves and exits after the step in progress (Ctrl-C after "
                            f"two seconds: at once, unsaved)\n".encode())
        self.received = self.received or number

    @staticmethod
    def cause(number):
        """The signal's name, or --time-limit if that sent it."""
        return "--time-limit" if number == signal.SIGALRM else signal.Signals(number).name

    def agreed(self, overdue):
        """Collective. → (signal to stop for, or 0; whether to save now; whether a save is `overdue`), of any rank."""
        asked, self.save = self.save, False
        number, asked, overdue = self.world.max([self.received, asked, overdue])
        return number, bool(asked), bool(overdue)
