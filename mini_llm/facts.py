"""The first lines of a run's log: data, model, memory, steps."""

import logging
from dataclasses import replace

import torch

from mini_llm.config import flatten
from mini_llm.hardware import device_name, should_compile
from mini_llm.kernels import MAX_EXPLICIT_CONTEXT
from mini_llm.wandb_runs import WandbConfig

log = logging.getLogger("mini_llm")


def log_facts(cfg, world, corpus, raw, optimizer_bytes, precision, accum, state, resume_from):
    tokens, n_params = corpus.meta["tokens"], raw.num_params()
    micro = cfg.batch.batch_size * corpus.seq_len
    step_tokens, epoch_tokens = micro * accum * world.size, corpus.n_windows * corpus.seq_len
    run_tokens = cfg.optim.num_steps * step_tokens
    compiled = should_compile(cfg.speed, world.device)
    fixed = state_bytes(raw, optimizer_bytes, world, accum)
    activations = activation_bytes(raw, cfg.batch.batch_size, corpus.seq_len, precision.dtype, compiled)
    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
    if 1 < world.shards < world.size:
        ranks += f", each {world.shards} of which hold a replica of the model"
    elif world.shards > 1:
        ranks += ", which share one replica of the model"
    elif world.memory:
        ranks += ", which exchange gradients through shared memory"
    log.info(f"Using device: {world.device} ({device_name(world.device)}), {ranks}")
    log.info("Arguments: " + " ".join(f"{name}={value}" for name, value in flatten(cfg).items()
                                      if cfg.wandb.use_wandb or not name.startswith("wandb_")))
    log.info(f"total tokens: {tokens['train']:,} train, {tokens['val']:,} val ({corpus.folder}); "
             f"vocabulary {raw.cfg.vocab_size:,} ({corpus.meta['tokenizer']})")
    log.info(f"train dataset size: {corpus.n_windows:,}, val dataset size: {corpus.n_val_windows:,} sequences of "
             f"{corpus.seq_len}; steps per epoch: {epoch_tokens / step_tokens:,.1f}")
    if corpus.shares:
        log.info("samples: " + ", ".join(
            f"{share:.1%} of {name} ({shard.count:,} tokens, which this run reads "
            f"{run_tokens * share / shard.windows(corpus.seq_len) / corpus.seq_len:.3g} times)"
            for share, (name, shard) in zip(corpus.shares, corpus.train_sources.items(), strict=True)))
    if corpus.meta["entropy_rate"]:
        log.info(f"toy data: no model can get below a loss of {corpus.meta['entropy_rate']:.4f} nats per token")
    log.info(f"model: {raw.cfg.arch}, {n_params:,} parameters, {raw.flops_per_token(corpus.seq_len):.3g} FLOPs per "
             f"token; about {(fixed + activations) / 1e9:.2f} GB ({fixed / 1e9:.2f} weights and optimizer, "
             f"{activations / 1e9:.2f} activations)" + (" on each rank" if world.size > 1 else ""))
    log.info(f"step: {step_tokens:,} tokens = batch {cfg.batch.batch_size} x sequence {corpus.seq_len} x accumulation "
             f"{accum} x ranks {world.size}; amp {precision.name} ({precision.reason})"
             + ("; torch.compile, before the first step" if compiled else ""))
    log.info(f"run: {cfg.optim.num_steps:,} steps, {run_tokens:,} tokens: {run_tokens / epoch_tokens:.3g} epochs, "
             f"{run_tokens / n_params:.3g} tokens per parameter; evaluated every "
             f"{cfg.report.eval_every(cfg.optim.num_steps) or cfg.optim.num_steps:,} steps")
    if world.device.type == "mps" and max(micro, raw.cfg.vocab_size) >= 32767 and torch.__version__ < (2, 14):
        log.warning(f"PyTorch {torch.__version__} gets products over 32,767 and more elements wrong on M1 and M2, and "
                    f"this model has some (pytorch #193487): take PyTorch 2.14 or newer, or --device cpu")
    if not cfg.wandb.use_wandb and replace(cfg.wandb, wandb_watch="none") != WandbConfig():  # metrics.jsonl has those
        log.warning("not tracked by W&B: its other flags count with --use-wandb only")
    if cfg.optim.warmup_steps >= cfg.optim.num_steps:
        log.warning(f"--warmup-steps {cfg.optim.warmup_steps} is not below --num-steps: the run ends in the warm-up")
    log.info(f"Resumed at step {state.step} from {resume_from}" if resume_from else
             f"Starting from {cfg.init.init_from or 'scratch'}")


def activation_bytes(model, batch_size, seq_len, half, compiled):
    """About what a micro-batch keeps for its backward pass. Per token and layer, with products in 16 bits (`half`): 18
    bytes per channel, 8 of them of queries, keys, values and what attention returns, and 4 per channel of the MLP, for
    GPT-2 the 34 of Korthikanti et al. 2022; SwiGLU has two such channels, and RoPE and, in 16 bits, QK-norm keep copies
    of queries and keys, which the compiler mostly does without. Activation checkpointing keeps each layer's input and
    all of one layer. Logits and their gradient share a buffer in the chunked loss and if compiled."""
    cfg, parts = model.cfg, model.cfg.parts
    copies = 0 if compiled else 12 * bool(parts.rope_theta) + 16 * (half is not None and parts.qk_norm == "before")
    mlp = (6 if compiled else 8) if parts.mlp == "swiglu" else 4
    layer = 10 * cfg.d_model + (8 + copies) * cfg.n_heads * cfg.head_size + mlp * cfg.ff_size
    if model.head_weight.device.type == "cpu":  # the attention weights, of which the fused kernel keeps none
        explicit = half and seq_len <= MAX_EXPLICIT_CONTEXT
        weight = 2 if explicit else 0
        if cfg.dropout:  # and their masks; the fused kernel has no dropout there, and what replaces it keeps fp32
            weight = 4 if explicit else 12 if half else 6
        layer += weight * cfg.n_heads * seq_len
    layers = layer + 2 * cfg.d_model * cfg.n_layers if cfg.use_activation_checkpoint else layer * cfg.n_layers
    logits = (2 if model.chunks_loss or compiled else 10 if half else 6) * cfg.vocab_size
    return batch_size * seq_len * (layers + logits) * (1 if half else 2)


def state_bytes(model, optimizer_bytes, world, accum):
    """About what each rank keeps of weights and gradients, in fp32, and of the optimizer's `optimizer_bytes`."""
    n_params, n_trained = model.num_params(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = 4 * (n_params + n_trained) + optimizer_bytes
    if world.shards > 1:  # plus what is gathered at a time: all outside the blocks, and two blocks
        n_blocks = sum(p.numel() for p in model.blocks.parameters())
        return whole // world.shards + 8 * (n_params - n_blocks + 2 * n_blocks // model.cfg.n_layers)
    # DDP's buckets are the gradients only in the last micro-batch.
    return whole + 4 * n_trained * (world.size > 1 and accum > 1)
