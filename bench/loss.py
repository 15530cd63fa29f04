"""Time to loss: nanoGPT's own recipe against one of ours, on the same training and validation text. Anything goes;
what counts is the wall time of the whole process, from a cold start with empty caches of its own.

    python bench/loss.py --nanogpt PATH/TO/nanoGPT --text tinyshakespeare.txt --recipe configs/speedrun-cpu.toml

On the CPU nanoGPT trains as its README says: 2000 steps of size A, by characters, and its loss is the last that it
prints. Ours may have another tokenizer: losses are in nats per byte, which in ASCII text is a character. On a GPU
nanoGPT trains 124M for so many --seconds on the source files of torch and transformers, 100 MB that every machine has,
and its loss is the least that it prints, at the time of that. Ours is that of the recipe's --eval-tokens, and the time
that of the first report at or below nanoGPT's; on a GPU, where both find their tokens prepared, it ends there. In each
round ours has another seed.
"""

import dataclasses
import importlib.util
import math
import re
import sys
import tempfile
from pathlib import Path

from peers import ROOT, SIZES, Bench, benchmark_parser, machine, rows_with, run, spread

from mini_llm.errors import UserError, one_line_errors


def nanogpt(bench, options):
    """→ wall seconds and the validation loss of nanoGPT's own recipe."""
    found = {"loss": float("inf")}

    def read(line, seconds):
        match = re.search(r"step \d+: train loss \S+, val loss (\S+)", line)
        if match and (options.device == "cpu" or float(match[1]) < found["loss"]):
            found["loss"], found["seconds"] = float(match[1]), seconds

    if options.device == "cpu":
        flags = ["--bias=False", "--eval_iters=20", "--eval_interval=250", "--log_interval=100"]
        wall, *_ = run(*bench.nano(2000, False, *flags), on_line=read)
        return wall, found["loss"]
    # A decay that ends within the time, by estimate: an unfinished one would flatter ours.
    flags = ["--bias=False", "--eval_iters=20", "--eval_interval=250", "--max_iters=100000", "--lr_decay_iters=1500",
             "--learning_rate=6e-4", "--min_lr=6e-5", "--beta2=0.95", "--weight_decay=0.1"]
    run(*bench.nano(3000, True, *flags), on_line=read, seconds=options.seconds)
    return found["seconds"], found["loss"]


def ours(bench, options, target, seed):
    """→ wall seconds until a report at or below `target` (None: never), of the whole process, and the last loss."""
    on_gpu = options.device == "cuda"
    reports = [(math.inf, math.nan)]  # (seconds, loss); this one if there is no other
    nats = 1.0  # per byte, of one per token

    def read(line, seconds):
        if match := re.search(r"val loss (\S+)", line):
            reports.append((seconds, float(match[1])))
        return "end" if on_gpu and reports[-1][1] <= target else None

    limit = on_gpu and options.seconds * 2 // 3  # with nanoGPT's time and both starts within nine minutes
    data = ["--train-data", bench.corpus.folder if on_gpu else options.text.resolve()]
    with tempfile.TemporaryDirectory() as folder:
        wall, *_ = run(ROOT, [sys.executable, "train.py", "--config", options.recipe, *data, "--device",
                              options.device, "--cache-dir", f"{folder}/cache", "--checkpoint-path", f"{folder}/c.pt",
                              "--seed", seed], on_line=read, seconds=limit)
        if not on_gpu:
            last = rows_with(f"{folder}/c.metrics.jsonl", "val/loss")[-1]
            nats = last["val/bits_per_byte"] * math.log(2) / last["val/loss"]
    reached = min((seconds for seconds, loss in reports if loss * nats <= target), default=None)
    return reached, wall, reports[-1][1] * nats


@one_line_errors()
def main():
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, help="the text, for the CPU")
    parser.add_argument("--recipe", default="configs/speedrun-cpu.toml")
    parser.add_argument("--seconds", type=int, default=300, help="that nanoGPT trains on a GPU, from its start")
    options = parser.parse_args()
    if options.device == "cpu" and not (options.text and options.text.is_file()):
        raise UserError("--text FILE: for the CPU, name a text that is there")
    if options.text and not options.text.read_bytes().isascii():
        raise UserError(f"--text {options.text}: characters are bytes in ASCII text only; give another")
    rounds, size = options.rounds, SIZES["A"]
    code = ()  # patterns of files: the text, on a GPU
    if options.device == "cuda":
        rounds, size = 1, dataclasses.replace(SIZES["124m"], vocab=0)  # the tokenizer's own, as the recipe has it
        code = [f"{Path(importlib.util.find_spec(package).origin).parent}/**/*.py" for package in ("torch",
                                                                                                  "transformers")]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, size, options.text, options.nanogpt, options.device, code)
        theirs, own = [], []
        for seed in range(1337, 1337 + rounds):
            seconds, target = nanogpt(bench, options)
            theirs.append(seconds)
            print(f"nanoGPT: loss {target:.4f} in {seconds:.1f} s", flush=True)
            reached, wall, loss = ours(bench, options, target, seed)
            own.append((reached, wall))
            print(f"ours: at or below it after {reached or math.nan:.1f} s, {loss:.4f} at the end, {wall:.1f} s in all",
                  flush=True)
    print(f"\n{options.recipe}; {machine(options.device)}")
    if all(reached for reached, _ in own):
        print("nanoGPT's time ÷ ours: until its loss is reached "
              + spread([a / b for a, (b, _) in zip(theirs, own, strict=True)], ".2f"))
        if options.device == "cpu":  # on a GPU neither runs to its end
            print("whole processes " + spread([a / b for a, (_, b) in zip(theirs, own, strict=True)], ".2f"))


if __name__ == "__main__":
    main()
