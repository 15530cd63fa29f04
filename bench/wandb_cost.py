"""What tracking costs: a run with W&B, online on loopback, against the same run without, in turn.

    python bench/wandb_cost.py

Speed is taken over the reports after W&B is up, from their own times and tokens, so that everything that a run does in
between counts. The start (W&B's import and its first requests, on a core that training may want) is stated apart, as is
what one report costs the training thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]
MODELS = {  # layers, heads, width, context, batch, steps
    "A": (4, 4, 128, 64, 12, 900),
    "default": (4, 4, 256, 256, 8, 150),
}
UP = 5.0  # seconds after the first report from when W&B counts as up


def train(folder, model, flags, environment):
    """One run → tokens/s after the start, tokens/s of the whole, wall seconds."""
    layers, heads, width, context, batch, steps = MODELS[model]
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--n-layers", str(layers), "--n-heads", str(heads),
                    "--d-model", str(width), "--seq-len", str(context), "--batch-size", str(batch), "--num-steps",
                    str(steps), "--eval-steps", "0", "--eval-tokens", "1024", "--save-steps", "0", "--device", "cpu",
                    "--cache-dir", str(folder / "cache"), "--checkpoint-path", str(folder / "c.pt"), "--overwrite",
                    *flags], cwd=folder, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in open(folder / "c.metrics.jsonl")]
    rows = [row for row in rows if "train/loss" in row]
    up = [row for row in rows if row["time"] > rows[0]["time"] + UP]

    def speed(rows):
        return (rows[-1]["train/tokens"] - rows[0]["train/tokens"]) / (rows[-1]["time"] - rows[0]["time"])

    return speed(up), speed(rows), seconds


def report_cost(folder, server):
    """Microseconds that the training thread spends on one report of 30 figures: median and 99th percentile."""
    import dataclasses

    from tracking import JsonlSink
    from wandb_runs import RunPlan, WandbConfig, with_environment
    from wandb_sink import WandbSink

    os.environ.update(server.environment)
    metrics = {f"train/figure_{number}": number / 7 for number in range(30)}
    found = {}
    for name in ("metrics.jsonl", "metrics.jsonl and W&B"):
        rows = JsonlSink(folder / "cost.metrics.jsonl", 0)
        sinks = [rows]
        if "W&B" in name:
            config = dict(wandb_run_id="cost", seed=0)
            cfg = dataclasses.replace(with_environment(WandbConfig()), wandb_mode="online")
            sinks.append(WandbSink(cfg, RunPlan("cost", "", True, False, "rank-0", None),
                                   lambda suffix: folder / f"cost{suffix}", "", config, rows.place(), None, ""))
        costs = []
        for step in range(1500):
            begin = time.perf_counter()
            for sink in sinks:
                sink.log(step, metrics)
            costs.append((time.perf_counter() - begin) * 1e6)
            time.sleep(0.005)
        for sink in sinks:
            sink.close(0)
        start, costs = costs[0], sorted(costs[1:])
        found[name] = start, statistics.median(costs), costs[int(len(costs) * 0.99)]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    options = parser.parse_args()
    import torch
    from wandb_server import WandbServer

    print(f"{options.rounds} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| model | tokens/s without | with W&B | with ÷ without, median of rounds (min–max) | the start included |")
    print("|---|---|---|---|---|")
    with WandbServer() as server, tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for model in options.model:
            speeds = {"off": [], "on": []}
            for number in range(options.rounds + 1):
                order = ("off", "on") if number % 2 else ("on", "off")
                for name in order:
                    flags = ["--use-wandb", "--wandb-mode", "online"] if name == "on" else []
                    measured = train(folder, model, flags, server.environment)
                    if number:  # the first round fills the caches
                        speeds[name].append(measured)
            ratios = [[with_[i] / without[i] for with_, without in zip(speeds["on"], speeds["off"], strict=True)]
                      for i in (0, 1)]
            off, on = (statistics.median(each[0] for each in speeds[name]) for name in ("off", "on"))
            steady, whole = (f"{statistics.median(each):.3f} ({min(each):.3f}–{max(each):.3f})" for each in ratios)
            print(f"| {model} | {off:,.0f} | {on:,.0f} | {steady} | {whole} |", flush=True)
        print("\n| a report of 30 figures goes to | median, µs | 99th percentile, µs | the first, ms |")
        print("|---|---|---|---|")
        for name, (start, median, most) in report_cost(folder, server).items():
            print(f"| {name} | {median:.0f} | {most:.0f} | {start / 1e3:.1f} |")


if __name__ == "__main__":
    main()
