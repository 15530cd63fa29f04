"""Tokens per second, ours and the peers', run in turn: the same model, tokens, batch and device, AdamW, no dropout.

    python bench/speed.py --nanogpt PATH/TO/nanoGPT --text tinyshakespeare.txt --size A

Speed is taken from outside: every program prints a line each ten steps, once its device is done with them, and what
counts is the wall time from the line of a first step, after imports, compilation and warm-up, to that of a last one.
Our own reports must agree with it. Each round runs every program once, and ratios are taken within a round. Ours and
the compiled Trainer run in bf16 where the device does it fast, and in fp32 where it does not.
"""

import math
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from peers import SIZES, Bench, benchmark_parser, machine, rows_with, spread, timed


def programs(bench, options, fast):
    """Name → (steps → (folder, command)). The first is what ratios are taken against. `fast`: fp32 or bf16."""
    found = {}
    cpu = options.device == "cpu"
    bf16 = ["--bf16"] if fast == "bf16" else []
    if options.nanogpt:
        if cpu:
            found["nanoGPT, eager fp32"] = lambda steps: bench.nano(steps, False)
        found["nanoGPT, compile " + ("fp32" if cpu else "bf16")] = lambda steps: bench.nano(steps, True)
    if cpu:
        found["HF Trainer, fp32"] = bench.trainer
    found[f"HF Trainer, {fast} + compile"] = lambda steps: bench.trainer(steps, *bf16, "--compile")
    if cpu and bf16:
        found["mini-llm, --no-amp"] = lambda steps: bench.ours(steps, "--no-amp")
    if cpu:
        found["mini-llm, --compile"] = lambda steps: bench.ours(steps, "--compile")
    found["mini-llm, default"] = bench.ours
    return {name: make for name, make in found.items() if not options.only or any(o in name for o in options.only)}


def reported(folder, size):
    """Tokens a second between the same two steps, as our reports have it."""
    rows = rows_with(folder / "c.metrics.jsonl", "global_tokens_per_sec")
    return statistics.harmonic_mean(
        [row["global_tokens_per_sec"] for row in rows if size.first < row["step"] <= size.last])


def matmul_peak(device, dtype):
    """FLOP/s of a large product, the best of ten."""
    n, products = (2048, 1) if device == "cpu" else (8192, 20)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = 0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, products * 2 * n**3 / (time.perf_counter() - began))
    return best


def measure(makers, options, size, folder, peaks, end):
    """Run every program once a round, until about `end` → by name {round: tokens/s} and [peak MB], and our reports ÷
    the first. Each round adds to `peaks`, dtype → FLOP/s of matrix products."""
    speed, memory, agreement = {}, {}, []
    longest = 0
    for number, (name, make) in product(range(1, options.rounds + 1), makers.items()):
        if name == next(iter(makers)):
            for dtype, found in peaks.items():
                found.append(matmul_peak(options.device, dtype))
        start = time.perf_counter()
        if start + longest > end:
            print(f"{options.limit:g} s do not hold another run")
            break
        try:
            rate, resident = timed(make, size)
        except RuntimeError as error:  # the others' figures are worth having
            print(f"round {number}, {name}: {error}", flush=True)
            continue
        longest = max(longest, time.perf_counter() - start)
        print(f"round {number}, {name}: {rate:,.0f} tokens/s", flush=True)
        speed.setdefault(name, {})[number] = rate
        memory.setdefault(name, []).append(resident)
        if name == "mini-llm, default":
            agreement.append(reported(Path(folder), size) / rate)
    return speed, memory, agreement


def ratios(a, b):
    """a ÷ b, of the rounds in which both have run to the end."""
    both = [a[number] / b[number] for number in a.keys() & b.keys()]
    return spread(both, ".2f") if both else ""


def main():
    parser = benchmark_parser(__doc__, size="A", rounds=3)
    parser.add_argument("--text", type=Path, help="the text, by characters; none: Python's standard library, by BPE")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--only", nargs="*", help="only programs whose names contain one of these")
    parser.add_argument("--batch", type=int, help="sequences in a step, in place of the size's own")
    parser.add_argument("--limit", type=float, default=math.inf,
                        help="seconds; no run is begun that would end later, if it took as long as the longest so far")
    options = parser.parse_args()
    end = time.perf_counter() + options.limit
    size = SIZES[options.size]
    size.batch = options.batch or size.batch

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, size, options.text, options.nanogpt, options.device)
        from mini_llm.hardware import SpeedConfig, choose_precision, peak_flops

        with torch.device("meta"):
            flops = size.model(bench.vocab).flops_per_token(size.context)
        fast = choose_precision(SpeedConfig(), torch.device(options.device)).dtype or torch.float32
        makers = programs(bench, options, "bf16" if fast == torch.bfloat16 else "fp32")
        peaks = {torch.float32: [], fast: []}
        speed, memory, agreement = measure(makers, options, size, folder, peaks, end)

    if not speed:
        sys.exit("no program has run to its end")
    first, *_ = speed
    ours = speed.get("mini-llm, default", {})

    print(f"size {options.size}: {size.layers} layers, {size.heads} heads, d {size.width}, T {size.context}, batch "
          f"{size.batch}, vocabulary {bench.vocab}; {len(speed[first])} rounds; {machine(options.device)}")
    print("matrix products, best of each round, TFLOP/s: "
          + "; ".join(f"{str(dtype)[6:]} {spread([p / 1e12 for p in found], '.3g')}" for dtype, found in peaks.items()))
    if agreement:
        print(f"our reports ÷ measured from outside: {spread(agreement, '.3f')}")
    if options.device == "cuda" and (sheet := peak_flops(torch.device("cuda"))) and ours:
        print(f"MFU of mini-llm over the data sheet's {sheet / 1e12:.0f} TFLOP/s: "
              + spread([rate * flops / sheet for rate in ours.values()], ".1%"))
    print(f"\n| program | tokens/s, median (least–largest) | ÷ {first} | share of the matrix products' peak "
          "| ours ÷ it | peak RSS, MB |\n|---|---|---|---|---|---|")
    for name, rates in speed.items():
        peak = max(peaks[torch.float32 if "fp32" in name or "no-amp" in name else fast])
        share = statistics.median(rates.values()) * flops / peak
        print(f"| {name} | {spread(rates.values())} | {ratios(rates, speed[first])} | {share:.0%} "
              f"| {ratios(ours, rates)} | {statistics.median(memory[name]):,.0f} |")


if __name__ == "__main__":
    main()
