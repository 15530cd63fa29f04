"""Hang detection: a heartbeat file for supervisors, and the stacks of all threads when a run hangs."""

import contextlib
import faulthandler
import json
import logging
import os
import statistics
import threading
import time
from pathlib import Path

from mini_llm.files import replacing

POLL = 1.0  # seconds between checks
FACTOR = 10  # a step, evaluation or save counts as hung after this many times its median duration
LEAST = 30.0  # seconds that any activity may take: a brief stall is not a hang
FEW = 20  # durations of an activity from which its limit is known
FIRST = 600.0  # the limit before that, in seconds: first steps compile

log = logging.getLogger("mini_llm")


class Watchdog:
    """A thread that reads what the training loop is doing from its Meter, at no cost to the loop. On the main rank it
    rewrites the --heartbeat-file as the run advances: a stale one tells a supervisor that the run hangs or has died. If
    an activity takes far longer than usual, it appends the stacks of all threads to FILE.stacks.txt beside the
    checkpoint, once: on several ranks, those of the waiting ones show which one is missing."""

    def __init__(self, meter, state, cfg, rank):
        """`cfg` is the whole configuration."""
        self.meter, self.state = meter, state
        self.heartbeat_file = "" if rank else cfg.tracking.heartbeat_file
        self.stacks = cfg.checkpoint.beside(f".rank{rank}.stacks.txt" if rank else ".stacks.txt")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self):
        if self.heartbeat_file:
            self._beat("start")  # an existing file is from an earlier run
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join(2 * POLL)  # bounded: it may be writing to a disk that hangs

    def _watch(self):
        seen = told = None
        while not self.done.wait(POLL):
            doing = what, began = self.meter.doing
            if doing != seen and self.heartbeat_file:
                self._beat(what)
            seen = doing
            seconds = time.perf_counter() - began
            if doing != told and seconds > self._limit(what):
                told = doing
                with contextlib.suppress(OSError):
                    self._dump(what, seconds)

    def _limit(self, what):
        lasted = list(self.meter.lasted[what])
        # The host runs ahead of a GPU and waits for it at reports: steps with a report take longest.
        return max(LEAST, FACTOR * statistics.median(lasted), 2 * max(lasted)) if len(lasted) >= FEW else FIRST

    def _beat(self, what):
        beat = dict(step=self.state.step, doing=what, time=time.time(), pid=os.getpid())
        with contextlib.suppress(OSError), replacing(Path(self.heartbeat_file)) as draft:  # after an error it is stale
            draft.write_text(json.dumps(beat) + "\n")  # not synced: of no use after a power cut

    def _dump(self, what, seconds):
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self.stacks, "a") as file:
            print(f"{time.strftime('%F %T')}: {what} after step {self.state.step} has taken {seconds:.0f} s", file=file,
                  flush=True)
            faulthandler.dump_traceback(file)
        log.warning("%s after step %d has taken %.0f s, far longer than before; where all threads stand is in %s",
                    what, self.state.step, seconds, self.stacks)
