"""One GPT, four architectures: (tokens, targets) → loss.

GPT-2 (Radford et al. 2019), Llama (arXiv:2302.13971), Qwen3 (arXiv:2505.09388) and nanochat differ in a handful of
parts: the norm, the position encoding, the MLP, the output head. `ARCHS` defines each by one choice per part.

Shape letters: B batch, T time, C d_model, L layers, nh query heads, nkv key/value heads, hs head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mini_llm import kernels
from mini_llm.config import arg, flag
from mini_llm.errors import UserError

IGNORE = -1  # ignore_index: targets excluded from the loss


@dataclass(frozen=True)
class Arch:
    norm: str  # layernorm: gain and bias; rmsnorm: gain only; plain_rmsnorm: no parameters
    norm_eps: float
    mlp: str  # gelu: tanh approximation; swiglu; relu2
    bias: bool = False  # in every linear layer except the head
    rope_theta: float = 0  # unless --rope-theta is given; 0: learned absolute positions instead of RoPE
    rope_sign: int = 1  # -1: nanochat rotates in the opposite direction
    qk_norm: str = "no"  # RMSNorm on queries and keys: no, before or after RoPE
    embed_norm: bool = False
    tie_embeddings: bool = False
    init: str = "normal"  # or nanochat: see init_weight
    softcap: float = 0.0  # logits = cap * tanh(logits / cap); 0: none


ARCHS = {
    "gpt2": Arch(norm="layernorm", norm_eps=1e-5, bias=True, mlp="gelu", tie_embeddings=True),
    "llama": Arch(norm="rmsnorm", norm_eps=1e-5, rope_theta=1e4, mlp="swiglu"),
    "qwen3": Arch(norm="rmsnorm", norm_eps=1e-6, rope_theta=1e6, qk_norm="before", mlp="swiglu"),
    "nanochat": Arch(norm="plain_rmsnorm", norm_eps=1e-6, rope_theta=1e4, rope_sign=-1, qk_norm="after", mlp="relu2",
                     embed_norm=True, init="nanochat", softcap=15.0),
}


@dataclass
class GPTConfig:
    """Model"""

    RUN_FLAGS = "dropout", "use_activation_checkpoint"  # may differ between runs of a model; the others define it
    arch: str = arg("gpt2", "architecture", choices=tuple(ARCHS))
    n_layers: int = arg(4, "transformer blocks", ge=1, le=10_000)
    n_heads: int = arg(4, "attention heads (queries)", ge=1)
    n_kv_heads: int = arg(0, "key/value heads of grouped-query attention; 0: as many as n_heads", ge=0)
    d_model: int = arg(256, "width of the residual stream", ge=1)
    d_ff: int = arg(0, "width of the MLP; 0: 4 x d_model, 3 x with SwiGLU", ge=0)
    head_dim: int = arg(0, "width of one head; 0: d_model / n_heads", ge=0)
    rope_theta: float = arg(0.0, "base of RoPE's wavelengths; 0: as the architecture has it", ge=0)
    dropout: float = arg(0.0, "probability, on embeddings, attention weights and residual branches", ge=0, lt=1)
    max_position_embeddings: int = arg(1024, "longest sequence, in tokens", ge=1)
    vocab_size: int = arg(0, "size of a trained bpe tokenizer, or of an embedding wider than the tokenizer; "
                             "0: 4096 for bpe, else the tokenizer's own size", ge=0)
    tie_embeddings: bool | None = arg(None, "share input and output embedding; unset: as the architecture has it")
    use_activation_checkpoint: bool = arg(False, "recompute blocks in the backward pass: less memory, a third slower")

    def validate_sizes(self):
        """Raises UserError for impossible sizes. Not `validate`, which runs before --init-from sets them."""
        if not self.head_dim and self.d_model % self.n_heads:  # the advice gives an even --head-dim: for RoPE
            raise UserError(f"--n-heads {self.n_heads} does not divide --d-model {self.d_model}; "
                            f"try --d-model {2 * self.n_heads * max(1, round(self.d_model / self.n_heads / 2))}")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise UserError(f"--n-kv-heads {self.n_kv_heads} does not divide --n-heads {self.n_heads}; "
                            f"try --n-kv-heads {math.gcd(self.n_heads, self.n_kv_heads)}")
        if self.parts.rope_theta and self.head_size % 2:
            raise UserError(f"--head-dim {self.head_size} is odd, and RoPE rotates pairs of dimensions; make it even")
        if self.rope_theta and not self.parts.rope_theta:
            raise UserError(f"--rope-theta {self.rope_theta}: --arch {self.arch} has learned positions; leave it out")
        rough = self.d_model * (self.n_layers * 2 * (self.n_heads * self.head_size + self.ff_size)
                                + self.vocab_size + self.max_position_embeddings)
        if rough > 1e12 or self.n_layers > 10_000:  # even empty, layers take time and memory
            sizes = " ".join(f"{flag(name)} {size}" for name, size in vars(self).items() if type(size) is int and size)
            raise UserError(f"{sizes}: {rough:.0e} parameters in {self.n_layers} layers, which no device holds")

    # The flags have 0 or None for "default". What follows is resolved, and is what the model is built from.

    @property
    def parts(self):
        return ARCHS[self.arch]

    @property
    def head_size(self):
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self):
        return self.n_kv_heads or self.n_heads

    @property
    def ff_size(self):
        return self.d_ff or (3 if self.parts.mlp == "swiglu" else 4) * self.d_model

    @property
    def tied(self):
        return self.parts.tie_embeddings if self.tie_embeddings is None else self.tie_embeddings


def autocast_dtype(device):
    """The dtype in which autocast runs matrix products on `device`; None if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class RMSNorm(nn.RMSNorm):
    """x / rms(x), times a learned gain if `elementwise_affine` (Zhang & Sennrich 2019), in fp32."""

    def forward(self, x):
        gain = None if self.weight is None else self.weight.float()  # FSDP may gather it in bf16
        return F.rms_norm(x.float(), self.normalized_shape, gain, self.eps).type_as(x)


def make_norm(parts, size):
    if parts.norm == "layernorm":
        return nn.LayerNorm(size, eps=parts.norm_eps)
    return RMSNorm(size, parts.norm_eps, elementwise_affine=parts.norm == "rmsnorm")


def rope_angles(cfg):
    """cos and sin of the RoPE angles, (2, max_position_embeddings, hs / 2), float32 (Su et al. 2021)."""
    with torch.device("cpu"):  # even in a model made on the meta device: no checkpoint has them
        inverse = (cfg.rope_theta or cfg.parts.rope_theta) ** (-torch.arange(0, cfg.head_size, 2) / cfg.head_size)
        angles = torch.outer(torch.arange(cfg.max_position_embeddings).float(), inverse)
    return torch.stack([angles.cos(), angles.sin() * cfg.parts.rope_sign])


def rotate(x, rope):
    """Rotate each pair (i, i + hs/2) of x, (B, n, T, hs), by its position's angle; rope is (2, T, hs / 2)."""
    (cos, sin), (x1, x2) = rope, x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


def attend(q, k, v, dropout=0.0):
    """Causal attention: q (B, nh, T, hs), k and v (B, nkv, S, hs) → (B, nh, T, hs). T is S, or 1 with a KV cache."""
    T = q.shape[2]
    assert T in (1, k.shape[2]), "a cache takes the prompt whole, then one token at a time"
    explicit = q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad and 1 < T <= kernels.MAX_EXPLICIT_CONTEXT
    # On CUDA only flash attention takes grouped queries (as of torch 2.13); in fp16, older GPUs do not have it.
    takes_groups = not explicit and (not q.is_cuda or q.dtype == torch.bfloat16 and q.shape[3] <= 256)
    if q.shape[1] != k.shape[1] and not takes_groups:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, nh, S, hs)
    if explicit:
        return kernels.CausalAttention.apply(q, k, v, dropout)
    # A single new token attends to the whole cache, so only longer inputs need the causal mask.
    return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=q.shape[1] != k.shape[1],
                                          dropout_p=dropout)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, bias = cfg, cfg.parts.bias
        self.sizes = [n * cfg.head_size for n in (cfg.n_heads, cfg.kv_heads, cfg.kv_heads)]
        self.qkv = kernels.Linear(cfg.d_model, sum(self.sizes), bias=bias)
        self.proj = kernels.Linear(self.sizes[0], cfg.d_model, bias=bias)
        if cfg.parts.qk_norm != "no":
            self.q_norm, self.k_norm = (make_norm(cfg.parts, cfg.head_size) for _ in "qk")

    def forward(self, x, rope, past=None):
        B, T, _ = x.shape
        # (B, T, n * hs) -> (B, n, T, hs)
        q, k, v = (part.view(B, T, -1, self.cfg.head_size).transpose(1, 2)
                   for part in self.qkv(x).split(self.sizes, dim=-1))
        if self.cfg.parts.qk_norm == "before":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if self.cfg.parts.qk_norm == "after":
            q, k = self.q_norm(q), self.k_norm(k)
        if past is not None:
            k, v = past.append(k, v)
        y = attend(q, k, v, self.cfg.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, nh, T, hs) -> (B, T, nh * hs) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.kind, bias = cfg.parts.mlp, cfg.parts.bias
        self.up = kernels.Linear(cfg.d_model, cfg.ff_size, bias=bias)
        if self.kind == "swiglu":
            self.gate = kernels.Linear(cfg.d_model, cfg.ff_size, bias=bias)
        self.down = kernels.Linear(cfg.ff_size, cfg.d_model, bias=bias)

    def forward(self, x):
        h = self.up(x)
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * h)
        if self.kind == "relu2":
            return self.down(F.relu(h).square())
        # On a CPU the exact form takes half the time and is within 5e-4 of GPT-2's tanh, which fp32 evaluation keeps.
        # So train() and eval() differ a little even without dropout.
        exact = h.is_cpu and (self.training or h.dtype == torch.bfloat16)
        return self.down(F.gelu(h, approximate="none" if exact else "tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = make_norm(cfg.parts, cfg.d_model), Attention(cfg)
        self.mlp_norm, self.mlp = make_norm(cfg.parts, cfg.d_model), MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, past=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, past))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    def __init__(self, cfg, draw=True):
        """Initial weights come from torch's global generator, in the order of `named_parameters`; unless `draw` they
        are uninitialized memory, to be loaded. cfg.vocab_size must be set. Raises UserError for impossible sizes."""
        super().__init__()
        assert cfg.vocab_size > 0, "the vocabulary size comes from the tokenizer"
        cfg.validate_sizes()
        self.cfg = cfg
        self.tok_emb = kernels.Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.parts.rope_theta:
            self.register_buffer("rope", rope_angles(cfg), persistent=False)
        else:
            self.pos_emb = kernels.Embedding(cfg.max_position_embeddings, cfg.d_model)
        self.embed_norm = make_norm(cfg.parts, cfg.d_model) if cfg.parts.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = make_norm(cfg.parts, cfg.d_model)
        self.head = None if cfg.tied else kernels.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if draw and name.endswith((".weight", ".bias")):  # all of ours; one that you add is left to its module
                self.init_weight(name, parameter)

    @torch.no_grad()
    def init_weight(self, name, weight):
        """The tensor, filled with the initial values of the parameter `name`. normal: std 0.02, projections into the
        residual stream divided by sqrt(2L), as in GPT-2. nanochat: embeddings of std 1, matrices uniform with std
        1/sqrt(C), residual projections zero, the head near zero."""
        assert name.endswith((".weight", ".bias")), f"{name}: for train_fsdp.py, give its initial values here"
        into_stream = name.endswith(("proj.weight", "down.weight"))
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        elif self.cfg.parts.init == "normal":
            weight.normal_(0.0, 0.02 / math.sqrt(2 * self.cfg.n_layers) if into_stream else 0.02)
        elif into_stream:
            weight.zero_()
        elif name in ("tok_emb.weight", "head.weight"):
            weight.normal_(0.0, 1.0 if name == "tok_emb.weight" and not self.cfg.tied else 0.001)
        else:
            weight.uniform_(-math.sqrt(3 / self.cfg.d_model), math.sqrt(3 / self.cfg.d_model))
        return weight

    @classmethod
    def of(cls, cfg, weights):
        """A GPT whose parameters are the tensors of the state dict `weights`: none is drawn or copied."""
        with torch.device("meta"):
            model = cls(cfg)
        model.load_state_dict(weights, assign=True)
        return model

    def forward(self, tokens, targets=None, reduction="mean"):
        """tokens (B, T) int64, targets (B, T) with IGNORE at positions excluded from the loss → mean cross-entropy in
        nats per token (`reduction="sum"`: the sum; "none": each, (B * T,)). Without targets → logits (B, T, V)."""
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        # Chunks round gradients before fp16's loss scale applies; torch.compile would unroll the loop over chunks.
        if self.chunks_loss and autocast_dtype(x.device) is not torch.float16 and not torch.compiler.is_compiling():
            nats = kernels.head_cross_entropy(x.flatten(0, 1), self.head_weight.to(x.dtype), targets.flatten(), IGNORE)
            return nats if reduction == "none" else nats.sum() / (1 if reduction == "sum" else targets.ne(IGNORE).sum())
        logits = self.padded_logits(x).float().flatten(0, 1)  # (B * T, V + padding)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction=reduction)

    @property
    def chunks_loss(self):
        """Whether the loss is computed in chunks: each bf16 logit then takes 2 bytes instead of 10."""
        return (self.head_weight.device.type == "cpu" and self.cfg.vocab_size >= kernels.MIN_CHUNKED_VOCABULARY
                and not self.cfg.parts.softcap)

    def hidden(self, tokens, past=None):
        """tokens (B, T) → hidden states (B, T, C), after the final norm. `past`: a KVCache per layer."""
        start, T = (past[0].length if past else 0), tokens.shape[1]
        assert start + T <= self.cfg.max_position_embeddings, "longer than max_position_embeddings"
        x = self.tok_emb(tokens)
        rope = self.rope[:, start:start + T] if self.cfg.parts.rope_theta else None  # (2, T, hs / 2)
        if rope is None:
            x = x + self.pos_emb.weight[start:start + T]  # (B, T, C) + (T, C)
        x = self.dropout(self.embed_norm(x))
        if autocast_dtype(x.device) is torch.bfloat16:
            # The residual stream too, as in nanochat and Megatron-LM: half the memory traffic. fp16 lacks the range.
            x = x.bfloat16()
        for layer, block in enumerate(self.blocks):
            if self.cfg.use_activation_checkpoint and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, past[layer] if past else None)
        return self.norm(x)

    @property
    def head_weight(self):
        return self.tok_emb.weight if self.head is None else self.head.weight

    def logits(self, x):
        """(B, T, C) → (B, T, V)."""
        return self.padded_logits(x)[..., :self.cfg.vocab_size]

    def padded_logits(self, x):
        """(B, T, C) → (B, T, V + padding). On a GPU, where tensor cores prefer a multiple of 64 columns, -inf fills up
        to it; the weights keep their shape. A loss of the slice [..., :V] has a slower backward pass (LOG.md)."""
        weight, V, cap = self.head_weight, self.cfg.vocab_size, self.cfg.parts.softcap
        pad = -V % 64 if weight.is_cuda else 0
        logits = F.linear(x, F.pad(weight, (0, 0, 0, pad)) if pad else weight)
        logits = cap * torch.tanh(logits.float() / cap) if cap else logits
        if pad:
            logits = logits.masked_fill(torch.arange(V + pad, device=x.device) >= V, -math.inf)
        return logits

    def num_params(self, matmul=False):
        """The number of parameters; with `matmul`, the N of 6N FLOPs: without embeddings that are only looked up."""
        skipped = {"pos_emb.weight"} | ({"tok_emb.weight"} if self.head is not None else set())
        return sum(p.numel() for name, p in self.named_parameters() if not (matmul and name in skipped))

    def flops_per_token(self, seq_len):
        """Forward and backward: 6N + 12·L·d·T (Chowdhery et al. 2022, appendix B), not counting recomputation."""
        width = self.cfg.n_heads * self.cfg.head_size
        return 6 * self.num_params(matmul=True) + 12 * self.cfg.n_layers * width * seq_len


class KVCache:
    """One layer's keys and values of the tokens so far, in a preallocated buffer with room for `limit` tokens."""

    def __init__(self, limit):
        self.limit, self.length, self.buffer = limit, 0, None

    def append(self, k, v):
        """New keys and values, (B, nkv, T, hs) each → all so far, (B, nkv, length, hs) each."""
        if self.buffer is None:
            self.buffer = k.new_empty(2, *k.shape[:2], self.limit, k.shape[3])  # (2, B, nkv, limit, hs)
        start, self.length = self.length, self.length + k.shape[2]
        self.buffer[0, :, :, start:self.length] = k
        self.buffer[1, :, :, start:self.length] = v
        return self.buffer[0, :, :, :self.length], self.buffer[1, :, :, :self.length]
