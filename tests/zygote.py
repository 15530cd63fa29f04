"""Commands run in copies of a process that has imported torch, which takes two seconds: most of a short command's time.
Otherwise they are processes like others: their own modules, environment, streams, exit code. The ranks that torchrun
starts are its children, and copies of it."""

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
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

TORCHRUN = "torch.distributed.run"
RANKS_NEED = TORCHRUN, "torch._dynamo", "torch.distributed.fsdp"  # and train.py does without
ROOM = 2**16  # bytes that the zygote's environment is longer, for `show` to write a copy's over it


class Popen(subprocess.Popen):
    """As `subprocess.Popen([Python, script, …], start_new_session=True)`, or [Python, -m, module, …], with streams,
    `cwd` and `env`. Once it has ended, `seconds` are those of a core that it took."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, *rest):
        given, _, _, out, _, err = pipes = rest[:6]  # a pair for each of stdin, stdout and stderr
        self._child_created = True
        self.ended, reply = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with reply, tempfile.TemporaryFile("w+") as asked:
            json.dump(dict(command=list(map(str, args)), cwd=str(cwd), env=env), asked)
            asked.seek(0)
            streams = (own if stream == -1 else stream for own, stream in enumerate((given, out, err)))
            socket.send_fds(zygote(TORCHRUN in args[:3]), [b"!"], [asked.fileno(), reply.fileno(), *streams])
        self.pid = json.loads(self.ended.recv(64))
        self._close_pipe_fds(*pipes)

    def _try_wait(self, flags):
        """As os.waitpid, though the process is the zygote's."""
        try:
            status, self.seconds = json.loads(self.ended.recv(64, socket.MSG_DONTWAIT if flags else 0))
        except BlockingIOError:
            return 0, 0
        self.ended.close()
        return self.pid, status

    def _internal_poll(self, *_, **__):
        if self._waitpid_lock.acquire(blocking=False):  # else another thread waits, and this one may want to kill
            try:
                pid, status = (0, 0) if self.returncode is not None else self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(command, cwd, env, input=None, timeout=300, meanwhile=None):
    """As `subprocess.run(command, capture_output=True, text=True)`; the result has `seconds`, too. `meanwhile` is
    called with the process while it runs, and may raise: that ends it."""
    with contextlib.ExitStack() as stack:
        given, out, err = files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        given.write(input or "")
        given.seek(0)
        process = Popen(command, stdin=given, stdout=out, stderr=err, cwd=cwd, env=env)
        process.ended.settimeout(timeout)
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        beside = threads.submit(accompany, process, meanwhile)
        try:
            process.wait()
            beside.result()
        except BaseException as error:  # pytest-timeout's, too
            kill(process)
            raise subprocess.TimeoutExpired(command, timeout) if isinstance(error, TimeoutError) else error from None
        for file in files:
            file.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
        done.seconds = process.seconds
        return done


def accompany(process, meanwhile):
    try:
        if meanwhile:
            meanwhile(process)
    except BaseException:
        kill(process)
        raise


def kill(process):
    """With all that it has started, unless that is in a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def zygote(for_torchrun):
    """The channel to the process that is copied. It ends with the one that holds this end."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *RANKS_NEED * for_torchrun],
                         pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                         env=os.environ | dict(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1", ROOM="x" * ROOM))
    return ours


def serve(channel):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that are in `begin`
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for pytest, which then ends what it waits for
    while True:
        asked, files, *_ = socket.recv_fds(channel, 1, 5)
        if not asked:
            return
        if not os.fork():
            channel.close()
            with open(files.pop(0)) as file:
                request = json.load(file)
            begin(*files, **request)
            return
        for file in files:
            os.close(file)


def begin(reply, *files, **request):
    """Start a command, and wait for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        os.close(reply)
        become(files=files, **request)
        return
    for file in files:
        os.close(file)
    os.write(reply, json.dumps(pid).encode())
    _, status, used = os.wait4(pid, 0)
    os.write(reply, json.dumps([status, used.ru_utime]).encode())
    os._exit(0)


def become(command, cwd, env, files):
    """Be the script to its end, which is that of the interpreter."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the zygote, and in what a shell starts with &
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    show(env)
    tempfile.tempdir = None  # the environment's
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    sys.orig_argv = command
    if command[1] == "-m":
        sys.argv, sys.path[0] = command[2:], os.getcwd()
        if command[2] == TORCHRUN and not (torch.version.cuda or torch.version.hip):  # a GPU is not for copies
            from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

            subprocess_handler.Popen = Rank
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command[1:], os.path.dirname(command[1])
        runpy.run_path(command[1], run_name="__main__")


def show(env):
    """Write it over what this interpreter began with: /proc/PID/environ is where tests look for processes."""
    with open("/proc/self/stat") as file:
        begin, end = map(int, file.read().rpartition(")")[2].split()[47:49])
    variables = "".join(f"{name}={value}\0" for name, value in env.items()).encode()
    assert len(variables) <= end - begin, "raise ROOM"
    ctypes.memmove(begin, variables.ljust(end - begin, b"\0"), end - begin)


class Rank(subprocess.Popen):
    """A process like that of `Popen([Python, "-u", script, …], start_new_session=True)`."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
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

    for module in sys.argv[2:]:
        importlib.import_module(module)
    sys.modules.pop(TORCHRUN, None)  # it will be the main module
    gc.freeze()  # else each copy looks through all that torch has made when it ends: 0.3 s
    serve(socket.socket(fileno=int(sys.argv[1])))
