"""A checkpoint as a Hugging Face folder: `python export.py --checkpoint-path checkpoints/minigpt.pt --output DIR`.

The folder loads with `transformers.AutoModelForCausalLM.from_pretrained(DIR)`, with nothing of ours installed.
`to_hugging_face` and `from_hugging_face` carry weights both ways for all three architectures, with equal logits.
"""

import dataclasses
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
from config import UserError, arg, parse
from model import GPT, GPTConfig

# Our parameter names → theirs; {i} is the block's number. Our merged qkv is GPT-2's c_attn, and the others' q, k, v.
LLAMA_NAMES = {
    "tok_emb": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attn.proj": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
NAMES = {
    "gpt2": {
        "tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
        "blocks.{i}.attn_norm": "transformer.h.{i}.ln_1", "blocks.{i}.attn.qkv": "transformer.h.{i}.attn.c_attn",
        "blocks.{i}.attn.proj": "transformer.h.{i}.attn.c_proj", "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
        "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc", "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
    },
    "qwen3": LLAMA_NAMES | {"blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
                            "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
                            "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj"},
    "nanochat": LLAMA_NAMES | {"blocks.{i}.mlp.up": "model.layers.{i}.mlp.fc1",
                               "blocks.{i}.mlp.down": "model.layers.{i}.mlp.fc2"},
}


@dataclass
class OutputConfig:
    """Export"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the checkpoint to export", metavar="FILE.pt")
    output: str = arg("", "the folder to write", metavar="DIR")
    overwrite: bool = arg(False, "write into a folder that is there already")

    def validate(self):
        if not self.output:
            raise UserError("--output is missing: name the folder to write, such as --output export/minigpt")
        if Path(self.output).exists() and not self.overwrite:
            raise UserError(f"--output {self.output}: there already; add --overwrite, or name another folder")


@dataclass
class ExportConfig:
    """Write a checkpoint as a Hugging Face folder."""

    output: OutputConfig = field(default_factory=OutputConfig)


def hugging_face_config(cfg, eos=None):
    """The transformers configuration that is this GPTConfig."""
    import transformers

    common = dict(vocab_size=cfg.vocab_size, bos_token_id=eos, eos_token_id=eos, tie_word_embeddings=cfg.tied)
    if cfg.arch == "gpt2":
        _require(cfg.kv_heads == cfg.n_heads and cfg.head_size * cfg.n_heads == cfg.d_model,
                 "GPT-2 has as many key/value heads as query heads, of d_model / n_heads each")
        return transformers.GPT2Config(n_positions=cfg.max_position_embeddings, n_embd=cfg.d_model,
                                       n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.ff_size,
                                       resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout,
                                       **common)
    shape = dict(hidden_size=cfg.d_model, intermediate_size=cfg.ff_size, num_hidden_layers=cfg.n_layers,
                 num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_size,
                 max_position_embeddings=cfg.max_position_embeddings, rms_norm_eps=cfg.parts.norm_eps,
                 rope_parameters={"rope_type": "default", "rope_theta": cfg.parts.rope_theta},
                 attention_dropout=cfg.dropout)
    if cfg.arch == "qwen3":
        return transformers.Qwen3Config(use_sliding_window=False, **shape, **common)
    return transformers.NanoChatConfig(final_logit_softcapping=cfg.parts.softcap, pad_token_id=None, **shape, **common)


def to_hugging_face(cfg, state):
    """Our state dict → theirs."""
    theirs = {}
    for name, tensor in state.items():
        layer, stem, kind = _split(name)
        if stem.endswith("attn.qkv") and cfg.arch != "gpt2":
            sizes = [n * cfg.head_size for n in (cfg.n_heads, cfg.kv_heads, cfg.kv_heads)]
            for letter, part in zip("qkv", tensor.split(sizes), strict=True):
                theirs[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
            continue
        theirs[f"{NAMES[cfg.arch][stem]}.{kind}".replace("{i}", layer)] = _oriented(cfg, stem, tensor)
    return theirs


def from_hugging_face(cfg, theirs):
    """Their state dict → ours, for a GPT of `cfg`."""
    ours = {}
    for name, tensor in GPT(cfg).state_dict().items():
        layer, stem, kind = _split(name)
        if stem.endswith("attn.qkv") and cfg.arch != "gpt2":
            ours[name] = torch.cat([theirs[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
            continue
        ours[name] = _oriented(cfg, stem, theirs[f"{NAMES[cfg.arch][stem]}.{kind}".replace("{i}", layer)])
        assert ours[name].shape == tensor.shape, (name, ours[name].shape, tensor.shape)
    return ours


def _split(name):
    """blocks.3.attn.qkv.weight → 3, blocks.{i}.attn.qkv, weight"""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] != "blocks":
        return "", stem, kind
    return parts[1], ".".join(["blocks", "{i}", *parts[2:]]), kind


def _oriented(cfg, stem, tensor):
    """GPT-2's layers within a block are Conv1D, (in, out); ours are Linear, (out, in)."""
    conv1d = cfg.arch == "gpt2" and stem.startswith("blocks") and tensor.ndim == 2
    return tensor.T.contiguous() if conv1d else tensor.contiguous()


def _require(condition, message):
    if not condition:
        raise UserError(f"--arch: {message}; transformers' class cannot hold this model")


def load_model(path):
    """The model of a checkpoint, in evaluation mode, and the checkpoint. Raises UserError."""
    try:
        saved = checkpoint.load(path)
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"--checkpoint-path: {error}") from None
    names = {item.name for item in dataclasses.fields(GPTConfig)}
    known = {name: value for name, value in saved["config"].items() if name in names}
    model = GPT(GPTConfig(**known | {"vocab_size": saved["identity"]["--vocab-size"]}))
    model.load_state_dict(saved["model"])
    return model.eval(), saved


def export(path, output):
    """Write the Hugging Face folder of the checkpoint at `path`: config, safetensors, tokenizer."""
    import transformers

    model, _ = load_model(path)
    run = re.sub(r"\.(best|prev|nonfinite|step-\d+)$", "", path.stem)
    tokenizer = path.with_name(run + ".tokenizer")
    if not tokenizer.is_dir():
        raise UserError(f"--checkpoint-path {path}: its tokenizer, {tokenizer}, is missing; copy it there")
    eos = transformers.AutoTokenizer.from_pretrained(str(tokenizer)).eos_token_id
    twin = transformers.AutoModelForCausalLM.from_config(hugging_face_config(model.cfg, eos))
    missing, unexpected = twin.load_state_dict(to_hugging_face(model.cfg, model.state_dict()), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    twin.tie_weights()
    twin.save_pretrained(output)
    for file in tokenizer.iterdir():
        shutil.copy(file, output)


def main():
    try:
        cfg = parse(ExportConfig).output
        export(Path(cfg.checkpoint_path), cfg.output)
        print(f"wrote {cfg.output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
