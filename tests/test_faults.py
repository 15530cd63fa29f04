"""Faults of the machine and of the numbers, in real runs: what is lost is at most what was not saved yet."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import zygote
from conftest import ROOT, TINY, Clock, Run, command, environment, eventually, interrupt_after, on_small_disk
from test_train import same

from data import Corpus, DataConfig
from mini_llm import checkpoint
from mini_llm import saver as saver_module
from mini_llm.checkpoint import CheckpointConfig, State, step_of
from mini_llm.errors import UserError
from mini_llm.meter import Meter
from mini_llm.saver import NotSaved, Saver, _buffers
from mini_llm.sinks import JsonlSink
from mini_llm.tracking import TrackingConfig
from optim import OptimConfig, StepGuard, make_optimizer
from train import World

SMALL_FILES = f"""
import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')
"""


def on_a_full_disk(trainer, *flags, script=ROOT / "train.py"):
    """The command of a run whose files may not grow beyond 100 KB: less than a checkpoint, more than all else."""
    (trainer.folder / "small_files.py").write_text(SMALL_FILES)
    return [sys.executable, "small_files.py", script, *trainer.arguments(flags)[2:]]


def test_a_checkpoint_that_cannot_be_written_costs_a_warning_and_the_next_one_is(trainer):
    flags = ["--num-steps", 60, "--save-steps", 5, "--log-steps", 5, "--eval-steps", 20]
    whole = trainer(*flags, checkpoint="whole.pt")
    process = zygote.Popen(on_a_full_disk(trainer, *flags), cwd=trainer.folder, env=environment(), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = []
    for line in process.stdout:
        out.append(line)
        if "step 10 could not be saved" in line:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process.wait() == 0, "".join(out)
    assert sum("File too large" in line for line in out) >= 2
    run = trainer(*flags, "--resume")  # nothing left to do: only to read its results
    assert same(run, whole)
    assert [record["title"] for record in run.records if record.get("event") == "alert"] == ["not saved"]
    assert not list(trainer.folder.glob("*.tmp"))


# Something else fills the disk at step 10 until a save and a report have failed.
FULL_DISK = """
"$@" > out 2>&1 &
until grep -q "step 10/" out; do kill -0 $! || exit 98; sleep 0.02; done
cat /dev/zero > disk/filler
until grep -q "could not be saved" out; do kill -0 $! || exit 97; sleep 0.02; done
rm disk/filler
wait $!
code=$?
cp -r disk saved
exit $code
"""


def test_a_disk_that_something_else_fills_costs_no_row_and_no_bit(trainer):
    flags = ["--num-steps", 400, "--save-steps", 10, "--log-steps", 10, "--eval-steps", 20]
    whole = trainer(*flags, checkpoint="whole.pt")
    run = on_small_disk("4m", FULL_DISK, trainer.arguments(flags, checkpoint="disk/c.pt"), trainer.folder)
    out = (trainer.folder / "out").read_text()
    assert run.returncode == 0 and "No space left" in out, run.stderr + out
    assert same(Run(subprocess.CompletedProcess([], 0, out, ""), trainer.folder / "saved", "c.pt"), whole)


def test_only_a_last_checkpoint_that_cannot_be_written_fails_the_run(trainer):
    flags = ["--num-steps", 200, "--save-steps", 100, "--async-save", "--log-steps", 5, "--eval-steps", 0,
             "--max-tokens", 20_000]  # so that its tokens may be written
    run = zygote.run(on_a_full_disk(trainer, *flags), trainer.folder, environment())
    assert run.returncode == 1 and "step 200 could not be saved" in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and not (trainer.folder / "c.pt").exists()
    records = map(json.loads, (trainer.folder / "c.metrics.jsonl").read_text().splitlines())
    alerts = {record["title"]: record["step"] for record in records if record.get("event") == "alert"}
    assert 100 < alerts["not saved"] < 200 == alerts["stopped by NotSaved"], "told at the next report"


def test_a_slow_run_saves_by_the_clock(trainer):
    """Saves every 10 ms, which are a few steps: after the same step on both ranks, or they would hang."""
    run = trainer("--num-steps", 60, "--save-steps", 0, "--save-minutes", 0.01 / 60, "--keep-last", 99,
                  "--no-save-best", ranks=2)
    assert run.code == 0, run.err
    steps = [int(file.stem.rpartition("-")[2]) for file in trainer.folder.glob("c.step-*.pt")]
    assert len(steps) >= 2 and max(steps) == 60, steps


def test_a_save_is_overdue_so_many_minutes_of_training_after_the_last_one(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, saver_module)
    cfg = CheckpointConfig(checkpoint_path=str(tmp_path / "c.pt"), save_minutes=1.0)
    saver = Saver(cfg, World.__new__(World), State(step=1), SimpleNamespace(saved=lambda *_: None))
    monkeypatch.setattr(saver_module, "save_run", lambda *_: clock.sleep(300))
    clock.now += 59
    assert not saver.is_overdue()
    clock.now += 1
    assert saver.is_overdue()
    saver.save(dict, newest=False, best=True, last=False)
    assert saver.is_overdue(), "the best one is not the newest"
    saver.save(dict, newest=True, best=False, last=False)
    clock.now += 59
    assert not saver.is_overdue(), "writing takes longer than that"
    clock.now += 1
    assert saver.is_overdue()
    saver.world.is_main = False  # one clock decides
    assert not saver.is_overdue()
    saver.world.is_main, cfg.save_minutes = True, 0.0
    assert not saver.is_overdue()


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    cfg = CheckpointConfig(checkpoint_path=str(tmp_path / "new" / "c.pt"), keep_last=2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_900, total=9_000))
    with pytest.raises(UserError, match="4 checkpoints of 1e-06 GB need 1e-07 GB more"):
        checkpoint.require_space(cfg, 1_000, n_steps=1_000)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "c.pt").write_bytes(bytes(100))
    checkpoint.require_space(cfg, 1_000, n_steps=1_000)  # what is there already counts
    os.link(tmp_path / "new" / "c.pt", tmp_path / "new" / "c.prev.pt")  # once
    (tmp_path / "new" / "c.metrics.jsonl").write_bytes(b"x")  # of which a resume makes a copy
    with pytest.raises(UserError, match="4 checkpoints of 1e-06 GB need 1e-09 GB more"):
        checkpoint.require_space(cfg, 1_000, n_steps=1_000)
    (tmp_path / "new" / "c.pt.tmp").write_bytes(b"x")  # left by a kill, to be removed
    checkpoint.require_space(cfg, 1_000, n_steps=1_000)
    every = dataclasses.replace(cfg, checkpoint_path=str(tmp_path / "other.pt"), keep_last=10**6)
    with pytest.raises(UserError, match="4 checkpoints"):  # one by --save-steps, one by --save-minutes
        checkpoint.require_space(every, 1_000, n_steps=250)
    every = dataclasses.replace(every, save_minutes=0.0)
    checkpoint.require_space(every, 1_000, n_steps=250)  # one save in all
    (tmp_path / "other.kept-00000050.pt").write_bytes(bytes(100_000))  # stays
    milestones = dataclasses.replace(every, keep_last=0, save_steps=10, keep_every=50)
    with pytest.raises(UserError, match="10 checkpoints"):  # six of them, at most, for good
        checkpoint.require_space(milestones, 1_000, n_steps=250)
    with pytest.raises(UserError, match="5 checkpoints"):  # those that wait for their upload
        checkpoint.require_space(every, 1_000, n_steps=250, uploads=2)


@pytest.mark.parametrize("says", [SimpleNamespace(free=0, total=0), OSError(errno.ENOSYS, "Function not implemented")])
def test_a_file_system_that_does_not_say_what_is_free_is_not_full(tmp_path, monkeypatch, says):
    def disk_usage(folder):
        if isinstance(says, OSError):
            raise says
        return says

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    checkpoint.require_space(CheckpointConfig(checkpoint_path=str(tmp_path / "c.pt")), 1_000, n_steps=1_000)


@contextlib.contextmanager
def room_for_nine_bytes(path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_a_full_disk_refuses_are_written_later_each_once_and_whole(tmp_path, caplog):
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.log(1, {"a": 1.0})
    for step in 2, 5:  # twice
        with room_for_nine_bytes(sink.path):
            sink.log(step, {"a": 2.0})
            sink.log(step + 1, {"a": 3.0})
            assert sink.path.read_text().count("\n") == step - 1 and sink.path.read_text().endswith("\n")
        if step == 2:
            sink.log(4, {"a": 4.0})
    sink.close(0)
    assert re.findall(r'"step": (\d)', sink.path.read_text()) == ["1", "2", "3", "4", "5", "6"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2, "once each time"
    lost = JsonlSink(tmp_path / "lost.jsonl", 0)
    with room_for_nine_bytes(lost.path):
        lost.log(1, {"a": 1.0})
        lost.log(2, {"a": 2.0})
        lost.close(0)
    assert caplog.records[-1].levelname == "ERROR" and "lost.jsonl lacks its last 2 rows" in caplog.text


@pytest.mark.parametrize("optimizer", OptimConfig.__dataclass_fields__["optimizer"].metadata["choices"])
def test_a_gradient_that_is_no_number_changes_nothing(optimizer):
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, vocab_size=32, max_position_embeddings=16))
    cfg = OptimConfig(optimizer=optimizer)
    opt = make_optimizer(model, cfg, torch.device("cpu"))
    guard = StepGuard(cfg, opt, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))

    def step(spoil=False):
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        if spoil:
            next(model.parameters()).grad[0, 0] = math.nan
        guard.step(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), 0)
        opt.zero_grad()

    def everything():
        moments = [value for state in opt.state_dict()["state"].values() for value in state.values()]
        return [value.clone() for value in [*model.parameters(), *moments]]

    step()
    before = everything()
    step(spoil=True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step()
    assert not torch.equal(before[0], everything()[0])


class Alone(World):
    def __init__(self):
        self.device = torch.device("cpu")


def test_a_spike_is_left_out_and_a_lasting_change_is_not():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    cfg, scaler = OptimConfig(skip_loss_spikes=6.0), torch.amp.GradScaler("cpu", enabled=False)
    guard = StepGuard(cfg, optimizer, scaler, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)

    def taken(step, size):
        weight.grad = torch.ones(1)
        before = weight.item()
        said = guard.step(size * (1 + 0.1 * torch.randn((), generator=draws)), step).item()
        assert said == (weight.item() != before)
        return said

    assert all(taken(step, 50.0 if step == 20 else 1.0) for step in range(200)), "20 are too few to tell"
    assert not any(taken(200 + i, size) for i, size in enumerate((3.0, math.nan, math.inf, 3.0))) and taken(204, 1.0)
    again = StepGuard(cfg, optimizer, scaler, torch.device("cpu"))
    again.load_state_dict(guard.state_dict())
    assert torch.equal(again._limit(), guard._limit())
    assert sum(taken(step, 3.0) for step in range(205, 300)) > 80, "the limit follows"
    meter = Meter(Alone(), 1.0, None)
    for norm, was in ((1.0, True), (9.0, False), (9.0, False), (math.nan, False)):
        meter.add(torch.ones(1), torch.tensor(norm), torch.tensor(was), tokens=1)
    assert (meter.skipped, meter.skipped_in_row) == (3, 1), "a spike is no reason to halt"


# The loss of a batch with a window that starts with PLANTED becomes no number: as a broken sample would have it.
PLANTED = """
import sys; sys.path.insert(0, {root!r})
import torch, model, train
from train_ddp import DDPWorld
forward = model.GPT.forward
def planted(self, tokens, targets=None, reduction="mean"):
    loss = forward(self, tokens, targets, reduction)
    bad = self.training and targets is not None and ((tokens.sum() % {every}) == 0).item()
    return loss * float("nan") if bad else loss
model.GPT.forward = planted
train.main(DDPWorld if "RANK" in __import__("os").environ else train.World)
"""


def test_fp16_leaves_a_batch_without_a_loss_out_too_and_what_is_to_be_saved_waits_for_the_next(trainer):
    (script := trainer.folder / "planted.py").write_text(PLANTED.format(root=str(ROOT), every=5))
    run = trainer("--num-steps", 30, "--amp-dtype", "fp16", "--eval-steps", 0, "--max-bad-steps", 29, "--log-steps", 1,
                  "--save-steps", 3, "--keep-last", 30, script=script)
    assert run.code == 0 and "steps skipped" in run.out, run.err
    saved = torch.load(run.checkpoint, weights_only=True)
    assert 0 < saved["meter"]["skipped"][0] < 30 and all(map(torch.isfinite, map(torch.sum, saved["model"].values())))
    skipped = [run.rows[step].get("train/skipped_steps", 0) for step in range(31)]
    taken = [step for step in range(1, 31) if skipped[step] == skipped[step - 1]]
    first = [next((step for step in taken if step >= due), 30) for due in range(3, 31, 3)]
    assert first != list(range(3, 31, 3)), "some have to wait"
    assert {step_of(path) for path in trainer.folder.glob("c.step-*")} == {*first, 30}


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.full)])
def test_a_batch_without_a_loss_is_left_out_counted_and_resumed_over(trainer, ranks):
    (script := trainer.folder / "planted.py").write_text(PLANTED.format(root=str(ROOT), every=5))
    flags = ["--num-steps", 200, "--save-steps", 7, "--log-steps", 5, "--eval-steps", 0, "--max-bad-steps", 199]
    how = dict(ranks=ranks, script=script)
    done = trainer(*flags, checkpoint="whole.pt", **how)
    assert done.code == 0, done.err
    killed = interrupt_after(trainer.arguments(flags, **how), trainer.folder, r"step 20/200",
                             signal.SIGKILL if ranks is None else signal.SIGTERM)
    assert killed.returncode
    again = trainer(*flags, "--resume", **how)
    assert again.code == 0 and "steps skipped" in again.out, again.err
    whole, resumed = (torch.load(trainer.folder / name, weights_only=True) for name in ("whole.pt", "c.pt"))
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    assert all(torch.isfinite(tensor).all() for tensor in whole["model"].values())
    assert whole["meter"]["skipped"] == resumed["meter"]["skipped"] and 0 < whole["meter"]["skipped"][0] < 200
    assert all(math.isfinite(value) for value in whole["meter"]["smoothed"].values())


def test_too_many_bad_steps_in_a_row_halt_and_name_the_samples(trainer, text, cache):
    (script := trainer.folder / "planted.py").write_text(PLANTED.format(root=str(ROOT), every=1))
    flags = ["--num-steps", 30, "--log-steps", 2, "--eval-steps", 2, "--save-steps", 2]
    run = trainer(*flags, script=script)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, run.err
    assert re.search(r"not finite in 10 steps in a row, the last at step 10, which read the training tokens from "
                     r"\[\d+(, \d+){3}\] on", run.err)
    corpus = Corpus(DataConfig(train_data=[str(text)], cache_dir=str(cache), tokenizer_name="byte", seq_len=32))
    assert f"from {corpus.samples(9 * 4, 4).tolist()} on" in run.err, "those of the tenth step"
    assert [file.name for file in trainer.folder.glob("*.pt")] == ["c.nonfinite.pt"]
    assert run.rows[10]["train/skipped_steps"] == 10 and run.rows[10]["lr"] > 0, "its own report is there"
    assert "no checkpoint is from before step 0: start as before, with --overwrite and a lower --lr" in run.err
    two = trainer(*flags, "--timeout", 20, ranks=2, checkpoint="two.pt", script=script)
    assert two.code and "error: loss or gradient was not finite in 10 steps in a row" in two.err, two.err
    assert two.err.count("error: ") == 1, "all ranks halt together"
    flags += ["--checkpoint-path", "full.pt", "--batch-size", 70]
    run = zygote.run(on_a_full_disk(trainer, *flags, script="planted.py"), trainer.folder, environment())
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "could not be saved (File too large)" in run.stderr
    assert re.search(r"read the training tokens from \[\d+(, \d+){63}\] on", run.stderr), "70 would be a long line"


@pytest.mark.parametrize(("ranks", "full"), [(None, 0), (2, 1)])
def test_a_run_that_does_not_fit_writes_nothing(trainer, ranks, full):
    """`full`: the rank without memory."""
    if ranks:  # there is a run that it would replace
        assert trainer("--num-steps", 5).code == 0
    before = {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}
    (script := trainer.folder / "large.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train, train_ddp\n"
        "fits, calls = train.GPT.forward, []\n"
        "def forward(self, *batch):\n"
        "    calls.append(1)\n"
        f"    if int(os.environ.get('RANK', 0)) != {full} or len(calls) == 1:\n"
        "        return fits(self, *batch)\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 TiB')\n"
        "train.GPT.forward = forward\n"
        f"train.main({'train_ddp.DDPWorld' if ranks else ''})\n")
    run = trainer("--num-steps", 5, "--overwrite", "--grad-accum-steps", 2, ranks=ranks, script=script)
    assert run.code == 1 and "out of memory" in run.err.splitlines()[0], run.err
    after = {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}
    assert before == after or before == {} and after.keys() == {"c.lock"}


SIGNALLED = """
import os, signal, sys; sys.path.insert(0, {root!r})
import train

fast = train.{where}

def signalled(*args):
    train.{where} = fast
    os.kill(os.getpid(), signal.{name})
    return fast(*args)

train.{where} = signalled
train.main()
"""


@pytest.mark.parametrize(("how", "signal_number"), [("dry run", signal.SIGTERM), ("to the cache", signal.SIGINT)])
def test_ended_while_it_tokenizes_it_leaves_nothing(trainer, text, tmp_path, how, signal_number):
    (tmp_path / "large.txt").write_text(text.read_text() * 300)
    (scratch := tmp_path / "scratch").mkdir()
    flags = [*["--dry-run"] * (how == "dry run"), "--train-data", "large.txt", "--cache-dir", "made"]
    process = zygote.Popen([*command("train.py"), *TINY, *flags, "--checkpoint-path", "d.pt"], cwd=tmp_path,
                           env=environment(TMPDIR=str(scratch)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    drafts = (scratch, "mini-llm-*/*.draft/train.bin") if how == "dry run" else (tmp_path, "made/*.draft/train.bin")
    eventually(lambda: list(drafts[0].glob(drafts[1])), 60)
    process.send_signal(signal_number)
    assert (process.communicate(timeout=60)[1].count(b"\n"), process.returncode) == (0, 128 + signal_number)
    assert not list(scratch.iterdir()) and sorted(os.listdir(tmp_path)) == ["large.txt", "scratch"]


def signalled(trainer, name, *flags, where="GPT.forward"):
    """train.py, which gets that signal in its first call of `where`: in the pass before its first step."""
    (script := trainer.folder / "signalled.py").write_text(SIGNALLED.format(root=str(ROOT), name=name, where=where))
    return trainer(*flags, script=script)


def test_a_stop_before_the_first_step_replaces_nothing(trainer):
    assert trainer("--num-steps", 5).code == 0
    before = {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}
    run = trainer("--num-steps", 10, "--overwrite", "--time-limit", 1e-5)
    assert run.code == 142 and "before the first step: nothing has been replaced" in run.out, run.err
    assert before == {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}


def test_a_run_that_is_asked_to_stop_in_its_last_step_is_finished(trainer):
    run = signalled(trainer, "SIGTERM", "--num-steps", 1, where="set_lr")
    assert run.code == 0 and "Training finished" in run.out and "stopped by" not in run.out, run.err
    assert run.err.startswith("SIGTERM: saves and exits")


# Prints what is asked of memory and disk before the first step.
ROOM = """
import sys; sys.path.insert(0, {root!r})
import train; from mini_llm import checkpoint

def reserved(sizes, device, wrapped=train.hardware.reserved):
    print("held", sum(sizes))
    return wrapped(sizes, device)

def require_space(cfg, n_bytes, n_steps, uploads, wrapped=checkpoint.require_space):
    print("saved", n_bytes, n_steps, uploads)
    wrapped(cfg, n_bytes, n_steps, uploads)

train.hardware.reserved, checkpoint.require_space = reserved, require_space
train.main()
"""


def test_room_for_optimizer_state_and_checkpoints_is_asked_for_before_the_first_step(trainer):
    (script := trainer.folder / "room.py").write_text(ROOM.format(root=str(ROOT)))
    first = trainer("--num-steps", 2, script=script)
    again = trainer("--num-steps", 9, "--resume", script=script)
    n = sum(tensor.nbytes for tensor in again.weights().values())
    asked = [re.findall("^(?:held|saved) .*", run.out, re.M) for run in (first, again)]
    assert asked[0] == [f"saved {3 * n} 2 0", f"held {2 * n}"], first.err
    assert asked[1] == [f"saved {3 * n} 7 0", "held 0"], "it is loaded"


def test_a_tokenizer_that_cannot_be_written_replaces_no_run(trainer):
    assert trainer("--num-steps", 5).code == 0
    before = {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}
    (script := trainer.folder / "full.py").write_text(
        f"import errno, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import data, train\n"
        "def full(path, content):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', str(path))\n"
        "data.write_whole = full\n"
        "train.main()\n")
    run = trainer("--num-steps", 5, "--overwrite", script=script)
    said = ".json: No space left on device; the tokenizer cannot be copied: make room there, or give another "
    said += "--checkpoint-path\n"
    assert run.code == 2 and run.err.endswith(said), run.err
    assert before == {path.name: path.read_bytes() for path in trainer.folder.glob("c.*") if path.is_file()}


def test_a_log_that_cannot_be_written_is_a_line_and_costs_no_checkpoint(trainer):
    assert trainer("--num-steps", 5).code == 0
    (trainer.folder / "c.log").unlink()
    (trainer.folder / "c.log").mkdir()
    run = trainer("--num-steps", 10, "--resume")
    assert run.code == 2 and "c.log: " in run.err and "give a --checkpoint-path" in run.err, run.err
    assert run.err.count("\n") == 1, run.err
    (trainer.folder / "c.log").rmdir()
    assert trainer("--num-steps", 10, "--resume").code == 0


def test_sigusr1_before_the_first_step_saves_and_goes_on(trainer):
    run = signalled(trainer, "SIGUSR1", "--num-steps", 5, "--save-steps", 0)
    assert run.code == 0, run.out + run.err
    steps = [torch.load(trainer.folder / name, weights_only=True)["state"]["step"] for name in ("c.prev.pt", "c.pt")]
    assert steps == [1, 5]


def test_a_time_limit_saves_and_leaves_and_sigusr1_saves_and_goes_on(trainer):
    flags = ["--num-steps", 100_000, "--save-steps", 0, "--eval-steps", 0, "--log-steps", 50]
    limited = trainer(*flags, "--time-limit", 0.15, checkpoint="limited.pt")
    assert limited.code == 128 + signal.SIGALRM and "stopped by --time-limit" in limited.out, limited.err
    assert limited.checkpoint.exists() and "--time-limit: saves and exits" in limited.err

    process = zygote.Popen(trainer.arguments(flags), cwd=trainer.folder, env=environment(), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        saved = None
        for line in process.stdout:
            step = int(found[1]) if (found := re.search(r" step (\d+)/", line)) else 0
            if step == 100:
                process.send_signal(signal.SIGUSR1)
            if saved is None and (trainer.folder / "c.pt").exists():
                saved = torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"]
            if saved and step > saved:
                process.terminate()
        assert process.wait() == 143 and saved >= 100
    finally:
        process.kill()


@pytest.mark.parametrize("ranks", [pytest.param(None, marks=pytest.mark.full), 2])
def test_saving_on_a_thread_changes_no_bit_of_any_checkpoint(trainer, ranks):
    flags = ["--num-steps", 40, "--save-steps", 6, "--eval-steps", 5, "--log-steps", 5, "--keep-last", 20,
             "--skip-loss-spikes", 6]
    runs = [trainer(*flags, *more, ranks=ranks, checkpoint=name)
            for name, more in (("sync.pt", []), ("async.pt", ["--async-save"]))]
    assert [run.code for run in runs] == [0, 0], runs[1].err
    steps = [f".step-{step:08d}.pt" for step in (*range(6, 40, 6), 40)]
    for suffix in [".pt", ".prev.pt", ".best.pt", *steps]:
        sync, later = (torch.load(run.checkpoint.with_suffix(suffix), weights_only=True) for run in runs)
        assert sync["state"] == later["state"] and sync["state"]["step"]
        a, b = ((run["model"], run["optimizer"]["state"], run["guard"]) for run in (sync, later))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_a_thread_fails_to_save_is_told_undone_and_tried_again(tmp_path, caplog):
    state, written, alerts = State(step=1, val_loss=3.0), [], []
    saver = Saver(CheckpointConfig(checkpoint_path=str(tmp_path / "c.pt"), async_save=True), Alone(), state,
                  SimpleNamespace(saved=lambda path, at, best: written.append((path.name, at.step, best)),
                                  alert=lambda *words: alerts.append(words)))
    save_all = partial(saver.save, lambda: {"state": torch.tensor(state.step)}, newest=True)
    save_all(best=True, last=False)
    saver.conclude()
    (tmp_path / "c.pt.tmp").mkdir()  # the draft cannot be written
    state.step, state.val_loss = 2, 2.0
    save_all(best=True, last=False)
    state.step, state.val_loss = 3, 1.5
    save_all(best=True, last=False)  # fails, too; and tells of the one before
    assert "step 2 could not be saved" in caplog.text and state.best_val == 1.5
    saver.conclude()
    assert "step 3 could not be saved" in caplog.text and state.best_val == 3.0, "that of the file"
    assert [text[:24] for _, text in alerts] == ["step 2 could not be save"], "one alert, not one at each try"
    with pytest.raises(NotSaved, match="step 3"):
        save_all(best=False, last=True)
    (tmp_path / "c.pt.tmp").rmdir()
    save_all(best=False, last=True)
    assert written == [("c.pt", 1, True), ("c.pt", 3, False)]
    assert torch.load(tmp_path / "c.best.pt", weights_only=True)["state"] == 1


def test_a_copy_is_not_changed_by_the_steps_that_follow(tmp_path):
    saver = Saver(CheckpointConfig(checkpoint_path=str(tmp_path / "c.pt"), async_save=True), Alone(), State(),
                  SimpleNamespace(saved=lambda *_: None))
    weight, saver.world.saving = torch.ones(5), threading.Lock()
    with saver.world.saving:  # the thread has not begun to write
        saver.save(lambda: {"weight": weight}, newest=True, best=False, last=False)
        weight.zero_()
    saver.conclude()
    assert torch.load(tmp_path / "c.pt", weights_only=True)["weight"].tolist() == [1.0] * 5
    weight.fill_(1.0)
    copied = saver._copied({"a": [weight, 3], "b": {"c": "d"}})
    weight.zero_()
    assert copied["a"][0].tolist() == [1.0] * 5 and copied["a"][1] == 3 and copied["b"] == {"c": "d"}
    assert saver._copied({"a": [weight, 4], "b": {"c": "d"}})["a"][0].data_ptr() == copied["a"][0].data_ptr()


def test_what_a_thread_has_saved_is_told_at_the_first_look_after(tmp_path):
    told = []
    saver = Saver(CheckpointConfig(checkpoint_path=str(tmp_path / "c.pt"), async_save=True), Alone(), State(),
                  SimpleNamespace(saved=lambda path, *_: told.append(path.name)))
    saver.world.saving = threading.Lock()
    saver.save(dict, newest=True, best=False, last=False)
    saver.future.result()
    saver.conclude(wait=False)
    assert told == ["c.pt"]
    with saver.world.saving:
        saver.save(dict, newest=False, best=True, last=False)
        saver.conclude(wait=False)
        assert told == ["c.pt"]
    saver.conclude()
    assert told == ["c.pt", "c.best.pt"]


def test_copies_share_blocks_of_limited_size():
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in ((3, torch.float32), (40, torch.float32), (9, torch.bool),
                                                            (1, torch.int64), (30, torch.float32))]
    copies = _buffers(tensors, block_bytes=150)
    assert [(copy.shape, copy.dtype) for copy in copies] == [(tensor.shape, tensor.dtype) for tensor in tensors]
    blocks = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert sorted(blocks.values()) == [128, 150, 150, 160]


# A step, or an evaluation, that hangs from some moment on.
HANGING = """
import sys; sys.path.insert(0, {root!r})
import time, train; from mini_llm import watchdog
watchdog.POLL, watchdog.LEAST, watchdog.FEW, watchdog.FIRST = 0.1, 1.0, 3, {first}
calls = 0
def hang(wrapped):
    def hanging_here(*args, **kwargs):
        global calls
        calls += 1
        if calls == {call}:
            time.sleep(1000)
        return wrapped(*args, **kwargs)
    return hanging_here
{where} = hang({where})
train.main()
"""


@pytest.mark.parametrize(("where", "call", "what"), [
    ("train.set_lr", 12, "step"), ("train.evaluate", 12, "eval"), ("train.hardware.to_device", 1, "step")],
    ids=["step", "eval", "before the first step"])
def test_a_run_that_hangs_says_where_and_its_heartbeat_stops(trainer, where, call, what):
    first = 2.0 if call == 1 else 600.0
    script = trainer.folder / "hanging.py"
    script.write_text(HANGING.format(root=str(ROOT), where=where, call=call, first=first))
    flags = ["--num-steps", 30, "--log-steps", 2, "--eval-steps", 2, "--heartbeat-file", "beat"]
    process = zygote.Popen(trainer.arguments(flags, script=script), cwd=trainer.folder, env=environment(), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for line in process.stdout:
            if "far longer" in line:
                break
        assert f"{what} after step" in line and "c.stacks.txt" in line
        assert "hanging_here" in (trainer.folder / "c.stacks.txt").read_text()
        beat = json.loads((trainer.folder / "beat").read_text())
        assert beat["pid"] == process.pid and beat["doing"] == what and (beat["step"] > 0) == (call > 1)
        age = os.stat(trainer.folder / "beat").st_mtime
        time.sleep(0.5)
        assert os.stat(trainer.folder / "beat").st_mtime == age
    finally:
        process.kill()
        process.wait()


def test_a_heartbeat_file_that_cannot_be_written_is_refused(trainer):
    (trainer.folder / "c.pt").write_text("the run before")
    run = trainer("--num-steps", 2, "--heartbeat-file", "missing/beat", "--overwrite")
    assert [path.name for path in trainer.folder.iterdir()] == ["c.pt"]
    assert run.code == 2 and run.err.startswith("error: --heartbeat-file missing/beat: cannot be written")
    assert len(run.err.strip().splitlines()) == 1
    with pytest.raises(UserError, match="cannot be written"):
        TrackingConfig(heartbeat_file=str(trainer.folder)).validate()


def test_a_console_on_a_full_disk_costs_its_lines_only(trainer):
    flags = ["--num-steps", 20, "--save-steps", 5]
    whole = trainer(*flags, checkpoint="whole.pt")
    with open("/dev/full", "w") as full:
        run = subprocess.run(trainer.arguments(flags), cwd=trainer.folder, env=environment(), stdout=full,
                             stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert same(Run(run, trainer.folder, "c.pt"), whole)
