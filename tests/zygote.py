"""Commands run in copies of a process that has imported torch, which takes two seconds: most of a short command's time.
Otherwise they are processes like others: their own modules, environment, streams, exit code."""

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile

REPLY = 64  # bytes of each


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
        channel = zygote()
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
def zygote():
    """The channel to the process that is copied. It ends with the one that holds this end."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                         stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
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
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    import torch  # noqa: F401

    serve(socket.socket(fileno=int(sys.argv[1])))
