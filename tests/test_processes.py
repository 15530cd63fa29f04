"""Children and parents, whatever they are called."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, Clock, eventually

from mini_llm import processes
from mini_llm.processes import StopSignal, child_processes, parent_of

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")


def test_the_code_of_a_process_is_that_of_our_files_which_it_has_loaded(tmp_path):
    (tmp_path / "mini_llm").mkdir()
    for file in ("__init__", "errors", "processes"):
        (tmp_path / "mini_llm" / f"{file}.py").write_bytes((ROOT / "mini_llm" / f"{file}.py").read_bytes())

    def digest():
        command = [sys.executable, "-c", "import mini_llm.processes; print(mini_llm.processes.source_digest())"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = digest()
    (tmp_path / "scratch.py").touch()  # lies on this machine only
    assert digest() == before
    with open(tmp_path / "mini_llm" / "errors.py", "a") as file:
        file.write("# pulled\n")
    assert digest() != before


def test_the_second_ctrl_c_ends_a_run_at_once_and_the_first_does_not(monkeypatch, capfd):
    clock = Clock(monkeypatch, processes)
    stop = StopSignal(SimpleNamespace(is_main=True))
    stop._on_signal(signal.SIGTERM, None)
    said = capfd.readouterr().err
    assert said.startswith("SIGTERM: saves and exits after the step in progress") and said.count("\n") == 1
    clock.sleep(5)
    stop._on_signal(signal.SIGINT, None)  # the first of its kind: the run is still saving
    clock.sleep(1)
    stop._on_signal(signal.SIGINT, None)  # torchrun's, of the same key
    assert stop.received == signal.SIGTERM
    clock.sleep(5)
    with pytest.raises(KeyboardInterrupt):
        stop._on_signal(signal.SIGINT, None)
    assert capfd.readouterr().err == ""


def test_a_request_to_save_does_not_end_a_run_that_is_over():
    """Uploads to W&B come after the loop, in which the signals are listened to."""
    before = {number: signal.getsignal(number) for number in (*StopSignal.STOPS, signal.SIGUSR1)}
    try:
        with StopSignal(SimpleNamespace(is_main=True)).listen():
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        assert {number: signal.getsignal(number) for number in StopSignal.STOPS} | {
            signal.SIGUSR1: before[signal.SIGUSR1]} == before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_time_limit_counts_from_the_start_and_ends_with_the_loop(monkeypatch):
    """Tokenizing belongs to it; the uploads to W&B that come after the loop are not to be ended by it."""
    monkeypatch.setattr(processes, "STARTED", time.monotonic() - 50)
    with StopSignal(SimpleNamespace(is_main=True), time_limit=1).listen():
        assert 5 < signal.getitimer(signal.ITIMER_REAL)[0] < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(SimpleNamespace(is_main=True)).listen() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_orphan_that_hangs_ends_all_the_same():
    code = ("import os, signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from mini_llm import processes; processes.LAST_CALL = 0.5\n"
            "signal.signal(signal.SIGTERM, lambda *_: None)\n"
            "if not os.fork():\n"
            "    processes.stop_when_orphaned(1); print(os.getpid(), flush=True); time.sleep(60)\n"
            "time.sleep(1)")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert process.wait() == 0 and parent_of(pid)
    eventually(lambda: not parent_of(pid), 10)


def test_a_child_is_found_whatever_bytes_its_name_has():
    code = "import ctypes, sys, time; ctypes.CDLL(None).prctl(15, b') \\xff 7 8'); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert child.pid in child_processes(os.getpid()) and parent_of(child.pid) == os.getpid()
    finally:
        child.kill()
        child.wait()


def test_an_orphan_is_asked_to_stop_and_a_process_with_its_parents_is_not(tmp_path):
    orphan = ("import signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
              "from mini_llm.processes import stop_when_orphaned\n"
              "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[2], 'w').close(), sys.exit(0)))\n"
              "stop_when_orphaned(2); print(flush=True); time.sleep(60)")
    middle = ("import subprocess, sys\n"
              "child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], stdout=subprocess.PIPE)\n"
              "child.stdout.readline(); print(child.pid, flush=True); child.wait()")
    top = ("import subprocess, sys, time\n"
           "child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], stdout=subprocess.PIPE)\n"
           "print(child.stdout.readline().decode(), flush=True); time.sleep(60)")
    told = tmp_path / "told"
    shell = subprocess.Popen(["sh", "-c", '"$@" & read x', "sh", sys.executable, "-c", top, middle, orphan, str(ROOT),
                              str(told)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(shell.stdout.readline())
    shell.stdin.close()  # the user leaves
    assert shell.wait(10)
    with pytest.raises(AssertionError):
        eventually(told.exists, 2.5)  # both are there
    os.kill(parent_of(parent_of(pid)), signal.SIGKILL)
    eventually(told.exists, 10)
    eventually(lambda: not parent_of(pid), 10)


def test_no_process_is_left_by_a_progress_bar():
    """As multiprocessing's lock would start where processes are not forked: on macOS, and from Python 3.14 on."""
    subprocess.run([sys.executable, "-c", """
import multiprocessing, sys
from multiprocessing import resource_tracker
multiprocessing.set_start_method("forkserver")
from mini_llm.progress import ProgressBar
assert list(ProgressBar(range(2), disable=False)) == [0, 1]
ProgressBar.write("done")
assert resource_tracker._resource_tracker._pid is None
"""], cwd=ROOT, check=True, stderr=subprocess.PIPE)
