"""The trainer's end: what speaks to Weights & Biases during a run is a process of its own.

The trainer writes its rows to metrics.jsonl anyway. `WandbSink` starts a second process, wandb_follower.py, that reads
them from there and passes them on. So the file is the queue: it drops nothing and costs the trainer nothing; a W&B that
is slow, down, frozen or killed holds up only the other process; and a trainer that is killed leaves one behind that
still delivers what was written. The two are tied by a pipe: its end tells the second that the first is done, or gone.
"""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import archive
from processes import child_processes, only_one
from wandb_runs import DIFF_CHARACTERS, Job, git, remember

FOLLOWER = Path(__file__).with_name("wandb_follower.py")
FAILURE_TIMEOUT = 15  # seconds for uploads, at most, after a signal or an error: other ranks may be waiting
UPLOADS = 4  # checkpoints that may wait for upload, each a second name of a file that may otherwise be gone

log = logging.getLogger("mini_llm.wandb")
log.setLevel(logging.INFO)  # also on ranks whose other messages are not shown


class WandbSink:
    """The trainer's end: starts the process at the first report, tells it when to finish, and waits so long and no
    longer. Nothing here waits for W&B but `close`, which is bounded."""

    def __init__(self, cfg, plan, beside, tag, config, rows, console, toml):
        """`cfg` is a WandbConfig with the environment in it, `plan` this process's part (RunPlan); `beside(suffix)`
        names files of this run, `tag` sets this rank's apart; `config` is what is logged as such, `toml` the same as a
        file; `rows` and `console` are (file, offset) of what to read."""
        base = config["wandb_run_id"]
        init = dict(project=cfg.wandb_project, entity=cfg.wandb_entity or None, id=plan.run_id,
                    name=cfg.wandb_run_name and cfg.wandb_run_name + plan.run_id[len(base):] or None,
                    group=cfg.wandb_group or plan.group or None, job_type=cfg.wandb_job_type or None,
                    tags=cfg.wandb_tags or None, notes=cfg.wandb_notes or None, dir=cfg.wandb_dir or None)
        tool = os.path.relpath(FOLLOWER.with_name("wandb_tools.py"))
        diff = git("diff", "HEAD")[:DIFF_CHARACTERS]
        files = {beside(".config.toml").name: toml} | ({"diff.patch": diff + "\n"} if diff else {})
        self.job = Job(init, config, mode=cfg.wandb_mode, shared=plan.shared, primary=plan.primary, label=plan.label,
                       init_timeout=cfg.wandb_init_timeout, finish_timeout=cfg.wandb_finish_timeout,
                       files=files, policy=cfg.wandb_log_checkpoints, rows=rows, console=console,
                       lock=str(beside(f"{tag}.wandb.lock")), tokenizer=str(beside(".tokenizer")),
                       sync=f"python {shlex.quote(tool)} sync {shlex.quote(str(beside('.pt')))}")
        self.beside, self.tag, self.process = beside, tag, None
        self.closing = self.given_up = False
        remember(beside(f"{tag}.wandb.json"), base, self.job)
        with only_one(self.job.lock) as alone:
            if alone:  # else the process of a life that was killed is still uploading them
                self._forget_links()

    def _links(self):
        """This rank's own: other ranks may share the folder."""
        prefix = self.beside(f"{self.tag}.upload-")
        return sorted(prefix.parent.glob(glob.escape(prefix.name) + "[0-9]" * 8 + "*.pt"))

    def _forget_links(self):
        for link in self._links():
            link.unlink(missing_ok=True)

    def log(self, step, record):
        """`record` is in the file already."""
        if self.process is None and "event" not in record:
            self.process = self._start()  # at the first report, and not before

    def _start(self):
        # Another's wandb-core must not be ours, and the warnings are to be heard, if only by the follower. What a
        # variable says is in the job by now; the SDK fails at some that say nothing, or end in a comma.
        unwanted = ("WANDB_SERVICE", "WANDB_SILENT", "WANDB_QUIET", "WANDB_TAGS", "WANDB_FORK_FROM",
                    "WANDB_RESUME_FROM")
        environment = {name: value for name, value in os.environ.items()
                       if name not in unwanted and (value or not name.startswith("WANDB_"))}
        environment.setdefault("WANDB_ERROR_REPORTING", "false")  # else 12 s more at exit when the server hangs
        environment.setdefault("WANDB_X_DISABLE_VIEWER", "true")  # and 10 s at the start, to learn the user's name
        try:
            process = subprocess.Popen([sys.executable, str(FOLLOWER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, env=environment, text=True,
                                       start_new_session=True)  # Ctrl-C and torchrun's signals are for the trainer
            process.stdin.write(json.dumps(dataclasses.asdict(self.job)) + "\n")
            process.stdin.flush()
        except OSError as error:
            self._say(logging.WARNING, f"cannot start its process ({error}); send the run later: {self.job.sync}")
            return False
        self.listener = threading.Thread(target=self._listen, args=(process,), daemon=True, name="wandb")
        self.listener.start()
        return process

    def _listen(self, process):
        for line in process.stdout:
            level, _, text = line.rstrip("\n").partition(" ")
            if level == "STOP" and not self.closing:
                os.kill(os.getpid(), signal.SIGTERM)  # save and leave, all ranks together
            self._say(logging.getLevelNamesMapping().get(level, logging.INFO), text)
        if process.wait() and not self.given_up:
            self._say(logging.WARNING, f"its process ended with code {process.returncode}; send the rest later: "
                                       f"{self.job.sync}")

    def _say(self, level, text):
        log.log(level, "wandb%s: %s", "" if self.job.label == "rank-0" else f" {self.job.label}", text)

    def checkpoint_to_upload(self, path, step, best):
        """A second name for a checkpoint that is to be uploaded while the first moves on to the next one, or None."""
        latest = path != self.beside(".best.pt")
        wanted = {"none": False, "best": best, "last": latest, "all": True}[self.job.policy]
        if not wanted or not self.process or self.process.poll() is not None:
            return None
        waiting = self._links()
        while len(waiting) >= UPLOADS:
            waiting.pop(1).unlink(missing_ok=True)  # the first may be under way
        link = self.beside(f"{self.tag}.upload-{step:08d}.pt")
        try:
            archive.link(path, link)
        except OSError as error:
            self._say(logging.WARNING, f"checkpoint of step {step} not uploaded: {error}")
            return None
        return str(link)

    def close(self, exit_code):
        if not self.process:
            return
        self.closing = True
        seconds = min(self.job.finish_timeout, FAILURE_TIMEOUT) if exit_code else self.job.finish_timeout
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps([exit_code, seconds]) + "\n")
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        # The process bounds itself; one that is frozen cannot, and is ended here.
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.given_up = True
            for pid in [self.process.pid, *child_processes(self.process.pid)]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._say(logging.WARNING, f"not finished within {seconds:g} s, ended; send the rest later: "
                                       f"{self.job.sync}")
        self.listener.join(1)
        self._forget_links()
