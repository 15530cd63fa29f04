"""The loss of a model on a text: `python evaluate.py --checkpoint-path checkpoints/minigpt.pt --data book.txt`.

`evaluate` is what the trainer calls; the command uses the same windows and sums. Without --stride windows do not
overlap, as in training, so that the command reproduces a run's own `val/loss`.
"""

import contextlib
import json
import math
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch

from mini_llm import hardware
from mini_llm.config import arg, parse
from mini_llm.errors import UserError, one_line_errors, visible
from mini_llm.files import without_infinity
from mini_llm.pretrained import load_run
from mini_llm.progress import ProgressBar
from mini_llm.shards import Shard, ShardWriter, foreign_tokens, part_shards, read_meta, read_windows, spread_windows
from mini_llm.text import find_sources, pieces, require_hub, source_names, take
from mini_llm.token_cache import BATCH
from mini_llm.tokenizer import encode_pieces, gives_back, id_count
from model import IGNORE

# With fewer documents, the confidence interval clusters by parts of the text: few and long, as neighbors are alike.
MIN_DOCUMENTS, PARTS = 20, 30


def token_nats(model, x, y, precision):
    """Inputs and targets, (B, T) int64 arrays → the loss of each target, (B, T) float32, 0 where it is IGNORE."""
    with precision.autocast():
        return model(*hardware.to_device(precision.device, x, y), reduction="none").view(y.shape)


def figures(loss, bytes_per_token):
    """The reported metrics, from a loss in nats per token."""
    return {"loss": loss, "ppl": math.inf if loss > 700 else math.exp(loss),
            "bits_per_byte": loss / math.log(2) / bytes_per_token}


@torch.no_grad()
def evaluate(model, corpus, cfg, precision, world):
    """Validation loss in nats per token, also per source if there are several, plus perplexity and bits per byte. Each
    rank takes its share and the sums are all-reduced: no metric depends on the number of ranks. Collective."""
    model.eval()
    nats, n_tokens = {name: [] for name in corpus.val_sources}, dict.fromkeys(corpus.val_sources, 0)
    for name, x, y, rows in corpus.val_batches(cfg.report.eval_tokens, cfg.batch.batch_size, world.rank, world.size):
        y[rows:] = IGNORE
        nats[name].append(token_nats(model, x, y, precision).sum(-1))
        n_tokens[name] += rows * corpus.seq_len
    model.train()
    # fsum rounds once: the order of a rank's windows does not matter. The device is read only here, at the end.
    sums = world.sum([*(math.fsum(x for batch in part for x in batch.tolist()) for part in nats.values()),
                      *n_tokens.values()])
    losses = {name: total / count for name, total, count in zip(nats, sums[:len(nats)], sums[len(nats):], strict=True)}
    # Weighted by each source's own size: under --eval-tokens a small source still gets one window, more than its share.
    weights = [shard.windows(corpus.seq_len) for shard in corpus.val_sources.values()]
    found = figures(float(np.average(list(losses.values()), weights=weights)), corpus.val_bytes_per_token)
    return {f"val/{name}": value for name, value in found.items()} | {
        f"val/loss/{name}": loss for name, loss in losses.items() if name}


@dataclass
class EvaluateConfig:
    """Evaluate"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the checkpoint to evaluate, or a Hugging Face folder (GPT-2, "
                                                         "Llama, Qwen3, NanoChat)", metavar="FILE.pt|DIR")
    data: list[str] = arg([], "text: whatever --train-data takes, several with figures of each, or a folder of token "
                              "shards, for its validation set; nothing: the run's own, if its --cache-dir is there",
                          metavar="PATH")
    text_column: str = arg("", "the column with the text, in files that have columns; unset: the run's")
    seq_len: int = arg(0, "tokens in a window; 0: the run's --seq-len, or of a folder at most 1024", ge=0)
    stride: int = arg(0, "tokens between windows that overlap: after the first window each token is predicted from "
                         "at least --seq-len - --stride before it; 0: windows that do not overlap, as in training",
                      ge=0)
    eval_tokens: int = arg(0, "evaluate on about N tokens, evenly spread, as a run's --eval-tokens does; 0: all", ge=0)
    batch_size: int = arg(8, "windows computed at once", ge=1)
    json: bool = arg(False, "print one JSON object instead")

    def validate(self):
        if self.stride and self.eval_tokens:
            raise UserError("--stride takes the whole text: leave out --eval-tokens")


@dataclass
class Config:
    """Loss, perplexity and bits per byte of a model on a text."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    precision: hardware.PrecisionConfig = field(default_factory=hardware.PrecisionConfig)


def own_validation_set(saved):
    """The folder of token shards that the checkpoint's run was validated on. Raises UserError."""
    config = saved["config"]
    if "train_data" not in config:
        raise UserError("--data is missing: a Hugging Face folder has no validation set; name text to evaluate on")
    # Of the folders in --train-data one may be of token shards.
    given = (Path(path) / "meta.json" for path in (str(saved.get("tokens", "")), *config["train_data"]))
    for file in (*given, *Path(config["cache_dir"]).glob("*/meta.json")):
        with contextlib.suppress(UserError):  # missing, or another corpus's and damaged
            if read_meta(file.parent)["fingerprint"]["val"] == saved["identity"]["the validation data"]:
                return str(file.parent)
    was = config["val_data"] or config["train_data"]
    named = f", such as the run's {shlex.join(map(str, was))}" if was else ""
    raise UserError(f"--data is missing, and the run's own validation set is not in {config['cache_dir']}: name "
                    f"text to evaluate on{named}")


def open_data(paths, text_column, seq_len, tokenizer, eos, saved, folder):
    """{name: Shard} of the data, and {name: bytes of text per token}, with that of all under "". Token shards know only
    the latter. Text is tokenized into `folder`. Raises UserError."""
    if len(paths) == 1 and Path(paths[0], "val.bin").is_file():
        return _open_shards(Path(paths[0]), seq_len, saved)
    column = text_column or saved["config"].get("text_column", "text")
    sources = find_sources(paths, "--data", column)
    require_hub(sources, "--data")
    if foreign := foreign_tokens(sources, saved["config"].get("tokenizer_name", ""),
                                 saved["identity"]["the tokenizer"]):
        raise UserError(f"--data {foreign}: a token file of another tokenizer; give the text itself")
    spans, n_bytes, left_out, changed = {}, {}, 0, False
    writer = ShardWriter(file := Path(folder) / "val.bin", id_count(tokenizer), eos, bytes(32))
    by_path = groupby(sources, lambda source: source.argument)
    for name, (_, own) in zip(source_names(paths) or [""], by_path, strict=True):
        n_bytes[name], start = 0, writer.count
        stream = pieces(list(own), "val")
        while batch := take(stream, BATCH):
            if writer.count == start:  # its first
                changed |= not gives_back(tokenizer, batch)
            for _, ids, size, lost in encode_pieces(tokenizer, batch, eos):
                writer.write(ids)
                n_bytes[name] += size
                left_out += lost
        spans[name] = start, writer.count - start
    writer.close()
    whole = Shard(file)
    shards = {name: whole.part(*span) for name, span in spans.items()}
    if prefix := saved.get("prefix"):
        token = visible(tokenizer.decode(prefix, skip_special_tokens=False))
        print(f"warning: the tokenizer puts {token} before a text, and "
              f"here no document has it: the loss is a little too high", file=sys.stderr)
    if left_out:
        print(f"warning: {left_out:,} characters are left out: the tokenizer has no token for them", file=sys.stderr)
    if changed:
        print("warning: the tokenizer changes the text: its tokens do not decode to what they were made from, whose "
              "bytes count in bits per byte", file=sys.stderr)
    if not any(n_bytes.values()):
        raise UserError(f"--data {' '.join(paths)}: the tokenizer knows none of this text; give another")
    per_token = {name: size / shards[name].count for name, size in n_bytes.items() if size}
    return shards, per_token | {"": sum(n_bytes.values()) / sum(shard.count for shard in shards.values())}


def _open_shards(folder, seq_len, saved):
    """What `open_data` returns, for the validation set in a folder of token shards."""
    meta, file = read_meta(folder), folder / "val.bin"
    if meta["tokenizer_hash"][:16] != saved["identity"]["the tokenizer"]:
        raise UserError(f"--data {folder}: shards of another tokenizer than the checkpoint's; give the text itself")
    Shard(file).verify(meta, "val")
    return part_shards(file, meta["val_sources"], seq_len), {"": meta["bytes"]["val"] / meta["tokens"]["val"]}


def sliding_windows(n_targets, seq_len, stride):
    """Yields (first input token, how many of its last targets count) of windows that count each target once."""
    done = min(seq_len, n_targets)
    yield 0, done
    while done < n_targets:
        new = min(stride, n_targets - done)
        done += new
        yield done - seq_len, new


def window_batches(shards, seq_len, stride, max_tokens, batch_size):
    """Yields batches of windows: name, first positions (B,), inputs and targets (B, T), IGNORE where not counted."""
    spread = {} if stride else spread_windows(shards, seq_len, max_tokens)
    for name, shard in shards.items():
        T = min(seq_len, shard.count - 1)
        windows = (sliding_windows(shard.count - 1, T, stride) if stride else
                   ((index * seq_len, seq_len) for index in spread[name]))
        while batch := list(islice(windows, batch_size)):
            firsts, counted = zip(*batch, strict=True)
            x, y = read_windows(shard, firsts, T)
            y[np.arange(T) < T - np.array(counted)[:, None]] = IGNORE
            yield name, np.array(firsts), x, y


def interval(nats, tokens):
    """The 95 % confidence interval of the loss, from the sums of losses and of tokens per cluster, (n,) each: ± 1.96
    standard errors of a ratio of sums over independent clusters (Cochran 1977, section 6.4). None if there is one."""
    if len(nats) < 2:
        return None
    loss = nats.sum() / tokens.sum()
    error = math.sqrt(len(nats) / (len(nats) - 1) * np.square(nats - loss * tokens).sum()) / tokens.sum()
    return [loss - 1.96 * error, loss + 1.96 * error]


def document_starts(shard):
    """Positions right after the end-of-text tokens of a shard, ascending, (n,)."""
    if shard.eos is None:
        return np.array([], dtype=np.int64)
    block = 1 << 20  # tokens read at a time
    return np.concatenate([first + 1 + np.flatnonzero(shard.read(first, min(block, shard.count - first)) == shard.eos)
                           for first in range(0, shard.count, block)])


@torch.no_grad()
def evaluate_text(model, shards, bytes_per_token, cfg, seq_len, precision):
    """Everything that the command reports, as a dict."""
    starts = {name: document_starts(shard) for name, shard in shards.items()}
    documents = {name: np.zeros((2, len(at) + 1)) for name, at in starts.items()}  # nats and tokens of each document
    length = max(seq_len, math.ceil(sum(shard.count - 1 for shard in shards.values()) / PARTS))
    parts = {name: np.zeros((2, shard.count // length + 1)) for name, shard in shards.items()}
    bar = ProgressBar(total=cfg.eval_tokens or sum(shard.count for shard in shards.values()), unit=" tokens",
                      unit_scale=True, leave=False, disable=None)  # none in a pipe
    for name, firsts, x, y in window_batches(shards, seq_len, cfg.stride, cfg.eval_tokens, cfg.batch_size):
        losses = token_nats(model, x, y, precision).cpu().numpy().astype(np.float64)
        counted = y != IGNORE
        targets = firsts[:, None] + 1 + np.arange(y.shape[1])  # (B, T) positions
        for clusters, keys in ((documents[name], np.searchsorted(starts[name], targets, side="right")),
                               (parts[name], (targets - 1) // length)):  # (B, T) keys
            for sums, values in zip(clusters, (losses, counted), strict=True):
                np.add.at(sums, keys, values)
        bar.update(int(counted.sum()))
    bar.close()
    totals = {name: sums.sum(1) for name, sums in documents.items()}
    # As in `evaluate`: sources count by their own sizes, whatever share of the windows they have.
    weights = {name: shards[name].windows(seq_len) * seq_len / n if cfg.eval_tokens else 1.0
               for name, (_, n) in totals.items()}

    def joined(clusters):
        all_of_them = np.concatenate([sums * weights[name] for name, sums in clusters.items()], axis=1)
        return all_of_them[:, all_of_them[1] > 0]

    kind, clusters = "documents", joined(documents)
    if clusters.shape[1] < MIN_DOCUMENTS:
        kind, clusters = "parts of the text", joined(parts)
    nats, n_tokens = clusters.sum(1).tolist()
    return figures(nats / n_tokens, bytes_per_token[""]) | {
        "ci95": interval(*clusters), "clusters": f"{clusters.shape[1]} {kind}",
        "tokens": int(sum(n for _, n in totals.values())),
        "seq_len": seq_len, "stride": cfg.stride, "precision": precision.name,
        "sources": {name: figures(float(part[0] / part[1]), bytes_per_token.get(name, math.nan))
                    for name, part in totals.items() if name}}


def report(found):
    """The results as text."""
    ci95 = "{:.4f} to {:.4f}".format(*found["ci95"]) if found["ci95"] else "unknown"
    lines = [f"loss {found['loss']:.4f} nats per token (95 %: {ci95}, standard error over {found['clusters']})",
             f"perplexity {found['ppl']:.2f}, {found['bits_per_byte']:.4f} bits per byte",
             f"{found['tokens']:,} tokens in windows of {found['seq_len']}"
             + (f", {found['stride']} apart" if found["stride"] else "")
             + f", amp {found['precision']}; {found['checkpoint']}"
             + (f", step {found['step']}" if found["step"] is not None else "")]
    for name, each in found["sources"].items():
        bits = "" if math.isnan(each["bits_per_byte"]) else f", {each['bits_per_byte']:.4f} bits per byte"
        lines.append(f"loss {each['loss']:.4f}, perplexity {each['ppl']:.2f}{bits} on {name}")
    return "\n".join(lines)


@one_line_errors()
def main():
    given = parse(Config)
    cfg, speed = given.evaluate, hardware.SpeedConfig(**vars(given.precision))
    device = hardware.choose_device(speed.device)
    hardware.configure(speed, device)
    model, tokenizer, eos, saved = load_run(cfg.checkpoint_path)
    seq_len = cfg.seq_len or saved["config"]["seq_len"]
    if seq_len > model.cfg.max_position_embeddings:
        raise UserError(f"--seq-len {seq_len} is above the model's {model.cfg.max_position_embeddings} positions; "
                        f"lower it")
    if cfg.stride > seq_len:
        raise UserError(f"--stride {cfg.stride} is above --seq-len {seq_len}: windows would leave tokens out")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # on NFS, open files keep a name in it
        try:
            shards, bytes_per_token = open_data(cfg.data or [own_validation_set(saved)], cfg.text_column, seq_len,
                                                tokenizer, eos, saved, folder)
        except OSError as error:  # a full disk
            raise UserError(f"{error.filename or folder}: {error.strerror}; make room there, or set TMPDIR") from None
        for name, shard in shards.items():
            if shard.count < (2 if cfg.stride else seq_len + 1):
                where = f"--data {' '.join(cfg.data)}" if cfg.data else "the run's own validation set"
                where += f" ({name})" if name else ""
                raise UserError(f"{where}: {shard.count} tokens are fewer than one window of --seq-len {seq_len} + 1; "
                                f"give more text, or --stride {seq_len}, which takes shorter ones, too")
        precision = hardware.choose_precision(speed, device)
        with hardware.enough_memory():
            found = evaluate_text(model.to(device), shards, bytes_per_token, cfg, seq_len, precision)
    found |= {"checkpoint": cfg.checkpoint_path, "step": saved["state"]["step"]}
    print(json.dumps(without_infinity(found)) if cfg.json else visible(report(found)))


if __name__ == "__main__":
    main()
