"""train_ddp.py under the real torchrun, on the CPU. One process is the oracle of many."""

import os
import pickle
import re
import signal
import subprocess

import pytest
import torch
import zygote
from conftest import ROOT, TINY, Run, command, environment, interrupt_after, processes_with
from test_ranks import free_port, start_node
from test_train import same
from wandb_file import run_files

from mini_llm import hardware, rendezvous
from mini_llm.config import parse
from mini_llm.errors import RunFailed, UserError
from mini_llm.processes import parent_of
from train import Config

full = pytest.mark.full

EXACT = ["--no-amp", "--log-steps", 2, "--eval-steps", 4, "--eval-tokens", 0]


def close(a, b, tolerance):
    assert a.losses().keys() == b.losses().keys()
    for key, value in a.losses().items():
        assert b.losses()[key] == pytest.approx(value, abs=tolerance), key


@pytest.mark.parametrize("optimizer, ranks", [("adamw", 2), ("muon", 3)])  # for whose third rank no matrix is left
def test_ranks_are_one_process_with_as_many_micro_batches_and_continue_it(trainer, optimizer, ranks):
    flags = [*EXACT, "--lr-scheduler", "none", "--optimizer", optimizer]  # which goes on the same with more steps
    one = trainer(*flags, "--num-steps", 12, "--grad-accum-steps", ranks, checkpoint="one.pt")
    many = trainer(*flags, "--num-steps", 12, ranks=ranks, checkpoint="many.pt")
    assert one.code == many.code == 0, one.err + many.err
    close(one, many, 1e-5)
    for name, weight in one.weights().items():
        assert torch.allclose(weight, many.weights()[name], atol=1e-4), name

    trainer(*flags, "--num-steps", 7, "--grad-accum-steps", ranks, checkpoint="moved.pt")
    moved = trainer(*flags, "--num-steps", 12, "--resume", ranks=ranks, checkpoint="moved.pt")
    assert moved.code == 0 and "Resumed at step 7" in moved.out, moved.err
    for key, value in one.losses().items():
        if key[0] != 0:
            assert moved.losses()[key] == pytest.approx(value, abs=1e-5), key


def srun(trainer, *flags, checkpoint):
    """One task on each of two nodes, as `srun python train_ddp.py` starts them."""
    port, tasks = free_port(), []
    for task in range(2):
        slurm = dict(SLURM_PROCID=task, SLURM_NTASKS=2, SLURM_LOCALID=0, SLURM_NTASKS_PER_NODE=1, SLURM_NODEID=task,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        tasks.append(zygote.Popen(
            [*command("train_ddp.py"), *trainer.arguments([*EXACT, *flags], checkpoint=checkpoint)[2:]], text=True,
            cwd=trainer.folder, env=environment(**{name: str(value) for name, value in slurm.items()}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return tasks


def test_srun_may_start_the_ranks_itself(trainer):
    one = trainer(*EXACT, "--num-steps", 4, "--grad-accum-steps", 2, checkpoint="one.pt")
    tasks = srun(trainer, "--num-steps", 4, checkpoint="two.pt")
    out, err = tasks[0].communicate(timeout=120)
    assert [task.wait(60) for task in tasks] == [0, 0], err
    close(one, Run(subprocess.CompletedProcess(tasks[0].args, 0, out, err), trainer.folder, "two.pt"), 1e-5)


@pytest.fixture
def world(monkeypatch):
    """`world(**environment)`: that of a rank in no process group."""
    import train_ddp

    def make(device="cpu", **variables):
        for name, value in (variables | dict(MASTER_ADDR="localhost", MASTER_PORT=1)).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(train_ddp.rendezvous, "join", lambda *_: None)
        monkeypatch.setattr(train_ddp.ranks, "require_same", lambda *_: None)
        return train_ddp.DDPWorld(parse(Config, ["--device", device]))

    return make


TORCHRUN = dict(RANK=7, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, GROUP_RANK=1)


def test_the_ranks_that_torchrun_starts_under_srun_are_torchruns(world, monkeypatch):
    """One task of srun on a node, torchrun, has started all of the node's ranks: each has srun's variables, too."""
    slurm = dict(SLURM_PROCID=1, SLURM_NTASKS=2, SLURM_LOCALID=0, SLURM_NTASKS_PER_NODE=1, SLURM_NODEID=1)
    chosen, choose = [], hardware.choose_device

    def noted(*how, **more):
        chosen.append((how, more))
        return choose(*how, **more)

    monkeypatch.setattr(hardware, "choose_device", noted)
    made = world(**TORCHRUN, **slurm)
    assert (made.rank, made.size, made.local_rank, made.local_size, made.node_rank) == (7, 8, 3, 4, 1)
    assert chosen == [(("cpu", 3), dict(alone=False))], "the fourth GPU of its node"


@pytest.mark.parametrize("name, value, answer", [
    ("RANK", 8, r"^RANK is 8 and WORLD_SIZE 8: set WORLD_SIZE \(.* SLURM_NTASKS\) to the number of ranks in all$"),
    ("LOCAL_RANK", 4, r"^LOCAL_RANK is 4 and LOCAL_WORLD_SIZE 4: .* SLURM_NTASKS_PER_NODE\) .* on each node$"),
    ("WORLD_SIZE", "two", "WORLD_SIZE is 'two': set it to a number"),
    ("MASTER_PORT", "", "MASTER_PORT is '': set it to a number")])
def test_ranks_set_by_hand_that_cannot_be_are_answered_before_the_others_are_waited_for(monkeypatch, name, value,
                                                                                       answer):
    for variable, set_to in (TORCHRUN | dict(MASTER_ADDR="localhost", MASTER_PORT=1) | {name: value}).items():
        monkeypatch.setenv(variable, str(set_to))
    with pytest.raises(UserError, match=answer):
        rendezvous.launched("train_ddp.py")


@pytest.mark.parametrize("threads, asked", [("1", [4]), ("3", [])])
def test_ranks_on_a_cpu_share_its_cores_unless_told_otherwise(world, monkeypatch, threads, asked):
    calls = []
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    monkeypatch.setattr("train_ddp.usable_cores", lambda: 18)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    world(**TORCHRUN, OMP_NUM_THREADS=threads)
    assert calls == asked and os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "4"


def test_ranks_on_metal_are_refused(world, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device mps: PyTorch has no collectives"):
        world(device="mps", **TORCHRUN)


def test_an_error_that_cannot_be_sent_reaches_every_rank_by_its_words(monkeypatch):
    import train_ddp

    class Odd(Exception):  # as of a library, whose constructor wants more than a message
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def sent(outcome):
        outcome[:] = pickle.loads(pickle.dumps(outcome))

    def fails():
        raise Odd("this", "that")

    monkeypatch.setattr(train_ddp.dist, "broadcast_object_list", sent)
    world = train_ddp.DDPWorld.__new__(train_ddp.DDPWorld)
    world.is_main = True
    with pytest.raises(RunFailed, match="^Odd: this and that$"):
        world.from_main(fails)


def test_a_node_holds_no_checkpoint_for_each_of_its_ranks(monkeypatch):
    """What the main rank reads comes to the others in shapes, and then one by one to their device."""
    import train_ddp

    value, sent = dict(large=torch.empty(2**16, device="meta"), small=torch.empty(3, device="meta"), step=5), []
    monkeypatch.setattr(train_ddp.dist, "broadcast_object_list", lambda outcome: outcome.__setitem__(1, value))
    monkeypatch.setattr(train_ddp.dist, "broadcast", lambda tensor, source: sent.append(tensor.fill_(7)))
    world = train_ddp.DDPWorld.__new__(train_ddp.DDPWorld)
    world.is_main, world.device = False, torch.device("cpu")
    got = world.from_main(None)
    assert got["large"].is_meta and got["small"].tolist() == [7, 7, 7] and got["step"] == 5 and len(sent) == 1
    large, small, step = (world.distribute(got[name], None) for name in ("large", "small", "step"))
    assert len(sent) == 2 and large is sent[1] and small is got["small"] and step == 5


@full
def test_a_task_of_srun_notices_that_the_other_is_killed(trainer):
    tasks = srun(trainer, "--num-steps", 10**6, checkpoint="endless.pt")
    try:
        next(line for line in tasks[0].stdout if "step 10/" in line)
        tasks[1].kill()
        assert "rank 1" in tasks[0].communicate(timeout=60)[1]
        assert [task.wait(60) for task in tasks] == [1, -signal.SIGKILL]
    finally:
        for task in tasks:
            task.kill()


@full
@pytest.mark.timeout(600)
def test_the_compiler_changes_no_loss_of_ranks_that_accumulate_and_recompute(trainer):
    flags = [*EXACT, "--num-steps", 6, "--grad-accum-steps", 2, "--use-activation-checkpoint"]
    plain = trainer(*flags, ranks=2, checkpoint="plain.pt")
    compiled = trainer(*flags, "--compile", ranks=2, checkpoint="compiled.pt")
    assert compiled.code == 0 and "torch.compile, before the first step" in compiled.out, compiled.err
    close(plain, compiled, 1e-5)


@full
@pytest.mark.timeout(1200)
def test_many_ranks_are_one_process_and_half_of_them_continue_it(trainer):
    """RANKS=64 takes 16 GB and, on two cores, four minutes of importing torch."""
    ranks = int(os.environ.get("RANKS", 32))
    flags = [*EXACT, "--lr-scheduler", "none"]
    one = trainer(*flags, "--num-steps", 12, "--batch-size", ranks, checkpoint="one.pt")
    trainer(*flags, "--num-steps", 8, "--batch-size", 1, ranks=ranks, checkpoint="many.pt", timeout=600)
    many = trainer(*flags, "--num-steps", 12, "--batch-size", 1, "--grad-accum-steps", 2, "--resume", ranks=ranks // 2,
                   checkpoint="many.pt", timeout=600)
    assert many.code == 0 and "Resumed at step 8" in many.out, many.err
    close(one, many, 1e-5)


def test_validation_does_not_depend_on_the_number_of_ranks(trainer, text):
    (trainer.folder / "a.txt").write_text(text.read_text()[:12_000])
    (trainer.folder / "b.txt").write_text(text.read_text()[:500].upper())
    flags = ["--num-steps", 1, "--no-amp", "--eval-tokens", 0, "--lr", 1e-9, "--val-data", "a.txt", "b.txt",
             "--dropout", 0.5]  # which an evaluation does without
    runs = [trainer(*flags, "--grad-accum-steps", 6 // (ranks or 1), ranks=ranks, checkpoint=f"{ranks}.pt")
            for ranks in (None, 2, 3)]
    for name in ("val/loss", "val/loss/a", "val/loss/b"):
        losses = [run.rows[0][name] for run in runs]
        assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_accumulation_over_ranks_averages_every_gradient_once(trainer):
    flags = [*EXACT, "--num-steps", 6]
    wide = trainer(*flags, "--grad-accum-steps", 4, checkpoint="wide.pt")
    ranks = trainer(*flags, "--global-batch-tokens", 4 * 4 * 32, ranks=2, checkpoint="ranks.pt")
    assert "512 tokens = batch 4 x sequence 32 x accumulation 2 x ranks 2" in ranks.out
    assert "step/s" not in ranks.out + ranks.err, "a progress bar of the other rank"
    close(wide, ranks, 1e-5)
    assert wide.rows[6]["train/tokens"] == ranks.rows[6]["train/tokens"] == 6 * 512
    assert wide.rows[6]["train/epoch"] == ranks.rows[6]["train/epoch"] > 0
    for run, size in (wide, 1), (ranks, 2):  # speed counts the tokens of every micro-batch and rank
        row = run.rows[6]
        low, high = (row[f"tokens_per_sec_per_rank/{end}"] for end in ("min", "max"))
        assert row["global_tokens_per_sec"] == pytest.approx(size * low), "all ranks' tokens in the slowest's time"
        assert 512 / size / row["train/step_time_sec"] in (pytest.approx(low), pytest.approx(high))  # rank 0 is either


@pytest.mark.parametrize("ranks, precision", [
    pytest.param(2, ["--no-amp"], marks=full), pytest.param(2, ["--amp-dtype", "bf16"], marks=full),
    pytest.param(2, ["--amp-dtype", "fp16"], marks=full), (3, ["--amp-dtype", "bf16"])],
    ids=["fp32", "bf16", "fp16", "3 ranks"])
def test_ranks_resume_bit_for_bit(trainer, ranks, precision):
    flags = ["--max-tokens", 3200, "--grad-accum-steps", 2, "--dropout", 0.2, "--log-steps", 5, "--eval-steps", 4,
             "--save-steps", 6, "--lr-scheduler", "none", "--d-model", 160, *precision]  # tensors above 2**16
    straight = trainer(*flags, "--num-steps", 14, ranks=ranks, checkpoint="straight.pt")
    first = trainer(*flags, "--num-steps", 9, ranks=ranks, checkpoint="resumed.pt")
    second = trainer(*flags, "--num-steps", 14, "--resume", ranks=ranks, checkpoint="resumed.pt")
    assert straight.code == first.code == second.code == 0, straight.err + first.err + second.err
    assert same(second, straight) and straight.rows[14]["train/epoch"] > 1


def test_dropout_is_drawn_anew_by_every_rank_and_step():
    from mini_llm.hardware import seed_step

    masks = set()
    for step in range(3):
        for rank in range(3):
            seed_step(1337, step, rank, torch.device("cpu"))
            masks.add(tuple(torch.rand(4).tolist()))
    assert len(masks) == 9
    for seed in 1337, 1338:
        seed_step(seed, 2, 2, torch.device("cpu"))
        assert (tuple(torch.rand(4).tolist()) in masks) == (seed == 1337)


WATCHED = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train; from mini_llm import hardware
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from train_ddp import DDPWorld
wrap, seed_step, make_profiler = DDPWorld.wrap, hardware.seed_step, train.make_profiler

def note(*what):
    os.write(3, (" ".join(map(str, what)) + "\\n").encode())

def wrapping(self, model):
    def hook(state, bucket):
        note("reduced", self.rank)
        return allreduce_hook(state, bucket)
    self.comm_hook = hook
    return wrap(self, model)

def seeding(seed, step, rank, device):
    note("seed", step, rank)
    seed_step(seed, step, rank, device)

def profiling(wanted, *rest):
    note("profiles", wanted)
    return make_profiler(False, *rest)

DDPWorld.wrap, hardware.seed_step, train.make_profiler = wrapping, seeding, profiling
hardware.device_name = lambda _: "that of rank " + os.environ["RANK"]
train.stop_when_orphaned = lambda launchers: note("launchers", launchers)
os.dup2(os.open("notes." + os.environ["RANK"], os.O_WRONLY | os.O_CREAT), 3)
train.main(DDPWorld)
"""


def test_gradients_go_over_the_wire_once_a_step_and_each_rank_has_randomness_of_its_own(trainer):
    (script := trainer.folder / "watched.py").write_text(WATCHED)
    run = trainer("--num-steps", 3, "--grad-accum-steps", 4, "--use-profiler", ranks=2, script=script)
    assert run.code == 0, run.err
    for rank in range(2):
        notes = (trainer.folder / f"notes.{rank}").read_text().splitlines()
        assert notes.count(f"reduced {rank}") == 3 + 1  # one bucket holds this model; one pass comes before the steps
        assert [note for note in notes if note.startswith("seed")] == [f"seed {step} {rank}" for step in range(3)]
        assert f"profiles {rank == 0}" in notes and "launchers 1" in notes, "torchrun may be killed"


def test_a_dry_run_of_ranks_leaves_no_tokens_behind(trainer, text):
    (trainer.folder / "tmp").mkdir()
    run = trainer("--train-data", text, "--dry-run", data=False, ranks=2, env={"TMPDIR": str(trainer.folder / "tmp")})
    assert run.code == 0 and "one step:" in run.out, run.err
    assert list((trainer.folder / "tmp").glob("mini-llm*")) == [] and {*trainer.folder.iterdir()} == {
        trainer.folder / "tmp"}


SLOW = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import train, train_ddp; from mini_llm import saver
quick = saver.save
saver.save = lambda *args: (time.sleep(3), quick(*args))
train.main(train_ddp.DDPWorld)
"""


def test_a_slow_save_is_not_training_time_on_any_rank(trainer):
    (script := trainer.folder / "slow.py").write_text(SLOW)
    run = trainer("--num-steps", 20, "--log-steps", 10, "--save-steps", 16, "--eval-steps", 0, ranks=2, script=script)
    row = run.rows[20]
    assert row["time/checkpoint_sec"] > 2.9
    assert row["train/step_time_sec"] < 0.25  # else at least 0.3
    assert row["tokens_per_sec_per_rank/min"] > row["tokens_per_sec_per_rank/max"] / 2


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=full)])
def test_a_signal_saves_on_agreement_and_the_run_goes_on(trainer, signal_number):
    flags = ["--num-steps", 150, "--log-steps", 10, "--eval-steps", 0, "--save-steps", 0]
    straight = trainer(*flags, ranks=2, checkpoint="straight.pt")
    stopped = interrupt_after(trainer.arguments(flags, ranks=2), trainer.folder, r"step 30/150", signal_number)
    assert stopped.returncode != 0
    step = int(re.search(rf"stopped by {signal_number.name} at step (\d+)", stopped.stdout)[1])
    resumed = trainer(*flags, "--resume", ranks=2)
    assert resumed.code == 0 and f"Resumed at step {step}" in resumed.out, resumed.err
    assert same(resumed, straight)


def test_a_signal_to_one_rank_before_the_first_step_stops_them_all(trainer):
    (script := trainer.folder / "signalled.py").write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train, train_ddp\n"
        "fast = train.GPT.forward\n"
        "def forward(self, *batch):\n"
        "    train.GPT.forward = fast\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return fast(self, *batch)\n"
        "if os.environ['RANK'] == '1':\n"
        "    train.GPT.forward = forward\n"
        "train.main(train_ddp.DDPWorld)\n")
    run = trainer("--num-steps", 5, ranks=2, script=script)
    assert "stopped by SIGTERM before the first step: nothing has been replaced" in run.out, run.out + run.err
    assert "error: " not in run.err and not run.checkpoint.exists()


def test_a_save_on_a_thread_is_done_when_a_stopped_rank_leaves(trainer):
    """It leaves without the interpreter's end, which would wait for threads."""
    (script := trainer.folder / "slow.py").write_text(SLOW)
    process = _at_step_30(trainer, "--save-steps", 0, "--async-save", ranks=1, script=script)
    os.kill(_rank_process(process.pid, 0), signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", out)[1])
    assert torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] == step


def test_a_signal_to_one_rank_alone_stops_them_all(trainer):
    process = _at_step_30(trainer, "--save-steps", 0)
    os.kill(_rank_process(process.pid, 1), signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", out)[1])
    assert process.returncode != 0
    assert torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] == step


def _at_step_30(trainer, *flags, ranks=2, script="train_ddp.py"):
    """torchrun in the midst of a run without end."""
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, *flags]
    process = zygote.Popen(trainer.arguments(flags, ranks, script=script), cwd=trainer.folder, text=True,
                           env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while "step 30/" not in (line := process.stdout.readline()):
        assert line, "it has ended"
    return process


def _rank_process(parent, rank):
    """The pid of the torchrun child whose environment says that it is this rank."""
    (pid,) = [pid for pid in processes_with(f"RANK={rank}") if parent_of(pid) == parent]
    return pid


def test_a_mistake_is_said_once_and_ends_every_rank(trainer):
    run = trainer("--n-heads", 5, ranks=2)
    assert run.code != 0 and run.err.count("error: --n-heads 5") == 1
    run = trainer("--resume", ranks=2)
    assert run.code != 0 and run.err.count("error: --resume") == 1 and "exitcode  : 2" in run.err
    assert not list(trainer.folder.iterdir())


def test_two_nodes_make_one_log_one_wandb_run_and_one_checkpoint(trainer, text):
    port, nodes = free_port(), []
    flags = ["--train-data", text, "--num-steps", 10, "--use-wandb", "--wandb-run-name", "two nodes"]
    for node in range(2):
        (folder := trainer.folder / f"node{node}").mkdir()
        nodes.append(start_node(node, port, folder, flags, ranks=2, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "step 10/10" in outputs[0][0] and "4 ranks" in outputs[0][0] and outputs[1][0] == ""
    first, second = (trainer.folder / f"node{node}" for node in range(2))
    assert {path.name for path in second.iterdir()} == {"data"}, "the second node writes its token cache only"
    assert {path.name.removeprefix("minigpt.") for path in (first / "checkpoints").iterdir()} == {
        "pt", "best.pt", "lock", "log", "metrics.jsonl", "config.toml", "tokenizer", "wandb.json", "wandb.lock"}
    (wandb_run,) = run_files(first)
    assert wandb_run.name == "two nodes" and [row["step"] for row in wandb_run.rows] == [0, 10]


@pytest.mark.parametrize("difference, words", [
    ("os.environ['LOCAL_RANK'] = '0'; os.chdir('node1')",
     r"the ranks have different data: rank 1 has the training data \w+ instead of \w+"),
    ("from mini_llm import hardware; hardware.Precision.name = 'odd'; hardware.device_name = lambda _: 'odd'",
     r"the ranks have different devices: rank 1 has precision odd instead of \S+, device odd instead of "),
    ("import torch; seed = torch.manual_seed; torch.manual_seed = lambda number: seed(number + 1)",
     "the ranks have different weights: rank 1 has "),
    ("os.environ['LOCAL_RANK'] = '0'; os.chdir('node2')", "--train-data prose.txt: no such file"),
], ids=["data", "devices", "weights", "missing"])
def test_ranks_that_differ_leave_saying_why(tmp_path, text, difference, words):
    """Rank 1 is made to differ, also as the first rank of a node with other files."""
    (tmp_path / "prose.txt").write_text(text.read_text())
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "prose.txt").write_text(text.read_text().upper())
    (tmp_path / "node2").mkdir()
    script = tmp_path / "differ.py"
    script.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      f"if os.environ['RANK'] == '1': {difference}\n"
                      f"from train_ddp import DDPWorld\nfrom train import main\nmain(DDPWorld)\n")
    flags = [*TINY, "--train-data", "prose.txt", "--optimizer", "muon"]
    run = zygote.run([*command(script, ranks=2), *flags], tmp_path, environment())
    assert run.returncode != 0 and re.search(words, run.stderr), run.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_is_that_of_train_py_when_there_is_one_rank(trainer):
    # In fp32: these two have one thread and two, and bf16 would make 5e-6 of the last bits of a sum.
    flags = ["--num-steps", 6, "--log-steps", 2, "--dropout", 0.1, "--no-amp"]
    alone, launched = trainer(*flags, checkpoint="a.pt"), trainer(*flags, ranks=1, checkpoint="b.pt")
    assert launched.code == 0, launched.err
    close(alone, launched, 1e-6)
