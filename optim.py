"""The optimizer and the learning rate schedule: AdamW, Muon, and the learning rate as a pure function of the step."""

import inspect
import math
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mini_llm.config import arg
from mini_llm.errors import UserError

# Progress from the peak (0) to the end (1) → height above the floor, from 1 to 0.
SCHEDULES = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress: 1 - progress,  # over the last fifth only, unless --decay-steps is given
    "linear": lambda progress: 1 - progress,
    "none": lambda progress: 1.0,
}
MOMENTUM = 0.95  # Muon's, as in modded-nanogpt and nanochat


@dataclass
class OptimConfig:
    """Optimization"""

    ALTERNATIVES = "num_steps", "num_tokens", "num_epochs"
    optimizer: str = arg("adamw", "muon: Muon for the matrices inside the blocks, AdamW for all else",
                         choices=("adamw", "muon"))
    num_steps: int = arg(1000, "optimizer steps in all", ge=1, le=10**9)
    num_tokens: float = arg(0.0, "length of the run in tokens instead, such as 10e9; 0: see --num-steps", ge=0, le=1e15)
    num_epochs: float = arg(0.0, "length of the run in passes over the training text instead, such as 1.5; 0: see "
                                   "--num-steps", ge=0, le=10**6)
    lr: float = arg(1e-3, "peak learning rate", gt=0)
    muon_lr: float = arg(0.02, "Muon's peak learning rate; rises and falls with the schedule of --lr", gt=0)
    min_lr: float | None = arg(None, "learning rate at the end of the schedule; unset: lr / 10", ge=0)
    lr_scheduler: str = arg("cosine", "shape after the warm-up; wsd: constant, then linear over the last fifth",
                            choices=tuple(SCHEDULES))
    warmup_steps: int = arg(100, "steps over which the learning rate rises to its peak", ge=0)
    decay_steps: int = arg(0, "the run's last steps, over which the learning rate falls; 0: all after the warm-up, or "
                              "for wsd the last fifth of the run", ge=0)
    weight_decay: float = arg(0.1, "decoupled, on matrices only", ge=0)
    beta1: float = arg(0.9, "AdamW's decay of the first moment", ge=0, lt=1)
    beta2: float = arg(0.95, "AdamW's decay of the second moment", ge=0, lt=1)
    grad_clip_norm: float = arg(1.0, "clip the gradients' global norm to this maximum; 0: off", ge=0)
    max_bad_steps: int = arg(10, "halt at the next report after this many steps in a row with a NaN or infinite "
                                 "gradient; each of them is skipped", ge=1)
    skip_loss_spikes: float = arg(0.0, "skip steps whose gradient norm is more than X standard deviations above the "
                                       "mean of the last 128; 0: off; 6 is a usual value", ge=0)
    seed: int = arg(1337, "seed of the weights and of dropout", ge=0)

    def validate(self):
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower it, or leave it out for lr / 10")
        if self.decay_steps and self.lr_scheduler == "none":
            raise UserError(f"--decay-steps {self.decay_steps}: --lr-scheduler none has no decay; take wsd")

    def require_precision(self, name):
        """Raises UserError for flags that do not go with the Precision of this name."""
        if self.skip_loss_spikes and name == "fp16":
            raise UserError("--skip-loss-spikes: in fp16 it is the scaler that skips steps; take --amp-dtype bf16")

    def in_steps(self, global_batch_size, seq_len, n_windows):
        """These settings with the length of the run in steps, rounded up, however it was given. `global_batch_size`:
        sequences in a step; `n_windows`: sequences in an epoch. Raises UserError."""
        sequences = self.num_epochs * n_windows or self.num_tokens / seq_len
        steps = math.ceil(round(sequences / global_batch_size, 6))  # 0.07 x 100 is above 7
        num_steps = max(1, steps) if sequences else self.num_steps
        if num_steps > 10**9:
            given = f"epochs {self.num_epochs:g}" if self.num_epochs else f"tokens {self.num_tokens:g}"
            raise UserError(f"--num-{given}: {num_steps:,} steps, of which a run has 1,000,000,000 at most; lower it, "
                            f"or raise --batch-size")
        return replace(self, num_steps=num_steps, num_tokens=0.0, num_epochs=0.0)


def state_sizes(optimizer):
    """Bytes of each tensor of optimizer state: AdamW keeps two fp32 moments per parameter, Muon one."""
    return [4 * p.numel() for group in optimizer.param_groups for p in group["params"]
            for _ in range(1 if group.get("rule") == "muon" else 2)]


def lr_at(step, cfg):
    """The learning rate of optimizer step `step` (counted from 0): a linear warm-up that reaches the peak at its last
    step, then the schedule, which reaches `min_lr` at the run's last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    floor = cfg.lr / 10 if cfg.min_lr is None else cfg.min_lr
    # wsd: warm-up, stable, decay (Hu et al. 2024).
    decay_steps = cfg.decay_steps or (max(1, cfg.num_steps // 5) if cfg.lr_scheduler == "wsd" else cfg.num_steps)
    start = max(cfg.warmup_steps, cfg.num_steps - decay_steps)
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, cfg.num_steps - start)))
    height = SCHEDULES[cfg.lr_scheduler](progress)
    return height * cfg.lr + (1 - height) * floor


def make_optimizer(model, cfg, device, matmul_dtype=None, orthogonalizer=None):
    """Fused AdamW (Loshchilov & Hutter 2019), with weight decay on matrices only. With `--optimizer muon`, Muon updates
    those in the blocks; `orthogonalizer`, World.orthogonalize, computes in bf16 if that is `matmul_dtype`."""

    def is_hidden(name, p):
        return cfg.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2

    # (name, parameter) pairs: optimizer state is saved by place, so resuming compares the names.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [(name, p) for name, p in named if is_hidden(name, p)]
    others = [(name, p) for name, p in named if not is_hidden(name, p)]
    muon = [dict(rule="muon", params=[(name, p) for name, p in hidden if p.shape == shape], momentum=MOMENTUM,
                 weight_decay=cfg.weight_decay, lr_ratio=cfg.muon_lr / cfg.lr)
            for shape in dict.fromkeys(p.shape for _, p in hidden)]
    options = dict(rule="adamw", betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu"))
    adamw = [dict(params=[(name, p) for name, p in others if p.ndim >= 2], weight_decay=cfg.weight_decay, **options),
             dict(params=[(name, p) for name, p in others if p.ndim < 2], weight_decay=0.0, **options)]
    groups = [group for group in muon + adamw if group["params"]]  # torch takes no names for an empty one
    optimizer = MuonAdamW(groups, matmul_dtype, orthogonalizer)
    set_lr(optimizer, cfg.lr)
    return optimizer


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


class StepGuard:
    """Takes the optimizer step, or skips it if the gradient is NaN or infinite or, with --skip-loss-spikes, its norm is
    far above recent ones. The loss spikes one step after the gradient norm, so the norm is tested (as in OLMo 2); all
    ranks decide alike, as it is that of the all-reduced gradient. The decision stays on the device: the fused kernels
    and Muon read a flag, `found_inf`, as optimizers with a fused group must. In fp16 the host waits for the scale."""

    WINDOW, MIN_NORMS = 128, 32  # norms in the window; how many it must hold before steps can be skipped as spikes

    def __init__(self, cfg, optimizer, scaler, device):
        self.deviations, self.optimizer, self.scaler = cfg.skip_loss_spikes, optimizer, scaler
        self.norms = torch.full((self.WINDOW,), math.nan, device=device)

    def step(self, grad_norm, step):
        """Take step number `step`, or skip it → whether it was taken, a bool tensor on the device; None if fp16 has
        overflowed, and nothing has changed but the scale: the step is then to be repeated."""
        taken = torch.isfinite(grad_norm)
        if self.deviations:
            taken &= grad_norm <= self._limit()
            # Record the norm even if the step is skipped: if gradients have grown for good, the limit follows.
            last = self.norms[step % self.WINDOW]
            last.copy_(torch.where(torch.isfinite(grad_norm), grad_norm, last))
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:  # overflow: the scaler has skipped the step and lowered the scale
                if scale >= 1:
                    return None
                self.scaler.update(2.0**16)  # not finite at any scale: skip the batch, as in bf16 and fp32
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = (~taken).float()
            self.optimizer.step()
        elif taken:  # not fused, as on Metal: the host waits for the device
            self.optimizer.step()
        return taken

    def _limit(self):
        mean = self.norms.nanmean()
        deviation = (self.norms - mean).square().nanmean().sqrt()
        return torch.where((~self.norms.isnan()).sum() >= self.MIN_NORMS, mean + self.deviations * deviation, math.inf)

    def state_dict(self):
        return dict(norms=self.norms) if self.deviations else {}

    def load_state_dict(self, state):
        self.norms.copy_(state["norms"])


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the parameter groups whose `rule` is muon, each
    with matrices of a single shape; AdamW, by torch's functional `adamw`, for those whose `rule` is adamw. Muon adds a
    matrix's orthogonalized Nesterov momentum times max(1, rows / columns)**0.5 (Jordan's scale)."""

    found_inf = None  # a scalar tensor on the device: 1.0 skips the step

    def __init__(self, groups, matmul_dtype, orthogonalizer):
        self.orthogonalize = orthogonalizer or (lambda matrices, _, dtype: orthogonalize(matrices, dtype))
        self.dtype = torch.bfloat16 if matmul_dtype == torch.bfloat16 else torch.float32
        # Makes GradScaler set found_inf (after unscale_) instead of reading it back; only fused AdamW supports this.
        self._step_supports_amp_scaling = all(group.get("fused", True) for group in groups)
        super().__init__(groups, defaults=dict(lr=0.0))

    # torch's wrappers of these methods import its compiler: a second at every start, as with torch.optim.AdamW itself.
    add_param_group, zero_grad, state_dict, load_state_dict = (inspect.unwrap(method) for method in (
        Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                update = {"muon": self._muon, "adamw": self._adamw}[group["rule"]]
                update(group, params, [p.grad for p in params], [self.state[p] for p in params])

    def _muon(self, group, params, grads, states):
        for p, state in zip(params, states, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
        rows, cols = params[0].shape
        params, grads, momenta = map(local, (params, grads, [state["momentum_buffer"] for state in states]))
        grads = [grad.nan_to_num(0, 0, 0) for grad in grads] if self.found_inf is not None else grads
        taken = 1.0 if self.found_inf is None else 1 - self.found_inf
        # A list of tensors: a single weight tensor would be read by the host, which would wait for it.
        torch._foreach_lerp_(momenta, grads, [(1 - group["momentum"]) * taken] * len(params))
        nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # (n, rows of this rank, cols)
        update = self.orthogonalize(nesterov, rows, self.dtype).to(params[0].dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * taken)
        torch._foreach_add_(params, (update * taken).unbind(), alpha=-group["lr"] * max(1, rows / cols) ** 0.5)

    def _adamw(self, group, params, grads, states):
        for p, state in zip(params, states, strict=True):
            if not state:
                state |= dict(step=torch.zeros((), device=p.device if group["fused"] else "cpu"),
                              exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        moments = (local(state[name] for state in states) for name in ("exp_avg", "exp_avg_sq"))
        adamw(local(params), local(grads), *moments, [], [state["step"] for state in states], fused=group["fused"],
              found_inf=self.found_inf, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
              lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8, maximize=False)


def local(tensors):
    """Tensors, with DTensors replaced by this rank's shard, which shares their memory."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def orthogonalize(matrices, dtype=torch.float32):
    """(n, rows, cols) → the same matrices with singular values near 1 (0.7 to 1.2), batched over n: Newton-Schulz
    iteration of an odd quintic whose coefficients Jordan chose for a steep slope at 0. Returned in `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):  # x ← a x + (b g + c g²) x, where g = x xᵀ
        gram = x @ x.mT  # (n, r, r), r the smaller of rows and cols
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
