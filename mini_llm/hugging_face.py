"""Configurations and weights in our format and in that of Hugging Face transformers, converted both ways, for GPT-2,
Llama, Qwen3 and NanoChat, with equal logits."""

import re

import torch

from mini_llm.errors import UserError
from model import GPT, GPTConfig

# Our parameter names → theirs; {i} is the block index. Our fused qkv is GPT-2's c_attn, and separate q, k, v elsewhere.
LLAMA_NAMES = {
    "tok_emb": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attn.proj": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj", "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
}
NAMES = {
    "gpt2": {
        "tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
        "blocks.{i}.attn_norm": "transformer.h.{i}.ln_1", "blocks.{i}.attn.qkv": "transformer.h.{i}.attn.c_attn",
        "blocks.{i}.attn.proj": "transformer.h.{i}.attn.c_proj", "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
        "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc", "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
    },
    "llama": LLAMA_NAMES, "qwen3": LLAMA_NAMES,  # a Llama has no q_norm and k_norm
    "nanochat": LLAMA_NAMES | {"blocks.{i}.mlp.up": "model.layers.{i}.mlp.fc1",
                               "blocks.{i}.mlp.down": "model.layers.{i}.mlp.fc2"},
}

# Fields of transformers' configurations that do not affect logits, or that GPTConfig has under other names.
NO_MATTER = re.compile(r"_name_or_path|architectures|\w*dtype|transformers_version|\w+_token_id|\w*p?drop(out)?|"
                       r"initializer_range|use_cache|id2label|label2id|problem_type|return_dict|output_\w+|summary_\w+|"
                       r"chunk_size_feed_forward|reorder_and_upcast_attn|max_window_layers|n_inner")


def gpt_config(theirs, source):
    """transformers' configuration → GPTConfig. Raises UserError, naming the field, for what GPT does not support."""
    if theirs.model_type not in NAMES:
        raise UserError(f"--init-from {source}: model_type {theirs.model_type} is none of {', '.join(NAMES)}")
    stated, heads = _flat(theirs.to_dict()), theirs.num_attention_heads
    cfg = GPTConfig(arch=theirs.model_type, n_layers=theirs.num_hidden_layers, n_heads=heads,
                    d_model=theirs.hidden_size, n_kv_heads=stated.get("num_key_value_heads") or heads,
                    d_ff=stated.get("intermediate_size") or stated.get("n_inner") or 4 * theirs.hidden_size,
                    head_dim=stated.get("head_dim") or theirs.hidden_size // heads, vocab_size=theirs.vocab_size,
                    rope_theta=float(stated.get("rope_parameters.rope_theta", 0)),
                    max_position_embeddings=theirs.max_position_embeddings, tie_embeddings=theirs.tie_word_embeddings)
    cfg.validate_sizes()
    # Fields in both configurations must agree. Fields missing from ours are allowed, except in rope_parameters.
    ours = _flat(hugging_face_config(cfg).to_dict())
    for name, value in stated.items():
        missing = None if name.startswith("rope_parameters.") else value
        if not NO_MATTER.fullmatch(name) and value != ours.get(name, missing):
            raise UserError(f"--init-from {source}: {name} is {value}, and {cfg.arch} here has {ours.get(name)}")
    if "quantization_config" in stated:
        raise UserError(f"--init-from {source}: quantization_config is set; give weights that are not quantized")
    if set(stated.get("auto_map") or ()) - {"AutoTokenizer", "AutoProcessor"}:
        raise UserError(f"--init-from {source}: auto_map is set: its model is code of its own, which is not run here")
    if "/" in (kernel := str(theirs._attn_implementation)):  # else transformers would fetch and run it
        raise UserError(f"--init-from {source}: attn_implementation is {kernel}: code, which is not run here")
    return cfg


def _flat(fields):
    """{"rope_parameters": {"rope_theta": 1e4}} → {"rope_parameters.rope_theta": 1e4}"""
    inner = fields.get("rope_parameters") or {}
    return fields | {"rope_parameters": None} | {f"rope_parameters.{name}": value for name, value in inner.items()}


def hugging_face_config(cfg, eos=None):
    """The transformers configuration equivalent to this GPTConfig. Raises UserError if there is none."""
    import transformers

    if cfg.arch not in NAMES:
        raise UserError(f"--arch {cfg.arch}: transformers has no such model, so that it cannot be exported")
    common = dict(vocab_size=cfg.vocab_size, bos_token_id=eos, eos_token_id=eos, tie_word_embeddings=cfg.tied)
    if cfg.arch == "gpt2":
        if (cfg.kv_heads, cfg.head_size * cfg.n_heads) != (cfg.n_heads, cfg.d_model):
            raise UserError("--arch: GPT-2 has as many key/value heads as query heads, of d_model / n_heads each; "
                            "transformers' class cannot hold this model")
        return transformers.GPT2Config(n_positions=cfg.max_position_embeddings, n_embd=cfg.d_model,
                                       n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.ff_size,
                                       layer_norm_epsilon=cfg.parts.norm_eps,
                                       resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout,
                                       **common)
    if cfg.arch == "llama" and cfg.d_model % cfg.n_heads:
        raise UserError(f"--arch llama: transformers' class holds no --d-model {cfg.d_model} that --n-heads "
                        f"{cfg.n_heads} does not divide")
    shape = dict(hidden_size=cfg.d_model, intermediate_size=cfg.ff_size, num_hidden_layers=cfg.n_layers,
                 num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_size,
                 max_position_embeddings=cfg.max_position_embeddings, rms_norm_eps=cfg.parts.norm_eps,
                 rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta or cfg.parts.rope_theta},
                 attention_dropout=cfg.dropout)
    kind, own = {"llama": (transformers.LlamaConfig, {}),
                 "qwen3": (transformers.Qwen3Config, dict(use_sliding_window=False)),
                 "nanochat": (transformers.NanoChatConfig, dict(final_logit_softcapping=cfg.parts.softcap,
                                                                pad_token_id=None))}[cfg.arch]
    return kind(**shape, **common, **own)


def to_hugging_face(cfg, state):
    """Our state dict → theirs."""
    sizes = [n * cfg.head_size for n in (cfg.n_heads, cfg.kv_heads, cfg.kv_heads)]  # of q, k and v
    theirs = {}
    for name, tensor in state.items():
        names = _their_names(cfg, name)
        tensor = _oriented(cfg, name, tensor)
        parts = tensor.split(sizes) if len(names) == 3 else [tensor]
        theirs |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    return theirs


def from_hugging_face(cfg, theirs):
    """Their state dict → ours, for a GPT of `cfg`."""
    ours = {}
    with torch.device("meta"):
        names = GPT(cfg).state_dict().keys()
    for name in names:
        parts = [_oriented(cfg, name, theirs[part]) for part in _their_names(cfg, name)]
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()  # no copy where none is needed
    return ours


def _their_names(cfg, name):
    """Our parameter's name → theirs: one, or three for our fused qkv. Raises UserError if there is none."""
    stem, _, kind = name.rpartition(".")
    layer = "".join(re.findall(r"\.(\d+)\.", stem))  # "" outside the blocks
    stem = re.sub(r"\.\d+\.", ".{i}.", stem)
    if stem.endswith("qkv") and cfg.arch != "gpt2":
        return [f"model.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
    if stem not in NAMES[cfg.arch]:
        raise UserError(f"--arch {cfg.arch}: transformers' class has no {name}, and cannot hold this model")
    return [f"{NAMES[cfg.arch][stem]}.{kind}".replace("{i}", layer)]


def _oriented(cfg, name, tensor):
    """Transposes where needed: GPT-2's layers within a block are Conv1D, (in, out); ours are Linear, (out, in)."""
    return tensor.T if cfg.arch == "gpt2" and name.startswith("blocks") and tensor.ndim == 2 else tensor
