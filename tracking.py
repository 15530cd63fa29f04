"""What is measured (`Meter`) and where it goes (`Tracker`): console, log file, metrics.jsonl, TensorBoard, W&B."""

import contextlib
import datetime
import importlib.util
import json
import logging
import math
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from logging.handlers import MemoryHandler

import torch
from tqdm import tqdm

from config import UserError, arg, flatten
from hardware import device_name, memory_metrics, synchronize

SMOOTHING = 0.1  # weight of the newest report in the smoothed/ metrics
SMOOTHED = {"loss": "train/loss", "tokens_per_sec": "global_tokens_per_sec", "mfu": "train/mfu",
            "step_time": "train/step_time_sec"}

log = logging.getLogger("mini_llm")


@dataclass
class ReportConfig:
    """Evaluation and reports"""

    log_steps: int = arg(10, "steps between reports", low=1)
    eval_steps: int | None = arg(None, "steps between evaluations; 0: only the first and the last; unset: 20 a run, "
                                       "but not more often than reports", low=0)
    eval_tokens: int = arg(16384, "validation tokens of one evaluation, spread evenly over the set; 0: all", low=0)
    sample_steps: int = arg(0, "steps between samples of generated text; 0: only at the end", low=0)

    def eval_every(self, num_steps):
        if self.eval_steps is not None:
            return self.eval_steps
        return self.log_steps * max(1, num_steps // 20 // self.log_steps)


@dataclass
class TrackingConfig:
    """Tracking"""

    use_wandb: bool = arg(False, "report to Weights & Biases, from rank 0")
    wandb_project: str = arg("mini-llm", "W&B project", metavar="NAME")
    wandb_run_name: str = arg("", "W&B run name; empty: W&B makes one up", metavar="NAME")
    use_tensorboard: bool = arg(False, "write TensorBoard events beside the checkpoint")
    use_profiler: bool = arg(False, "trace a few steps with torch.profiler")

    def validate(self):
        if self.use_tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--use-tensorboard: the tensorboard package is missing: pip install tensorboard")


def setup_logging(is_main):
    """Messages of all modules to stdout, from the main rank alone, around the progress bar. They are kept, too, for the
    log file, which is opened once it is known that there is something to train."""
    log.handlers, log.propagate = [_ConsoleHandler(), MemoryHandler(1000, flushLevel=logging.CRITICAL)], False
    log.setLevel(logging.INFO if is_main else logging.CRITICAL + 1)


FORMATTER = logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")


class _ConsoleHandler(logging.Handler):
    def emit(self, record):
        tqdm.write(FORMATTER.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_facts(cfg, world, corpus, raw, precision, accum, state):
    """Say what is about to be trained, on what."""
    tokens, n_params, size = corpus.meta["tokens"], raw.num_params(), raw.cfg
    micro = cfg.batch.batch_size * corpus.seq_len
    step_tokens = micro * accum * world.size
    # Weights, gradients and AdamW's moments in fp32; activations as counted by Korthikanti et al. 2022 (34 bytes a
    # token, layer and channel with flash attention and 16-bit products) and the logits with their gradient.
    fixed = 16 * n_params
    per_token = 34 * size.d_model * (1 if size.use_activation_checkpoint else size.n_layers) + 10 * size.vocab_size
    activations = micro * per_token * (1 if precision.dtype else 2)
    log.info(f"Using device: {world.device} ({device_name(world.device)}), {world.size} rank{'s'[:world.size > 1]}")
    log.info("Arguments: " + " ".join(f"{name}={value}" for name, value in flatten(cfg).items()))
    log.info(f"total tokens: {tokens['train']:,} train, {tokens['val']:,} val ({corpus.folder}); "
             f"vocabulary {size.vocab_size:,} ({corpus.meta['tokenizer']})")
    log.info(f"train dataset size: {corpus.n_windows:,}, val dataset size: {corpus.n_val_windows:,} sequences of "
             f"{corpus.seq_len}; steps per epoch: {corpus.n_windows * corpus.seq_len / step_tokens:,.1f}")
    if corpus.meta["entropy_rate"]:
        log.info(f"toy data: no model can get below a loss of {corpus.meta['entropy_rate']:.4f} nats per token")
    log.info(f"model: {size.arch}, {n_params:,} parameters, {raw.flops_per_token(corpus.seq_len):.3g} FLOPs per token; "
             f"about {(fixed + activations) / 1e9:.2f} GB ({fixed / 1e9:.2f} weights and optimizer, "
             f"{activations / 1e9:.2f} activations)")
    log.info(f"step: {step_tokens:,} tokens = {cfg.batch.batch_size} sequences x {corpus.seq_len} x {accum} "
             f"micro-batches x {world.size} ranks; amp {precision.name} ({precision.reason})")
    log.info(f"Resumed at step {state.step}" if state.step else "Starting from scratch")


class Meter:
    """Sums of what happens between two reports. Adding reads nothing back from the device; a report synchronizes once
    and reduces over the ranks once.

    The training clock stands still in `excluded(...)` and starts after the first step, which warms up and compiles.
    """

    def __init__(self, world, flops_per_token, peak_flops):
        self.world, self.flops_per_token, self.peak_flops = world, flops_per_token, peak_flops
        # float64 adds float32 losses without rounding, so that a sum interrupted by a resume is the same sum.
        exact = torch.float32 if world.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=exact, device=world.device)
        self.norm_sum = torch.zeros_like(self.loss_sum)
        self.micro_batches = 0
        self.smoothed = {}
        self.spent, self.tokens, self.steps, self.timed_steps = defaultdict(float), 0, 0, 0
        self.warm, self.started, self.grad_norm = False, time.perf_counter(), 0.0
        self.reported = self.started

    def add(self, losses, grad_norm, tokens):
        """One optimizer step of this rank: `losses`, (micro-batches,) on the device; its share of the tokens."""
        self.loss_sum += losses.sum(dtype=self.loss_sum.dtype)
        self.norm_sum += grad_norm
        self.grad_norm = grad_norm
        self.micro_batches += len(losses)
        self.steps += 1
        self.tokens += tokens
        if not self.warm:
            synchronize(self.world.device)
            self.warm, self.spent["warmup"] = True, self._clock()
            self._restart_clock()

    def _clock(self):
        return time.perf_counter() - self.started

    def _restart_clock(self):
        self.started, self.tokens, self.timed_steps = time.perf_counter(), 0, self.steps

    @contextlib.contextmanager
    def excluded(self, what):
        """Time in here is not training time: it is reported as time/`what`_sec."""
        synchronize(self.world.device)
        begin = time.perf_counter()
        yield
        synchronize(self.world.device)
        seconds = time.perf_counter() - begin
        self.spent[what] += seconds
        self.started += seconds

    def totals(self):
        """Loss sum, gradient norm sum and micro-batches since the last report, over all ranks. Collective."""
        return self.world.sum([self.loss_sum.item(), self.norm_sum.item(), self.micro_batches])

    def report(self, ends_interval=True):
        """The metrics since the last report, on every rank. Collective.

        A run's last report may come in the middle of an interval. It does not end it: a run that goes on from there,
        with a larger --num-steps, reports the loss of the whole interval, as if it had never stopped.
        """
        loss_sum, norm_sum, count = self.totals()
        synchronize(self.world.device)
        seconds, timed = self._clock(), self.steps - self.timed_steps
        metrics = {"train/loss": loss_sum / count, "train/grad_norm": float(self.grad_norm)}
        if not math.isfinite(norm_sum):
            metrics["train/grad_norm"] = norm_sum
        if timed:
            ranks = self.world.gather([self.tokens, seconds])  # (size, 2)
            rates = [tokens / time_ for tokens, time_ in ranks]
            total = sum(tokens for tokens, _ in ranks) / max(time_ for _, time_ in ranks)
            achieved = total * self.flops_per_token / self.world.size
            metrics |= {"train/step_time_sec": seconds / timed, "tokens_per_sec_per_rank": sum(rates) / len(rates),
                        "tokens_per_sec_per_rank/min": min(rates), "tokens_per_sec_per_rank/max": max(rates),
                        "global_tokens_per_sec": total, "train/tflops_per_rank": achieved / 1e12}
            if self.peak_flops:
                metrics["train/mfu"] = achieved / self.peak_flops
        for name, source in SMOOTHED.items():
            if ends_interval and source in metrics and math.isfinite(metrics[source]):
                old = self.smoothed.get(name, metrics[source])
                self.smoothed[name] = old + SMOOTHING * (metrics[source] - old)
        metrics |= {f"smoothed/{name}": value for name, value in self.smoothed.items()}
        metrics |= memory_metrics(self.world.device)
        metrics |= {"time/dt_sec": time.perf_counter() - self.reported, "steps": self.steps}
        metrics |= {f"time/{what}_sec": seconds for what, seconds in self.spent.items()}
        self.reported, self.steps = time.perf_counter(), 0
        self.spent.clear()
        if ends_interval:
            self.loss_sum.zero_()
            self.norm_sum.zero_()
            self.micro_batches = 0
        self._restart_clock()
        return metrics

    def state_dict(self):
        """The unfinished interval, for the checkpoint: a resumed run reports the loss of all of it. Collective."""
        loss_sum, norm_sum, count = self.totals()
        return dict(loss_sum=loss_sum, norm_sum=norm_sum, micro_batches=int(count), smoothed=dict(self.smoothed))

    def load_state_dict(self, state):
        self.smoothed = dict(state["smoothed"])
        if self.world.is_main:
            self.loss_sum.fill_(state["loss_sum"])
            self.norm_sum.fill_(state["norm_sum"])
            self.micro_batches = state["micro_batches"]


class Tracker:
    """Sends each report to the console and to every sink. On other ranks than the main one there are none."""

    def __init__(self, cfg, beside, world, state, num_steps, amp, config):
        """`beside(suffix)` names this run's files, `state` is where it starts, `config` is what it is tracked with."""
        self.num_steps, self.amp, self.checkpoint, self.exit_code = num_steps, amp, beside(".pt"), 0
        self.sinks, self.file = [], None
        if world.is_main:
            self._open(cfg, beside, state, config)
        self.bar = tqdm(total=num_steps, initial=state.step, unit="step", leave=False, dynamic_ncols=True,
                        disable=None if world.is_main else True)

    def _open(self, cfg, beside, state, config):
        beside(".log").parent.mkdir(parents=True, exist_ok=True)
        self.file = logging.FileHandler(beside(".log"), mode="a" if state.step else "w")
        self.file.setFormatter(FORMATTER)
        for early in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
            early.setTarget(self.file)
            early.flush()
            log.removeHandler(early)
        log.addHandler(self.file)
        self.sinks.append(JsonlSink(beside(".metrics.jsonl"), state.step))
        if cfg.use_tensorboard:
            self.sinks.append(TensorboardSink(beside(".tensorboard"), state.step))
        if cfg.use_wandb:
            from wandb_sink import WandbSink, stored_run_id

            state.wandb_run_id = stored_run_id(beside(".wandb.json"), state.wandb_run_id, config["resume"])
            self.sinks.append(WandbSink(cfg, state.wandb_run_id, config))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if kind:
            log.error("stopped by %s: %s", kind.__name__, error)
            if self.checkpoint.exists():
                log.error("the last checkpoint is %s: --resume goes on from it", self.checkpoint)
        for sink in self.sinks:
            sink.close(1 if kind else self.exit_code)
        if self.file:
            log.removeHandler(self.file)
            self.file.close()

    def report(self, state, epochs_per_step, metrics):
        """`metrics` under the names of the README's table: one line, and one row in every sink."""
        per_step = metrics.get("time/dt_sec", 0) / max(1, metrics.pop("steps", 1))
        metrics |= {"train/tokens": state.tokens, "train/epoch": state.step * epochs_per_step,
                    "amp": float(self.amp != "off")}
        log.info("%s", console_line(state.step, self.num_steps, metrics, per_step, self.amp))
        for sink in self.sinks:
            sink.log(state.step, metrics)

    def sample(self, step, make_text):
        try:
            log.info("sample at step %d:\n%s", step, make_text())
        except Exception as error:  # worth less than the run: no tokenizers package here, say
            log.warning("no sample: %s", error)

    def stopped(self, signal_number, step):
        log.info("stopped by %s at step %d, saved; go on with --resume", signal.Signals(signal_number).name, step)
        self.exit_code = 128 + signal_number

    def finished(self, files):
        log.info("Training finished. Written: %s", ", ".join(files))


def console_line(step, num_steps, m, seconds_per_step, amp):
    """The report as one line; what was not measured this time is left out. Epochs count from 1 here."""
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
    show("grad norm {:.2f}", "train/grad_norm")
    if "train/mfu" in m:
        parts.append(f"mfu {m['train/mfu']:.1%}")
    else:
        show("{:.3g} TFLOP/s", "train/tflops_per_rank")
    show("dt {:.2f}s", "time/dt_sec")
    if seconds_per_step:
        parts.append(f"eta {datetime.timedelta(seconds=round((num_steps - step) * seconds_per_step))}")
    return " | ".join([*parts, f"amp {amp}"])


class JsonlSink:
    """One JSON object a line and report, flushed. On resume, rows after the checkpoint's step are cut off: the run will
    write them again."""

    def __init__(self, path, start_step):
        kept = []
        if start_step and path.exists():
            with open(path) as file:
                kept = [line for line in file if _row_step(line) <= start_step]
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(kept))
        draft.replace(path)
        self.file = open(path, "a")  # noqa: SIM115 - closed in close()

    def log(self, step, metrics):
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no infinity
        self.file.write(json.dumps({"step": step, "time": time.time(), **row}) + "\n")
        self.file.flush()

    def close(self, exit_code):
        self.file.close()


def _row_step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the torn last line of a killed run
        return math.inf


class TensorboardSink:
    def __init__(self, folder, start_step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def log(self, step, metrics):
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self, exit_code):
        self.writer.close()


def make_profiler(enabled, path):
    """A torch.profiler that traces three steps after three of warm-up, or a null object with the same `step()`."""
    if not enabled:
        return contextlib.nullcontext(_NoProfiler())

    def on_ready(profiler):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.info("profile of 3 steps: %s (open it in https://ui.perfetto.dev)", path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, on_trace_ready=on_ready, record_shapes=True,
                                  schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1))


class _NoProfiler:
    def step(self):
        pass
