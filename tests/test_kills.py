"""Runs that are killed at any moment, again and again: what comes out is what an uninterrupted run leaves."""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
from conftest import environment, eventually, processes_with
from test_train import same

# A kill in every phase: a save and an evaluation in every third step, and text to tokenize at the first start.
FLAGS = ["--num-steps", 150, "--save-steps", 3, "--eval-steps", 3, "--log-steps", 3, "--grad-accum-steps", 2,
         "--max-tokens", 20_000]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def live(command, cwd, seconds, rng, name):
    """Start the command and send it, or one of its ranks, or all of them, a signal after so many seconds. Returns its
    exit code, the signal, None where it ended before, and what it printed. Its processes know their `name`."""
    process = subprocess.Popen(command, cwd=cwd, env=environment(KILLED=name), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, None, out.decode()
    except subprocess.TimeoutExpired:
        number = rng.choice(SIGNALS)
        everyone = processes_with(f"KILLED={name}")
        for pid in rng.choice([[process.pid], everyone, everyone[-1:]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        out, _ = process.communicate(timeout=60)
        eventually(lambda: not processes_with(f"KILLED={name}"), 60)  # a killed torchrun's ranks save and leave
        return process.returncode, number, out.decode()


@pytest.mark.parametrize(("ranks", "kills"), [
    (None, 6), (2, 3), pytest.param(None, 120, marks=pytest.mark.full), pytest.param(2, 80, marks=pytest.mark.full)])
@pytest.mark.timeout(3000)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(trainer, tmp_path, ranks, kills):
    rng = random.Random(kills)
    began = time.monotonic()
    whole = trainer(*FLAGS, "--cache-dir", "cache0", ranks=ranks, checkpoint="whole.pt")
    assert whole.code == 0, whole.err
    seconds = time.monotonic() - began
    done = life = 0
    while done < kills:
        saving = ["--async-save"] * (life % 2)
        command = trainer.arguments([*FLAGS, *saving, "--resume", "auto", "--cache-dir", f"cache{life}"], ranks,
                                    f"{life}.pt")
        code, number, out = live(command, tmp_path, rng.uniform(0.2, seconds), rng, tmp_path.name)
        done += number is not None
        assert number or code == 0, out
        if number is None or done == kills:  # to its end, if it is not there yet
            last = trainer(*FLAGS, "--resume", "auto", "--cache-dir", f"cache{life}", ranks=ranks,
                           checkpoint=f"{life}.pt")
            assert last.code == 0 and same(last, whole), f"life {life}, after {done} kills\n{last.out}{last.err}"
            life += 1
