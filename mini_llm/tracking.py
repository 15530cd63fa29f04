"""Where reports go: to the console, the log file, and the sinks: metrics.jsonl, TensorBoard, W&B."""

import contextlib
import datetime
import importlib.util
import logging
import math
import os
import shlex
import sys
import time
import traceback
import types
from collections import deque
from dataclasses import dataclass
from logging.handlers import MemoryHandler

import torch

from mini_llm.config import RUN_CONFIG, arg, to_toml
from mini_llm.errors import RunFailed, UserError, print_any_character, visible
from mini_llm.files import command, write_whole
from mini_llm.hardware import device_name
from mini_llm.plots import sparkline
from mini_llm.progress import ProgressBar
from mini_llm.saver import NonFinite
from mini_llm.sinks import JsonlSink, TensorboardSink
from mini_llm.wandb_runs import distributed_info, plan_run, resolve_run

# What a finished run draws on the console: title → metric.
DRAWN = {"train loss": "train/loss", "val loss": "val/loss", "grad norm": "train/grad_norm", "lr": "lr",
         "tok/s": "global_tokens_per_sec"}
# Flags that .config.toml is without: the next start has its own, and may find the run in another folder.
NOT_KEPT = ("resume", "overwrite", "dry_run", "wandb_run_id", "checkpoint_path")

log = logging.getLogger("mini_llm")


@dataclass
class ReportConfig:
    """Evaluation and reports"""

    log_steps: int = arg(10, "steps between reports", ge=1)
    eval_steps: int | None = arg(None, "steps between evaluations; 0: only before the first and after the last step; "
                                       "unset: 20 to 40 per run, or at each report if there are fewer", ge=0)
    eval_tokens: int = arg(16384, "validation tokens of one evaluation, spread evenly over the set; 0: all", ge=0)
    sample_steps: int = arg(0, "steps between samples of generated text; 0: only at the end", ge=0)
    sample_prompt: str = arg("", "text that the samples begin with", metavar="TEXT")

    def eval_every(self, num_steps):
        if self.eval_steps is not None:
            return self.eval_steps
        return self.log_steps * max(1, num_steps // 20 // self.log_steps)


@dataclass
class TrackingConfig:
    """Tracking"""

    use_tensorboard: bool = arg(False, "write TensorBoard events beside the checkpoint")
    heartbeat_file: str = arg("", "rewritten at most once a second while the run makes progress: step, what is "
                                  "being done, time, pid", metavar="FILE")
    use_profiler: bool = arg(False, "trace the fourth to the sixth step of this start with torch.profiler")

    def validate(self):
        folder = os.path.dirname(os.path.abspath(self.heartbeat_file))
        if self.heartbeat_file and (os.path.isdir(self.heartbeat_file) or not os.access(folder, os.W_OK)):
            raise UserError(f"--heartbeat-file {self.heartbeat_file}: cannot be written; name one that can be")
        if self.use_tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--use-tensorboard: the tensorboard package is missing: pip install tensorboard")


def setup_logging(is_main):
    """Send all messages to stdout, from the main rank only, and buffer them for the log file, which is opened later."""
    print_any_character()  # there may be any in a sample
    console = _ConsoleHandler()
    console.setFormatter(_Formatter())
    log.handlers, log.propagate = [console, MemoryHandler(1000, flushLevel=logging.CRITICAL)], False
    log.setLevel(logging.INFO if is_main else logging.CRITICAL + 1)


class _Formatter(logging.Formatter):
    """Labels warnings and errors, for whoever searches a long log, and escapes what would act on the terminal."""

    def format(self, record):
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}] {label}{visible(record.getMessage())}"


class _ConsoleHandler(logging.Handler):
    def emit(self, record):
        with contextlib.suppress(OSError):  # a full disk, closed pipe or lost terminal must not end the run
            ProgressBar.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    def handleError(self, record):
        """Ignore errors: a full disk only loses lines of this file, which are on the console, too."""


class Tracker:
    """Sends each report to the sinks and, on the main rank, the console; others have sinks only to write to W&B."""

    def __init__(self, cfg, world, state, epochs, amp, facts):
        """`cfg`: the whole configuration; `facts`: what to record with the run. `state` is read at each record, and
        gets the id of the W&B run; `epochs(state)`: how often the data has been read. Collective with --use-wandb."""
        self.state, self.epochs, self.amp = state, epochs, amp
        self.flops_per_token, self.num_steps = facts["flops_per_token"], cfg.optim.num_steps
        self.beside, self.is_main = cfg.checkpoint.beside, world.is_main
        self.exit_code = 0  # that the run ends with
        self.log_file = None
        self.sinks = []
        self.wandb = None  # that of the sinks which is W&B's
        self.drawn = {title: {} for title in DRAWN}  # thousandth of the run → its first value
        self.lately = deque([(time.perf_counter(), state.step)], 100)  # when each report was
        settings, self.plan = self._plan_wandb(cfg, world, state)
        if world.is_main or self.plan:
            facts = facts | distributed_info(world) | dict(
                wandb_run_id=state.wandb_run_id, device=device_name(world.device), command=shlex.join(sys.orig_argv))
            try:
                self._open(cfg, state.step, settings, facts, "" if world.is_main else f".rank{world.rank}")
            except OSError as error:
                raise UserError(f"{error.filename or cfg.checkpoint.checkpoint_path}: {error.strerror}; make room "
                                f"there, or give a --checkpoint-path whose files can be appended to") from None
        self.bar = ProgressBar(total=self.num_steps, initial=state.step, unit="step", leave=False, dynamic_ncols=True,
                               disable=None if world.is_main else True)

    def _plan_wandb(self, cfg, world, state):
        """The W&B settings and this rank's RunPlan; (None, None) without W&B. Collective."""
        if not cfg.wandb.use_wandb:
            return None, None
        info = distributed_info(world)
        settings, state.wandb_run_id = world.from_main(lambda: resolve_run(  # another node's environment may differ
            cfg.wandb, self.beside(".wandb.json"), bool(cfg.checkpoint.resume), state.wandb_run_id, info))
        if settings.wandb_mode == "disabled":
            log.info("W&B is off: by --wandb-mode, WANDB_MODE or `wandb disabled`")
            return None, None
        return settings, plan_run(settings.wandb_run_mode, settings.wandb_rank_scope, state.wandb_run_id, info)

    def _open(self, cfg, step, settings, facts, tag):
        """Open this rank's files; on ranks other than the main one, their names contain `tag`."""
        self.beside(".log").parent.mkdir(parents=True, exist_ok=True)
        toml = to_toml(cfg, without=NOT_KEPT)
        console = None  # (path of the log file, bytes in it from before this start), for W&B
        if self.is_main:
            if self.beside(".log").is_symlink() or not self.beside(".log").is_file():
                self.beside(".log").unlink(missing_ok=True)  # a link or pipe of a run that came from elsewhere
            self.log_file = _LogFile(self.beside(".log"), mode="a" if step else "w", encoding="utf-8")
            self.log_file.setFormatter(_Formatter())
            console = str(self.beside(".log")), self.beside(".log").stat().st_size
            for early in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
                early.setTarget(self.log_file)
                early.flush()
                log.removeHandler(early)
            log.addHandler(self.log_file)
            write_whole(self.beside(RUN_CONFIG), toml.encode())
        rows = JsonlSink(self.beside(f"{tag}.metrics.jsonl"), step)
        self.sinks.append(rows)
        if cfg.tracking.use_tensorboard and self.is_main:
            self.sinks.append(TensorboardSink(self.beside(".tensorboard"), step))
        if self.plan:
            from mini_llm.wandb_sink import WandbSink

            self.wandb = WandbSink(settings, self.plan, self.beside, tag, facts, rows.place(), console, toml)
            self.sinks.append(self.wandb)
        self._record(step, event="config", config=facts)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if kind:
            self.exit_code = {UserError: 2, KeyboardInterrupt: 130}.get(kind, 1)  # as train.main does
            log.error("stopped by %s: %s", kind.__name__, error)
            if self.log_file and not issubclass(kind, (RunFailed, KeyboardInterrupt)):  # else only stderr has it
                with contextlib.suppress(OSError):
                    traceback.print_exception(error, file=self.log_file.stream)
            known = [file for file in map(self.beside, (".pt", ".best.pt")) if file.exists()]
            if known and not issubclass(kind, NonFinite):  # which says from where to go on
                log.info("the last checkpoint is %s: --resume goes on from it", known[0])
            self.alert(f"stopped by {kind.__name__}", str(error))
        self._record(self.state.step, event="exit", code=self.exit_code)
        for sink in self.sinks:
            sink.close(self.exit_code)
        if self.log_file:
            log.removeHandler(self.log_file)
            with contextlib.suppress(OSError):  # a full disk, to which the last lines could not be written
                self.log_file.close()

    def _record(self, step, **record):
        for sink in self.sinks:
            sink.log(step, record)

    def report(self, metrics):
        """Log `metrics` (docs/metrics.md): numbers, one-element tensors, histograms. One console line, and a row in
        each sink. Those under `rank/` are this rank's own, logged only where ranks write to W&B separately."""
        metrics = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        step = self.state.step
        metrics |= {"train/tokens": self.state.tokens, "train/epoch": self.epochs(self.state),
                    "train/flops": float(self.state.tokens * self.flops_per_token), "amp": float(self.amp != "off")}
        began, first = self.lately[0]
        per_step = (time.perf_counter() - began) / max(1, step - first)  # evaluations and saves included
        log.info("%s", console_line(step, self.num_steps, metrics, per_step, self.amp))
        if step == first:  # exclude the one-time evaluation before the first step
            self.lately.clear()
        self.lately.append((time.perf_counter(), step))
        for title, name in DRAWN.items():
            if math.isfinite(metrics.get(name, math.nan)):
                self.drawn[title].setdefault(1000 * step // self.num_steps, metrics[name])
        own = {name: metrics.pop(name) for name in list(metrics) if name.startswith("rank/")}
        row = metrics if self.is_main or self.plan and self.plan.primary else {}
        if self.plan and self.plan.suffix is not None:
            row |= {name + self.plan.suffix: value for name, value in own.items()}
        if row:
            self._record(step, **row)

    def sample(self, make_text):
        try:
            text = make_text()
        except Exception as error:  # must not end the run; the tokenizers package may be missing, for example
            log.warning("no sample: %s", error)
            return
        log.info("sample at step %d:\n%s", self.state.step, text)
        self._record(self.state.step, event="sample", text=text)

    def alert(self, title, text):
        """Tell whoever is not watching: by an alert of W&B, and in report.py. Does nothing on other ranks."""
        if self.is_main:
            self._record(self.state.step, event="alert", title=title, text=text, level="ERROR")

    def saved(self, path, state, best):
        """Called after the main rank has written a checkpoint: upload it to W&B if wanted."""
        if self.wandb and (link := self.wandb.checkpoint_to_upload(path, state.step, best)):
            self._record(state.step, event="checkpoint", path=link, best=best, tokens=state.tokens,
                         epoch=self.epochs(state), num_steps=self.num_steps, val_loss=state.val_loss)

    def finished(self, files):
        def number(value):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

        drawn = {title: [*values.values()] for title, values in self.drawn.items()}
        rows = [f"{title:10} {sparkline(values):40} {number(values[0])} → {number(values[-1])}"
                for title, values in drawn.items() if len(values) > 1]
        drawable = (sys.stdout.encoding or "").lower().startswith("utf")
        log.info("%s", "\n".join(["Training finished.", *(rows if drawable else [])]))
        log.info("Written: %s", ", ".join(files))
        log.info("curves: %s", command("report.py", self.beside(".pt"), "--terminal"))


def console_line(step, num_steps, m, seconds_per_step, amp):
    """The report as one line, without metrics that were not measured this time. Epochs count from 1 here."""
    parts = [f"epoch {max(1, math.ceil(m['train/epoch']))} step {step}/{num_steps}"]

    def show(text, *names):
        if all(name in m for name in names):
            parts.append(text.format(*(m[name] for name in names)))

    show("lr {:.2e}", "lr")
    show("step time {:.3g}s", "train/step_time_sec")
    show("tok/s {:,.0f}/rank {:,.0f} global", "tokens_per_sec_per_rank", "global_tokens_per_sec")
    show("train loss {:.4f}", "train/loss")
    show("val loss {:.4f}", "val/loss")
    show("val ppl {:.2f}", "val/ppl")
    show("val bpb {:.4f}", "val/bits_per_byte")
    show("grad norm {:.2f}", "train/grad_norm")
    if m.get("train/skipped_steps"):
        show("{} steps skipped", "train/skipped_steps")
    if "train/mfu" in m:
        parts.append(f"mfu {m['train/mfu']:.1%}")
    else:
        show("{:.3g} TFLOP/s", "train/tflops_per_rank")
    show("dt {:.2f}s", "time/dt_sec")
    if "lr" in m:  # steps were taken
        parts.append(f"eta {datetime.timedelta(seconds=round((num_steps - step) * seconds_per_step))}")
    return " | ".join([*parts, f"amp {amp}"])


def make_profiler(enabled, path, steps_left):
    """A torch.profiler of the fourth to sixth of `steps_left` steps, or a null object with the same `step()`."""
    if enabled and steps_left < 4:
        log.warning("--use-profiler: no trace, which begins with the fourth step of a start: there are %d to come; "
                    "raise --num-steps", steps_left)
    if not enabled or steps_left < 4:
        return contextlib.nullcontext(types.SimpleNamespace(step=lambda: None))

    def on_ready(profiler):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        if path.exists():  # torch does not report a full disk
            log.info("profile: %s (open it in https://ui.perfetto.dev)", path)
        else:
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
            log.warning("the profile could not be written: %s", path)

    return torch.profiler.profile(on_trace_ready=on_ready,
                                  schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1))
