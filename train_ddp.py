"""Pretrain a GPT on many devices: `torchrun --nproc-per-node=N train_ddp.py`, on one node or several.

The training loop is train.py's. This file has what distributed data parallelism changes: each rank has a replica of the
model and its share of every batch, and gradients are averaged during the backward pass.
"""

import contextlib
import functools
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from mini_llm import ranks, rendezvous
from mini_llm.errors import UserError
from mini_llm.hardware import usable_cores
from mini_llm.processes import source_digest
from mini_llm.shared_memory import share
from train import main
from world import World


class DDPWorld(World):
    script, launchers = "train_ddp.py", 1  # torchrun, or Slurm's step
    comm_hook = None  # DDP's communication hook; None: through shared memory on one host without GPUs, else all-reduce
    replicas = None  # the process group of the ranks that hold the same weights; None: all do
    # How this rank reports faults and exits; of the class, because errors can occur before there is a World.
    heartbeat = ranks.NoHeartbeat()
    SENT_LATER = 2**16  # elements from which on `from_main` sends only a tensor's shape, and `distribute` its values

    def __init__(self, cfg):
        self.rank, self.size, self.local_rank, self.local_size, self.node_rank = rendezvous.launched(self.script)
        self.is_main = self.rank == 0
        # By default each rank has a process per core for torch.compile's kernels. Read when the compiler is imported.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(32, usable_cores() // self.local_size))))
        super().__init__(cfg)
        if self.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, usable_cores() // self.local_size))  # torchrun's default, 1, leaves cores idle
        if cfg.checkpoint.resume != "auto" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("torchrun --max-restarts starts this command again as it is: give it --resume auto")
        code = source_digest()  # now: a pull may change the files while this rank waits for the others
        # On GPUs gradients use NCCL; scalars and flags stay on the CPU and use gloo, so they never wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        DDPWorld.heartbeat = rendezvous.join(backend, cfg.ranks.timeout)
        self.require_same({"the code": code}, "versions", "bring every node to the same git commit and start again")

    def wrap(self, model):
        self.memory = share(self)
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Nothing to broadcast: buffers are equal on all ranks and never change. torch 2.13 renamed the option.
        sync = "forward_sync_buffers" if torch.__version__ >= (2, 13) else "broadcast_buffers"
        # torch.compile splits its graph at every bucket of gradients: of 1.5B into 146 graphs at the default 25 MB.
        # And through shared memory a bucket is exchanged while the backward pass waits: small ones gain nothing.
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **{sync: False},
                                        bucket_cap_mb=100 if devices or self.memory else None)
        hook = self.comm_hook or (self.memory and self.memory.comm_hook)
        if hook:
            model.register_comm_hook(None, hook)
        return model

    def grad_sync(self, model, last):
        return contextlib.nullcontext() if last else model.no_sync()

    def orthogonalize(self, matrices, rows, dtype):
        """Each replica orthogonalizes a share of the matrices, for all."""
        compute = functools.partial(super().orthogonalize, rows=rows, dtype=dtype)
        return ranks.shared_out(compute, matrices, self.replicas) if self.shards < self.size else compute(matrices)

    def gather(self, values):
        return self.memory.gather(values) if self.memory else ranks.gather(values)

    def from_main(self, make):
        def sent(tensor):
            return tensor if tensor.numel() >= self.SENT_LATER else self.broadcast(tensor).cpu()

        return tree_map_only(torch.Tensor, sent, ranks.from_main(make, self.is_main))

    def distribute(self, value, like):
        return self.broadcast(value) if torch.is_tensor(value) and value.numel() >= self.SENT_LATER else value

    def broadcast(self, tensor):
        """The main rank's tensor, on the device of every rank; the others give a meta tensor of its shape."""
        # Through the GPU: between nodes NCCL finds the fast network, gloo takes the one that the host's name leads to.
        sent = tensor.to(self.device) if self.is_main else torch.empty_like(tensor, device=self.device)
        dist.broadcast(sent, 0)
        return sent

    @property
    def saving(self):
        return self.heartbeat.saving

    def begin_step(self, step):
        self.heartbeat.me["step"] = step

    def require_same(self, mine, what, advice="start every node with the same command and files"):
        ranks.require_same(mine, what, UserError, advice)

    def require_replicas(self, model, optimizer):
        if self.shards < self.size:
            states = [model.state_dict(), optimizer.state_dict()]
            ranks.require_same(ranks.digests(states), "weights", ranks.RankFault, ranks.RESUME, apart=self.shards)

    @staticmethod
    def fail(error, code):
        DDPWorld.heartbeat.fail(error, code)

    @staticmethod
    def crash(error):
        DDPWorld.heartbeat.crash(error)

    @staticmethod
    def leave(code):
        DDPWorld.heartbeat.leave(code)


if __name__ == "__main__":
    main(DDPWorld)
