"""A checkpoint as a Hugging Face folder: `python export.py --checkpoint-path checkpoints/minigpt.pt --output DIR`.

The folder loads with `transformers.AutoModelForCausalLM.from_pretrained(DIR)`, without any of our code.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import BatchConfig, DataConfig
from generate import TEMPERATURE, TOP_K
from mini_llm.config import arg, is_launch_flag, parse
from mini_llm.errors import UserError, one_line_errors
from mini_llm.files import beside_run, make_folder, read_json, read_records, sync_path, tokenizer_files
from mini_llm.hardware import SpeedConfig
from mini_llm.hugging_face import hugging_face_config, to_hugging_face
from mini_llm.pretrained import load_run, tokenizer_folder
from mini_llm.tokenizer import id_count
from model import GPTConfig
from optim import OptimConfig

TRAINED_BY = (GPTConfig, DataConfig, BatchConfig, OptimConfig, SpeedConfig)  # the flags that the card lists
# What is loaded from such a folder. Beside a new export, an earlier one's would count, too.
LOADED = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|tokenizer\.model|merges\.txt|"
                    r"vocab\.(json|txt)|(model\.safetensors|pytorch_model\.bin)\.index\.json|special_tokens_map\.json|"
                    r"added_tokens\.json|chat_template\.(jinja|json)")
SPARE_IDS = 4096  # at most this many ids without a token are listed in generation_config.json as suppressed


@dataclass
class ExportConfig:
    """Export"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the checkpoint to export", metavar="FILE.pt")
    output: str = arg("", "the folder to write", metavar="DIR")
    dtype: str = arg("float32", "type of the weights; bfloat16 halves the file", choices=("float32", "bfloat16"))
    overwrite: bool = arg(False, "write into a folder that is there already; an earlier model's files go, others stay")

    def validate(self):
        if not self.output:
            raise UserError("--output is missing: name the folder to write, such as --output export/minigpt")
        if os.path.exists(self.output) and not self.overwrite:
            raise UserError(f"--output {self.output}: there already; add --overwrite, or name another folder")
        if os.path.isfile(self.output):
            raise UserError(f"--output {self.output}: is a file; name a folder")


@dataclass
class Config:
    """Write a checkpoint as a Hugging Face folder."""

    export: ExportConfig = field(default_factory=ExportConfig)


def export(path, output, dtype="float32"):
    """Write the checkpoint at `path` as a Hugging Face folder, with tokenizer and model card. Raises UserError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if path.is_dir():
        raise UserError(f"--checkpoint-path {path}: a folder, and so no checkpoint; give the .pt file")
    model, tokenizer, eos, saved = load_run(path)
    n_tokens = id_count(tokenizer)
    twin = transformers.AutoModelForCausalLM.from_config(hugging_face_config(model.cfg, eos))
    missing, unexpected = twin.load_state_dict(to_hugging_face(model.cfg, model.state_dict()), strict=False)
    if different := [*unexpected, *sorted(set(missing) - {"lm_head.weight"})]:
        raise UserError(f"--arch {model.cfg.arch}: model.py, which must have been changed, and transformers' class "
                        f"differ in {different[0]}: it cannot hold this model")
    _require_same_model(model, twin.eval(), min(saved["config"]["seq_len"], 1024), eos)
    spare = list(range(n_tokens, model.cfg.vocab_size))  # ids that the tokenizer does not have
    twin.generation_config = transformers.GenerationConfig(
        bos_token_id=saved.get("start", eos), eos_token_id=eos, pad_token_id=eos,
        suppress_tokens=spare if 0 < len(spare) <= SPARE_IDS else None,
        do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
    output = Path(output)
    try:
        make_folder(output.parent)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as draft:
            draft = Path(draft)
            twin.to(getattr(torch, dtype)).save_pretrained(draft)
            if model.cfg.parts.rope_theta:  # where transformers before version 5, and other loaders, look for it
                config = read_json(draft / "config.json")
                theta = config["rope_parameters"]["rope_theta"]
                (draft / "config.json").write_text(json.dumps(config | dict(rope_theta=theta), indent=2))
            for file in draft.glob("*.safetensors"):  # which the library lets only its owner read
                with contextlib.suppress(OSError):  # a file system without rights, such as Windows' under WSL
                    file.chmod((draft / "config.json").stat().st_mode & 0o777)
            _write_tokenizer(tokenizer_folder(path), tokenizer, model.cfg.max_position_embeddings, draft)
            (draft / "README.md").write_text(model_card(path, model, saved, n_tokens, dtype), "utf-8")
            _move(draft, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: {getattr(error, 'strerror', None) or error}; name a folder that can be "
                        f"written") from None


def _move(draft, output):
    """Move all files from one folder to another, once they are on the disk, and delete an earlier model's there."""
    written = {file.name for file in draft.glob("[!.]*")}  # a ._NAME of macOS moves with its file
    for name in written:
        sync_path(draft / name)
    make_folder(output)
    for name in written:
        (draft / name).replace(output / name)
    for file in output.iterdir():
        if LOADED.fullmatch(file.name) and file.name not in written and file.is_file():
            file.unlink(missing_ok=True)
    sync_path(output)


def _require_same_model(model, twin, length, eos):
    """Raises UserError unless both compute the same: model.py may have been changed, transformers' class has not."""
    # One document: a model whose attention ends with each (docs/extending.md) is transformers' on one.
    ids = [number % model.cfg.vocab_size for number in range(length + 1)]
    tokens = torch.tensor([[token for token in ids if token != eos][:length]])  # (1, up to length)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(tokens).logits
    if (ours - theirs).norm() > 1e-3 * ours.norm():  # rounding makes 1e-6; not of NaN, which weights may be
        raise UserError(f"--arch {model.cfg.arch}: transformers' class gives other logits than model.py, which must "
                        f"have been changed, and cannot hold this model")


def _write_tokenizer(source, tokenizer, length, draft):
    """A copy of the tokenizer's folder, with what other programs require of it."""
    for file in tokenizer_files(source):
        shutil.copy(file, draft)
    if tokenizer.encode("").ids != tokenizer.encode("", add_special_tokens=False).ids:
        tokenizer.post_processor = None  # it adds special tokens that training did not
        (draft / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    path = draft / "tokenizer_config.json"
    try:
        settings = read_json(path)
    except ValueError as error:
        raise UserError(f"{source}: {path.name} is damaged: {error}") from None
    settings["model_max_length"] = length
    if settings.get("eos_token"):  # CTranslate2 requires an unknown token; GPT-2's own tokenizer uses this one
        settings.setdefault("unk_token", settings["eos_token"])
    path.write_text(json.dumps(settings, indent=1))


def model_card(path, model, saved, n_tokens, dtype):
    """README.md of the folder: what the checkpoint and the files beside it say about the run."""
    cfg, config, identity, state = model.cfg, saved["config"], saved["identity"], saved["state"]
    metrics = beside_run(path, ".metrics.jsonl")
    kept = "step", "event", "config", "train/loss", "val/loss"  # and not histograms, of megabytes in each row
    rows = [{name: row.get(name) for name in kept} for row in (read_records(metrics) if metrics.is_file() else ())
            if row["step"] <= state["step"]]
    facts = next((row["config"] for row in reversed(rows) if row["event"] == "config"), {})
    counts = facts.get("corpus_tokens", {})

    def last(name):
        return next(((row[name], row["step"]) for row in reversed(rows) if row[name] is not None), None)

    def loss(value, step):
        at = f" at step {step:,}" if step is not None else ""
        return f"{value:.4f} nats per token (perplexity {math.exp(min(value, 700)):.2f}){at}"

    def data(split, files, fingerprint):
        tokens = f"{counts[split]:,}" if split in counts else "unknown"
        return f"| {split} | {', '.join(f'`{file}`' for file in files)} | {tokens} | `{fingerprint}` |"

    built_in = "a Markov chain" if config["use_toy_data"] else "Python's standard library"
    # Whether the text was split here; token shards and the Markov chain come already split.
    divided = not config["use_toy_data"] and Path(facts.get("corpus", "")) not in map(Path, config["train_data"])
    val_files = config["val_data"] or [f"{config['val_ratio']:.3g} of the text above" if divided else "of the same"]
    known = (state["best_val"], None) if math.isfinite(state["best_val"]) else None  # only the metrics know its step
    best = min(((row["val/loss"], row["step"]) for row in rows if row["val/loss"] is not None), default=known)
    losses = [("training loss", last("train/loss")), ("validation loss", last("val/loss")),
              ("best validation loss so far", best)]
    results = [f"- {name}: {loss(*found)}" for name, found in losses if found]
    log = beside_run(path, ".log")
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    results += [f"- Weights & Biases: {link}" for link in re.findall(r"wandb.*: run .+ at (https?://\S+)", text)[-1:]]
    elsewhere = {"device", "train_data", "val_data", "val_ratio", "use_toy_data", "tokenizer_name"}
    flags = [one.name for part in TRAINED_BY for one in dataclasses.fields(part)]
    settings = "\n".join(f"{name} = {json.dumps(config[name], ensure_ascii=False)}" for name in flags
                         if name not in elsewhere and not is_launch_flag(name)
                         and config.get(name) not in (None, "", []))
    spare = f", and {cfg.vocab_size - n_tokens:,} ids without meaning" if cfg.vocab_size > n_tokens else ""
    origin = f"\n| started from | `{config['init_from']}` |" if config.get("init_from") else ""
    results = "\n".join(results)
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mini-llm
- {cfg.arch}
---

# {beside_run(path, '').name}

A base model: it continues the text that it is given, in the style of its training data. It has not been trained to
follow instructions, to converse or to refuse anything, and nobody has reviewed what it says.

## Model

| | |
|---|---|
| architecture | {cfg.arch} |
| parameters | {model.num_params():,} ({dtype}) |
| layers | {cfg.n_layers} |
| heads | {cfg.n_heads} of width {cfg.head_size}, {cfg.kv_heads} for keys and values |
| width | {cfg.d_model}, {cfg.ff_size} in the MLP |
| context | {cfg.max_position_embeddings:,} tokens; trained on sequences of {identity['--seq-len']:,} |
| vocabulary | {n_tokens:,} tokens{spare} (`{facts.get('corpus_tokenizer', config['tokenizer_name'])}`) |
| embeddings | {'shared by input and output' if cfg.tied else 'input and output apart'} |{origin}

## Data

| | files | tokens | fingerprint |
|---|---|---|---|
{data("train", config["train_data"] or [built_in], identity["the training data"])}
{data("val", val_files, identity["the validation data"])}

## Training

{state['step']:,} steps of {identity['sequences in a step']:,} sequences: {state['tokens']:,} tokens.

{results}

```toml
{settings}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""


@one_line_errors()
def main():
    cfg = parse(Config).export
    export(Path(cfg.checkpoint_path), cfg.output, cfg.dtype)
    print(f"wrote {cfg.output}")


if __name__ == "__main__":
    main()
