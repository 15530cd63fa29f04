"""The process that talks to W&B during a run: reads the records of metrics.jsonl and sends them on.

Started by `WandbSink`, which closes its standard input when the run is over. Everything here may block, fail or be
killed without affecting training.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time

from mini_llm.processes import only_one
from mini_llm.wandb_client import (
    LOST_CODE,
    Publisher,
    import_wandb,
    leave,
    offline_folder,
    open_run,
    records_before,
    reports_before,
)
from mini_llm.wandb_errors import Relay, with_advice
from mini_llm.wandb_runs import Job

POLL = 1.0  # seconds between reads of the file; each takes CPU time that training may need


class Tail:
    """Reads the complete lines that were appended to a file since the last read."""

    def __init__(self, path, offset=0):
        self.file = open(path, "rb")
        self.file.seek(offset)
        self.rest = b""  # the beginning of a line that is not complete yet

    def lines(self):
        *whole, self.rest = (self.rest + self.file.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


class Follower:
    """Reads the records of a run and sends them to W&B until the trainer has finished or died."""

    def __init__(self, job, say):
        self.job, self._say = job, say
        self.ended = threading.Event()  # set once the trainer has finished or died
        self.exit_code, self.timeout = LOST_CODE, job.finish_timeout  # unless the trainer sends others
        self.stopped = False  # whether the run was stopped on its page
        self.overdue = False  # whether this process ends itself, at the timeout

    def say(self, level, text):
        if not self.overdue:  # what fails then was ended on purpose
            self._say(level, text)

    def await_trainer(self, control):
        """Runs in a thread: wait for the trainer's exit code and timeout, then end this process after that timeout."""
        with contextlib.suppress(ValueError):  # EOF without a message: the trainer was killed
            self.exit_code, self.timeout = json.loads(control.readline())
        self.ended.set()
        time.sleep(max(self.timeout / 2, self.timeout - 1))  # the trainer waits longer, then kills it
        self.say("WARNING", f"not finished within {self.timeout:g} s, ended; send the rest later: {self.job.sync}")
        self.overdue = True
        leave()

    def stop(self):
        self.stopped = True
        self.say("STOP", "stopped on the run's page")

    def run(self):
        rows, console = Tail(*self.job.rows), Tail(*self.job.console) if self.job.console else None
        # If the run was killed and restarted, the follower of its earlier start may still be at work.
        with only_one(self.job.lock, self.job.finish_timeout):
            with self._patience():
                run = open_run(self.job, self.say, stop=lambda: self.stop())  # a lambda: the SDK copies a method's self
            samples = [json.loads(line) for head, line in records_before(*self.job.rows) if head["event"] == b"sample"]
            publisher = Publisher(run, self.job, self.say, samples)
            publisher.publish(self._unsent(run))
            delivery = Delivery(run, self.job, self.say)
            last = False
            while not last:
                last = self.ended.wait(POLL)  # wait before reading: what was written by then is read below
                for line in console.lines() if console else ():
                    print(line)  # W&B records this process's stdout as the run's console log
                publisher.publish(rows.lines())
                delivery.check()
            self._finish(run, publisher)
            delivery.check()
            if run.offline:
                self.say("INFO", f"recorded in {offline_folder(run)}; send it later: {self.job.sync}")
            elif delivery.log:
                self.say("INFO", f"finished: {run.url}")

    def _finish(self, run, publisher):
        """Tell W&B how the trainer ended, and wait until everything is sent."""
        # Not in a sweep: W&B would requeue trials that the agent ended or a user stopped.
        if self.exit_code == 128 + signal.SIGTERM and not self.stopped and not self.job.sweep:
            run.mark_preempting()  # before the uploads, which there may be no time for
        if publisher.is_uploading():
            limit = " (--wandb-finish-timeout)" if self.timeout == self.job.finish_timeout else ""
            self.say("INFO", f"checkpoints are uploading, {self.timeout:g} s at most{limit}")
        publisher.upload_waiting(last=True)
        run.finish(exit_code=self.exit_code)
        with contextlib.suppress(SystemExit):  # raised if the SDK's service process (wandb-core) failed
            import_wandb().teardown()  # waits for that process, which may still be writing its file

    def _unsent(self, run):
        """Reports of earlier starts that did not reach the server: those later than the last that it has, or of a
        later step, if the clock has been set back since."""
        last, step = run.summary.get("_timestamp", 0), run.summary.get("step", 0)
        # The last row of a shared run may be another rank's.
        if run.offline or self.job.shared or not all(isinstance(value, int | float) for value in (last, step)):
            return []
        if n := sum(1 for _ in reports_before(*self.job.rows, last, step)):
            self.say("INFO", f"rows of earlier starts that were not there: {n}, sent now; wandb sync of their offline "
                             f"folders would send them twice")
        return reports_before(*self.job.rows, last, step)

    @contextlib.contextmanager
    def _patience(self):
        """Warn once if opening the run takes too long without failing."""
        limit = self.job.init_timeout + 30
        timer = threading.Timer(limit, self.say, ["WARNING", f"not up after {limit:g} s; training goes on, its rows "
                                                             f"are kept: {self.job.sync}"])
        timer.daemon = True
        timer.start()
        yield
        timer.cancel()


class Delivery:
    """Checks whether the SDK's service process still delivers rows. If the server rejects them for good, or a captive
    portal answers in its place, the SDK carries on silently; only its internal log shows it."""

    def __init__(self, run, job, say):
        self.say, self.sync = say, job.sync
        self.log = None  # unread, or no longer of interest
        with contextlib.suppress(OSError):
            self.log = Tail(run.settings.log_internal)

    def check(self):
        for line in self.log.lines() if self.log else ():
            found = re.search(r"filestream: (fatal error: filestream: )?(failed to upload|json decode error): ([^{}]*)",
                              line)
            if found:
                why = found[3].partition(" url=")[0].strip(' "')
                self.say("WARNING", f"the server takes no more rows ({why}); training goes on. Send the rest later: "
                                    f"{self.sync}")
                self.log = None
                return


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the pipe to the trainer is for `say` alone
    with os.fdopen(int(sys.argv[1])) as file:
        job = Job(**json.load(file))
    # W&B records the command line of the running process: make it the trainer's.
    sys.argv = [job.program, *job.arguments]

    def say(level, text):
        with contextlib.suppress(OSError):  # the trainer may be gone
            print(level, " ".join(text.split()), file=out, flush=True)

    follower = Follower(job, say)
    sys.stderr = Relay(follower.say)
    with contextlib.suppress(OSError):
        os.nice(10)  # when CPU cores are scarce, training has priority
    threading.Thread(target=follower.await_trainer, args=(sys.stdin,), daemon=True).start()
    try:
        follower.run()
    except Exception as error:
        follower.say("WARNING", f"{with_advice(error)}. Training goes on without it; send the run later: {job.sync}")
    leave()
