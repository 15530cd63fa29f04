"""Pretrain a GPT on one device: `python train.py`. The other modes run this loop, each with a `World` of its own."""

import logging
import os
import time
from dataclasses import asdict, dataclass, field, replace

import torch

from data import BatchConfig, Corpus, DataConfig
from evaluate import evaluate
from generate import require_prompt, sample_text
from mini_llm import checkpoint, hardware, resume
from mini_llm.checkpoint import CheckpointConfig
from mini_llm.config import flag, flatten, parse
from mini_llm.errors import RunFailed, UserError, leave_on_sigterm, needed_packages
from mini_llm.facts import log_facts
from mini_llm.hardware import SpeedConfig
from mini_llm.meter import Meter
from mini_llm.pretrained import InitConfig, load_initial, resolve_init, resolve_vocab_size
from mini_llm.processes import StopSignal, refuse_torchrun, stop_when_orphaned
from mini_llm.saver import Saver, raise_nonfinite
from mini_llm.tracking import ReportConfig, Tracker, TrackingConfig, make_profiler, setup_logging
from mini_llm.wandb_runs import WandbConfig, provenance, sweep_trial, sync_command
from mini_llm.watchdog import Watchdog
from model import GPT, GPTConfig
from optim import OptimConfig, StepGuard, lr_at, make_optimizer, set_lr, state_sizes
from world import RanksConfig, World

log = logging.getLogger("mini_llm")


@dataclass
class Config:
    """Pretrain a GPT. With no flags: a small model on Python's standard library, offline, in minutes."""

    model: GPTConfig = field(default_factory=GPTConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    given = frozenset()  # names of the flags set explicitly, by `parse`; not annotated, so not a field itself


def train(cfg, world):
    """Train until `num_steps` or a stop signal. Returns the exit code: 0, or 128 + the signal number."""
    dry_run, batch_size = cfg.batch.dry_run, cfg.batch.batch_size
    if cfg.ranks.shard_ranks and world.shards == 1:
        raise UserError(f"--shard-ranks {cfg.ranks.shard_ranks}: only train_fsdp.py shards a model, over several "
                        f"ranks; take that, or --shard-ranks 0")
    world.require_same({flag(name): value for name, value in flatten(cfg).items()}, "flags")
    resume_from = checkpoint.plan_together(cfg.checkpoint, world, dry_run)
    cfg.model, cfg.init, cfg.data = world.from_main(lambda: resolve_init(cfg, resume_from))
    accum = cfg.batch.accum_steps(world.size, cfg.data.seq_len)
    precision = hardware.choose_precision(cfg.speed, world.device)
    cfg.optim.require_precision(precision.name)

    # The data, and what defines the run.
    global_batch_size = batch_size * accum * world.size  # sequences in a step
    world.from_main(lambda: resume.require_same_flags(resume_from, cfg, global_batch_size))
    earlier = world.from_main(lambda: resume.earlier_shards(resume_from, cfg))
    corpus = Corpus(cfg.data, cfg.model.vocab_size, writes=world.local_rank == 0, scratch=dry_run, earlier=earlier,
                    check=lambda folder: require_prompt(cfg.report.sample_prompt, folder))
    cfg.optim = cfg.optim.in_steps(global_batch_size, corpus.seq_len, corpus.n_windows)
    config = flatten(cfg)
    vocab_size = resolve_vocab_size(cfg.model, cfg.init, corpus.vocab_size, cfg.data.tokenizer_name)
    identity = resume.run_identity(cfg, corpus, vocab_size, global_batch_size)

    # The ranks must have the same data, precision and kind of device; then the checkpoint is read.
    # Muon's products in bf16 round differently on different GPUs and CPUs: replicas would drift apart.
    device = hardware.device_name(world.device) if cfg.optim.optimizer == "muon" else world.device.type
    world.require_same(identity, "data")
    world.require_same({"precision": precision.name, "device": device}, "devices",
                       "give an --amp-dtype that all have, or --no-amp, and under Muon devices that are the same")
    versions = world.from_main(provenance)  # of code and packages
    saved = resume_from and world.from_main(
        lambda: resume.load_for_resume(resume_from, cfg.checkpoint, identity, config, mends=not dry_run))

    torch.manual_seed(cfg.optim.seed)  # the same initial weights on every rank
    raw = world.place(lambda draw: GPT(replace(cfg.model, vocab_size=vocab_size), draw),
                      draw=not (saved or cfg.init.init_from))
    optimizer = make_optimizer(raw, cfg.optim, world.device, precision.dtype, world.orthogonalize)
    if not saved:
        state = load_initial(raw, optimizer, cfg.init, identity, world)
    scaler = precision.scaler()
    flops_per_token = raw.flops_per_token(corpus.seq_len)
    meter = Meter(world, flops_per_token, hardware.peak_flops(world.device), cfg.wandb.wandb_watch, batch_size,
                  cfg.report.log_steps)
    guard = StepGuard(cfg.optim, optimizer, scaler, world.device)
    parts = dict(model=raw, optimizer=optimizer, scaler=scaler, guard=guard, meter=meter)
    if saved:
        resume.log_versions(saved, versions)
        state = resume.restore(saved, parts, cfg.checkpoint.continues(resume_from), world)
    del saved  # else its tensors stay in memory for the whole run
    corpus.first_sample = state.first_sample
    fast = torch.compile(raw) if hardware.should_compile(cfg.speed, world.device) else raw
    world.require_replicas(raw, optimizer)
    model = world.wrap(fast)  # `model` takes the training steps, `fast` evaluates, `raw` is saved
    num_steps, eval_steps = cfg.optim.num_steps, cfg.report.eval_every(cfg.optim.num_steps)
    moment_bytes = state_sizes(optimizer)
    log_facts(cfg, world, corpus, raw, sum(moment_bytes), precision, accum, state, resume_from)

    def due(every, ahead=0):
        """Whether step `state.step + ahead` is a multiple of `every` (0: of none) or the run's last."""
        return state.step + ahead == num_steps or (every and (state.step + ahead) % every == 0)

    def epochs(at):
        """How often the data has been read at the State `at`: `state` or a copy of it."""
        return (at.first_sample + at.step * global_batch_size) / corpus.n_windows

    def forward_backward(micro):
        """One micro-batch of this rank → its loss. Gradients accumulate; the last averages them over the ranks."""
        with world.grad_sync(model, last=micro == accum - 1):
            with meter.forward, precision.autocast():
                batch = corpus.batch(state.step, batch_size, micro, accum, world.rank, world.size)
                loss = model(*hardware.to_device(world.device, *batch))  # (B, T) inputs and targets
            scaler.scale(loss / accum).backward()
        return loss.detach()

    def train_step():
        """One step of all ranks → (losses of this rank's micro-batches, gradient norm, whether taken) on the device."""
        world.begin_step(state.step + 1)
        hardware.seed_step(cfg.optim.seed, state.step, world.rank, world.device)
        set_lr(optimizer, lr_at(state.step, cfg.optim))
        losses = [forward_backward(micro) for micro in range(accum)]
        scaler.unscale_(optimizer)
        if due(cfg.report.log_steps, ahead=1):
            meter.watch(raw)
        norm = world.clip_gradients(raw, cfg.optim.grad_clip_norm or float("inf"))
        taken = guard.step(norm, state.step)
        optimizer.zero_grad(set_to_none=True)
        if taken is None:  # fp16 overflowed: repeat the step with the lower scale that the scaler has set
            return train_step()
        return torch.stack(losses), norm, taken

    def payload():
        """Everything a run needs to resume, on the main rank. Collective."""
        world.require_replicas(raw, optimizer)
        return world.full_state({name: part.state_dict() for name, part in parts.items()}) | dict(
            format=resume.FORMAT, state=asdict(state), identity=identity, config=config, start=corpus.start,
            tokens=os.path.abspath(corpus.folder), versions=versions)

    def halt():
        """Saves the weights and raises NonFinite, naming the samples of the last step. Collective."""
        last = payload()
        samples = corpus.samples((state.step - 1) * global_batch_size, min(global_batch_size, 64)).tolist()
        world.from_main(lambda: raise_nonfinite(cfg.checkpoint, last, world.saving, samples))

    def evaluate_now():
        with meter.excluded("eval"):
            return evaluate(fast, corpus, cfg, precision, world)

    def sample_now():
        with meter.excluded("sample"), precision.autocast():
            full = world.full_model(raw)
            world.from_main(lambda: track.sample(lambda: sample_text(
                full.to(world.device), cfg.checkpoint.beside(".tokenizer"), corpus, cfg.report.sample_prompt)))

    if dry_run:
        began = time.perf_counter()
        losses, _, _ = train_step()
        log.info("one step: loss %.4f in %.2f s; nothing written", losses.mean().item(), time.perf_counter() - began)
        return 0
    if state.step >= num_steps:
        lacking = cfg.wandb.use_wandb and cfg.checkpoint.beside(".wandb.json").exists()  # else nothing can be sent
        send = f"; rows that W&B lacks: {sync_command(cfg.checkpoint.beside('.pt'))}" if lacking else ""
        log.info("already at step %d of %d: raise --num-steps (or --num-epochs …) to go on%s", state.step, num_steps,
                 send)
        return 0

    world.from_main(lambda: checkpoint.claim(cfg, resume_from, 4 * raw.num_params() + sum(moment_bytes), state.step))
    stop = StopSignal(world, cfg.checkpoint.time_limit).listen()  # until the end of the loop
    # A warm-up pass whose gradients are discarded, with memory held for the optimizer state: OOM and compile errors
    # show before any file is replaced. DDP needs it, too: it regroups the gradients after its first backward pass,
    # which changes the order of summation from 3 ranks on: a resumed run's first step would differ in its last bits.
    held = [] if optimizer.state else [size // world.shards for size in moment_bytes]  # loaded: they are there already
    with Watchdog(meter, state, cfg, world.rank), hardware.reserved(held, world.device):
        for micro in sorted({0, accum - 1}):  # under DDP without the all-reduce, and with it
            forward_backward(micro)
        optimizer.zero_grad(set_to_none=True)
        if signal_number := world.max([stop.received])[0]:  # also a barrier: all have passed the warm-up
            log.info("stopped by %s before the first step: nothing has been replaced", stop.cause(signal_number))
            return 128 + signal_number
        world.from_main(lambda: corpus.export_tokenizer(cfg.checkpoint.beside(".tokenizer")))
        world.from_main(lambda: resume.remove_stale_files(cfg.checkpoint, resume_from, state.step))
        state.best_val = world.from_main(lambda: resume.loss_to_beat(cfg.checkpoint, state, cfg.report.eval_tokens))

    facts = config | corpus.facts | versions | dict(n_params=raw.num_params(), accum_steps=accum,
                                                    flops_per_token=flops_per_token)
    with (Tracker(cfg, world, state, epochs, precision.name, facts) as track,
          make_profiler(cfg.tracking.use_profiler and world.is_main, cfg.checkpoint.beside(".trace.json"),
                        num_steps - state.step) as profiler,
          stop, Watchdog(meter, state, cfg, world.rank)):
        saver = Saver(cfg.checkpoint, world, state, track)
        save_due = False  # --save-steps or --save-minutes has asked for a save that is still to come
        if state.step == 0:
            track.report(evaluate_now())
        while state.step < num_steps:
            losses, norm, taken = train_step()
            state.step += 1
            state.tokens += global_batch_size * corpus.seq_len
            meter.add(losses, norm, taken, tokens=batch_size * accum * corpus.seq_len)
            profiler.step()
            track.bar.update()
            # Three numbers on the CPU: does not wait for the GPU.
            signal_number, save_now, overdue = stop.agreed(saver.is_overdue())
            metrics, best = {}, False
            if cfg.ranks.check_replicas and state.step % cfg.ranks.check_replicas == 0:
                world.require_replicas(raw, optimizer)
            if due(cfg.report.log_steps):
                saver.conclude(wait=False)  # reports an --async-save that has ended meanwhile
                metrics = meter.report(ends_interval=state.step % cfg.report.log_steps == 0)
                metrics["lr"] = lr_at(state.step - 1, cfg.optim)  # of the step just taken
            if due(eval_steps):
                metrics |= evaluate_now()
                state.val_loss = metrics["val/loss"]
                best = cfg.checkpoint.save_best and state.val_loss < state.best_val and not meter.skipped_in_row
            if metrics:
                track.report(metrics)
            if due(cfg.report.log_steps) and meter.skipped_in_row >= cfg.optim.max_bad_steps:
                saver.conclude()
                halt()
            if due(cfg.report.sample_steps):  # before saving: a run killed in here repeats the step and its sample
                sample_now()
            save_due = save_due or overdue or due(cfg.checkpoint.save_steps)
            last = signal_number or state.step == num_steps
            # While steps are being skipped, these two wait: the weights may be the cause, and of no use. A signal's
            # save and the last one do not wait. (Reading `skipped_in_row` waits for the device.)
            newest = last or save_now or (save_due and not meter.skipped_in_row)
            if newest or best:
                with meter.excluded("checkpoint"):  # all ranks wait here: saving is not training time
                    saver.save(payload, newest, best, last)
            save_due = save_due and not newest
            if signal_number and state.step < num_steps:
                log.info("stopped by %s at step %d, saved; go on with --resume", stop.cause(signal_number), state.step)
                track.exit_code = 128 + signal_number
                break
        else:  # all steps taken: no signal has ended the loop
            track.finished(cfg.checkpoint.files())
    return track.exit_code


def main(world_type=World):
    try:
        cfg = parse(Config)
        cfg.wandb.require_best(cfg.checkpoint.save_best)
        if trial := sweep_trial():  # each trial of a sweep is a separate run
            cfg.checkpoint.checkpoint_path = str(cfg.checkpoint.beside(f".{trial}.pt"))
        if not world_type.launchers:
            refuse_torchrun()
            leave_on_sigterm()  # torchrun's ranks may be waiting for each other, and end at once
        stop_when_orphaned(world_type.launchers + bool(trial))  # a sweep's agent is a launcher, too
        world = world_type(cfg)
        setup_logging(world.is_main)
        with needed_packages():
            code = train(cfg, world)
            world.leave(0 if trial else code)  # W&B's agent gives up after five trials that fail
    except (UserError, RunFailed) as error:
        world_type.fail(error, 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:  # before there is anything to save, or a second Ctrl-C
        world_type.leave(130)
    except Exception as error:
        world_type.crash(error)
        raise


if __name__ == "__main__":
    main()
