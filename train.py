"""Pretrain a GPT on one device: `python train.py`.

The loop here is the only one. `train_ddp.py` runs it with a `World` of many processes.
"""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from dataclasses import dataclass, field

import torch

import checkpoint
import hardware
from checkpoint import CheckpointConfig, State, StopSignal
from config import UserError, arg, flatten, parse
from data import Corpus, DataConfig
from generate import sample_text
from hardware import SpeedConfig
from model import GPT, IGNORE, GPTConfig
from optim import OptimConfig, lr_at, make_optimizer, set_lr
from tracking import Meter, ReportConfig, Tracker, TrackingConfig, log_facts, make_profiler, setup_logging

log = logging.getLogger("mini_llm")


@dataclass
class BatchConfig:
    """Batch"""

    batch_size: int = arg(8, "sequences in one micro-batch of one rank", low=1)
    grad_accum_steps: int = arg(1, "micro-batches in one optimizer step", low=1)
    global_batch_tokens: int = arg(0, "tokens in one step of all ranks, from which --grad-accum-steps follows", low=0)
    dry_run: bool = arg(False, "say what would be trained and how large it is, take one step, write nothing")

    def accum_steps(self, world_size, seq_len):
        """Micro-batches of each rank in one optimizer step. Raises UserError where the global batch does not divide."""
        if not self.global_batch_tokens:
            return self.grad_accum_steps
        micro = self.batch_size * world_size * seq_len
        if self.global_batch_tokens % micro:
            nearest = max(1, round(self.global_batch_tokens / micro)) * micro
            raise UserError(f"--global-batch-tokens {self.global_batch_tokens} is not a multiple of --batch-size "
                            f"{self.batch_size} x {world_size} ranks x --seq-len {seq_len} = {micro}; try {nearest}")
        return self.global_batch_tokens // micro


@dataclass
class Config:
    """Pretrain a GPT. With no flags: a small model on Python's standard library, offline, in about three minutes."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self):
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(f"--seq-len {self.data.seq_len} is above --max-position-embeddings "
                            f"{self.model.max_position_embeddings}; raise the latter or lower the former")
        if self.batch.global_batch_tokens and self.batch.grad_accum_steps > 1:
            raise UserError("--global-batch-tokens decides --grad-accum-steps: give one of them")


class World:
    """The processes that train together: here, one. `train_ddp.py` has the other kind."""

    rank = local_rank = node_rank = 0
    size = local_size = 1
    is_main = True  # global rank 0: the one that logs and saves

    def __init__(self, cfg):
        self.device = hardware.configure(cfg, hardware.choose_device(cfg.device, self.local_rank))

    def wrap(self, model):
        """The module whose backward pass averages gradients over the ranks."""
        return model

    def grad_sync(self, model, last):
        """Around forward and backward of a micro-batch: gradients are averaged in the last one only."""
        return contextlib.nullcontext()

    def sum(self, values):
        """Numbers → their sums over the ranks, float64."""
        return list(values)

    def gather(self, values):
        """Numbers of each rank, in the order of ranks."""
        return [list(values)]

    def max(self, value):
        """A whole number → the largest of all ranks."""
        return value

    def from_main(self, make):
        """What `make()` returns, or raises, on the main rank: the same on every rank."""
        return make()

    def require_same(self, value, what):
        """Collective. Raises UserError on every rank where one has another `value` than the main rank."""
        if self.max(value != self.from_main(lambda: value)):
            raise UserError(f"the ranks have different {what}; start every node with the same command and files")

    @staticmethod
    def fail(error, code):
        """Tell the user of an error and leave; there may be no world yet."""
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)

    def close(self):
        pass


class NonFinite(Exception):
    """The loss or the gradient is no number any more."""


@torch.no_grad()
def evaluate(model, corpus, cfg, precision, world):
    """Loss over the validation windows in nats per token, and what follows from it. Each rank takes its share and the
    sums are reduced, so that the figure does not depend on the number of ranks. Collective."""
    model.eval()
    nats, n_tokens = [], 0
    for x, y, rows in corpus.val_batches(cfg.report.eval_tokens, cfg.batch.batch_size, world.rank, world.size):
        y[rows:] = IGNORE
        with precision.autocast():
            nats.append(model(*hardware.to_device(world.device, x, y), reduction="sum"))
        n_tokens += rows * corpus.seq_len
    model.train()
    nats, n_tokens = world.sum([math.fsum(map(float, nats)), n_tokens])
    loss = nats / n_tokens
    return {"val/loss": loss, "val/ppl": math.exp(loss) if loss < 700 else math.inf,
            "val/bits_per_byte": loss / math.log(2) / corpus.val_bytes_per_token}


def train(cfg, world):
    """Train until `num_steps`, or until a signal. Returns the exit code: 0, or 128 + the signal's number."""
    dry_run, config, batch_size = cfg.batch.dry_run, flatten(cfg), cfg.batch.batch_size
    world.require_same(config, "flags")
    resume_from = None if dry_run else world.from_main(lambda: checkpoint.plan(cfg.checkpoint))
    corpus = Corpus(cfg.data, cfg.model.vocab_size, writes=world.local_rank == 0, scratch=dry_run)
    accum = cfg.batch.accum_steps(world.size, corpus.seq_len)
    step_samples = batch_size * accum * world.size
    epochs_per_step = step_samples / corpus.n_windows
    identity = checkpoint.run_identity(cfg, corpus, step_samples)
    world.require_same(identity, "data")
    saved = resume_from and world.from_main(lambda: checkpoint.restore(resume_from, cfg.checkpoint, identity, config))

    precision = hardware.choose_precision(cfg.speed, world.device)
    torch.manual_seed(cfg.optim.seed)  # the same weights on every rank
    raw = GPT(dataclasses.replace(cfg.model, vocab_size=identity["--vocab-size"])).to(world.device)
    optimizer, scaler = make_optimizer(raw, cfg.optim, world.device), precision.scaler()
    meter = Meter(world, raw.flops_per_token(corpus.seq_len), hardware.peak_flops(world.device))
    parts, state = dict(model=raw, optimizer=optimizer, scaler=scaler, meter=meter), State()
    if saved:
        # Decay and betas are the flags', not those of the run that is resumed.
        saved["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
        for name, part in parts.items():
            if saved[name]:  # a scaler is empty but in fp16
                part.load_state_dict(saved[name])
        state = State(**saved["state"])
        if not cfg.checkpoint.continues(resume_from):
            state.wandb_run_id = ""  # a branch of a run is a run of its own
        del saved
    fast = torch.compile(raw) if hardware.should_compile(cfg.speed, world.device) else raw
    model = world.wrap(fast)  # for the training step; `fast` evaluates, `raw` is saved
    num_steps, eval_steps = cfg.optim.num_steps, cfg.report.eval_every(cfg.optim.num_steps)
    log_facts(cfg, world, corpus, raw, precision, accum, state)

    def train_step():
        """One optimizer step of all ranks → (losses of this rank's micro-batches, gradient norm), on the device; None
        where fp16 overflowed: then nothing has changed but the scale, and the step is to be repeated."""
        hardware.seed_step(cfg.optim.seed, state.step, world.rank)
        set_lr(optimizer, lr_at(state.step, cfg.optim))
        losses = []
        for micro in range(accum):
            batch = corpus.batch(state.step, micro, accum, batch_size, world.rank, world.size)
            x, y = hardware.to_device(world.device, *batch)  # (B, T) each
            with world.grad_sync(model, last=micro == accum - 1):
                with precision.autocast():
                    loss = model(x, y)
                scaler.scale(loss / accum).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.optim.grad_clip_norm or math.inf)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if scaler.get_scale() < scale:
            check_finite(scale >= 1)
            return None
        return torch.stack(losses), norm

    def payload():
        """All that a resumed run needs. Collective."""
        return {name: part.state_dict() for name, part in parts.items()} | dict(
            format=checkpoint.FORMAT, state=dataclasses.asdict(state), identity=identity, config=config,
            torch=str(torch.__version__))

    def check_finite(finite):
        """Halt where loss or gradient are no numbers: the same decision on every rank, since both are reduced."""
        if not finite:
            last, path = payload(), cfg.checkpoint.beside(".nonfinite.pt")
            world.from_main(lambda: checkpoint.save(path, last))
            raise NonFinite(f"loss or gradient is not finite at step {state.step}; this state is in {path}, and "
                            f"--resume with a lower --lr goes on from the last good checkpoint")

    def save(latest, best):
        with meter.excluded("checkpoint"):
            now = payload()
            check_finite(math.isfinite(now["meter"]["loss_sum"] + now["meter"]["norm_sum"]))
            # The other ranks wait here, and not in the next step, where it would count as training.
            world.from_main(lambda: checkpoint.save_run(cfg.checkpoint, now, state.step, latest, best))

    evaluate_now = meter.excluded("eval")(lambda: evaluate(fast, corpus, cfg, precision, world))

    def due(every):
        return state.step == num_steps or (every and state.step % every == 0)

    if dry_run:
        began = time.perf_counter()
        while (done := train_step()) is None:
            pass
        log.info("one step: loss %.4f in %.2f s; nothing written", done[0].mean(), time.perf_counter() - began)
        return 0
    if state.step >= num_steps:
        log.info("already at step %d of %d: raise --num-steps to train on", state.step, num_steps)
        return 0
    if world.is_main:
        corpus.export_tokenizer(cfg.checkpoint.beside(".tokenizer"))
        if cfg.checkpoint.overwrite:
            checkpoint.begin(cfg.checkpoint, resume_from, state.step)

    facts = config | dict(world_size=world.size, n_params=raw.num_params(), accum_steps=accum)
    with (Tracker(cfg.tracking, cfg.checkpoint.beside, world, state, num_steps, precision.name, facts) as track,
          make_profiler(cfg.tracking.use_profiler and world.is_main, cfg.checkpoint.beside(".trace.json")) as profiler,
          StopSignal(world) as stop):
        if state.step == 0:
            track.report(state, epochs_per_step, evaluate_now())
        while state.step < num_steps:
            if (done := train_step()) is None:
                continue
            state.step += 1
            state.tokens += step_samples * corpus.seq_len
            meter.add(*done, tokens=batch_size * accum * corpus.seq_len)
            profiler.step()
            track.bar.update()
            metrics, best, signal_number = {}, False, stop.agreed()
            if due(cfg.report.log_steps):
                metrics = meter.report(ends_interval=state.step % cfg.report.log_steps == 0)
                metrics["lr"] = lr_at(state.step - 1, cfg.optim)  # the rate of the step just taken
                check_finite(math.isfinite(metrics["train/loss"] + metrics["train/grad_norm"]))
            if due(eval_steps):
                metrics |= evaluate_now()
                best, state.best_val = metrics["val/loss"] < state.best_val, min(state.best_val, metrics["val/loss"])
            if metrics:
                track.report(state, epochs_per_step, metrics)
            if (latest := due(cfg.checkpoint.save_steps) or signal_number) or best:
                save(latest, best)
            if due(cfg.report.sample_steps):
                with meter.excluded("sample"), precision.autocast():
                    world.from_main(lambda: track.sample(
                        state.step, lambda: sample_text(raw, cfg.checkpoint.beside(".tokenizer"), corpus.eos)))
            if signal_number and state.step < num_steps:
                track.stopped(signal_number, state.step)
                break
        else:
            track.finished(cfg.checkpoint.files())
    return track.exit_code


def main(world_type=World):
    try:
        cfg = parse(Config)
        world = world_type(cfg.speed)
        setup_logging(world.is_main)
        code = train(cfg, world)
        world.close()  # only now: where one rank has failed, waiting for the others could wait for ever
        sys.exit(code)
    except (UserError, NonFinite) as error:
        world_type.fail(error, 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:  # before there was anything to save
        sys.exit(130)


if __name__ == "__main__":
    main()
