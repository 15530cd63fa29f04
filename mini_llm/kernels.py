"""Linear layers, attention and the loss on a CPU, with custom backward passes.

PyTorch's own versions make several more passes over the largest tensors of a step: the output of a linear layer with a
bias, the (T, T) attention weights of every head, the logits of every token (bench/step.py, LOG.md). GPUs use PyTorch's
versions; nothing was measured there. `model.py` decides when to use the attention and loss from here.

Shape letters as in model.py: B batch, T time, C d_model, nh heads, hs head size, V vocabulary; N = B * T.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK = 2**20  # logits converted to probabilities at a time: few enough to stay in cache
# Private to torch: where it is missing, Linear is the same as nn.Linear.
ONEDNN = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()
# Measured (LOG.md): the longest context at which explicit attention in bf16 beats the fused kernel, and the smallest
# vocabulary at which computing the loss in chunks of logits beats one pass.
MAX_EXPLICIT_CONTEXT, MIN_CHUNKED_VOCABULARY = 512, 1024
MIN_FUSED_OUTPUT = 2**20  # output elements from which on fusing the bias saves more than the extra Python call costs


def once_differentiable(backward):
    """For the backward pass of a Function. torch's decorator of this name silently omits terms of a second derivative
    (create_graph=True) that does not need the gradients of the Function's outputs."""

    @functools.wraps(backward)
    def once(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fast kernels for CPUs have no second derivatives: differentiate F.cross_entropy of "
                               "model(tokens), not model(tokens, targets), without autocast, and under "
                               "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
        return backward(ctx, *gradients)

    return once


class Linear(nn.Linear):
    """nn.Linear, except that in training on a CPU, large bf16 outputs with a bias are computed by LinearFunction."""

    def reset_parameters(self):
        """Does nothing: GPT.init_weight draws the weights."""

    def forward(self, x):
        if (ONEDNN and x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.bias is not None
                and x.shape[:-1].numel() * self.out_features >= MIN_FUSED_OUTPUT and torch.is_grad_enabled()
                and not torch.compiler.is_compiling()):
            return LinearFunction.apply(x, self.weight, self.bias)
        return super().forward(x)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Does nothing, as in Linear."""


class LinearFunction(torch.autograd.Function):
    """x Wᵀ + b in bf16: x (..., C), W (D, C) and b (D,) in fp32 → (..., D). oneDNN adds b while writing the product;
    torch's linear layer first writes b to every row, then adds the product. The results are bitwise equal."""

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
    """Causally masked softmax(q kᵀ / √hs) v, each (B, nh, T, hs). With bf16 inputs all products are in bf16; the
    backward pass of PyTorch's CPU flash kernel computes them in fp32."""

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
    """Hidden states (N, C), head weight (V, C) and targets (N,) → the cross-entropy of each target in nats, float32,
    (N,); 0 where the target is `ignore`. Raises RuntimeError for any other target outside the vocabulary."""
    # Grad mode is asked here: inside Function.forward it is always off.
    return HeadCrossEntropy.apply(x, head, targets, ignore, torch.is_grad_enabled())


class HeadCrossEntropy(torch.autograd.Function):
    """Overwrites the logits with their gradient, one chunk at a time: no second tensor of their size is needed."""

    @staticmethod
    def forward(ctx, x, head, targets, ignore, needs_grad):
        logits = x @ head.t()  # (N, V)
        targets = targets[:, None]
        nats = torch.empty(targets.shape)
        rows = max(1, CHUNK // head.shape[0])
        for part, target, nat in zip(*(tensor.split(rows) for tensor in (logits, targets, nats)), strict=True):
            counted = target != ignore
            target = target.where(counted, 0)  # any index that exists: its loss and gradient become 0
            counted = counted.float()
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
        dnats = dnats[:, None]  # float32, so the products below are too, until they are cast
        return ((dlogits @ head) * dnats).to(x.dtype), dlogits.t() @ (x * dnats).to(x.dtype), None, None, None
