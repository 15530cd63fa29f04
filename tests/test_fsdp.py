"""train_fsdp.py under the real torchrun, with gloo on the CPU. Replicas are the oracle of shards."""

import functools
import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, interrupt_after
from test_ddp import EXACT, _at_step_30, _rank_process, close
from test_train import same
from torch.utils._pytree import tree_leaves

import train_fsdp
from mini_llm.config import parse
from model import GPT, GPTConfig
from train import Config
from train_fsdp import FSDPWorld

full = pytest.mark.full
SHARDED = dict(ranks=2, script="train_fsdp.py")


def goes_on_as(resumed, straight, after):
    for key, value in straight.losses().items():
        if key[0] > after:
            assert resumed.losses()[key] == pytest.approx(value, abs=1e-5), key
            norms = [run.rows[key[0]].get("train/grad_norm") for run in (resumed, straight)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4), key


@pytest.mark.parametrize("flags", [
    ["--arch", "gpt2", "--grad-accum-steps", 2, "--dropout", 0.1, "--async-save", "--save-steps", 5],
    ["--arch", "nanochat", "--optimizer", "muon", "--use-activation-checkpoint"],
    pytest.param(["--arch", "qwen3", "--compile", "--skip-loss-spikes", 6, "--use-activation-checkpoint"], marks=full)],
    ids=lambda flags: flags[1])
def test_shards_train_as_replicas_do_and_each_goes_on_from_the_other(trainer, flags):
    flags = [*EXACT, "--lr-scheduler", "none", "--warmup-steps", 2, *flags]
    whole = trainer(*flags, "--num-steps", 12, ranks=2, checkpoint="whole.pt")
    sharded = trainer(*flags, "--num-steps", 7, **SHARDED)
    assert whole.code == sharded.code == 0, whole.err + sharded.err
    assert "2 ranks, which share one replica" in sharded.out and "one replica" not in whole.out
    assert sharded.weights().keys() == whole.weights().keys()
    on = trainer(*flags, "--num-steps", 12, "--resume", ranks=2)  # as replicas
    assert on.code == 0 and "Resumed at step 7" in on.out, on.err
    goes_on_as(on, whole, 7)
    back = trainer(*flags, "--num-steps", 16, "--resume", checkpoint="whole.pt", **SHARDED)
    assert back.code == 0 and "Resumed at step 12" in back.out, back.err
    further = trainer(*flags, "--num-steps", 16, "--resume", ranks=2)
    goes_on_as(back, further, 12)
    for name, weight in further.weights().items():
        assert torch.allclose(weight, back.weights()[name], atol=1e-4), name


def test_a_sharded_run_takes_optimizer_state_along_as_one_process_does(trainer):
    flags = ["--no-amp", "--lr-scheduler", "none", "--warmup-steps", 0, "--optimizer", "muon", "--log-steps", 1]
    first = trainer(*flags, "--num-steps", 4, "--batch-size", 8, checkpoint="first.pt")
    flags += ["--init-from", "first.pt", "--tokenizer-name", "first.tokenizer", "--keep-optimizer", "--num-steps", 4,
              "--eval-tokens", 512, "--device", "cpu"]
    one = trainer(*flags, "--batch-size", 8, checkpoint="one.pt", tiny=False)
    sharded = trainer(*flags, "--batch-size", 4, checkpoint="sharded.pt", tiny=False, **SHARDED)
    assert first.code == one.code == sharded.code == 0, first.err + one.err + sharded.err
    assert "sample 32" in one.out and "sample 32" in sharded.out
    goes_on_as(sharded, one, 0)


@full
def test_three_shards_resume_bit_for_bit(trainer):
    flags = ["--no-amp", "--optimizer", "muon", "--lr-scheduler", "none", "--dropout", 0.1]
    sharded = functools.partial(trainer, *flags, **SHARDED | dict(ranks=3))
    through = sharded("--num-steps", 10, checkpoint="through.pt")
    sharded("--num-steps", 6, checkpoint="parts.pt")
    parts = sharded("--num-steps", 10, "--resume", checkpoint="parts.pt")
    assert through.code == parts.code == 0, through.err + parts.err
    assert same(parts, through)


def test_replicas_of_shards_train_as_replicas_do_and_resume_bit_for_bit(trainer):
    """Also the order in which gradients are added up is that of before: of shards, then of replicas."""
    flags = [*EXACT, "--lr-scheduler", "none", "--warmup-steps", 2, "--grad-accum-steps", 2, "--optimizer", "muon"]
    hybrid = functools.partial(trainer, *flags, "--shard-ranks", 2, "--check-replicas", 3, ranks=4,
                               script="train_fsdp.py")
    through = hybrid("--num-steps", 8, checkpoint="through.pt")
    assert "4 ranks, each 2 of which hold a replica" in through.out, through.err
    hybrid("--num-steps", 5, checkpoint="parts.pt")
    parts = hybrid("--num-steps", 8, "--resume", checkpoint="parts.pt")
    assert through.code == parts.code == 0, through.err + parts.err
    assert same(parts, through)
    goes_on_as(through, trainer(*flags, "--num-steps", 8, ranks=4, checkpoint="whole.pt"), 0)


HYBRID = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import time, torch, train, train_fsdp

FAULT

train.main(train_fsdp.FSDPWorld)
"""
IN_STEP_6 = """
class Faulty(train_fsdp.FSDPWorld):
    def clip_gradients(self, model, max_norm):
        if self.rank == 3 and self.heartbeat.me["step"] == 6:
            FAULT
        return super().clip_gradients(model, max_norm)

train_fsdp.FSDPWorld = Faulty
"""
FLIP = IN_STEP_6.replace("FAULT", "next(model.parameters()).detach().to_local().view(torch.int32)[0, 0] ^= 1 << 20")
OTHER_FLAGS = 'sys.argv += ["--shard-ranks", "0"] * (os.environ["RANK"] in "23")'
OTHER_SUMS = """
total = torch.nn.utils.get_total_norm
torch.nn.utils.get_total_norm = lambda grads: total(grads) * (1 + 1e-5 * (os.environ["RANK"] in "23"))
"""


@pytest.fixture
def hybrid(trainer):
    """`hybrid(fault, *flags)` runs two replicas of two shards, after that code → (exit code, lines that say why)."""
    def run(fault, *flags):
        (script := trainer.folder / "faulty.py").write_text(HYBRID.replace("FAULT", fault, 1))
        done = trainer("--shard-ranks", 2, *flags, ranks=4, script=script)
        return done.code, [line for line in done.err.splitlines() if re.match("error: |warning: ", line)]

    return run


def test_a_replica_of_shards_that_differs_is_named_and_not_saved(trainer, hybrid):
    code, (line,) = hybrid(FLIP, "--num-steps", 20, "--save-steps", 4)
    assert code and re.match("error: the ranks have different weights: rank 3 has [^;]*; --resume", line), line
    assert torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] == 4


def test_in_replicas_of_shards_the_one_that_all_wait_for_is_named(hybrid):
    code, (line,) = hybrid(IN_STEP_6.replace("FAULT", "time.sleep(500)"), "--num-steps", 20, "--timeout", 10)
    assert code and re.match(r"error: rank 3 \(.*\) has stopped at step 6: nothing from it for 10 s", line), line


def test_nodes_that_shard_otherwise_are_named_at_once(hybrid):
    code, (line,) = hybrid(OTHER_FLAGS, "--num-steps", 5)
    assert code and "the ranks have different flags: rank 2 has --shard-ranks 0 instead of 2; rank 3 has" in line, line


def test_replicas_of_shards_clip_by_one_norm(hybrid):
    """Each replica's ranks add it up among themselves, on other hardware maybe in another order."""
    assert hybrid(OTHER_SUMS, "--num-steps", 6, "--grad-clip-norm", 0.1, "--check-replicas", 1, "--no-amp") == (0, [])


def test_bf16_shards_lose_as_little_as_bf16_replicas(trainer):
    flags = ["--num-steps", 20, "--warmup-steps", 2, "--eval-tokens", 0, "--eval-steps", 20, "--amp-dtype", "bf16"]
    sharded, whole = trainer(*flags, **SHARDED), trainer(*flags, ranks=2, checkpoint="whole.pt")
    assert sharded.code == 0, sharded.err
    close(sharded, whole, 2e-3)


HELD = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import json, os, train, train_fsdp
from torch.distributed.tensor import DTensor

def held(tensors):
    return sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors if t.ndim)

class Guard(train.StepGuard):
    def step(self, norm, step):
        taken = super().step(norm, step)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        with open("held-" + os.environ["RANK"], "w") as file:
            json.dump([held(parameters), held(p.grad for p in parameters), held(moments)], file)
        return taken

train.StepGuard = Guard
train.main(train_fsdp.FSDPWorld)
"""


def test_each_rank_holds_its_share_of_weights_gradients_and_moments(trainer):
    (script := trainer.folder / "held.py").write_text(HELD)
    run = trainer("--num-steps", 2, "--grad-accum-steps", 2, ranks=2, script=script)
    assert run.code == 0, run.err
    held = torch.tensor([json.loads((trainer.folder / f"held-{rank}").read_text()) for rank in range(2)])
    n = sum(tensor.numel() for tensor in run.weights().values())
    assert held.sum(0).tolist() == [n, n, 2 * n]  # weights, gradients, moments
    assert (held[0] - held[1]).abs().max() < 0.1 * n


SLOW = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import time, train, train_fsdp; from mini_llm import saver

def save(*args, fast=saver.save):
    time.sleep(0.2)  # some steps
    fast(*args)

saver.save = save
train.main(train_fsdp.FSDPWorld)
"""


def test_steps_during_a_save_do_not_change_what_is_saved(trainer):
    flags = ["--num-steps", 24, "--save-steps", 8, "--keep-last", 3, "--skip-loss-spikes", 6]
    waiting = trainer(*flags, checkpoint="waiting.pt", **SHARDED)
    (script := trainer.folder / "slow.py").write_text(SLOW)
    assert trainer(*flags, "--async-save", ranks=2, script=script).code == waiting.code == 0
    for step in (8, 16, 24):
        ours, theirs = (tree_leaves([torch.load(trainer.folder / f"{name}.step-{step:08d}.pt", weights_only=True)[part]
                                     for part in ("model", "optimizer", "guard")]) for name in ("c", "waiting"))
        assert all(map(torch.equal, *([leaf.nan_to_num(-1) for leaf in leaves if isinstance(leaf, torch.Tensor)]
                                      for leaves in (ours, theirs)))), step


def test_weights_of_transformers_begin_a_sharded_run(trainer, tuned, text):
    folder, run = tuned["qwen3"]  # of two replicas
    flags = ["--init-from", folder, "--tokenizer-name", "byte", "--seq-len", 32, "--batch-size", 4, "--num-steps", 40,
             "--warmup-steps", 5, "--lr", 1e-2, "--eval-tokens", 0, "--eval-steps", 0, "--no-amp", "--device", "cpu"]
    sharded = trainer(*flags, tiny=False, **SHARDED)
    assert sharded.code == 0, sharded.err
    close(sharded, run, 1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--amp-dtype", "fp16"], "fp16 (--amp-dtype fp16): "), (["--check-replicas", 5], "--check-replicas 5: "),
    (["--wandb-watch", "gradients", "--use-wandb"], "--wandb-watch gradients: "),
    (["--shard-ranks", 3], "--shard-ranks 3 has to divide the 2 ranks, and be two or more"),
    (["--shard-ranks", 1], "--shard-ranks 1 has to divide the 2 ranks, and be two or more")])
def test_what_shards_cannot_do_is_refused_in_one_line(trainer, flags, words):
    run = trainer(*flags, "--num-steps", 5, **SHARDED)
    said = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert run.code and len(said) == 1 and words in said[0], run.err
    assert not list(trainer.folder.glob("c.*"))


def test_a_sharded_run_that_is_stopped_goes_on_as_if_it_had_not_been(trainer):
    flags = ["--num-steps", 50, "--dropout", 0.1, "--log-steps", 5, "--eval-steps", 0, "--save-steps", 0]
    straight = trainer(*flags, checkpoint="straight.pt", **SHARDED)
    stopped = interrupt_after(trainer.arguments(flags, **SHARDED), trainer.folder, "step 10/50")
    assert stopped.returncode != 0 and "stopped by SIGTERM at step" in stopped.stdout
    resumed = trainer(*flags, "--resume", **SHARDED)
    assert resumed.code == 0 and same(resumed, straight), resumed.err


def test_a_rank_that_is_killed_ends_the_others_and_is_named(trainer):
    process = _at_step_30(trainer, "--save-steps", 20, **SHARDED)
    os.kill(_rank_process(process.pid, 1), signal.SIGKILL)
    said = process.stdout.read()
    assert process.wait(timeout=200) != 0 and re.search(r"^error: rank 1 \(.*\) is gone at step \d+", said, re.M), said
    assert torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] >= 20


def test_a_buffer_is_that_which_the_model_was_made_with(trainer):
    (script := trainer.folder / "buffered.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, model, train, train_fsdp

def make(self, *args, **options):
    init(self, *args, **options)
    self.register_buffer("counts", torch.arange(2.0**16, device="cpu"))  # DDPWorld.SENT_LATER

init, model.GPT.__init__ = model.GPT.__init__, make
train.main(train_fsdp.FSDPWorld)
""")
    for checkpoint, flags in (("c.pt", ["--num-steps", 2]), ("c.pt", ["--num-steps", 4, "--resume"]),
                              ("d.pt", ["--num-steps", 2, "--init-from", "c.pt"])):
        run = trainer(*flags, ranks=2, checkpoint=checkpoint, script=script)
        assert run.code == 0, run.err
        saved = torch.load(run.checkpoint, weights_only=True)
        assert torch.equal(saved["model"]["counts"], torch.arange(2.0**16)) and saved["state"]["step"] == flags[1]


def test_a_single_rank_holds_the_only_shard(monkeypatch):
    """As where a job is tried on one GPU."""
    def alone(world, cfg):
        world.size, world.device, world.heartbeat = 1, torch.device("cpu"), SimpleNamespace(mesh=lambda *shape: shape)

    monkeypatch.setattr(train_fsdp.DDPWorld, "__init__", alone)
    monkeypatch.setattr(FSDPWorld, "require_same", lambda *_: None)
    monkeypatch.setattr(train_fsdp, "keep_freed_memory", lambda up_to: None)
    world = FSDPWorld(parse(Config, []))
    assert (world.shards, world.mesh, world.replicas) == (1, ("cpu", 1), None)


def test_each_block_is_gathered_in_autocasts_dtype_and_its_gradients_are_added_up_in_fp32(monkeypatch):
    sharded, compiled, world = {}, [], FSDPWorld.__new__(FSDPWorld)
    monkeypatch.setattr(train_fsdp, "fully_shard", lambda module, **how: sharded.update({module: how}))
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    world.mesh, world.dtype, world.compiles, world.device = "mesh", torch.bfloat16, True, torch.device("cpu")
    world.distribute = lambda value, like: value
    cfg = GPTConfig(n_layers=3, n_heads=2, d_model=8, vocab_size=11, max_position_embeddings=8)
    model = world.place(functools.partial(GPT, cfg), draw=True)
    assert list(sharded) == [*model.blocks, model], "the rest of it last: what is in a block is already another's"
    for how in sharded.values():
        policy = how["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype, how["mesh"]) == (torch.bfloat16, torch.float32, "mesh")
        assert not policy.cast_forward_inputs, "the residual stream has a dtype of its own"
    # The last block and the rest are used again at once, by the backward pass. (None: PyTorch's choice for a root.)
    assert [how.get("reshard_after_forward") for how in sharded.values()] == [True, True, False, None]
    assert [forward.__self__ for forward in compiled] == list(model.blocks)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


def test_what_is_saved_of_a_sharded_run_is_a_copy_and_on_the_main_rank_alone():
    world, tensor = FSDPWorld.__new__(FSDPWorld), torch.ones(3)
    saved = world.full_state(dict(guard=tensor, step=7))
    tensor.zero_()
    assert saved["guard"].tolist() == [1, 1, 1] and saved["step"] == 7
    world.is_main = False
    assert world.full_state(dict(guard=tensor))["guard"].device.type == "meta"


def test_gradients_go_between_replicas_of_shards_once_a_step():
    asked, world = [], FSDPWorld.__new__(FSDPWorld)
    for last in False, True:
        with world.grad_sync(SimpleNamespace(set_requires_all_reduce=asked.append), last):
            assert asked[-1] is last
    assert len(asked) == 2


def test_optimizer_state_that_is_no_tensor_stays_as_it_is():
    world = FSDPWorld.__new__(FSDPWorld)
    for value in 3, torch.zeros(2):
        assert world.distribute(value, torch.zeros(4)) is value
