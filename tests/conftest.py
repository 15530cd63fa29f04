import contextlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zygote
from filelock import FileLock  # which PyTorch needs, too

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("mini_llm/*.py")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side, a process on each core
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of a thousand processes compiles our modules anew
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
# A GPU machine may have nothing but torch, transformers and pytest.
collect_ignore = [] if importlib.util.find_spec("hypothesis") else ["test_properties.py"]

# Small enough that a step takes a few milliseconds; every other flag is the default's.
TINY = ["--n-layers", "2", "--n-heads", "2", "--d-model", "32", "--seq-len", "32", "--batch-size", "4",
        "--max-position-embeddings", "64", "--tokenizer-name", "byte", "--eval-tokens", "512", "--device", "cpu"]


# Modules that take minutes: they begin first, so that both workers end at about the same time.
LONG = ("train", "wandb_online", "ddp", "fsdp", "wandb", "faults", "ranks", "sweep", "emulated_cuda", "extending")


def pytest_collection_modifyitems(items):
    import torch

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder for what one of pytest-xdist's workers makes for all."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def text(common):
    """A file of 120 KB of prose-like lines, the same on every machine."""
    import random

    rng = random.Random(7)
    words = "the a king sea of and runs sings night under stone bright old river".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + "." for _ in range(3200)]
    path = common / "prose.txt"
    with FileLock(common / "prose.lock"):
        if not path.exists():
            path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def cache(common):
    """One token cache for the whole session: runs on the same text share it."""
    return common / "cache"


class Run:
    """A finished command: exit code, output, and the records of its metrics.jsonl."""

    def __init__(self, process, folder, checkpoint):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr
        self.checkpoint = folder / checkpoint

    @property
    def records(self):
        path = self.checkpoint.with_name(self.checkpoint.stem + ".metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def rows(self):
        """step → its report."""
        return {record["step"]: record for record in self.records if "event" not in record}

    def losses(self):
        """(step, name) → value of every loss reported."""
        return {(step, name): row[name] for step, row in self.rows.items() for name in ("train/loss", "val/loss")
                if name in row}

    def weights(self):
        import torch

        return torch.load(self.checkpoint, weights_only=True)["model"]


# An expression for a process of its own. Not ru_maxrss, which begins with what the process that starts it has.
PEAK_MB = r"int(__import__('re').search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) // 1024"

# What may lie where a file is expected.
PUT = {"a folder": os.mkdir, "a pipe": os.mkfifo, "a device": lambda path: os.symlink("/dev/zero", path),
       "a circle": lambda path: os.symlink(path, path), "nothing": lambda path: None}


def environment(**extra):
    kept = {name: value for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and not name.startswith("WANDB")}
    # One thread a process: the models are tiny, and threads of several processes would wait for each other.
    ours = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
            "OMP_NUM_THREADS": "1"}
    return kept | ours | extra


def command(script, ranks=None):
    if ranks is None:
        return [sys.executable, str(ROOT / script)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            f"--nproc-per-node={ranks}", str(ROOT / script)]


# For the real SDK against `server`. It sends rows every 15 s else, and takes whole seconds only.
QUICK = dict(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1", WANDB_MODE="online")
# Where git says that a clone is from.
REMOTE = dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="remote.origin.url", GIT_CONFIG_VALUE_0="https://here.test/clone")


@pytest.fixture
def server():
    """A W&B server on loopback; when the test is over, no process that knew of it is left."""
    from wandb_server import WandbServer

    with WandbServer() as server:
        yield server
        eventually(lambda: not processes_with(f"WANDB_BASE_URL={server.url}"), 15)


@pytest.fixture
def trainer(tmp_path, text, cache):
    """`trainer(*flags, ranks=None)` runs train.py, or train_ddp.py with so many ranks, or `script`, to its end."""
    def arguments(flags, ranks=None, checkpoint="c.pt", tiny=True, data=True, script=None):
        script = script or ("train.py" if ranks is None else "train_ddp.py")
        return [*command(script, ranks), *(TINY if tiny else []),
                *(["--cache-dir", str(cache)] if data else []),
                *(["--train-data", str(text)] if data and "--train-data" not in flags else []),
                "--checkpoint-path", checkpoint, *map(str, flags)]

    def run(*flags, ranks=None, checkpoint="c.pt", env=None, tiny=True, data=True, timeout=300, script=None,
            meanwhile=None):
        args = arguments(flags, ranks, checkpoint, tiny, data, script)
        if any(re.match("OMP_|PYTHON|LC_|LANG", name) for name in env or ()):  # which count at an interpreter's start
            done = subprocess.run(args, cwd=tmp_path, env=environment(**(env or {})), timeout=timeout, text=True,
                                  capture_output=True)
        else:
            done = zygote.run(args, tmp_path, environment(**(env or {})), timeout=timeout, meanwhile=meanwhile)
        return Run(done, tmp_path, checkpoint)

    run.arguments = arguments
    run.folder = tmp_path
    return run


# Vocabularies: the byte tokenizer's own, and wider ones.
TUNED = {"gpt2": 257, "llama": 260, "qwen3": 260, "nanochat": 260}


@pytest.fixture(scope="session")
def tuned(common, text, cache):
    """arch → (Hugging Face folder of random weights, the run that --init-from started from it); qwen3's on 2 ranks."""
    folder = common / "tuned"
    with FileLock(common / "tuned.lock"):
        if not (found := folder / "found").exists():
            folder.mkdir(exist_ok=True)
            found.write_bytes(pickle.dumps(tune(folder, text, cache)))
    return pickle.loads(found.read_bytes())


def tune(folder, text, cache):
    import torch
    import transformers

    found = {}
    for arch, vocab_size in TUNED.items():
        if arch == "gpt2":
            config = transformers.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        else:
            kind, theta = {"llama": (transformers.LlamaConfig, 5e5), "qwen3": (transformers.Qwen3Config, 1e6),
                           "nanochat": (transformers.NanoChatConfig, 1e4)}[arch]
            config = kind(vocab_size=vocab_size, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=16 if arch == "qwen3" else 8,
                          max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": theta},
                          **{"rms_norm_eps": 1e-5} if arch == "llama" else {})
        torch.manual_seed(3)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(0.0, 0.3)
        theirs.save_pretrained(folder / arch)
        ranks, script = (2, "train_ddp.py") if arch == "qwen3" else (None, "train.py")
        flags = ["--init-from", folder / arch, "--tokenizer-name", "byte", "--train-data", text, "--cache-dir", cache,
                 "--seq-len", 32, "--batch-size", 8 // (ranks or 1), "--num-steps", 40, "--warmup-steps", 5,
                 "--lr", 1e-2, "--eval-tokens", 0, "--eval-steps", 0, "--no-amp", "--device", "cpu",
                 "--checkpoint-path", f"{arch}.pt"]
        done = zygote.run([*command(script, ranks), *flags], folder, environment())
        assert done.returncode == 0, done.stdout + done.stderr
        found[arch] = folder / arch, Run(done, folder, f"{arch}.pt")
    return found


@pytest.fixture(scope="session")
def val_windows(tuned):
    """The validation windows of the `tuned` runs, (n, 33) int64."""
    import torch

    from mini_llm.shards import Shard

    shard = Shard(Path(re.search(r" val \((.+?)\)", tuned["gpt2"][1].out)[1], "val.bin"))
    return torch.stack([torch.tensor(shard.read(32 * i, 33).astype("int64")) for i in range(shard.windows(32))])


def processes_with(variable):
    """The pids whose environment has `variable`, NAME=value."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{variable}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def on_small_disk(size, script, command, cwd, env=None):
    """Run a shell script, to which `command` is "$@", where the folder `disk` is a file system of so many bytes that
    nobody else sees and that goes with it. Skips where there may be none."""
    if not shutil.which("unshare"):
        pytest.skip("only Linux has a file system for one process")
    (cwd / "disk").mkdir()
    script = f"mount -t tmpfs -o size={size} tmpfs disk || exit 99\n{script}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command], cwd=cwd, text=True,
                         capture_output=True, env=environment(**(env or {})), timeout=180)
    if run.returncode == 99 or run.stderr.startswith("unshare"):
        pytest.skip(f"no file system can be mounted here: {run.stderr.strip()}")
    return run


class Clock:
    """Stands in for a module's `time`: it moves when told to, however busy the machine is."""

    def __init__(self, monkeypatch, *modules):
        self.now = 1000.0
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self):
        return self.now

    time = monotonic = perf_counter

    def sleep(self, seconds):
        self.now += seconds


def interrupt_after(args, cwd, pattern, signal_number=signal.SIGTERM, env=None, timeout=120):
    """Start a command, send it a signal once its output matches `pattern`, return it finished."""
    process = zygote.Popen(args, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=environment(**(env or {})))
    out, sent = [], False
    deadline = time.monotonic() + timeout
    try:
        for line in process.stdout:
            out.append(line)
            if not sent and re.search(pattern, line):
                process.send_signal(signal_number)
                sent = True
            assert time.monotonic() < deadline, "".join(out)
        err = process.stderr.read()
        process.wait(timeout=100)
    finally:
        if process.poll() is None:
            process.kill()
    assert sent, f"never saw {pattern}:\n{''.join(out)}\n{err}"
    return subprocess.CompletedProcess(args, process.returncode, "".join(out), err)
