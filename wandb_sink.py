"""Everything that speaks to Weights & Biases. Imported only with --use-wandb, on the rank that reports.

A thread of its own does init, log and finish: a W&B that is slow, down or frozen never holds up a training step, and
whatever it raises becomes one warning. metrics.jsonl has every row in any case.
"""

import contextlib
import json
import logging
import queue
import secrets
import string
import threading
import time

QUEUE_ROWS = 10_000  # reports waiting for W&B; when it is full the newest are dropped, and counted
FINISH_TIMEOUT = 60  # seconds that the end of a run waits for W&B
SIGNAL_TIMEOUT = 15  # the same after a signal: torchrun gives its ranks 30 s

log = logging.getLogger("mini_llm")


def stored_run_id(path, known, resumes):
    """This run's id: the checkpoint's (`known`), else for a run that resumes the one kept in `path`, else a new one.

    It is kept in `path` before the first step, so that not even a kill before the first checkpoint makes a second
    chart of the same run.
    """
    run_id = known
    if not run_id and resumes and path.exists():
        with contextlib.suppress(ValueError, KeyError):
            run_id = json.loads(path.read_text())["run_id"]
    run_id = run_id or "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(dict(run_id=run_id)))
    draft.replace(path)
    return run_id


class WandbSink:
    """`log` and `close` return at once, but for `close`'s bounded wait."""

    def __init__(self, cfg, run_id, config):
        self.cfg, self.run_id, self.config = cfg, run_id, config
        self.rows, self.dropped, self.thread = queue.Queue(QUEUE_ROWS), 0, None

    def log(self, step, metrics):
        if self.thread is None:  # nothing is imported, and no network touched, before the first report
            self.thread = threading.Thread(target=self._work, daemon=True, name="wandb")
            self.thread.start()
        try:
            self.rows.put_nowait({"step": step, **metrics})
        except queue.Full:
            self.dropped += 1

    def close(self, exit_code):
        if self.thread is None:
            return
        deadline = time.monotonic() + (SIGNAL_TIMEOUT if exit_code > 128 else FINISH_TIMEOUT)
        with contextlib.suppress(queue.Full):
            # A thread that has failed empties its queue no more.
            self.rows.put((exit_code,), timeout=deadline - time.monotonic() if self.thread.is_alive() else 0)
        self.thread.join(max(0, deadline - time.monotonic()))
        if self.thread.is_alive():
            log.warning("wandb: not finished in time, left behind; metrics.jsonl has every row")
        elif self.dropped:
            log.warning("wandb: %d rows were dropped while it did not answer; metrics.jsonl has them", self.dropped)

    def _work(self):
        try:
            run = self._init()
            while isinstance(row := self.rows.get(), dict):
                run.log(row)
            run.finish(exit_code=row[0])
        except Exception as error:  # the SDK raises its own, pydantic's, protobuf's and the sockets' errors
            log.warning("wandb: %s; training goes on without it, metrics.jsonl has every row",
                        (str(error).splitlines() or [type(error).__name__])[0])

    def _init(self):
        try:
            import wandb

            init = wandb.init  # a run folder of that name can be imported, too, and has none
        except (ImportError, AttributeError):
            raise RuntimeError("the wandb package is missing: pip install wandb") from None
        # Rows reach the local file within a second: a kill leaves no W&B process behind to write what it had.
        settings = wandb.Settings(x_transaction_log_flush_interval=1)
        run = init(project=self.cfg.wandb_project, name=self.cfg.wandb_run_name or None, id=self.run_id, resume="allow",
                   settings=settings)
        run.config.update(self.config, allow_val_change=True)
        # W&B's own step must grow, and so drops rows that a resumed run repeats: `step` is an axis of ours.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if run.url:
            log.info("wandb: run %s at %s", run.id, run.url)
        else:
            log.info("wandb: run %s offline in %s; send it later with wandb sync", run.id, run.dir)
        return run
