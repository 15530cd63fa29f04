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

POLL = 1.0  # seconds between two looks
FACTOR = 10  # a step, evaluation or save counts as hung after this many times its median duration
LEAST = 30.0  # seconds that anything may take: a short hiccup is no hang
FEW, FIRST = 20, 600.0  # before so many durations are known, seconds that anything may take: the first ones compile

log = logging.getLogger("mini_llm")


class Watchdog:
    """A thread that reads what the loop is doing from its Meter, so that the loop does nothing for it.

    While the run advances, the main rank's thread touches `heartbeat`, if given: a file that has grown old tells a
    supervisor that the run hangs or is gone. If something takes far longer than before, the stacks of all threads go to
    FILE.stacks.txt beside the checkpoint, once: each rank writes its own, and those that wait point at the one that is
    missing.
    """

    def __init__(self, meter, state, cfg, rank):
        """`cfg` is the whole configuration."""
        self.meter, self.state, self.heartbeat, self.is_main = meter, state, cfg.tracking.heartbeat_file, rank == 0
        self.stacks = cfg.checkpoint.beside(f".rank{rank}.stacks.txt" if rank else ".stacks.txt")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self):
        if self.heartbeat and self.is_main:
            self._beat("start")  # an old file is of an old run
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join(2 * POLL)  # it may be writing to a disk that hangs

    def _watch(self):
        seen = told = None
        while not self.done.wait(POLL):
            now = self.meter.doing
            if now != seen and self.heartbeat and self.is_main:
                self._beat(now[0])
            seen, seconds = now, time.perf_counter() - now[1]
            if now != told and seconds > self._limit(now[0]):
                told = now
                with contextlib.suppress(OSError):
                    self._dump(now[0], seconds)

    def _limit(self, what):
        lasted = list(self.meter.lasted[what])
        # The host runs ahead of a GPU and waits for it at reports: those are the longest.
        return max(LEAST, FACTOR * statistics.median(lasted), 2 * max(lasted)) if len(lasted) >= FEW else FIRST

    def _beat(self, what):
        beat = dict(step=self.state.step, doing=what, time=time.time(), pid=os.getpid())
        with contextlib.suppress(OSError):  # the file grows old, which is the truth
            draft = Path(f"{self.heartbeat}.tmp")
            draft.write_text(json.dumps(beat) + "\n")
            draft.replace(self.heartbeat)

    def _dump(self, what, seconds):
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self.stacks, "a") as file:
            print(f"{time.strftime('%F %T')}: {what} after step {self.state.step} has taken {seconds:.0f} s", file=file,
                  flush=True)
            faulthandler.dump_traceback(file)
        log.warning("%s after step %d has taken %.0f s, far longer than before; where all threads stand is in %s",
                    what, self.state.step, seconds, self.stacks)
