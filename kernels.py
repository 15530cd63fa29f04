"""Linear layers, attention and the loss on a CPU, with backward passes of their own.

PyTorch's own versions make several more passes over the largest tensors of a step: the output of a linear layer with a
bias, the (T, T) weights of every head, a logit for every token and word (bench/step.py, LOG.md). On a GPU PyTorch's own
are used; nothing was measured there. `model.py` decides about attention and the loss.

Shape letters as in model.py: B batch, T time, C d_model, nh heads, hs head size, V vocabulary; N = B * T.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # logits turned into probabilities at a time: few enough to stay in cache
ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
LARGE = 2**20  # output elements from which on fusing the bias saves more than the call from Python costs


class Linear(nn.Linear):
    """nn.Linear; in training on a CPU, large bf16 outputs with a bias go through LinearFunction."""

    def forward(self, x):
        if (ONEDNN and x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.bias is not None
                and x.shape[:-1].numel() * self.out_features >= LARGE and torch.is_grad_enabled()
                and not torch.compiler.is_compiling()):
            return LinearFunction.apply(x, self.weight, self.bias)
        return super().forward(x)


class LinearFunction(torch.autograd.Function):
    """x Wᵀ + b in bf16: x (..., C), W (D, C) and b (D,) in fp32 → (..., D). oneDNN adds b as it writes the product;
    torch's own linear layer writes b to every row first, and adds the product to that. The bits are the same."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype), "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)  # (B, T, D) -> (B * T, D)
        return dy @ weight, (rows.t() @ x.flatten(0, -2)).float(), rows.sum(0).float()


class CausalAttention(torch.autograd.Function):
    """softmax(q kᵀ / √hs, of the past only) v, each (B, nh, T, hs). In bf16 all products are: the backward pass of the
    CPU's flash kernel has them in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, dropout):
        B, nh, T, hs = q.shape
        q, k, v = (x.reshape(B * nh, T, hs) for x in (q, k, v))
        future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        weights = torch.baddbmm(future, q, k.mT, alpha=hs**-0.5).softmax(dim=-1)  # (B * nh, T, T)
        kept = F.dropout(torch.ones_like(weights), dropout) if dropout else None
        ctx.save_for_backward(q, k, v, weights, kept)
        return ((weights if kept is None else weights * kept) @ v).view(B, nh, T, hs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, weights, kept = ctx.saved_tensors
        shape, scale = dy.shape, q.shape[-1]**-0.5
        dy = dy.reshape(q.shape)
        dweights = dy @ v.mT
        if kept is None:
            dv = weights.mT @ dy
        else:
            dv = (weights * kept).mT @ dy
            dweights *= kept
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dq = torch.baddbmm(q, dscores, k, beta=0, alpha=scale)
        dk = torch.baddbmm(k, dscores.mT, q, beta=0, alpha=scale)
        return dq.view(shape), dk.view(shape), dv.view(shape), None


def head_cross_entropy(x, head, targets, ignore):
    """Hidden states (N, C), a head (V, C) and targets (N,) → the cross-entropy of each in nats, float32, (N,); 0 where
    the target is `ignore`. Raises RuntimeError for another target that is not one of V."""
    return HeadCrossEntropy.apply(x, head, targets, ignore, torch.is_grad_enabled())


class HeadCrossEntropy(torch.autograd.Function):
    """The logits become their own gradient, a chunk at a time: there is no second tensor of their size, and none in
    fp32."""

    @staticmethod
    def forward(ctx, x, head, targets, ignore, needs_grad):
        logits = x @ head.t()  # (N, V)
        targets = targets[:, None]
        nats = torch.empty(targets.shape)
        rows = max(1, CHUNK // head.shape[0])
        for part, target, nat in zip(*(tensor.split(rows) for tensor in (logits, targets, nats)), strict=True):
            counted = target != ignore
            target, counted = target.where(counted, 0), counted.float()
            scores = part.float()  # (rows, V)
            scores -= scores.amax(dim=1, keepdim=True)
            own = scores.gather(1, target)
            total = scores.exp_().sum(dim=1, keepdim=True)
            nat.copy_((total.log() - own) * counted)
            if needs_grad:  # softmax - one_hot(target)
                part.copy_(scores.mul_(counted / total).scatter_add_(1, target, -counted))
        ctx.save_for_backward(logits, x, head)
        return nats.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnats):
        dlogits, x, head = ctx.saved_tensors
        dnats = dnats[:, None]  # float32, as is what it multiplies
        return ((dlogits @ head) * dnats).to(x.dtype), dlogits.t() @ (x * dnats).to(x.dtype), None, None, None
