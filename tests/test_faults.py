"""Faults of the machine and of the numbers, in real runs: what is lost is at most what was not saved yet."""

import math
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, interrupt_after
from test_train import same

import checkpoint
from checkpoint import CheckpointConfig
from config import UserError
from optim import OptimConfig, make_optimizer, step_if_finite
from tracking import JsonlSink

SMALL_FILES = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1)); " \
              "sys.argv = sys.argv[1:]; sys.path.insert(0, {root!r}); runpy.run_path(sys.argv[0], run_name='__main__')"


def on_a_full_disk(trainer, *flags):
    """The command of a run whose files may not grow beyond 100 KB: less than a checkpoint, more than all else."""
    _, script, *rest = trainer.arguments(flags)
    return [sys.executable, "-c", SMALL_FILES.format(root=str(ROOT)), script, *rest]


def test_a_checkpoint_that_cannot_be_written_costs_a_warning_and_the_next_one_is(trainer):
    flags = ["--num-steps", 60, "--save-steps", 5, "--log-steps", 5, "--eval-steps", 20]
    whole = trainer(*flags, checkpoint="whole.pt")
    process = subprocess.Popen(on_a_full_disk(trainer, *flags), cwd=trainer.folder, env=environment(), text=True,
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
    assert not list(trainer.folder.glob("*.tmp"))


def test_only_a_last_checkpoint_that_cannot_be_written_fails_the_run(trainer):
    run = subprocess.run(on_a_full_disk(trainer, "--num-steps", 20, "--save-steps", 5), cwd=trainer.folder,
                         env=environment(), capture_output=True, text=True)
    assert run.returncode == 1 and "step 20 could not be saved" in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and not (trainer.folder / "c.pt").exists()


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    cfg = CheckpointConfig(checkpoint_path=str(tmp_path / "new" / "c.pt"), keep_last=2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: Free(5_900))
    with pytest.raises(UserError, match="6 checkpoints of 1e-06 GB need 1e-07 GB more"):
        checkpoint.require_space(cfg, 1_000)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "c.pt").write_bytes(bytes(100))
    checkpoint.require_space(cfg, 1_000)  # what is there already counts


class Free:
    def __init__(self, free):
        self.free = free


def test_rows_that_a_full_disk_refuses_are_written_later_each_once_and_whole(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.log(1, {"a": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sink.path.stat().st_size + 9, before[1]))
    try:
        sink.log(2, {"a": 2.0})
        sink.log(3, {"a": 3.0})
        assert sink.path.read_text().count("\n") == 1 and sink.path.read_text().endswith("\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.log(4, {"a": 4.0})
    sink.close(0)
    assert re.findall(r'"step": (\d)', sink.path.read_text()) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_no_number_changes_nothing(optimizer):
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, vocab_size=32, max_position_embeddings=16))
    opt = make_optimizer(model, OptimConfig(optimizer=optimizer), torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(spoil=False):
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        if spoil:
            next(model.parameters()).grad[0, 0] = math.nan
        step_if_finite(opt, scaler, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
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


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_batch_without_a_loss_is_left_out_counted_and_resumed_over(trainer, ranks):
    (trainer.folder / "planted.py").write_text(PLANTED.format(root=str(ROOT), every=5))
    flags = ["--num-steps", 30, "--save-steps", 7, "--log-steps", 5, "--eval-steps", 0, "--max-bad-steps", 29]

    def run(name, *more):
        return [str(trainer.folder / "planted.py") if part.endswith(("train.py", "train_ddp.py")) else part
                for part in trainer.arguments([*flags, *more], ranks, name)]

    done = subprocess.run(run("whole.pt"), cwd=trainer.folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = interrupt_after(run("c.pt"), trainer.folder, r"step 20/30", signal.SIGKILL if ranks is None
                             else signal.SIGTERM)
    assert killed.returncode
    again = subprocess.run(run("c.pt", "--resume"), cwd=trainer.folder, env=environment(), capture_output=True,
                           text=True)
    assert again.returncode == 0 and "steps skipped" in again.stdout, again.stderr
    whole, resumed = (torch.load(trainer.folder / name, weights_only=True) for name in ("whole.pt", "c.pt"))
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    assert all(torch.isfinite(tensor).all() for tensor in whole["model"].values())
    assert whole["meter"]["skipped"] == resumed["meter"]["skipped"] and 0 < whole["meter"]["skipped"][0] < 30
    assert all(math.isfinite(value) for value in whole["meter"]["smoothed"].values())


def test_too_many_bad_steps_in_a_row_halt_and_name_the_samples(trainer):
    (trainer.folder / "planted.py").write_text(PLANTED.format(root=str(ROOT), every=1))
    _, _, *rest = trainer.arguments(["--num-steps", 30, "--log-steps", 2, "--max-bad-steps", 4])
    run = subprocess.run([sys.executable, "planted.py", *rest], cwd=trainer.folder, env=environment(),
                         capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert re.search(r"not finite in 4 steps in a row, the last at step 4, which read the samples \[\d+(, \d+){3}\]",
                     run.stderr)
    assert (trainer.folder / "c.nonfinite.pt").exists()


def test_a_time_limit_saves_and_leaves_and_sigusr1_saves_and_goes_on(trainer):
    flags = ["--num-steps", 100_000, "--save-steps", 0, "--eval-steps", 0, "--log-steps", 50]
    limited = trainer(*flags, "--time-limit", 0.15, checkpoint="limited.pt")
    assert limited.code == 128 + signal.SIGALRM and "stopped by SIGALRM" in limited.out, limited.err
    assert limited.checkpoint.exists()

    process = subprocess.Popen(trainer.arguments(flags), cwd=trainer.folder, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        saved = None
        for line in process.stdout:
            step = int(found[1]) if (found := re.search(r" step (\d+)/", line)) else 0
            if step == 100:
                process.send_signal(signal.SIGUSR1)
            if step >= 150 and saved is None and (trainer.folder / "c.pt").exists():
                saved = torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"]
                process.terminate()
        assert process.wait() == 143 and 100 <= saved <= 150
    finally:
        process.kill()
