import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

# Small enough that a step takes a few milliseconds; every other flag is the default's.
TINY = ["--n-layers", "2", "--n-heads", "2", "--d-model", "32", "--seq-len", "32", "--batch-size", "4",
        "--max-position-embeddings", "64", "--tokenizer-name", "byte", "--eval-tokens", "512", "--device", "cpu"]


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 120 KB of prose-like lines, the same on every machine."""
    import random

    rng = random.Random(7)
    words = "the a king sea of and runs sings night under stone bright old river".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + "." for _ in range(3200)]
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One token cache for the whole session: runs on the same text share it."""
    return tmp_path_factory.mktemp("cache")


class Run:
    """A finished command: exit code, output, and the rows of its metrics.jsonl."""

    def __init__(self, process, folder, checkpoint):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr
        self.checkpoint = folder / checkpoint

    @property
    def rows(self):
        path = self.checkpoint.with_suffix("").with_suffix(".metrics.jsonl")
        return {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}

    def losses(self):
        """(step, name) → value of every loss reported."""
        return {(step, name): row[name] for step, row in self.rows.items() for name in ("train/loss", "val/loss")
                if name in row}

    def weights(self):
        import torch

        return torch.load(self.checkpoint, weights_only=True)["model"]


def environment(**extra):
    kept = {name: value for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS") and not name.startswith("WANDB")}
    ours = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return kept | ours | extra


def command(script, ranks=None):
    if ranks is None:
        return [sys.executable, str(ROOT / script)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            str(ROOT / script)]


@pytest.fixture
def trainer(tmp_path, text, cache):
    """`trainer(*flags, ranks=None)` runs train.py, or train_ddp.py with so many ranks, to its end."""
    def run(*flags, ranks=None, checkpoint="c.pt", env=None, tiny=True, data=True, timeout=180):
        return Run(subprocess.run(arguments(flags, ranks, checkpoint, tiny, data), cwd=tmp_path, text=True,
                                  capture_output=True, env=environment(**(env or {})), timeout=timeout),
                   tmp_path, checkpoint)

    def arguments(flags, ranks=None, checkpoint="c.pt", tiny=True, data=True):
        script = "train.py" if ranks is None else "train_ddp.py"
        return [*command(script, ranks), *(TINY if tiny else []),
                *(["--train-data", str(text), "--cache-dir", str(cache)] if data else []),
                "--checkpoint-path", checkpoint, *map(str, flags)]

    run.arguments = arguments
    run.folder = tmp_path
    return run


def interrupt_after(args, cwd, pattern, signal_number=signal.SIGTERM, env=None, timeout=120):
    """Start a command, send it a signal once its output matches `pattern`, return it finished."""
    process = subprocess.Popen(args, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment(**(env or {})))
    out, deadline, sent = [], time.monotonic() + timeout, False
    try:
        for line in process.stdout:
            out.append(line)
            if not sent and re.search(pattern, line):
                process.send_signal(signal_number)
                sent = True
            assert time.monotonic() < deadline, "".join(out)
        err = process.stderr.read()
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
    assert sent, f"never saw {pattern}:\n{''.join(out)}\n{err}"
    return subprocess.CompletedProcess(args, process.returncode, "".join(out), err)
