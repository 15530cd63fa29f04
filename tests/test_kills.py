"""Runs that are killed at any moment, or between any two operations on files: what comes out is what an uninterrupted
run leaves.

`pytest -n 0 -s -m full tests/test_kills.py` kills 200 times at random and once before each operation on a file, and
prints what bench/RELIABILITY.md has.
"""

import contextlib
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
import zygote
from conftest import ROOT, TINY, Run, environment, eventually, processes_with
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
        self.process = zygote.Popen(command, cwd=cwd, env=environment(KILLED=name), stdout=subprocess.PIPE,
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


# For each line (a folder, N, a fault) runs train.py there, in a copy of this process, which has imported it; kills it
# before its N-th operation on a file, and if the fault is "power" takes from every file what was not synced to the
# disk; and starts it again with --resume auto. Prints the number of operations, and the exit codes.
DYING = """
import builtins, io, os, signal, sys; sys.path.insert(0, {root!r})
import train; from mini_llm import tracking

def start(arguments, dies_at, fault):
    done, synced = 0, {{}}

    def die():
        for folder, _, names in os.walk(".") if fault == "power" else ():
            for path in (os.path.join(folder, name) for name in names):
                os.truncate(path, min(os.path.getsize(path), synced.get(os.stat(path).st_ino, 0)))
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(owner, name, wanted=lambda *_: True):
        real = getattr(owner, name)

        def call(path, *args, **options):
            nonlocal done
            inside = isinstance(path, int) or os.path.abspath(path).startswith(os.getcwd())
            if inside and wanted(*args):
                done += 1
                if done == dies_at:
                    die()
            result = real(path, *args, **options)
            if inside and name == "fsync":
                synced[os.fstat(path).st_ino] = os.fstat(path).st_size
            if inside and name == "open" and args[:1] == ("wb",):  # its inode may have been another file's
                synced.pop(os.fstat(result.fileno()).st_ino, None)
            return result
        setattr(owner, name, call)

    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for name in ("replace", "link", "unlink", "mkdir", "rmdir", "fsync"):
        counted(os, name)
    counted(io, "open", lambda mode="r", *_: not mode.startswith("r"))
    builtins.open = io.open
    log = open("out", "a")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    try:
        train.main()
    except SystemExit as left:
        open("count", "w").write(str(done))
        os._exit(left.code)
    os._exit(1)

for line in sys.stdin:
    folder, dies_at, fault = line.split()
    os.makedirs(folder)
    os.chdir(folder)
    codes = [start(sys.argv[1:], int(dies_at), fault)]
    while codes[-1] == -9 and len(codes) < 3:
        codes.append(start([*sys.argv[1:], "--resume", "auto"], 0, ""))
    print(open("count").read(), *codes, flush=True)
"""


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("fault", ["kill", "power"])
@pytest.mark.timeout(3000)
def test_a_kill_or_power_cut_between_any_two_operations_on_files_loses_nothing(tmp_path, text, fault, every):
    flags = [*TINY, "--n-layers", 1, "--train-data", text, "--max-tokens", 20_000, "--num-steps", 24, "--warmup-steps",
             4, "--log-steps", 4, "--eval-steps", 4, "--save-steps", 8, "--keep-last", 1, "--cache-dir", "cache",
             "--checkpoint-path", "c.pt"]
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT)))
    with subprocess.Popen([sys.executable, "dying.py", *map(str, flags)], cwd=tmp_path, env=environment(), text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runs:

        def run(dies_at):
            folder = tmp_path / f"run{dies_at}"
            print(folder, dies_at, fault, file=runs.stdin, flush=True)
            count, *codes = map(int, runs.stdout.readline().split())
            files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
            done = subprocess.CompletedProcess([], codes[-1], (folder / "out").read_text(), "")
            return count, codes, files, Run(done, folder, "c.pt"), torch.load(folder / "c.best.pt", weights_only=True)

        count, codes, files, whole, best = run(0)
        assert codes == [0] and count > 90
        for dies_at in range(1, count + 1, every):
            _, codes, found, mended, mended_best = run(dies_at)
            assert codes == [-9, 0], f"{dies_at}: {codes}\n{mended.out}"
            assert same(mended, whole) and mended_best["state"] == best["state"], dies_at
            assert mended.rows.keys() == whole.rows.keys(), dies_at
            for name in "c.tokenizer/tokenizer.json", "c.config.toml":
                assert (tmp_path / f"run{dies_at}" / name).read_bytes() == (tmp_path / "run0" / name).read_bytes(), name
            # What the next save removes, and a lock file of the token cache.
            assert files <= found and {file.name for file in found - files} <= {"c.step-00000016.pt", ".lock"}, dies_at
        runs.stdin.close()
    print(f"\n{len(range(1, count + 1, every))} times ({fault}), before each operation on a file: 0 lost, 0 differing")
