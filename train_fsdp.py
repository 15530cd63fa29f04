"""Pretrain a GPT that one device cannot hold: `torchrun --nproc-per-node=N train_fsdp.py`, on one node or several.

The training loop is train.py's. This file has what fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020;
PyTorch's FSDP2) changes from train_ddp.py: parameters, gradients and optimizer state are sharded over the ranks by
rows. Each block's parameters are all-gathered just before its forward and again before its backward pass, and freed
after it; its gradients are reduce-scattered. With --shard-ranks N (hybrid sharding, HSDP) each group of N consecutive
ranks, such as a node's, holds one replica of the model, and gradients are all-reduced between the groups. Checkpoints
hold whole tensors: a run can go on in another mode, or on another number of ranks.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from mini_llm.errors import UserError
from mini_llm.hardware import choose_precision, keep_freed_memory, should_compile
from model import GPT
from train import main
from train_ddp import DDPWorld


class FSDPWorld(DDPWorld):
    script = "train_fsdp.py"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.require_same({"--shard-ranks": cfg.ranks.shard_ranks}, "flags")  # before groups are made of it
        self.shards = cfg.ranks.shard_ranks or self.size
        if self.size % self.shards or self.shards == 1 < self.size:
            raise UserError(f"--shard-ranks {self.shards} has to divide the {self.size} ranks, and be two or more; "
                            f"take the number of ranks of a node, or 0 for all")
        self.mesh = self.heartbeat.mesh(self.device.type, self.shards)
        if self.shards < self.size:
            self.replicas = self.mesh.get_group("dp_replicate")
        if self.device.type == "cpu":
            keep_freed_memory(up_to=1 << 17)  # what is gathered has many sizes: three times the memory would be kept
        precision = choose_precision(cfg.speed, self.device)
        self.dtype, self.compiles = precision.dtype, should_compile(cfg.speed, self.device)
        if self.dtype is torch.float16:
            raise UserError(f"fp16 ({precision.reason}): each rank would see overflows in its own shard only; take "
                            f"--no-amp or, where a GPU has it, --amp-dtype bf16")
        if cfg.wandb.wandb_watch != "none":
            raise UserError(f"--wandb-watch {cfg.wandb.wandb_watch}: no rank has whole tensors; leave it out, or take "
                            f"train_ddp.py")
        if cfg.ranks.check_replicas and self.shards == self.size:
            raise UserError(f"--check-replicas {cfg.ranks.check_replicas}: no two ranks hold the same weights; leave "
                            f"it out, or give --shard-ranks fewer than there are ranks")

    def place(self, make, draw):
        with torch.device("meta"):  # no rank has room for all the weights
            model = make(draw=False)
        # Parameters are all-gathered in autocast's dtype, which matrix products need; norm gains and embeddings, too,
        # are rounded to it. Inputs are not cast: GPT.hidden gives the residual stream its dtype.
        policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            # The last block's stay for the backward pass, which begins with it.
            fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=block is not model.blocks[-1])
            if self.compiles:  # also each block: train.py's torch.compile breaks its graph at FSDP's hooks
                block.forward = torch.compile(block.forward)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)  # embeddings, final norm and head
        weights = {}
        for name, like in model.named_parameters():  # one by one: drawn by the main rank, then scattered
            if draw:
                drawn = model.init_weight(name, torch.empty(like.shape, device="cpu" if self.is_main else "meta"))
                weights[name] = self.distribute(drawn, like)
            else:
                weights[name] = torch.empty_like(like, device=self.device)
        model.load_state_dict(weights, strict=False, assign=True)  # buffers are as they were made
        return model

    def wrap(self, model):
        return model

    def grad_sync(self, model, last):
        # Only the all-reduce between replicas waits for the last: no rank has room for unsharded gradients.
        model.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def clip_gradients(self, model, max_norm):
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).full_tensor()
        self.replicate(norm)  # another replica's ranks may have added it up in another order
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def replicate(self, tensor):
        """The first replica's tensor, in place, for the ranks that hold the same shard in the others."""
        if self.replicas:
            dist.broadcast(tensor, group=self.replicas, group_src=0)
        return tensor

    def orthogonalize(self, matrices, rows, dtype):
        """Each rank has some rows of every matrix; by two all-to-alls, it orthogonalizes some of the matrices whole."""
        n, _, cols = matrices.shape
        by_matrix, by_row, mesh = [Shard(0)], [Shard(1)], self.mesh["dp_shard"]
        size = dict(shape=torch.Size((n, rows, cols)), stride=(rows * cols, cols, 1))
        # (n, rows of this rank, cols) -> (matrices of this rank, rows, cols), and back
        mine = DTensor.from_local(matrices, mesh, by_row, **size).redistribute(placements=by_matrix)
        update = super().orthogonalize(mine.to_local(), rows, dtype)
        return DTensor.from_local(update, mesh, by_matrix, **size).redistribute(placements=by_row).to_local()

    def full_state(self, state):
        def gather(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            # A copy even of what is on the CPU already: --async-save writes it while training goes on.
            return whole.to("cpu", copy=whole is tensor) if self.is_main else whole.to("meta")

        return tree_map_only(torch.Tensor, gather, state)

    def distribute(self, value, like):
        if not (torch.is_tensor(value) and isinstance(like, DTensor) and value.shape == like.shape):
            return super().distribute(value, like)
        # On other ranks only the shape counts. The main rank scatters the rows over its replica, whose ranks then send
        # theirs to the other replicas. Over both dimensions at once, each of them would send a whole tensor instead.
        whole = value.to(self.device) if self.is_main else torch.empty_like(value, device=self.device)
        mine = self.replicate(distribute_tensor(whole, self.mesh["dp_shard"], [Shard(0)]).to_local())
        return DTensor.from_local(mine, self.mesh, like.placements, shape=whole.shape, stride=whole.stride())

    def full_model(self, model):
        weights = self.full_state(model.state_dict())
        return GPT.of(model.cfg, weights) if self.is_main else None


if __name__ == "__main__":
    main(FSDPWorld)
