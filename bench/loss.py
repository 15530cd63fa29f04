"""Time to loss: nanoGPT's own recipe against one of ours, on the same training and validation tokens. Anything goes;
what counts is the wall time of the whole process, from a cold start with empty caches of its own.

    python bench/loss.py --nanogpt PATH/TO/nanoGPT --text tinyshakespeare.txt --recipe configs/speedrun-cpu.toml

On the CPU nanoGPT trains as its README says: 2000 steps of size A. On a GPU it trains 124M for so many --seconds. Its
loss is the last that it prints; ours is that of the whole validation set, and the time that of the first report at or
below nanoGPT's.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from peers import ROOT, SIZES, Bench, machine, run, spread


def nanogpt(bench, options):
    """→ wall seconds and the last validation loss of nanoGPT's own recipe."""
    found = {}

    def read(line, seconds):
        if match := re.search(r"step \d+: train loss \S+, val loss (\S+)", line):
            found["loss"], found["seconds"] = float(match[1]), seconds

    if options.device == "cpu":
        flags = ["--eval_iters=20", "--eval_interval=250", "--log_interval=100", "--max_iters=2000",
                 "--lr_decay_iters=2000"]
        wall, *_ = run(*bench.nano(2000, False, *flags), on_line=read)
        return wall, found["loss"]
    flags = ["--eval_iters=20", "--eval_interval=250", "--max_iters=100000", "--lr_decay_iters=3000",
             "--learning_rate=6e-4", "--weight_decay=0.1"]
    run(*bench.nano(3000, True, *flags), on_line=read, seconds=options.seconds)
    return found["seconds"], found["loss"]


def ours(bench, options, target, seed):
    """→ wall seconds until a report at or below `target` (None: never), of the whole process, and the last loss."""
    found = {"reached": None, "loss": None}

    def read(line, seconds):
        if match := re.search(r"val loss (\S+)", line):
            found["loss"] = float(match[1])
            if found["loss"] <= target and found["reached"] is None:
                found["reached"] = seconds

    with tempfile.TemporaryDirectory() as folder:
        data = [part for part in bench.data if part not in ("--cache-dir", bench.folder / "cache")]
        wall, *_ = run(ROOT, [sys.executable, "train.py", "--config", options.recipe, *data, "--device", options.device,
                              "--cache-dir", f"{folder}/cache", "--checkpoint-path", f"{folder}/c.pt", "--seed", seed],
                       on_line=read)
    return found["reached"], wall, found["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, help="the text, by characters; none: Python's standard library, by BPE")
    parser.add_argument("--recipe", default="configs/speedrun-cpu.toml")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=int, default=300, help="that nanoGPT trains on a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="of both; ours with another seed in each")
    options = parser.parse_args()
    rounds = options.rounds if options.device == "cpu" else 1

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, SIZES["A" if options.device == "cpu" else "124m"], options.text, options.nanogpt,
                      options.device)
        theirs, own = [], []
        for seed in range(1337, 1337 + rounds):
            theirs.append(nanogpt(bench, options))
            own.append(ours(bench, options, theirs[-1][1], seed))
            print(f"nanoGPT: loss {theirs[-1][1]:.4f} in {theirs[-1][0]:.1f} s; ours: at or below it after "
                  f"{own[-1][0] or float('nan'):.1f} s, {own[-1][2]:.4f} at the end, {own[-1][1]:.1f} s in all",
                  flush=True)
    print(f"\n{options.recipe}; {machine(options.device)}")
    if all(reached for reached, *_ in own):
        print("nanoGPT's time ÷ ours: until its loss is reached "
              + spread([a / b for (a, _), (b, *_) in zip(theirs, own, strict=True)], ".2f") + ", whole processes "
              + spread([a / b for (a, _), (_, b, _) in zip(theirs, own, strict=True)], ".2f"))


if __name__ == "__main__":
    main()
