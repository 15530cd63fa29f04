"""Pretrain a GPT that one device cannot hold: `torchrun --nproc-per-node=N train_fsdp.py`, on one node or several.

The training loop is train.py's. This file has what fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020;
PyTorch's FSDP2) changes from train_ddp.py: parameters, gradients and optimizer state are split over the ranks by rows.
The parameters of a block are gathered for its forward and its backward pass alone; its gradients are averaged, each row
on the rank that holds it. With --shard-ranks N every N ranks, as of one node, hold the whole model among them, and its
replicas are trained as train_ddp.py's are (hybrid sharding). Checkpoints have whole tensors: a run may go on in another
mode, or on more ranks or fewer.
"""

import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from config import UserError
from hardware import choose_precision, keep_freed_memory, should_compile
from model import GPT
from optim import orthogonalize
from train import main
from train_ddp import DDPWorld

LARGE = 2**16  # elements from which a tensor is that of a parameter, and is sent in shards


class FSDPWorld(DDPWorld):
    script = "train_fsdp.py"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.shards = cfg.ranks.shard_ranks or self.size
        replicas, left_over = divmod(self.size, self.shards)
        if left_over:
            raise UserError(f"--shard-ranks {self.shards} does not divide the {self.size} ranks; take the number of "
                            f"ranks of a node")
        sizes, names = (replicas, self.shards), ("replicas", "shards")
        first = int(replicas == 1)  # no dimension of one, whose all-reduces would be called for nothing
        self.mesh = init_device_mesh(self.device.type, sizes[first:], mesh_dim_names=names[first:])
        if self.device.type == "cpu":
            keep_freed_memory(up_to=1 << 17)  # what is gathered has many sizes: three times the memory would be kept
        precision, self.compiles = choose_precision(cfg.speed, self.device), should_compile(cfg.speed, self.device)
        self.dtype = precision.dtype
        if self.dtype is torch.float16:
            raise UserError(f"fp16 ({precision.reason}): each rank would see overflows in its own shard only; take "
                            f"--no-amp or, where a GPU has it, --amp-dtype bf16")
        if cfg.wandb.wandb_watch != "none":
            raise UserError(f"--wandb-watch {cfg.wandb.wandb_watch}: no rank has whole tensors; leave it out, or take "
                            f"train_ddp.py")
        if cfg.ranks.check_replicas and self.shards == self.size:
            raise UserError(f"--check-replicas {cfg.ranks.check_replicas}: no two ranks hold the same weights; leave "
                            f"it out, or give --shard-ranks")

    def place(self, model):
        # Blocks are sent in autocast's dtype, in which their products are computed; gains of norms are rounded to it.
        halves = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=halves)
            if self.compiles:  # each by itself: compiling the whole model stops where FSDP's hooks are
                block.forward = torch.compile(block.forward)
        return fully_shard(model, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    def wrap(self, model):
        return model

    def grad_sync(self, model, last):
        model.set_requires_all_reduce(last)  # over replicas; over shards always: no rank has room for whole gradients
        return contextlib.nullcontext()

    def clip_gradients(self, model, max_norm):
        return super().clip_gradients(model, max_norm).full_tensor()

    def orthogonalize(self, matrices, rows, dtype):
        """Each rank has some rows of every matrix; by two all-to-alls, it orthogonalizes some of the matrices whole."""
        (n, _, cols), by_matrix, by_row, mesh = matrices.shape, [Shard(0)], [Shard(1)], self.mesh["shards"]
        size = dict(shape=torch.Size((n, rows, cols)), stride=(rows * cols, cols, 1))
        # (n, rows of this rank, cols) -> (matrices of this rank, rows, cols), and back
        mine = DTensor.from_local(matrices, mesh, by_row, **size).redistribute(placements=by_matrix)
        update = orthogonalize(mine.to_local(), dtype)
        return DTensor.from_local(update, mesh, by_matrix, **size).redistribute(placements=by_row).to_local()

    def whole(self, state):
        def gather(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return whole.to("cpu", copy=whole is tensor) if self.is_main else whole.to("meta")

        return tree_map_only(torch.Tensor, gather, state)

    def broadcast(self, tensor):
        return tensor if tensor.numel() >= LARGE else super().broadcast(tensor)  # `split` sends what is large

    def split(self, tensors, like):
        def scatter(tensor, parameter):
            # Of the other ranks' tensors only the shape counts.
            tensor = tensor.to(self.device) if self.is_main else torch.empty_like(tensor, device=self.device)
            return distribute_tensor(tensor, self.mesh, parameter.placements)

        return {name: scatter(tensor, like[name]) if name in like and tensor.shape == like[name].shape else tensor
                for name, tensor in tensors.items()}

    def assemble(self, model):
        weights = self.whole(model.state_dict())
        if not self.is_main:
            return None
        model = GPT(model.cfg)
        model.load_state_dict(weights, assign=True)
        return model


if __name__ == "__main__":
    main(FSDPWorld)
