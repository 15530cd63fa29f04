"""The interface of a mode: `World` is the processes that train together, in `train.py` a single one.

`train_ddp.py` and `train_fsdp.py` override what differs with several ranks. All ranks call the same methods at the same
points of the loop.
"""

import contextlib
import sys
from dataclasses import dataclass

import torch

from mini_llm import hardware
from mini_llm.config import arg
from optim import orthogonalize


@dataclass
class RanksConfig:
    """Ranks"""

    timeout: int = arg(1800, "seconds that ranks wait for a stalled one before all exit; must exceed the longest time "
                             "that one tokenizes, compiles or saves alone", ge=1, le=10**7, metavar="SECONDS")
    check_replicas: int = arg(0, "steps between comparisons of the ranks' weights and optimizer states, bit for bit; "
                                 "0: at the start and before each checkpoint only", ge=0)
    shard_ranks: int = arg(0, "under train_fsdp.py, number of consecutive ranks over which one replica of the model is "
                              "split, such as those of a node; 0: all", ge=0, metavar="RANKS")


class World:
    """The processes that train together, and how they share the work: here, there is one."""

    rank = local_rank = node_rank = 0
    size = local_size = 1
    shards = 1  # parts that parameters, gradients and optimizer state are split into, of which each rank holds one
    launchers = 0  # number of launcher processes above this one (torchrun): when one dies, this process saves and exits
    memory = None  # through which the ranks exchange gradients and numbers, if they are on one host (shared_memory.py)
    is_main = True  # global rank 0: the one that logs and saves
    saving = contextlib.nullcontext()  # context manager held while a checkpoint is written

    def __init__(self, cfg):
        self.device = hardware.choose_device(cfg.speed.device, self.local_rank, alone=not self.launchers)
        hardware.configure(cfg.speed, self.device, cfg.model.dropout, cfg.model.use_activation_checkpoint)

    def place(self, make, draw):
        """Collective. Puts the model `make(draw)`, or this rank's shard, on the device; `draw`: with new weights."""
        return make(draw).to(self.device)

    def wrap(self, model):
        """Collective. Returns the module whose backward pass averages gradients over the ranks."""
        return model

    def grad_sync(self, model, last):
        """Context for a micro-batch's forward and backward; only the `last` has to average gradients over ranks."""
        return contextlib.nullcontext()

    def clip_gradients(self, model, max_norm):
        """Collective. Clips the gradients' global norm to `max_norm`; returns the norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def orthogonalize(self, matrices, rows, dtype):
        """Collective, for Muon. `matrices`, (n, rows of this rank, cols), are this rank's rows of n matrices that have
        `rows` rows in all. Returns the same rows of the orthogonalized matrices, in `dtype`."""
        return orthogonalize(matrices, dtype)

    def full_state(self, state):
        """Collective. Returns the state of the run's parts, for the main rank to save. Under sharding its DTensors are
        gathered, all tensors are copies on the CPU, and other ranks get meta tensors."""
        return state

    def distribute(self, value, like):
        """Collective; reverses `full_state`. `value` is a tensor or number that `from_main` returned; every rank gets
        it whole or, under sharding, if it has the shape of the sharded tensor `like`, this rank's shard of it."""
        return value

    def full_model(self, model):
        """Collective. A model with all parameters for the main rank to sample from; under sharding None on others."""
        return model

    def gather(self, values):
        """Collective. Returns every rank's numbers, as floats, in rank order."""
        return [list(values)]

    def sum(self, values):
        """Collective. Returns the sum of each number over the ranks, in float64."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def max(self, values):
        """Collective. Returns the maximum of each integer over the ranks."""
        return [int(max(column)) for column in zip(*self.gather(values), strict=True)]

    def from_main(self, make):
        """Collective. Calls `make()` on the main rank only; every rank gets its result, or raises its exception. The
        others get only the shapes of large tensors, for `distribute`: a node need not hold a checkpoint for each."""
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
