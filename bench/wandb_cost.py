"""What tracking costs: a run with W&B, online on loopback, against the same run without, in turn.

    python bench/wandb_cost.py

Speed is taken over the reports after W&B is up, from their own times and tokens, so that everything that a run does in
between counts. The start (W&B's import and its first requests, on a core that training may want) is stated apart, as is
what one report costs the training thread.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from peers import ROOT, SIZES, Bench, Size, benchmark_parser, machine, rows_with, run, spread

sys.path.append(str(ROOT / "tests"))
MODELS = {"A": dataclasses.replace(SIZES["A"], last=900), "default": Size(4, 4, 256, 256, 8, first=0, last=150)}
UP = 5.0  # seconds after the first report from when W&B counts as up


def train(bench, flags):
    """One run → tokens/s after the start, tokens/s of the whole."""
    run(*bench.ours(bench.size.last, *flags))
    rows = rows_with(bench.folder / "c.metrics.jsonl", "train/loss")
    up = [row for row in rows if row["time"] > rows[0]["time"] + UP]

    def speed(rows):
        return (rows[-1]["train/tokens"] - rows[0]["train/tokens"]) / (rows[-1]["time"] - rows[0]["time"])

    return speed(up), speed(rows)


def report_cost(folder):
    """Microseconds that the training thread spends on one report of 30 figures: median and 99th percentile."""
    from mini_llm.sinks import JsonlSink
    from mini_llm.wandb_runs import RunPlan, WandbConfig, with_environment
    from mini_llm.wandb_sink import WandbSink

    metrics = {f"train/figure_{number}": number / 7 for number in range(30)}
    found = {}
    for name in ("metrics.jsonl", "metrics.jsonl and W&B"):
        rows = JsonlSink(folder / "cost.metrics.jsonl", 0)
        sinks = [rows]
        if "W&B" in name:
            config = dict(wandb_run_id="cost", seed=0, local_rank=0)
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
    parser = benchmark_parser(__doc__, device=False, rounds=5)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    options = parser.parse_args()
    from wandb_server import WandbServer

    print(f"{options.rounds} rounds; {machine('cpu')}\n")
    print("| model | tokens/s without | with W&B | with ÷ without, median of rounds (min–max) | the start included |")
    print("|---|---|---|---|---|")
    with WandbServer() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment)
        for model in options.model:
            bench = Bench(folder, MODELS[model])
            speeds = {"off": [], "on": []}
            for number in range(options.rounds + 1):
                order = ("off", "on") if number % 2 else ("on", "off")
                for name in order:
                    flags = ["--use-wandb", "--wandb-mode", "online"] if name == "on" else []
                    measured = train(bench, flags)
                    if number:  # the first round fills the caches
                        speeds[name].append(measured)
            ratios = [[with_[i] / without[i] for with_, without in zip(speeds["on"], speeds["off"], strict=True)]
                      for i in (0, 1)]
            off, on = (statistics.median(each[0] for each in speeds[name]) for name in ("off", "on"))
            steady, whole = (spread(each, ".3f") for each in ratios)
            print(f"| {model} | {off:,.0f} | {on:,.0f} | {steady} | {whole} |", flush=True)
        print("\n| a report of 30 figures goes to | median, µs | 99th percentile, µs | the first, ms |")
        print("|---|---|---|---|")
        for name, (start, median, most) in report_cost(Path(folder)).items():
            print(f"| {name} | {median:.0f} | {most:.0f} | {start / 1e3:.1f} |")


if __name__ == "__main__":
    main()
