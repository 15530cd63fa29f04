"""What is asked of the W&B SDK: to open a run, and to take the records of metrics.jsonl.

Everything here may block or fail: the trainer leaves it to a process of its own, wandb_follower.py.
"""

import contextlib
import functools
import glob
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from mini_llm.files import RECORD_HEAD, tokenizer_files
from mini_llm.processes import child_processes, kill
from mini_llm.wandb_errors import reason, with_advice
from mini_llm.wandb_runs import SOURCE, local_folder, remember_sent, run_path

LOST_CODE = 137  # exit code reported to W&B if the trainer died without reporting one, as after SIGKILL


@functools.cache
def scratch():
    """Holds the SDK's temporary folders, since `leave` skips the SDK's exit handler, which would remove them."""
    return tempfile.TemporaryDirectory(prefix="mini-llm-", ignore_cleanup_errors=True)


def leave(code=0):
    """End this process without the SDK's exit handler, which may wait forever for its service process."""
    threading.excepthook = lambda *_: None  # the SDK's threads may fail once their service process is gone
    kill(child_processes(os.getpid()))  # also a frozen wandb-core, which would never exit
    with contextlib.suppress(OSError):
        scratch().cleanup()
    os._exit(code)


def import_wandb():
    """The wandb package. Raises RuntimeError if missing, even if a run folder of that name is importable instead."""
    tempfile.tempdir = scratch().name
    if sys.platform == "linux":  # elsewhere the path may be too long for a socket
        os.environ["TMPDIR"] = tempfile.tempdir  # wandb-core leaves its socket's folder behind when it is killed
    if os.path.expanduser("~") == "~":  # in a container, for a user without a name, too: the SDK would fail
        os.environ["HOME"] = tempfile.tempdir
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where the SDK stages tables and artifacts
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, tempfile.tempdir)
    try:
        import wandb

        wandb.init  # noqa: B018
    except (ImportError, AttributeError):
        raise RuntimeError("the wandb package is missing: pip install wandb") from None
    return wandb


def open_run(job, say, stop=None):
    """Open the W&B run that `job` describes; if that fails, an offline run, if the job is `live` and not shared. Raises
    if no run can be opened. `stop` is called when it is stopped on its page."""
    wandb = import_wandb()
    init = init_arguments(job)
    settings = settings_of(job)

    def start(**other):
        return wandb.init(settings=wandb.Settings(**settings | other, stop_fn=stop), resume="allow", **init)

    try:
        if job.shared and not job.primary and not awaited(lambda: is_there(job), job.init_timeout):
            raise TimeoutError(f"the first process has not opened {job.init['project']}/{job.init['id']}")
        run = start()
    except Exception as error:  # the SDK raises its own errors and those of pydantic, protobuf and sockets
        if not job.live or job.shared or job.mode == "offline":
            raise
        wandb.teardown()  # else the SDK treats the id as in use
        run = start(mode="offline")
        say("WARNING", f"{with_advice(error)}. Recorded offline in {offline_folder(run)} meanwhile; send it later: "
                       f"{job.sync}")
    else:
        place = f"offline in {offline_folder(run)}" if run.offline else f"at {run.url}"
        if job.lock and not run.offline:
            remember_sent(job)
        say("INFO", f"run {run.id}{f' ({run.name})' if run.name else ''} {place}")
        if run.resumed and job.live and job.primary and not (job.sweep or job.config["resume"]):
            say("WARNING", f"run {run.id} had been there before: this training's rows are added to its own; "
                           f"--wandb-run-id NEW makes another")
    # W&B's own step must increase, so it drops rows that a resumed run repeats: use our own `step` as the x axis.
    run.define_metric("step", hidden=True)  # a chart of its own would be a straight line
    run.define_metric("*", step_metric="step")
    if job.primary:
        try:
            describe(run, job)
        except Exception as error:  # less important than the rows
            say("WARNING", f"configuration or files not logged: {reason(error)}")
    return run


def init_arguments(job):
    """The arguments of wandb.init."""
    left_out = set()
    if job.sent and job.mode == "online" and is_there(job):  # what has been changed on its page since stays so
        left_out |= {*job.sent}
    if os.environ.get("WANDB_SWEEP_ID"):  # the sweep determines these
        left_out |= {"project", "entity", "id"}
    init = {name: value for name, value in job.init.items() if name not in left_out}
    folder = local_folder(init.get("dir") or os.environ.get("WANDB_DIR") or ".")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)  # else the SDK falls back to a temporary folder
    if job.lock and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        init["dir"] = os.path.dirname(job.lock) or "."  # beside the checkpoint, for the same reason
    return init


def settings_of(job):
    """The arguments of wandb.Settings."""
    # Flush the local file every second: after a kill, no W&B process is left to write what was buffered.
    found = dict(mode=job.mode, x_transaction_log_flush_interval=1, init_timeout=job.init_timeout,
                 finish_timeout=job.finish_timeout, git_commit=job.config.get("git_commit"), git_root=str(SOURCE),
                 host=job.host, x_stats_pid=job.pid, program=job.program,
                 program_relpath=os.path.relpath(job.program, SOURCE), sweep_id=job.sweep or None)
    if job.shared:  # ranks end together, so let each of them mark the run as finished: the last need not be the primary
        found |= dict(mode="shared", x_primary=job.primary, x_label=job.label, x_update_finish_state=True)
    if not job.live:  # this machine need not be the one that trained
        found |= dict(console="off", x_disable_meta=True, disable_git=True)
    if not (job.live and job.monitors):
        found |= dict(x_disable_stats=True)
    return found


def describe(run, job):
    """Log the configuration and the files of the run."""
    facts = job.config
    if job.sweep:  # what the sweep sets is locked, and already in run.config
        facts = {name: value for name, value in facts.items() if name not in dict(run.config)}
    run.config.update(facts, allow_val_change=True)
    for name, text in job.files.items():
        path = Path(run.dir, name)
        path.write_text(text, "utf-8")
        run.save(glob.escape(str(path)), base_path=run.dir, policy="now")


def offline_folder(run):
    return os.path.dirname(run.dir)


def is_there(job):
    """Whether the server has this run already, as far as can be found out."""
    import wandb

    with contextlib.suppress(Exception):  # it has not, or it cannot be reached
        api = wandb.Api(timeout=math.ceil(min(10, job.init_timeout)))
        return bool(api.run(run_path(job.init, api)))
    return False


def awaited(look, seconds, arrived=bool):
    """Poll `look()` until its result has `arrived` or so many seconds have passed → the last result."""
    deadline = time.monotonic() + seconds
    while not arrived(found := look()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


class Publisher:
    """Sends the records of metrics.jsonl to a W&B run: metrics, samples, checkpoints, alerts."""

    def __init__(self, run, job, say, samples=()):
        """`samples`: records that the sample table starts with, such as those from before a resume."""
        self.run, self.job, self.say = run, job, say
        self.waiting = []  # checkpoint records whose files are still to be uploaded
        self.uploading = None  # the thread that uploads one
        self.samples = [[record["step"], record["text"]] for record in samples]
        self.failed = set()  # what could not be logged, and was told: kinds of events, and "upload"

    def publish(self, lines):
        """Send the records in `lines` of JSON."""
        for line in lines:
            record = json.loads(line)
            try:
                self._pass_on(**record)
            except Exception as error:
                if "event" not in record:
                    raise
                what = record["event"]
                if what not in self.failed:  # less important than the rows that follow
                    later = f"; send it later: {self.job.sync}" if self.job.sync else ""
                    self.say("WARNING", f"{what} of step {record['step']} not logged: {reason(error)}{later}")
                self.failed.add(what)
        self.upload_waiting()

    def _pass_on(self, step, time, event=None, **fields):
        match event:
            case None:
                self.run.log({"step": step, "_timestamp": time} | {name: _plain(name, value)
                                                                   for name, value in fields.items()})
            case "sample":
                self._sample(step, time, **fields)
            case "checkpoint":
                self.waiting.append(dict(step=step) | fields)
            case "alert":
                self.run.alert(**fields)

    def summarize(self, records):
        """Set the run's summary to the last values of these records of a whole metrics.jsonl."""
        last = {}
        for record in records:
            if "event" not in record:
                last |= {name: _plain(name, value) for name, value in record.items() if not isinstance(value, dict)}
        if last:
            last["_timestamp"] = last.pop("time")
            self.run.summary.update(last)

    def _sample(self, step, time, text):
        import wandb

        self.samples = sorted([*self.samples, [step, text]])[-100:]
        table = wandb.Table(columns=["step", "text"], data=self.samples)
        self.run.log({"step": step, "_timestamp": time, "samples": table})

    def is_uploading(self):
        return not self.run.offline and bool(self.waiting or self.uploading and self.uploading.is_alive())

    def upload_waiting(self, last=False):
        """Upload the waiting checkpoints, one at a time, in the background or, after the `last` one, before this
        returns, and delete their files. Unless the policy is `all`, only the newest is uploaded. Offline, they are kept
        with the run for `wandb sync`: unless `all`, only the run's last."""
        if self.job.policy != "all":
            for superseded in self.waiting[:-1]:
                Path(superseded["path"]).unlink(missing_ok=True)
            self.waiting = self.waiting[-1:]
            if self.run.offline and not last:
                return
        if last:
            if self.uploading:
                self.uploading.join()
            for record in self.waiting:
                self._upload(**record)
        elif self.waiting and not (self.uploading and self.uploading.is_alive()):
            self.uploading = threading.Thread(target=self._upload, kwargs=self.waiting.pop(0), daemon=True)
            self.uploading.start()

    def _upload(self, step, path, best, **figures):
        import wandb

        path, config = Path(path), self.job.config
        try:
            if not path.exists():
                self.say("WARNING", f"checkpoint of step {step} not uploaded: newer ones came before its turn")
                return
            tokenizer = tokenizer_files(Path(self.job.tokenizer))
            if self.run.offline:
                kept = Path(offline_folder(self.run)).resolve() / "checkpoints"  # `wandb sync` may run elsewhere
                (kept / "model.tokenizer").mkdir(parents=True, exist_ok=True)
                path = Path(shutil.move(path, kept / path.name))
                tokenizer = [Path(shutil.copy(file, kept / "model.tokenizer")) for file in tokenizer]
            artifact = wandb.Artifact(f"model-{self.run.id}", type="model", description=f"checkpoint of step {step}",
                                      metadata=figures | dict(step=step, seed=config["seed"], config=config))
            files = {file: f"model.tokenizer/{file.name}" for file in tokenizer if file.suffix == ".json"}
            files[path] = "model.pt"
            for file, name in files.items():  # immutable: uploaded from its place, not copied to a cache first
                artifact.add_file(str(file), name=name, policy="immutable", skip_cache=True)
            aliases = ["latest", f"step-{step}"]
            if best and self.job.policy != "last":  # which does not upload those that are only the best
                aliases.append("best")
            logged = self.run.log_artifact(artifact, aliases=aliases)
            if not self.run.offline:
                logged.wait()
        except Exception as error:  # less important than the rows that follow
            if "upload" not in self.failed:  # told once, until one succeeds
                self.say("WARNING", f"checkpoint of step {step} not uploaded: {reason(error)}; the next are tried, too")
            self.failed.add("upload")
        else:
            self.failed.discard("upload")
        if not self.run.offline:
            with contextlib.suppress(OSError):  # the trainer removes it, too
                path.unlink(missing_ok=True)


def _plain(name, value):
    """A metrics.jsonl value for W&B: null is NaN (inf for a perplexity), a dict of counts and edges a histogram."""
    if isinstance(value, dict):
        import wandb

        return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
    if value is None:
        return math.inf if name.endswith("ppl") else math.nan
    return value


def records_before(path, offset):
    """Yields (match of RECORD_HEAD, line) of the records in the first `offset` bytes of a metrics.jsonl."""
    with open(path, "rb") as file:
        while file.tell() < offset and (line := file.readline()):
            if head := RECORD_HEAD.match(line):
                yield head, line


def reports_before(path, offset, after, step):
    """Yields the reports later than `after`, seconds since the epoch, or than `step`, in the first `offset` bytes of a
    metrics.jsonl: JSON. With histograms, those of a long run together may not fit into memory."""
    after += 0.01  # the server's time may be rounded
    for head, line in records_before(path, offset):
        if not head["event"] and (float(head["time"]) > after or int(head["step"]) > step):
            yield line.decode()
