"""A long run, watched from outside: does it grow, slow down, or leave anything open?

    python bench/soak.py --minutes 20
    python bench/soak.py --minutes 20 --ranks 2 --use-wandb

It trains without a pause, evaluating and saving every few seconds, and once a second counts the main process's memory,
open files and threads in /proc. Step time is the run's own. Each is shown as its median and as a line fitted to the
last nine tenths of the time: its change in one hour, and over the run, beside the noise around the line.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import ROOT, rows_with

WARM = 0.1  # of the time, at the start, left out


def sample(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return {"memory, MB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
            "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
            "open files": len(os.listdir(f"/proc/{pid}/fd"))}


def trainer_pid(pid):
    """torchrun's first rank, or the process itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = [child for child in children if b"train_ddp.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return int(ranks[0]) if ranks else pid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--ranks", type=int, default=0, help="0: train.py")
    options, flags = parser.parse_known_args()
    script = [str(ROOT / "train.py")] if not options.ranks else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}", str(ROOT / "train_ddp.py")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *script, "--num-steps", "100000000", "--time-limit", str(options.minutes),
                   "--log-steps", "20", "--eval-steps", "100", "--save-steps", "100", "--sample-steps", "500",
                   "--checkpoint-path", "soak.pt", *flags]
        seen, began = [], time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL,
                                   env=os.environ | {"WANDB_MODE": "offline"})
        time.sleep(10)
        pid = trainer_pid(process.pid)
        while process.poll() is None:
            try:
                seen.append((time.monotonic() - began, sample(pid)))
            except OSError:
                break
            time.sleep(1)
        code = process.wait()
        rows = rows_with(Path(folder, "soak.metrics.jsonl"), "train/step_time_sec")
        saves = sum("time/checkpoint_sec" in row for row in rows)
        evals = sum("val/loss" in row for row in rows)
        kinds = {kind: [(at, values[kind]) for at, values in seen] for kind in seen[0][1]}
        kinds["step time, ms"] = [(row["time"] - rows[0]["time"], row["train/step_time_sec"] * 1000) for row in rows]
        print(f"{' '.join(['python', script[-1], *flags])}: {rows[-1]['step']} steps in "
              f"{rows[-1]['time'] - rows[0]['time']:.0f} s, {evals} evaluations, {saves} intervals with a save, exit "
              f"code {code}\n\n| | median | change in one hour | over the run | noise around the line |")
        print("|---|---|---|---|---|")
        for kind, points in kinds.items():
            points = [(at, value) for at, value in points if at > WARM * points[-1][0]]
            (slope, at0), values = statistics.linear_regression(*zip(*points, strict=True)), [v for _, v in points]
            noise = statistics.stdev(value - slope * at - at0 for at, value in points)
            print(f"| {kind} | {statistics.median(values):,.4g} | {slope * 3600:+.3g} | "
                  f"{slope * (points[-1][0] - points[0][0]):+.3g} | ±{noise:.2g} |")


if __name__ == "__main__":
    main()
