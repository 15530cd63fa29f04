"""The optimizer and its schedule: parameter groups, AdamW, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

import torch

from config import UserError, arg


@dataclass
class OptimConfig:
    """Optimization"""

    num_steps: int = arg(1000, "optimizer steps in all", low=1)
    lr: float = arg(1e-3, "peak learning rate", above=0)
    min_lr: float | None = arg(None, "learning rate at the end of the schedule; unset: lr / 10", low=0)
    lr_scheduler: str = arg("cosine", "shape after the warm-up; wsd: constant, then linear over the last fifth",
                            choices=("cosine", "wsd", "linear", "none"))
    warmup_steps: int = arg(100, "steps over which the learning rate rises to its peak", low=0)
    weight_decay: float = arg(0.1, "decoupled, on matrices only", low=0)
    beta1: float = arg(0.9, "AdamW's decay of the first moment", low=0, below=1)
    beta2: float = arg(0.95, "AdamW's decay of the second moment", low=0, below=1)
    grad_clip_norm: float = arg(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    seed: int = arg(1337, "seed of the weights and of dropout", low=0)

    def validate(self):
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower it, or leave it out for lr / 10")


def lr_at(step, cfg):
    """The learning rate of optimizer step `step`, counted from 0: a linear warm-up that reaches the peak in its last
    step, then the schedule, which reaches `min_lr` in the run's last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_scheduler == "none":
        return cfg.lr
    floor = cfg.lr / 10 if cfg.min_lr is None else cfg.min_lr
    start = cfg.warmup_steps
    if cfg.lr_scheduler == "wsd":  # warm-up, stable, decay (Hu et al. 2024)
        start = max(start, cfg.num_steps - max(1, cfg.num_steps // 5))
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, cfg.num_steps - start)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if cfg.lr_scheduler == "cosine" else 1 - progress
    return floor + (cfg.lr - floor) * shape


def make_optimizer(model, cfg, device):
    """AdamW (Loshchilov & Hutter 2019), fused, with decay on matrices and none on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    # A learning rate that is a plain number would be compiled and copied anew each time it changes.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                             fused=device.type in ("cuda", "cpu"))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
