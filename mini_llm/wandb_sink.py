"""The trainer's side of W&B logging; a separate process talks to Weights & Biases during a run.

The trainer writes its rows to metrics.jsonl anyway. `WandbSink` starts a second process, wandb_follower.py, which reads
them from that file and sends them on. The file is thus the queue: it drops nothing and costs the trainer nothing. If
W&B is slow, down, frozen or killed, only the follower is held up; if the trainer is killed, the follower still delivers
what was written. A pipe connects the two: EOF on it tells the follower that the trainer has finished or died.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading

from mini_llm import archive
from mini_llm.processes import child_processes, kill, only_one
from mini_llm.wandb_runs import SOURCE, UPLOADS, Job, recalled, remember, sync_command, uncommitted, upload_links

# What the process runs, with -P: nothing from the working folder. PYTHONPATH cannot name a folder with a colon.
FOLLOWER = ("-P", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); "
                        "from mini_llm.wandb_follower import main; main()", str(SOURCE))
FAILURE_TIMEOUT = 15  # maximum seconds for uploads after a signal or an error: other ranks may be waiting
QUIET = 2  # seconds for which the wait for W&B at the end needs no word

log = logging.getLogger("mini_llm.wandb")
log.setLevel(logging.INFO)  # even on ranks whose other messages are suppressed


class WandbSink:
    """Starts the follower process at the first report and, at the end, waits for it: only `close` waits for W&B."""

    def __init__(self, cfg, plan, beside, tag, config, rows, console, toml):
        """`cfg`: WandbConfig with the environment applied. `beside(suffix)` names the run's files, with `tag` in it
        this rank's. `toml`: text of .config.toml. `rows`, `console`: (path, byte offset) from which to read."""
        base = config["wandb_run_id"]
        ending = plan.run_id[len(base):]
        name = cfg.wandb_run_name[:128 - len(ending)] + ending if cfg.wandb_run_name else None  # 128: W&B's limit
        init = dict(project=cfg.wandb_project, entity=cfg.wandb_entity or None, id=plan.run_id, name=name,
                    group=cfg.wandb_group or plan.group or None, job_type=cfg.wandb_job_type or None,
                    tags=cfg.wandb_tags or None, notes=cfg.wandb_notes or None, dir=cfg.wandb_dir or None)
        diff = uncommitted()
        files = {beside(".config.toml").name: toml} | ({"diff.patch": diff} if diff else {})
        self.job = Job(init, config, mode=cfg.wandb_mode, shared=plan.shared, primary=plan.primary, label=plan.label,
                       monitors=config["local_rank"] == 0, policy=cfg.wandb_log_checkpoints, files=files,
                       init_timeout=cfg.wandb_init_timeout, finish_timeout=cfg.wandb_finish_timeout, rows=rows,
                       console=console, lock=str(beside(f"{tag}.wandb.lock")), tokenizer=str(beside(".tokenizer")),
                       sync=sync_command(beside(".pt")))
        self.beside, self.tag = beside, tag
        self.process = None  # not started yet; False: it could not be
        self.closing = self.given_up = False
        memory = beside(f"{tag}.wandb.json")
        sent = recalled(memory).get("sent", {})
        if sent.get("id") != plan.run_id:  # of another run
            sent = {}
        self.job.sent = [name for name in ("name", "group", "job_type", "tags", "notes")
                         if init[name] and init[name] == sent.get(name)]
        remember(memory, base, self.job, sent)
        with only_one(self.job.lock) as alone:
            if alone:  # else the follower of an earlier start, which was killed, is still uploading them
                self._remove_links()

    def _links(self):
        return upload_links(self.beside(f"{self.tag}.wandb.json"))

    def _remove_links(self):
        for link in self._links():
            link.unlink(missing_ok=True)

    def log(self, step, record):
        """`record` has already been written to metrics.jsonl."""
        if self.process is None and "event" not in record:
            self.process = self._start()  # only at the first report, not at an event before it

    def _start(self):
        # Never connect to another process's wandb-core, and keep warnings enabled, for the follower to relay. The
        # values that count are in the job; the SDK fails on some that are empty, end in a comma, or name another run.
        unwanted = ("WANDB_SERVICE", "WANDB_SILENT", "WANDB_QUIET", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE",
                    "WANDB_TAGS", "WANDB_NOTES", "WANDB_FORK_FROM", "WANDB_RESUME_FROM")
        environment = {name: value for name, value in os.environ.items()
                       if name not in unwanted and (value or not name.startswith("WANDB_"))}
        if not self.job.sweep:  # without a run id it is not an agent's, and the SDK would ignore the project for it
            environment.pop("WANDB_SWEEP_ID", None)
        environment.setdefault("WANDB_ERROR_REPORTING", "false")  # else exit takes 12 s longer when the server hangs
        environment.setdefault("WANDB_X_DISABLE_VIEWER", "true")  # and startup 10 s, to look up the user's name
        # On SageMaker the SDK makes up an id of its own, even where `id` is given, unless it is in the environment. And
        # in an ASCII locale the first other character of the console would end the follower.
        environment |= dict(WANDB_RUN_ID=self.job.init["id"], PYTHONUTF8="1")
        try:
            with tempfile.TemporaryFile("w+") as job:  # a pipe would make training wait until it is read
                json.dump(dataclasses.asdict(self.job), job)
                job.seek(0)
                # In a session of its own: Ctrl-C and torchrun's signals are only for the trainer.
                process = subprocess.Popen([sys.executable, *FOLLOWER, str(job.fileno())], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
                                           text=True, encoding="utf-8", start_new_session=True,
                                           pass_fds=[job.fileno()])
        except OSError as error:
            self._say(logging.WARNING, f"cannot start its process ({error}); send the run later: {self.job.sync}")
            return False
        self.listener = threading.Thread(target=self._listen, args=(process,), daemon=True, name="wandb")
        self.listener.start()
        return process

    def _listen(self, process):
        for line in process.stdout:
            level, _, text = line.rstrip("\n").partition(" ")
            if level == "STOP" and not self.closing and callable(signal.getsignal(signal.SIGTERM)):
                os.kill(os.getpid(), signal.SIGTERM)  # all ranks save and exit together; not once the loop has ended
            self._say(logging.getLevelNamesMapping().get(level, logging.INFO), text)
        if process.wait() and not self.given_up:
            self._say(logging.WARNING, f"its process ended with code {process.returncode}; send the rest later: "
                                       f"{self.job.sync}")

    def _say(self, level, text):
        log.log(level, "wandb%s: %s", "" if self.job.label == "rank-0" else f" {self.job.label}", text)

    def checkpoint_to_upload(self, path, step, best):
        """A link to a checkpoint, so that it can be uploaded after the next one replaces it; None: do not upload it."""
        newest = path != self.beside(".best.pt")
        wanted = {"none": False, "best": best, "last": newest, "all": True}[self.job.policy]
        if wanted and self.process is None:
            self.process = self._start()
        if not wanted or not self.process or self.process.poll() is not None:
            return None
        # Keep the oldest, which may be uploading, and the best.
        while len(waiting := self._links()) >= UPLOADS[self.job.policy]:
            skipped = next((link for link in waiting[1:] if ".best" not in link.suffixes), waiting[1])
            skipped.unlink(missing_ok=True)
        link = self.beside(f"{self.tag}.upload-{step:08d}{'.best' if best else ''}.pt")
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
        try:
            self._finish(exit_code)
        finally:  # also after a Ctrl-C
            self._remove_links()

    def _finish(self, exit_code):
        seconds = min(self.job.finish_timeout, FAILURE_TIMEOUT) if exit_code else self.job.finish_timeout
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps([exit_code, seconds]) + "\n")
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=min(QUIET, seconds))
        rest = max(0, seconds - QUIET)
        if rest and self.process.poll() is None and self.job.label == "rank-0":
            self._say(logging.INFO, f"waiting up to {rest:g} s for W&B; Ctrl-C leaves the rest for later: "
                                    f"{self.job.sync}")
        # The follower enforces the timeout itself; if it is frozen it cannot, and is killed here.
        try:
            self.process.wait(timeout=rest)
        except subprocess.TimeoutExpired:
            self.given_up = True
            kill([self.process.pid, *child_processes(self.process.pid)])
            self._say(logging.WARNING, f"not finished within {seconds:g} s, ended; send the rest later: "
                                       f"{self.job.sync}")
        self.listener.join(1)
