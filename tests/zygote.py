"""Commands run in copies of a process that has imported torch, which takes two seconds: most of a short command's time.
Otherwise they are processes like others: their own modules, environment, streams, exit code. The ranks that torchrun
starts are its children, and copies of it."""

import contextlib
import ctypes
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings

REPLY = 64  # bytes of each
TORCHRUN = "torch.distributed.run"


def run(command, cwd, env, input=None, timeout=300):
    """As `subprocess.run(command, capture_output=True, text=True)` of [Python, script, …] or [Python, -m, module, …].
    The result's `seconds` are those of a core that it took."""
    with contextlib.ExitStack() as stack:
        asked, given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(4))
        given.write(input or "")
        given.seek(0)
        request = dict(command=list(map(str, command)), cwd=str(cwd), env=env)
        json.dump(request, asked)
        asked.seek(0)
        channel = zygote(TORCHRUN in command[:3])
        socket.send_fds(channel, [b"!"], [file.fileno() for file in (asked, given, out, err)])
        pid = json.loads(channel.recv(REPLY))
        channel.settimeout(timeout)
        try:
            code, seconds = json.loads(channel.recv(REPLY))
        except BaseException as error:  # pytest-timeout's, too
            os.killpg(pid, signal.SIGKILL)
            zygote.cache_clear()  # its next word would be of this command
            raise subprocess.TimeoutExpired(command, timeout) if isinstance(error, TimeoutError) else error from None
        channel.settimeout(None)
        for file in (out, err):
            file.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read(), err.read())
        done.seconds = seconds
        return done


@functools.cache
def zygote(for_torchrun):
    """The channel to the process that is copied. It ends with the one that holds this end."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *[TORCHRUN, "torch._dynamo"] * for_torchrun],
                         pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    return ours


def serve(channel):
    while True:
        asked, files, *_ = socket.recv_fds(channel, 1, 4)
        if not asked:
            return
        with open(files.pop(0)) as file:
            request = json.load(file)
        if not (pid := os.fork()):
            channel.close()
            become(files=files, **request)
            return
        for file in files:
            os.close(file)
        channel.send(json.dumps(pid).encode().ljust(REPLY))
        _, status, used = os.wait4(pid, 0)
        channel.send(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime]).encode().ljust(REPLY))


def become(command, cwd, env, files):
    """Be the script to its end, which is that of the interpreter."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # the environment's
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    sys.orig_argv, is_module = command, command[1] == "-m"
    sys.argv, sys.path[0] = command[1 + is_module:], os.getcwd() if is_module else os.path.dirname(command[1])
    if is_module:
        if command[2] == TORCHRUN and not (torch.version.cuda or torch.version.hip):  # a GPU is not for copies
            from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

            subprocess_handler.Popen = Rank
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[1], run_name="__main__")


class Rank(subprocess.Popen):
    """A process like that of `Popen([Python, "-u", script, …], start_new_session=True)`."""

    def _execute_child(self, args, _, __, ___, ____, cwd, env, *_____):
        self._child_created = True
        with warnings.catch_warnings():  # of fork with threads: torchrun's hold nothing that a rank needs
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number in map(int, os.listdir("/dev/fd")):
                with contextlib.suppress(OSError):  # the listing's own
                    if number > 2:  # torchrun's objects will close these numbers: they must not become others' files
                        os.dup2(null, number, inheritable=False)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become([args[0], *args[2:]], cwd or os.getcwd(), env, [])
            code = 0
        except SystemExit as leave:
            code = leave.code or 0  # a number, as our scripts leave with
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            ctypes.pythonapi.Py_Exit(code)  # as an interpreter ends: with threads, atexit and streams


if __name__ == "__main__":
    import torch

    for module in sys.argv[2:]:  # which ranks need, and train.py does without
        importlib.import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
