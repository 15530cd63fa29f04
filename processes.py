"""Parents and children of this process: so that none outlives what started it."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

LAST_CALL = 600  # seconds from the request to stop until an orphan ends itself


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
