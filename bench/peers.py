"""The programs that the benchmarks compare, on the same tokens: ours, nanoGPT's own unmodified train.py, and the
Hugging Face Trainer (hf_trainer.py)."""

import argparse
import contextlib
import math
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Size:
    """A model and its batch, and the steps, multiples of ten, between which its speed is taken."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    first: int
    last: int
    vocab: int = 0  # 0: the tokenizer's own

    @property
    def tokens(self):
        return self.batch * self.context  # in one step

    def model(self, vocab):
        from model import GPT, GPTConfig

        return GPT(GPTConfig(n_layers=self.layers, n_heads=self.heads, d_model=self.width, vocab_size=vocab,
                             max_position_embeddings=self.context))


SIZES = {
    "A": Size(4, 4, 128, 64, 12, 60, 1260),
    "B": Size(6, 6, 384, 256, 16, 10, 70),
    "C": Size(4, 4, 256, 512, 2, 10, 110, vocab=50257),  # a small model with GPT-2's vocabulary
    "124m": Size(12, 12, 768, 1024, 64, 30, 180, vocab=50304),
    "350m": Size(24, 16, 1024, 1024, 32, 20, 120, vocab=50304),
    "1.5b": Size(48, 25, 1600, 1024, 16, 10, 40, vocab=50304),  # for step.py: two checkpoints of 19 GB
}


def benchmark_parser(doc, device=True, size=None, rounds=None):
    """The parser of a benchmark with the flags that several have; `size` and `rounds` are their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if size:
        parser.add_argument("--size", choices=SIZES, nargs="+" if isinstance(size, list) else None, default=size)
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


class Bench:
    """A folder in which every program finds the same tokens: of the file `text`, by character; else by a tokenizer
    trained on them, of the files that match the patterns `code`, or without any, of Python's standard library. Each
    program is a method: steps and more flags → the folder to run it in, and its command."""

    def __init__(self, folder, size, text=None, nanogpt=None, device="cpu", code=()):
        from data import Corpus, DataConfig

        self.folder, self.size, self.device = Path(folder), size, device
        paths, tokenizer = ([str(text.resolve())], "char") if text else (list(code), "bpe")
        self.data = [*(["--train-data", *paths] if paths else []), "--tokenizer-name", tokenizer]
        cfg = DataConfig(train_data=paths, tokenizer_name=tokenizer, seq_len=size.context,
                         cache_dir=str(self.folder / "cache"))
        self.corpus = Corpus(cfg, size.vocab)
        self.vocab = size.vocab or self.corpus.vocab_size
        self.tokens = self.folder / "tokens"  # as nanoGPT has them: ids alone, two bytes each
        self.tokens.mkdir(exist_ok=True)
        for split, shard in (("train", self.corpus.train), ("val", self.corpus.val)):
            ids = np.fromfile(shard.path, shard.dtype)[-shard.count:]
            ids.astype(np.uint16).tofile(self.tokens / f"{split}.bin")
        (self.tokens / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": self.vocab}))
        if nanogpt:
            self.nanogpt = self.folder / "nanoGPT"
            unneeded = shutil.ignore_patterns(".git", "out*", "*.bin")  # 17 GB, if OpenWebText has been prepared there
            shutil.copytree(nanogpt, self.nanogpt, ignore=unneeded)
            shutil.copytree(self.tokens, self.nanogpt / "data" / "same")

    def ours(self, steps, *flags):
        size = self.size
        vocab = ["--vocab-size", size.vocab] if size.vocab else []
        return self.folder, [sys.executable, ROOT / "train.py", *self.data, "--cache-dir", self.folder / "cache",
                             "--device", self.device, *vocab,
                             "--seq-len", size.context, "--max-position-embeddings", size.context,
                             "--batch-size", size.batch, "--n-layers", size.layers, "--n-heads", size.heads,
                             "--d-model", size.width, "--num-steps", steps, "--beta2", 0.99, "--eval-steps", 0,
                             "--save-steps", 0, "--save-minutes", 0, "--eval-tokens", size.context,
                             "--checkpoint-path", self.folder / "c.pt", "--overwrite", *flags]

    def nano(self, steps, compiled, *flags):
        size = self.size
        return self.nanogpt, [sys.executable, "train.py", "--dataset=same", f"--device={self.device}",
                              f"--compile={compiled}", "--eval_iters=1", "--eval_interval=1000000",
                              "--log_interval=10", "--gradient_accumulation_steps=1", f"--block_size={size.context}",
                              f"--batch_size={size.batch}", f"--n_layer={size.layers}", f"--n_head={size.heads}",
                              f"--n_embd={size.width}", "--dropout=0.0", "--bias=True", "--beta2=0.99",
                              "--learning_rate=1e-3", "--min_lr=1e-4", "--warmup_iters=100", f"--max_iters={steps}",
                              f"--lr_decay_iters={steps}", "--always_save_checkpoint=False", *flags]

    def trainer(self, steps, *flags):
        size = self.size
        return self.folder, [sys.executable, Path(__file__).with_name("hf_trainer.py"), "--tokens", self.tokens,
                             "--device", self.device, "--vocab", self.vocab, "--layers", size.layers, "--heads",
                             size.heads, "--width", size.width, "--context", size.context, "--batch", size.batch,
                             "--steps", steps, *flags]


def run(where, command, on_line=None, seconds=None):
    """Run one command → wall seconds, peak resident MB, its output. `on_line(line, seconds so far)` is called on every
    line; if it returns "end", or after `seconds`, the command is ended. Raises RuntimeError if it fails."""
    began = time.perf_counter()
    lines, ended, peak = [], False, math.nan
    process = subprocess.Popen(list(map(str, command)), cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"})
    for line in process.stdout:
        lines.append(line)
        now = time.perf_counter() - began
        peak = peak_resident_mb(process.pid) or peak
        enough = on_line and on_line(line, now) == "end"
        if (enough or seconds and now > seconds) and not ended:
            process.terminate()
            ended = True
    if process.wait() and not ended:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{''.join(lines)[-2000:]}")
    return time.perf_counter() - began, peak, "".join(lines)


def peak_resident_mb(pid):
    """A process's peak so far; None if it cannot be read. Not its ru_maxrss, which begins with its parent's memory."""
    with contextlib.suppress(OSError):  # gone, or not Linux
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return found and int(found[1]) / 1024


# After each ten steps: ours, nanoGPT's, the Trainer's.
PROGRESS = re.compile(r"step \d+/\d+ \| lr|^iter \d+: loss|^\{'loss'")


def timed(make, size):
    """One run → tokens/s between the lines of two steps, and peak resident MB."""
    seen = []
    _, peak, _ = run(*make(size.last + 10), lambda line, seconds: PROGRESS.search(line) and seen.append(seconds))
    seen = seen[size.first // 10 - 1:-1]  # ours evaluates before its last line
    return (len(seen) - 1) * 10 * size.tokens / (seen[-1] - seen[0]), peak


def rows_with(path, metric):
    """The records of a metrics.jsonl that have this metric."""
    from mini_llm.files import read_records

    return [record for record in read_records(path) if metric in record]


def spread(values, form=",.0f"):
    """Median (least–largest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def machine(device):
    import torch
    import transformers

    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    return (f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}")
