"""What a checkpoint costs the training loop: saved while it waits, and with --async-save, in turn.

    python bench/saving.py --size A B --rounds 3

Of one run each: the time that the loop stands still for a save, from its own reports and as a share of a step; and the
time of all steps, saves included, against the same run that saves only at its end.
"""

import statistics
import tempfile
from pathlib import Path

from peers import SIZES, Bench, benchmark_parser, machine, rows_with, run, spread

SAVES = 10
KINDS = {"never": ["--save-steps", 0], "waiting": [], "--async-save": ["--async-save"]}


def measure(bench, steps, every, flags):
    """→ seconds of a step, median seconds that a save holds it up, seconds of the steps with all that is between."""
    where, command = bench.ours(steps, "--log-steps", every, "--save-steps", every, *flags)
    run(where, command)
    rows = rows_with(bench.folder / "c.metrics.jsonl", "train/step_time_sec")
    saves = [row["time/checkpoint_sec"] for row in rows[2:-1] if "time/checkpoint_sec" in row]  # the first is told next
    return (statistics.median(row["train/step_time_sec"] for row in rows), statistics.median(saves) if saves else 0.0,
            rows[-1]["time"] - rows[0]["time"])


def main():
    parser = benchmark_parser(__doc__, size=["A", "B"], rounds=3)
    options = parser.parse_args()
    print(f"{machine(options.device)}; {options.rounds} rounds\n")
    print("| model | save | a save holds up the loop | of a step | all steps ÷ those without saves |")
    print("|---|---|---|---|---|")
    for name in options.size:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(folder, SIZES[name], device=options.device)
            every, found = SIZES[name].first * 2, {kind: [] for kind in KINDS}  # a save every five seconds or so
            for _ in range(options.rounds):
                for kind, flags in KINDS.items():
                    found[kind].append(measure(bench, SAVES * every, every, flags))
            for kind in list(KINDS)[1:]:
                held = [save for _, save, _ in found[kind]]
                share = [save / step for step, save, _ in found[kind]]
                whole = [mine[2] / never[2] for mine, never in zip(found[kind], found["never"], strict=True)]
                size = Path(folder, "c.pt").stat().st_size / 1e6
                print(f"| {name}, checkpoint {size:,.0f} MB, every {every} steps | {kind} | {spread(held, '.3f')} s | "
                      f"{spread(share, '.1%')} | {spread(whole, '.3f')} |", flush=True)


if __name__ == "__main__":
    main()
