"""The interface of a mode: `World` is the processes that train together, in `train.py` a single one.

`train_ddp.py` and `train_fsdp.py` override what many do otherwise. All ranks call the same methods at the same points
of the loop.
"""

import contextlib
import sys

import torch

import hardware
from optim import orthogonalize


class World:
    """The processes that train together, and how they share the work: here, there is one."""

    rank = local_rank = node_rank = 0
    size = local_size = 1
    shards = 1  # parts that parameters, gradients and optimizer state are split into, of which each rank holds one
    launchers = 0  # number of launcher processes above this one (torchrun): when one dies, this process saves and exits
    is_main = True  # global rank 0: the one that logs and saves
    saving = contextlib.nullcontext()  # context manager held while a checkpoint is written

    def __init__(self, cfg):
        self.device = hardware.choose_device(cfg.speed.device, self.local_rank, alone=not self.launchers)
        hardware.configure(cfg.speed, self.device, cfg.model.dropout)

    def place(self, model):
        """Moves the model to the device: all of it, or this rank's shard."""
        return model.to(self.device)

    def wrap(self, model):
        """Returns the module whose backward pass averages gradients over the ranks."""
        return model

    def grad_sync(self, model, last):
        """Context for a micro-batch's forward and backward; only the `last` has to average gradients over ranks."""
        return contextlib.nullcontext()

    def clip_gradients(self, model, max_norm):
        """Scales the gradients down to `max_norm`, if their norm is above it → their norm before."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def orthogonalize(self, matrices, rows, dtype):
        """Collective. Muon's matrices, of which this rank holds some of the `rows` rows, (n, rows of this rank, cols) →
        the same rows of them orthogonalized, in `dtype`."""
        return orthogonalize(matrices, dtype)

    def whole(self, state):
        """Collective. The state of the run's parts with whole tensors in place of shards, on the main rank only; if
        there are several shards, a copy on the CPU."""
        return state

    def split(self, tensors, like):
        """Collective; reverses `whole`. name → tensor, as `from_main` has them, and name → parameter, in `like` → the
        tensors; where models are sharded, this rank's shard of each that has its parameter's shape."""
        return tensors

    def assemble(self, model):
        """Collective. A model with all parameters, for the main rank to sample from; None on other ranks."""
        return model

    def gather(self, values):
        """Numbers → those of every rank, as floats, in rank order."""
        return [list(values)]

    def sum(self, values):
        """Numbers → the sum of each over the ranks, in float64."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def max(self, values):
        """Ints → the maximum of each over the ranks."""
        return [int(max(column)) for column in zip(*self.gather(values), strict=True)]

    def from_main(self, make):
        """Calls `make()` on the main rank only; every rank gets its result, or raises its exception. Where models are
        sharded, the others get large tensors without their data, for `split`."""
        return make()

    def begin_step(self, step):
        """Records which step (counted from 1) this rank is in, for fault reports."""

    def require_same(self, mine, what, advice=""):
        """Collective. Raises UserError on every rank if any rank's dict differs, naming the rank and the keys."""

    def require_replicas(self, model, optimizer):
        """Collective. Raises RunFailed on every rank if weights or optimizer states differ between ranks."""

    @staticmethod
    def fail(error, code):
        """Prints one line and exits. Static, because the error may occur before there is a World."""
        with contextlib.suppress(OSError):  # stderr may be gone
            print(f"error: {error}", file=sys.stderr)
        sys.exit(code)

    @staticmethod
    def crash(error):
        """Handles an unexpected exception: exits with one line if the cause is known, otherwise returns."""
        if known := hardware.explained(error):
            World.fail(known, 1)

    @staticmethod
    def leave(code):
        """Exits deliberately: other ranks do not treat it as a fault."""
        sys.exit(code)
