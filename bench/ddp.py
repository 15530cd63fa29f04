"""Scaling: torchrun with N ranks against one process, the same global batch, on the CPU's cores or on N GPUs.

    python bench/ddp.py --size A --ranks 2 --text tinyshakespeare.txt      # --mode fsdp: of shards

On a CPU each of N ranks has its share of the cores that the one process has. Speed is taken as in bench/speed.py. Other
flags, such as --compile, go to both.
"""

import tempfile
from pathlib import Path

from peers import ROOT, SIZES, Bench, benchmark_parser, machine, spread, timed


def main():
    parser = benchmark_parser(__doc__, size="A", rounds=3)
    parser.add_argument("--text", type=Path, help="the text, by characters; none: Python's standard library, by BPE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
    options, flags = parser.parse_known_args()
    size = SIZES[options.size]
    if size.batch % options.ranks:
        parser.error(f"--ranks {options.ranks} does not divide the batch of {size.batch}")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, size, options.text, device=options.device)

        def one(steps):
            return bench.ours(steps, *flags)

        def many(steps):
            where, (python, _, *arguments) = bench.ours(steps, "--batch-size", size.batch // options.ranks, *flags)
            return where, [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}",
                           ROOT / f"train_{options.mode}.py", *arguments]

        rates = {one: [], many: []}
        for _ in range(options.rounds):
            for make, found in rates.items():
                found.append(timed(make, size)[0])
    print(f"size {options.size}, global batch {size.batch} x {size.context} tokens, {machine(options.device)}")
    print(f"one process: {spread(rates[one])} tokens/s; {options.ranks} ranks ({options.mode}): {spread(rates[many])}; "
          f"ratio {spread([b / a for a, b in zip(rates[one], rates[many], strict=True)], '.3f')}")


if __name__ == "__main__":
    main()
