"""Our train.py against nanoGPT's own, unmodified train.py: same model, data, batch and device, run in turn.

    python bench/nanogpt.py --nanogpt PATH/TO/nanoGPT --text tinyshakespeare.txt

Speed is measured from outside: the wall time of a long run minus that of a short one, over the steps between them, so
that imports, preparation and the last save cancel. Each round runs every variant once; ratios are taken within a round.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {  # layers, heads, width, context, batch, steps of the short and the long run
    "A": (4, 4, 128, 64, 12, 50, 450),
    "B": (6, 6, 384, 256, 16, 3, 19),
}


def run(command, cwd):
    """→ wall seconds and peak resident MB of one command, which must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def nanogpt_command(checkout, config, steps):
    layers, heads, width, context, batch, *_ = config
    return [sys.executable, checkout / "train.py", "config/train_shakespeare_char.py", "--device=cpu",
            "--compile=False", "--eval_iters=1", "--eval_interval=1000000", "--log_interval=10",
            f"--block_size={context}",
            f"--batch_size={batch}", f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", "--dropout=0.0",
            f"--max_iters={steps}", f"--lr_decay_iters={steps}"]


def our_command(folder, text, config, steps, *flags):
    layers, heads, width, context, batch, *_ = config
    return [sys.executable, ROOT / "train.py", "--train-data", text, "--tokenizer-name", "char", "--device", "cpu",
            "--seq-len", context, "--max-position-embeddings", context, "--batch-size", batch, "--n-layers", layers,
            "--n-heads", heads, "--d-model", width, "--num-steps", steps, "--beta2", 0.99, "--eval-steps", 0,
            "--eval-tokens", context, "--cache-dir", folder / "cache", "--checkpoint-path", folder / "c.pt",
            "--overwrite", *flags]


def prepare_nanogpt(source, text, folder):
    """A copy of the checkout with its own data preparation run on `text`."""
    checkout = folder / "nanoGPT"
    shutil.copytree(source, checkout, ignore=shutil.ignore_patterns(".git", "out*"))
    data = checkout / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    subprocess.run([sys.executable, data / "prepare.py"], check=True, stdout=subprocess.DEVNULL)
    return checkout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="the text to train on, by characters")
    parser.add_argument("--config", choices=CONFIGS, default="A")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import torch

    config = CONFIGS[options.config]
    *_, context, batch, short, long = config
    with tempfile.TemporaryDirectory() as folder:
        folder, text = Path(folder), options.text.resolve()
        checkout = prepare_nanogpt(options.nanogpt, text, folder)
        variants = {
            "nanoGPT, eager fp32": lambda steps: (nanogpt_command(checkout, config, steps), checkout),
            "mini-llm, --no-amp": lambda steps: (our_command(folder, text, config, steps, "--no-amp"), folder),
            "mini-llm, default": lambda steps: (our_command(folder, text, config, steps), folder),
        }
        speed, memory = {name: [] for name in variants}, {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, make in variants.items():
                timed = []
                for steps in (short, long):
                    command, cwd = make(steps)
                    seconds, peak = run(list(map(str, command)), cwd)
                    timed.append(seconds)
                if number:  # the first round warms up caches
                    speed[name].append((long - short) * batch * context / (timed[1] - timed[0]))
                    memory[name].append(peak)

    base = speed["nanoGPT, eager fp32"]
    print(f"configuration {options.config}: {config[0]} layers, {config[1]} heads, d {config[2]}, T {context}, "
          f"batch {batch}; {options.rounds} rounds; torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| variant | tokens/s, median (min–max) | ÷ nanoGPT, median of rounds (min–max) | peak RSS, MB |")
    print("|---|---|---|---|")
    for name, rates in speed.items():
        ratios = [ours / theirs for ours, theirs in zip(rates, base, strict=True)]
        print(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
              f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
              f"| {statistics.median(memory[name]):.0f} |")


if __name__ == "__main__":
    main()
