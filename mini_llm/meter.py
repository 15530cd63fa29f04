"""Metrics measured between two reports: loss, throughput, timings, memory."""

import contextlib
import math
import time
from collections import defaultdict, deque

import numpy as np
import torch

from mini_llm.hardware import Stopwatch, memory_metrics, synchronize

SMOOTHING = 0.1  # weight of the newest report in the smoothed/ metrics
PART = 1 << 24  # values that are counted at once for a histogram
SMOOTHED = {"loss": "train/loss", "tokens_per_sec": "global_tokens_per_sec", "mfu": "train/mfu",
            "step_time": "train/step_time_sec"}


class Meter:
    """Accumulates what is measured between two reports. `add` reads nothing back from the device; a report synchronizes
    with it and reduces over the ranks. The training clock stops in `excluded` and starts after the first, slow step."""

    def __init__(self, world, flops_per_token, peak_flops, watch="none", batch_size=1, log_steps=1):
        """`batch_size`: sequences per micro-batch; `log_steps`: steps in an interval."""
        self.batch_size, self.log_steps = batch_size, log_steps
        self.world, self.flops_per_token, self.peak_flops = world, flops_per_token, peak_flops
        self.watch_what = watch if world.is_main else "none"
        self.watched = {}  # the histograms for the next report
        self.forward = Stopwatch(world.device)  # times work in which a rank does not wait for others
        # float64 adds float32 losses without rounding, so a sum interrupted by a resume comes out the same.
        exact = torch.float32 if world.device.type == "mps" else torch.float64
        self.loss_sum, self.micro_batches = torch.zeros(2, dtype=exact, device=world.device).unbind()
        self.restored = [0.0, 0]  # the checkpoint's totals, over all ranks, of the interval in which it was saved
        # Skipped steps in total, and steps in a row with a NaN or infinite gradient norm. The same on every rank.
        self.skipped, self.skipped_in_row = torch.zeros(2, dtype=torch.int64, device=world.device).unbind()
        self.smoothed = {}
        self.grad_norm = 0.0  # of the newest step
        self.warm = False  # whether the first step has been taken
        self.spent = defaultdict(float)  # activity → seconds since the last report
        # The training clock: when it was started, later by what was excluded; the tokens and steps since then.
        self.started, self.tokens, self.steps = time.perf_counter(), 0, 0
        self.reported = self.started  # when the last report was
        # For the watchdog: the current activity and its start, and how long recent activities took, in host time.
        self.doing = "step", self.started
        self.lasted = defaultdict(lambda: deque(maxlen=100))

    def add(self, losses, grad_norm, taken, tokens):
        """Add one optimizer step of this rank: `losses`, (micro-batches,), and whether it was `taken`, on the device;
        `tokens`: this rank's share. A step not taken counts as skipped, and its loss is ignored."""
        self.loss_sum += torch.where(taken, losses.sum(dtype=self.loss_sum.dtype), 0)
        self.micro_batches += taken * len(losses)
        self.skipped += ~taken
        self.skipped_in_row.add_(1).mul_(~torch.isfinite(grad_norm))  # a spike does not count towards a halt
        self.grad_norm = grad_norm
        self.steps += 1
        self.tokens += tokens
        now = time.perf_counter()
        self.lasted["step"].append(now - self.doing[1])
        self.doing = "step", now
        if not self.warm:
            synchronize(self.world.device)
            self.warm, self.spent["warmup"] = True, self._clock()
            self._restart_clock()

    def watch(self, model):
        """Compute histograms of the model's gradients and parameters for the next report (--wandb-watch)."""
        self.watched = histograms(model, self.watch_what)

    def _clock(self):
        return time.perf_counter() - self.started

    def _restart_clock(self):
        self.forward.read()  # discards the time of the warm-up
        self.started, self.tokens, self.steps = time.perf_counter(), 0, 0

    @contextlib.contextmanager
    def excluded(self, what):
        """Exclude the time of this block from training time; it is reported as time/`what`_sec."""
        synchronize(self.world.device)
        outer, since = self.doing
        began = time.perf_counter()
        self.doing = what, began
        yield
        synchronize(self.world.device)
        seconds = time.perf_counter() - began
        self.lasted[what].append(seconds)
        self.doing = outer, since + seconds
        self.spent[what] += seconds
        self.started += seconds

    def totals(self):
        """Loss sum and number of micro-batches of the interval so far, over all ranks. Collective."""
        mine = torch.stack([self.loss_sum, self.micro_batches]).tolist()
        return [now + before for now, before in zip(self.world.sum(mine), self.restored, strict=True)]

    def report(self, ends_interval=True):
        """The metrics since the last report, on every rank. Collective. A run's last report need not end an interval: a
        run resumed from there, with a larger --num-steps, reports the loss of the whole interval."""
        loss_sum, count = self.totals()
        synchronize(self.world.device)
        speed = self._speed()  # first: what follows is no training
        metrics = {"train/loss": loss_sum / count if count else math.nan, "train/grad_norm": float(self.grad_norm),
                   "train/skipped_steps": self.skipped.item(),
                   "rank/loss": (self.loss_sum / self.micro_batches).item()} | speed
        for name, source in SMOOTHED.items():
            if ends_interval and source in metrics and math.isfinite(metrics[source]):
                old = self.smoothed.get(name, metrics[source])
                self.smoothed[name] = old + SMOOTHING * (metrics[source] - old)
        metrics |= {f"smoothed/{name}": value for name, value in self.smoothed.items()}
        memory = memory_metrics(self.world.device)
        metrics |= memory | {f"rank/{name}": value for name, value in memory.items()}
        metrics["time/dt_sec"] = time.perf_counter() - self.reported
        metrics |= {f"time/{what}_sec": seconds for what, seconds in self.spent.items()}
        for name, (counts, low, high) in self.watched.items():
            edges = np.linspace(float(low), float(high), len(counts) + 1)
            metrics[name] = dict(counts=counts.tolist(), edges=edges.tolist())
        self.reported, self.watched = time.perf_counter(), {}
        self.spent.clear()
        if ends_interval:
            for total in (self.loss_sum, self.micro_batches):
                total.zero_()
            self.restored = [0.0, 0]
        self._restart_clock()
        return metrics

    def _speed(self):
        """Collective. Throughput of all ranks and of this one (rank/…) since the clock started; {} without a step."""
        seconds, steps, forward = self._clock(), self.steps, self.forward.read()
        if not steps:
            return {}
        tokens, times, forwards = zip(*self.world.gather([self.tokens, seconds, forward / steps]), strict=True)
        total = sum(tokens) / max(times)
        achieved = total * self.flops_per_token / self.world.size
        metrics = {"train/step_time_sec": seconds / steps, "global_tokens_per_sec": total,
                   "train/tflops_per_rank": achieved / 1e12, "rank/tokens_per_sec": self.tokens / seconds,
                   "rank/step_time_sec": seconds / steps}
        metrics |= _spread("tokens_per_sec_per_rank", [n / took for n, took in zip(tokens, times, strict=True)])
        # On Metal it would only measure submitting work to the device; of shards, also waiting for other ranks.
        if self.world.device.type != "mps" and self.world.shards == 1:
            metrics["rank/forward_time_sec"] = forward / steps
            metrics |= _spread("train/forward_time_sec", forwards)
        if self.peak_flops:
            metrics["train/mfu"] = achieved / self.peak_flops
        return metrics

    def state_dict(self):
        """The unfinished interval, for the checkpoint: a resumed run reports the whole interval's loss. Collective."""
        loss_sum, count = self.totals()
        return dict(loss_sum=loss_sum, micro_batches=count, batch_size=self.batch_size, log_steps=self.log_steps,
                    smoothed=dict(self.smoothed), skipped=[self.skipped.item(), self.skipped_in_row.item()])

    def load_state_dict(self, state):
        self.smoothed = dict(state["smoothed"])
        # Rescaled to this run's micro-batches; not restored if its intervals have another length.
        share = state["batch_size"] / self.batch_size
        if state.get("log_steps", self.log_steps) == self.log_steps:
            self.restored = [state["loss_sum"] * share, state["micro_batches"] * share]
        for count, before in zip((self.skipped, self.skipped_in_row), state["skipped"], strict=True):
            count.fill_(before)


def _spread(name, values):
    """Mean, minimum and maximum over the ranks."""
    return {name: sum(values) / len(values), f"{name}/min": min(values), f"{name}/max": max(values)}


def histograms(model, what, bins=64):
    """`gradients/NAME` and `parameters/NAME` → (counts, minimum, maximum), on the device, for --wandb-watch."""
    found = {}
    for kind in ("gradients", "parameters"):
        for name, parameter in model.named_parameters() if what in (kind, "all") else ():
            values = parameter.grad if kind == "gradients" else parameter.detach()
            if values is not None:
                values = values.float().nan_to_num(0, 0, 0).flatten()
                low, high = values.aminmax()
                high = torch.where(high > low, high, low + 1)
                counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
                # Not torch.histc: on a GPU, it synchronizes to read the range, and has no deterministic kernel. In
                # parts, as it takes 20 bytes a value: 10 GB for the embedding of Llama 3 8B.
                for part in values.split(PART):
                    index = ((part - low) / (high - low) * bins).long().clamp_(0, bins - 1)
                    counts.scatter_add_(0, index, torch.ones_like(index))
                found[f"{kind}/{name}"] = counts, low, high
    return found
