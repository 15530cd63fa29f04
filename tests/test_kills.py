"""Runs that are killed at any moment, again and again: what comes out is what an uninterrupted run leaves.

`pytest -n 0 -s -m full tests/test_kills.py` kills 200 times and prints the table of bench/RELIABILITY.md.
"""

import contextlib
import math
import os
import random
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter

import pytest
from conftest import environment, eventually, processes_with
from test_train import same

# A kill in every phase: a save and an evaluation in every third step, and text to tokenize at the first start.
FLAGS = ["--num-steps", 90, "--save-steps", 3, "--eval-steps", 3, "--log-steps", 3, "--grad-accum-steps", 2,
         "--max-tokens", 20_000]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
AIMS = {"saving": "*.pt.tmp", "tokenizing": "cache*/*.draft/*", "any moment": "*"}


class Life:
    """One start of the command, ended by a signal to it, to one of its ranks, or to all, after so many seconds: or by
    itself before. Its processes know their `name`."""

    def __init__(self, command, cwd, seconds, rng, name):
        self.signal = self.moment = self.ready = None
        self.began, self.lines = time.monotonic(), []
        self.process = subprocess.Popen(command, cwd=cwd, env=environment(KILLED=name), stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True, text=True)
        listener = threading.Thread(target=self._listen)
        listener.start()
        self._wait(seconds)
        aim = rng.choice(list(AIMS))
        hit = self._wait_for(lambda: any(cwd.glob(AIMS[aim])))
        if self.process.poll() is None:
            self.signal = rng.choice(SIGNALS)
            everyone = processes_with(f"KILLED={name}")
            for pid in rng.choice([[self.process.pid], everyone, everyone[-1:]]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self.signal)
            self.moment = "starting" if not self.ready else aim if hit and aim != "any moment" else "training"
        listener.join()
        self.code = self.process.wait(60)
        eventually(lambda: not processes_with(f"KILLED={name}"), 60)  # a killed torchrun's ranks save and leave

    def _listen(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if self.ready is None and ("Starting from scratch" in line or "Resumed at" in line):
                self.ready = time.monotonic() - self.began

    def _wait(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _wait_for(self, condition):
        """For half a second: that files are there only for a moment is the point."""
        until = time.monotonic() + 0.5
        while self.process.poll() is None and time.monotonic() < until:
            if condition():
                return True
        return False


@pytest.mark.parametrize(("ranks", "kills"), [
    (None, 3), *(pytest.param(ranks, kills, marks=pytest.mark.full) for ranks, kills in ((None, 140), (2, 60)))])
@pytest.mark.timeout(3000)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(trainer, tmp_path, ranks, kills):
    rng = random.Random(kills)
    began = time.monotonic()
    whole = trainer(*FLAGS, "--cache-dir", "cache", ranks=ranks, checkpoint="whole.pt")
    assert whole.code == 0, whole.err
    seconds = time.monotonic() - began
    killed, ready, runs = Counter(), [], 0
    while killed.total() < kills:
        flags = [*FLAGS, *["--async-save"] * (runs % 2), "--cache-dir", f"cache{runs}"]
        command = trainer.arguments([*flags, "--resume", "auto"], ranks, f"{runs}.pt")
        life = Life(command, tmp_path, rng.uniform(0.2, 0.7 * seconds), rng, str(tmp_path))
        ready += [life.ready] * (life.ready is not None)
        assert life.signal or life.code == 0, "".join(life.lines)
        if life.signal:
            killed[life.signal.name, life.moment] += 1
        if not life.signal or killed.total() == kills:  # to its end, if it is not there yet
            last = trainer(*flags, "--resume", "auto", ranks=ranks, checkpoint=f"{runs}.pt")
            assert last.code == 0 and same(last, whole), f"run {runs}, after {killed}\n{last.out}{last.err}"
            runs += 1
    ready = ready or [math.nan]
    print(f"\n{kills} kills in {runs} runs of {ranks or 1} rank(s), 0 lost, 0 differing; ready again after "
          f"{statistics.median(ready):.1f} s (at most {max(ready):.1f})")
    for (name, moment), times in sorted(killed.items()):
        print(f"| {name} | {moment} | {times} | 0 | 0 |")
