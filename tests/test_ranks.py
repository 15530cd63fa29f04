"""Ranks that misbehave, under the real torchrun: all leave, soon, and one line says which it was and why."""

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import zygote
from conftest import ROOT, TINY, Run, environment, eventually, processes_with
from test_train import same

from mini_llm import ranks, rendezvous
from mini_llm.config import parse
from mini_llm.errors import UserError
from mini_llm.ranks import Heartbeat, differences, digest
from train import Config

# A fault in the data path of RANK at STEP, the first time that torchrun starts it.
FAULTY = f"""
import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})
import torch
from data import Corpus
from train import main
from train_ddp import DDPWorld
kind, rank, step = os.environ["FAULT"].split()
if "GLOO" in os.environ:
    from mini_llm import shared_memory
    shared_memory.MAX_RANKS = 0
batch, wrap = Corpus.batch, DDPWorld.wrap

def faulty(self, at, *rest):
    if at == int(step) and rank in ("all", os.environ["RANK"]) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.write(1, b"FAULT %f\\n" % time.time())  # in one piece: another rank writes, too
        match kind:
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "stop": os.kill(os.getpid(), signal.SIGSTOP)
            case "hang": time.sleep(1000)
            case "rest": time.sleep(9)
            case "leave": raise KeyboardInterrupt
            case "limit": os.kill(os.getpid(), signal.SIGALRM)  # as the end of --time-limit
            case "raise": raise ValueError("a broken sample")
            case "memory": torch.empty(1 << 50)
            case "flip": DDPWorld.weight.view(torch.int32)[0] ^= 1 << 20  # a lower one may be lost in the update
    return batch(self, at, *rest)

def wrapping(self, model):
    DDPWorld.weight = next(model.parameters()).detach().view(-1)
    return wrap(self, model)

Corpus.batch, DDPWorld.wrap = faulty, wrapping
main(DDPWorld)
"""


@pytest.fixture
def faulted(trainer, record_property):
    """`faulted(fault, *flags)` runs ranks, one with a fault, to the end of every process: exit code, stderr, and the
    seconds from the fault until none was left."""
    script = trainer.folder / "faulty.py"
    script.write_text(FAULTY)

    def run(fault, *flags, torchrun=(), ranks=2, **env):
        name = f"{trainer.folder.name}-{fault}"
        args = trainer.arguments(flags, ranks, script=script)
        args[3:3] = torchrun
        process = zygote.Popen(args, cwd=trainer.folder, env=environment(FAULT=fault, FAULTED=name, **env),
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=60 * ranks)
            eventually(lambda: not processes_with(f"FAULTED={name}"), 30)
        finally:
            for pid in processes_with(f"FAULTED={name}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        seconds = time.time() - float(re.search(r"FAULT ([\d.]+)", out)[1])
        record_property("seconds", round(seconds, 1))
        print(f"{fault}: {seconds:.1f} s until all were gone")
        return process.returncode, out, err, seconds

    return run


TOY = ["--use-toy-data", "--tokenizer-name", "char"]
LONG = ["--num-steps", 100_000, "--eval-steps", 0, "--log-steps", 5, "--save-steps", 10]


@pytest.mark.parametrize(("fault", "words"), [
    ("kill 0 25", "is gone at step 26: it was killed, perhaps for want of memory (see dmesg), or crashed"),
    pytest.param("stop 1 25", "has stopped at step 26: nothing from it for", marks=pytest.mark.full),
    ("hang 0 25", "has stopped at step 26: nothing from it for"),
    ("raise 1 25", "failed at step 26: ValueError: a broken sample"),
    pytest.param("memory 1 25", "lower --batch-size and raise --grad-accum-steps, or --use-activation-checkpoint",
                 marks=pytest.mark.full),
])
@pytest.mark.timeout(200)
def test_a_rank_with_a_fault_ends_all_ranks_in_time_and_is_named_in_one_line(faulted, trainer, fault, words):
    kind, rank, _ = fault.split()
    code, out, err, seconds = faulted(fault, *LONG, "--timeout", 10)
    assert code != 0 and seconds < 60
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: rank {rank} \(\S+, pid \d+\) ", line) and words in line, line
    assert line.endswith("--resume auto goes on from the last checkpoint")
    ours = err[:err.index("torch/distributed/elastic")]  # torchrun has a traceback of its own
    assert ours.count("Traceback") == (kind == "raise"), "only a mistake in the code, and only of the rank that made it"
    assert torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] == 20


def test_over_gloo_a_killed_rank_is_named_too(faulted):
    """On one host ranks exchange gradients through shared memory, where none has an error from the others."""
    code, _, err, seconds = faulted("kill 1 25", *LONG, "--timeout", 10, GLOO="1")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and seconds < 60 and line.startswith("error: rank 1 (") and "is gone at step 26" in line, line


@pytest.mark.full
def test_ranks_do_not_wait_for_one_that_has_left(faulted):
    """As by a second Ctrl-C to it alone: torchrun would end them after 30 s, srun never."""
    code, out, _, _ = faulted("leave 1 25", *LONG)
    assert code != 0 and "error: stopped by RankEnded: rank 1 has ended" in out


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("fault", "words"), [("kill 20 9", "is gone"), ("stop 21 9", "has stopped")])
def test_one_of_many_ranks_is_named(faulted, fault, words):
    code, _, err, seconds = faulted(fault, *LONG, "--batch-size", 1, "--timeout", 20, ranks=32)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {fault.split()[1]} (") and f"{words} at step 10" in line
    assert code != 0 and seconds < 90


@pytest.mark.full
def test_if_all_ranks_stand_still_that_is_said_and_ends_none(faulted):
    code, _, err, _ = faulted("rest all 25", "--num-steps", 30, "--eval-steps", 0, "--timeout", 5)
    assert code == 0 and err.count("warning: no rank has moved for 5 s at step 26") == 1 and "error" not in err, err


def test_replicas_are_compared_in_their_moments_too(monkeypatch):
    import train_ddp

    seen = []
    monkeypatch.setattr(ranks, "require_same", lambda mine, *_, **__: seen.append(dict(mine)))
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    world = train_ddp.DDPWorld.__new__(train_ddp.DDPWorld)
    world.size = 2  # which otherwise torchrun says
    for _ in range(2):
        world.require_replicas(model, optimizer)
        optimizer.state[model.weight]["momentum_buffer"][0, 0] += 1
    assert seen[0].keys() == seen[1].keys() and sum(seen[0][name] != seen[1][name] for name in seen[0]) == 1


@pytest.mark.timeout(200)
def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_if_it_had_not_been(faulted, trainer):
    flags = ["--num-steps", 40, "--eval-steps", 10, "--log-steps", 5, "--save-steps", 10, "--dropout", 0.1]
    whole = trainer(*flags, ranks=2, checkpoint="whole.pt")
    code, out, err, _ = faulted("kill 1 25", *flags, "--resume", "auto", torchrun=["--max-restarts=2"])
    assert code == 0 and "Resumed at step 20" in out, out + err
    assert same(Run(subprocess.CompletedProcess([], code, out, err), trainer.folder, "c.pt"), whole)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_torchrun_restarts_the_ranks_of_two_nodes(trainer):
    """At the first try, though each node's ranks come when they can, and the store still has earlier addresses."""
    flags = ["--num-steps", 40, "--log-steps", 5, "--save-steps", 10, "--dropout", 0.1, "--resume", "auto"]
    (script := trainer.folder / "faulty.py").write_text(FAULTY)
    whole = trainer(*flags, ranks=4, checkpoint="whole.pt", script=script, env=dict(FAULT="none 0 0", GLOO="1"))
    mark, port = trainer.folder.name, free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=1",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    nodes = []
    try:
        for node in range(2):
            nodes.append(zygote.Popen(
                [*torchrun, f"--rdzv-conf=is_host={1 - node}", str(script), *trainer.arguments(flags)[2:]],
                cwd=trainer.folder, env=environment(FAULT="kill 2 25", FAULTED=mark), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        outs, errs = zip(*(node.communicate(timeout=200) for node in nodes), strict=True)
    finally:
        for pid in processes_with(f"FAULTED={mark}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    out = "".join(outs)
    assert [node.returncode for node in nodes] == [0, 0] and "Resumed at step 20" in out, out + "".join(errs)
    assert same(Run(subprocess.CompletedProcess([], 0, out, ""), trainer.folder, "c.pt"), whole)


def test_torchrun_restarts_no_run_that_was_stopped_as_asked(faulted):
    code, out, err, _ = faulted("limit all 25", *LONG, "--resume", "auto", torchrun=["--max-restarts=2"])
    assert code == 0 and out.count("stopped by --time-limit") == out.count("Using device") == 1, out + err


def test_a_restart_without_resume_auto_is_refused(monkeypatch):
    from train_ddp import DDPWorld

    for name, value in dict(RANK=0, LOCAL_RANK=0, GROUP_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1,
                            MASTER_ADDR="localhost", MASTER_PORT=1, TORCHELASTIC_MAX_RESTARTS=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="give it --resume auto"):
        DDPWorld(parse(Config, ["--device", "cpu"]))


@pytest.mark.timeout(200)
def test_a_replica_with_one_wrong_bit_is_named_and_never_saved(faulted, trainer):
    code, out, err, _ = faulted("flip 1 25", *LONG, "--check-replicas", 7)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and re.search(r"different weights: rank 1 has \[0\]\['\S+'\] \w{16} instead of \w{16}", line), line
    saved = torch.load(trainer.folder / "c.pt", weights_only=True)
    assert saved["state"]["step"] == 20 and not (trainer.folder / "c.pt.tmp").exists()
    assert "step 25/" in out and "step 30/" not in out


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_node(node, port, folder, flags, env=None, ranks=1, script=ROOT / "train_ddp.py", **streams):
    """torchrun with so many ranks on one of two nodes of this machine, in `folder`."""
    args = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}",
            f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", script, *TINY,
            *flags]
    return zygote.Popen(list(map(str, args)), cwd=folder, env=environment(**(env or {})), text=True, **streams)


@pytest.mark.timeout(100)
def test_nodes_that_differ_are_told_in_one_line_which_and_in_what(tmp_path, text):
    port = free_port()
    nodes, began = [], time.monotonic()
    for node, flags in enumerate(([], ["--data-seed", 2, "--lr", 0.5])):
        nodes.append(start_node(node, port, tmp_path, ["--train-data", text, *flags], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE))
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    lines = [line for line in "".join(errors).splitlines() if line.startswith("error: ")]
    assert all(node.returncode for node in nodes) and len(lines) == 1, errors
    assert "different flags: rank 1 has --data-seed 2 instead of 1337, --lr 0.5 instead of 0.001" in lines[0], lines
    assert time.monotonic() - began < 80


def test_a_rank_that_srun_has_not_started_is_named_by_rank_0_too(monkeypatch):
    """Which then holds the store itself."""
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), RANK=0, WORLD_SIZE=2,
                            LOCAL_WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "START", 1)
    with pytest.raises(ranks.RankFault, match="1 of 2 ranks have not joined within 1 s, the first is rank 1: "):
        rendezvous.join("gloo", timeout=20)


@pytest.fixture
def first_of_two(monkeypatch):
    """The environment of rank 0; the other, on another node, does not come."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1,
                            TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "START", 1)
    return store


def test_a_port_that_another_job_of_this_node_uses_is_named_with_the_way_out(first_of_two, monkeypatch):
    """Without torchrun, under srun, rank 0 opens it."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with pytest.raises(ranks.RankFault, match=f"port {first_of_two.port} of 127.0.0.1 is in use: set MASTER_PORT"):
        rendezvous.join("gloo", timeout=20)


def test_a_node_whose_ranks_fail_before_they_join_is_not_waited_for(first_of_two):
    """As on a node that lacks the file of --config: torchrun ends the ranks of that node only."""
    with pytest.raises(ranks.RankFault, match="1 of 2 ranks have not joined within 1 s, the first is rank 1: "):
        rendezvous.join("gloo", timeout=20)


@pytest.mark.parametrize("called, words", [(False, "1 of 2 ranks .* the first is rank 0: "),
                                           (True, "some of 2 ranks .* rank 0 says which: ")])
def test_a_rank_that_waits_says_whether_rank_0_is_there(first_of_two, called, words):
    def call():
        name = first_of_two.get("rank 1").decode()
        first_of_two.set(f"call of {name}", "a start")

    if called:
        threading.Thread(target=call).start()
    with pytest.raises(ranks.RankFault, match=words):
        rendezvous._roll_call(first_of_two.clone(), 1, 2, datetime.timedelta(seconds=1))


def come(store, rank, names, size=2):
    """A thread of that rank, which appends the name of the start that it has joined to `names`."""
    limit = datetime.timedelta(seconds=20)
    thread = threading.Thread(target=lambda: names.append(rendezvous._roll_call(store.clone(), rank, size, limit)))
    thread.start()
    return thread


def test_ranks_that_are_started_again_do_not_take_those_before_for_each_other(first_of_two):
    """torchrun starts each node's ranks again when it can, on the same store."""
    starts = []
    for first, second in ((0, 1), (0, 1), (1, 0)):
        names = []
        threads = [come(first_of_two, first, names)]
        time.sleep(0.5)
        assert not names, "the other rank, of this start, is not there"
        threads.append(come(first_of_two, second, names))
        for thread in threads:
            thread.join()
        assert len(set(names)) == 1 and len(names) == 2
        starts += set(names)
    assert len(set(starts)) == 3


def test_a_rank_that_ends_while_others_are_waited_for_is_waited_for_again(first_of_two):
    """As all ranks of a node do when torchrun restarts them there because one has failed."""
    names = []
    threads = [come(first_of_two, 0, names, size=3)]
    first_of_two.set("rank 1", "gone")
    call = first_of_two.get("call of gone").decode()
    first_of_two.set(f"{call}: gone is here", "")
    threads.append(come(first_of_two, 2, names, size=3))
    time.sleep(1)
    assert not names
    threads.append(come(first_of_two, 1, names, size=3))
    for thread in threads:
        thread.join()
    assert len(names) == 3 and len(set(names)) == 1


def test_a_rank_that_cannot_connect_says_which_variable_names_the_network(first_of_two, monkeypatch):
    come(first_of_two, 1, [])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none9")
    with pytest.raises(ranks.RankFault, match="rank 0 on .* cannot connect to the others: .*none9.*set GLOO_"):
        rendezvous.join("gloo", timeout=20)


@pytest.mark.timeout(100)
def test_a_file_that_one_node_lacks_is_an_error_with_that_nodes_rank(tmp_path, text):
    port, nodes = free_port(), []
    for node in range(2):
        (folder := tmp_path / str(node)).mkdir()
        if node == 0:
            shutil.copy(text, folder / "t.txt")
        nodes.append(start_node(node, port, folder, ["--train-data", "t.txt"], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE))
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    (line,) = [line for line in "".join(errors).splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(\S+, pid \d+\): --train-data t\.txt: no such file or folder", line), line


@pytest.mark.timeout(100)
def test_nodes_with_other_versions_of_the_code_do_not_train_together(tmp_path, text):
    """Their flags may be the same, and the gradients or the order of the samples others."""
    (other := tmp_path / "other.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_ddp\n"
        "train_ddp.source_digest = lambda: 'pulled'\ntrain_ddp.main(train_ddp.DDPWorld)\n")
    port, nodes = free_port(), []
    for node, script in enumerate((ROOT / "train_ddp.py", other)):
        nodes.append(start_node(node, port, tmp_path, ["--train-data", text], script=script,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    lines = [line for line in "".join(errors).splitlines() if line.startswith("error: ")]
    assert all(node.returncode for node in nodes) and len(lines) == 1, errors
    assert "different versions: rank 1 has the code pulled instead of " in lines[0], lines
    assert lines[0].endswith("; bring every node to the same git commit and start again"), lines
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.timeout(150)
def test_a_node_that_is_lost_with_torchruns_store_ends_the_others(trainer):
    """Its sockets stay open, as after a power cut: nothing answers, and nothing says so."""
    port = free_port()
    mark, nodes = trainer.folder.name, []
    try:
        for node in range(2):
            (folder := trainer.folder / f"node{node}").mkdir()
            with open(folder / "err", "w") as err:
                nodes.append(start_node(node, port, folder, [*LONG, *TOY, "--timeout", 6],
                                        {"LOST": f"{mark}-{node}"}, stdout=err, stderr=err))
        said = trainer.folder / "node1" / "err"
        eventually(lambda: "step 10/" in (trainer.folder / "node0" / "err").read_text(), 90)
        for pid in processes_with(f"LOST={mark}-0"):
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: "error: " in said.read_text(), 45)  # the collective itself waits for 66 s
        assert re.search(r"error: torchrun's store at 127.0.0.1 has not answered for \d+ s at step \d+: torchrun has "
                         "ended there, and says why, or that node or the network has failed", said.read_text())
    finally:
        for pid in [pid for node in range(2) for pid in processes_with(f"LOST={mark}-{node}")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in nodes:
            node.wait(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_digest_tells_every_bit_and_place(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(1001).to(dtype)
    before, octets = digest(tensor), tensor.view(torch.uint8)
    assert digest(tensor.clone()) == before
    seen = {before}
    for at in (0, 1, len(octets) // 2, len(octets) - 1):
        for bit in range(1 if dtype is torch.bool else 8):
            octets[at] ^= 1 << bit
            seen.add(digest(tensor))
            octets[at] ^= 1 << bit
    assert len(seen) == 1 + 4 * (1 if dtype is torch.bool else 8)
    if dtype.is_floating_point:
        assert digest(tensor.flip(0)) != before and digest(-tensor) != before
        assert digest(torch.zeros(4)) != digest(-torch.zeros(4))
        assert digest(tensor.repeat(9), block=64) != digest(tensor.repeat(9).roll(64), block=64)


@pytest.fixture
def heartbeat(monkeypatch):
    """Rank 0 of two without its threads; `sleep` ends what has slept ten times."""
    made, slept = Heartbeat.__new__(Heartbeat), []
    made.rank, made.size, made.timeout, made.max_missed, made.answers, made.counters = 0, 2, 100, 6, 0, []
    made.peer, made.missed, made.last_progress, made.stalled = {}, 0, -1, 0
    made.me = dict(name="rank 0", pid=os.getpid(), node="0", beat=0, progress=0, step=3, left=False)
    made.leaving, made.saving, made.publishing = threading.Lock(), threading.Lock(), threading.RLock()
    made.store = SimpleNamespace(set=lambda *_: None, check=lambda names: names == ["printed"], add=lambda *_: 1,
                                 compare_set=lambda name, old, new: new.encode())

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) % 10 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=sleep))
    made.slept = slept
    return made


@pytest.mark.parametrize(("peer", "words"), [
    (dict(node="0"), "is gone at step 3"), (dict(node="1"), None), (dict(node="0", left=True), None),
    (dict(node="1", beat=7), "nothing from it for 6 s"), (dict(node="1", beat=7, left=True), None)],
    ids=["killed", "on another node", "at its end", "frozen", "at its end on another node"])
def test_a_heartbeat_that_ends_is_a_fault_or_none(heartbeat, peer, words):
    """The pid of the next rank is that of no process here, as it may be on another node."""
    (gone := subprocess.Popen(["true"])).wait()
    beats, said = iter(range(100)), []
    heartbeat._read = lambda rank: dict(name="rank 1", pid=gone.pid, progress=0, left=False, beat=next(beats)) | peer
    heartbeat.fail = lambda reason="", **_: said.append(reason)
    with pytest.raises(KeyboardInterrupt):
        heartbeat._run()
    assert (words in said[0]) if words else said == []


def test_a_rank_leaves_with_the_fault_that_another_has_found(heartbeat, monkeypatch, capsys):
    """Where no torchrun ends it, as under srun."""
    heartbeat._read = lambda rank: dict(name="rank 1", pid=os.getpid(), node="0", progress=0, left=False,
                                        beat=len(heartbeat.slept))
    heartbeat.store.check = lambda names: names == ["reason"]
    heartbeat.store.compare_set = lambda *_: b"2 rank 7 is gone"

    def leave(code):
        raise KeyboardInterrupt(code)

    monkeypatch.setattr(ranks.os, "_exit", leave)
    with pytest.raises(KeyboardInterrupt, match="2"):
        heartbeat._run()
    assert capsys.readouterr().err == "error: rank 7 is gone\n"


def test_a_connection_to_the_store_that_breaks_is_made_anew(heartbeat):
    heartbeat.store = broken = dist.PrefixStore("", dist.TCPStore("127.0.0.1", 0, is_master=True,
                                                                  wait_for_workers=False))

    def read(rank):
        if heartbeat.store is broken:
            raise dist.DistNetworkError("Connection reset by peer")
        return dict(name="rank 1", pid=os.getpid(), node="0", progress=0, left=False, beat=len(heartbeat.slept))

    heartbeat._read = read
    with pytest.raises(KeyboardInterrupt):
        heartbeat._run()
    assert heartbeat.answers == 8 and json.loads(heartbeat.store.get("0"))["beat"] == 9, "of nine beats"


def test_that_a_rank_has_left_is_published_last(heartbeat):
    """Were a beat to come after it, the others would report the rank as gone."""
    begun, published = threading.Event(), []

    def slow_once(rank, text):
        if not begun.is_set():
            begun.set()
            time.sleep(0.3)
        published.append(json.loads(text)["left"])

    heartbeat.store.set = slow_once
    beat = threading.Thread(target=heartbeat._publish)
    beat.start()
    begun.wait(10)
    heartbeat._take_leave()
    beat.join(10)
    assert published == [False, True]


@pytest.mark.parametrize("left", [False, True])
def test_a_rank_that_the_others_wait_for_has_the_timeout_to_move(heartbeat, left):
    beats, said, heartbeat.timeout = iter(range(100)), [], 4
    heartbeat._read = lambda rank: dict(name=f"rank {rank}", pid=os.getpid(), node="0", progress=3 - rank,
                                        left=left and rank == 1, beat=next(beats))
    heartbeat.fail = lambda reason="", **_: said.append((reason.split(";")[0], len(heartbeat.slept)))
    with pytest.raises(KeyboardInterrupt):
        heartbeat._run()
    assert said[:1] == ([] if left else [("rank 1 has stopped at step 3: nothing from it for 4 s (--timeout)", 5)])


def test_a_rank_that_leaves_lets_a_save_in_progress_end(heartbeat, monkeypatch):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(ranks.os, "_exit", lambda code: codes.append((code, ended.is_set())))
    heartbeat.saving.acquire()
    threading.Timer(0.3, lambda: (ended.set(), heartbeat.saving.release())).start()
    heartbeat.fail("a reason", 3)
    assert codes == [(3, True)]


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_frozen_rank_of_this_node_is_killed_by_the_one_that_finds_it(heartbeat, monkeypatch, node):
    """It cannot exit by itself, and without torchrun nobody else ends it."""
    monkeypatch.setattr(ranks.os, "_exit", lambda code: None)
    frozen = subprocess.Popen(["sleep", "60"])
    try:
        frozen.send_signal(signal.SIGSTOP)
        heartbeat.fail("a reason", frozen=dict(node=node, pid=frozen.pid))
        if node == "0":
            assert frozen.wait(10) == -signal.SIGKILL
        else:
            assert frozen.poll() is None
    finally:
        frozen.kill()
        frozen.wait()


def test_a_rank_that_torchrun_ends_leaves_time_to_say_which_one_died(heartbeat, monkeypatch):
    codes, published = [], []
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    heartbeat._publish = lambda: published.append(heartbeat.me["left"])
    heartbeat._on_sigterm(signal.SIGTERM, None)
    assert (codes, heartbeat.slept, published) == ([143], [10], [True])
    heartbeat.leaving.acquire()  # it is saying so itself
    heartbeat._on_sigterm(signal.SIGTERM, None)
    assert codes == [143]


@pytest.mark.parametrize(("restarts", "code", "left_with"), [("0", 143, 143), ("3", 143, 0), ("3", 1, 1),
                                                             (None, 143, 143)])
def test_a_rank_that_was_asked_to_stop_says_so_by_its_code_unless_torchrun_would_restart_it(
        heartbeat, monkeypatch, restarts, code, left_with):
    codes = []
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    heartbeat.leave(code)
    assert codes == [left_with] and heartbeat.me["left"]


def test_ranks_that_have_stopped_are_named_with_the_limit_that_they_are_over(heartbeat):
    one, other = dict(name="rank 1"), dict(name="rank 2")
    assert heartbeat._stopped([one], 99).startswith("rank 1 has stopped at step 3: nothing from it for 99 s; ")
    assert heartbeat._stopped([one, other], 100).startswith(
        "rank 1, rank 2 have stopped at step 3: nothing from them for 100 s (--timeout); ")


def test_of_many_ranks_the_odd_one_is_named():
    odd, usual = {"a": 2, "b": 1}, {"a": 1, "b": 1}
    assert differences({0: odd, 1: usual, 2: usual, 3: usual}) == "rank 0 has a 2 instead of 1"
    assert differences({1: usual, 3: usual, 5: odd}) == "rank 5 has a 2 instead of 1"
    assert differences({1: usual, 2: usual, 3: usual}) == ""
    many = {rank: dict.fromkeys("abcde", rank * (rank % 2)) for rank in range(11)}
    text = differences(many)
    assert text.startswith("rank 1 has a 1 instead of 0, b 1 instead of 0, c 1 instead of 0 and 2 more; rank 3 has")
    assert text.endswith("and 1 ranks more") and "rank 7 has" in text and "rank 9" not in text
    fewer = differences({rank: one for rank, one in many.items() if rank != 9})
    assert "rank 7 has" in fewer and fewer.endswith("and 2 more")


def test_a_rank_whose_torchrun_was_killed_before_it_came_leaves(trainer):
    """It would knock at the store that has gone with it for as long as ranks wait for each other."""
    script = trainer.folder / "late.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train_ddp\n"
                      "train_ddp.rendezvous.CONNECT = 2\n"
                      "train_ddp.main(train_ddp.DDPWorld)\n")
    port = str(free_port())
    late = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    run = zygote.run([sys.executable, script, *TINY, *TOY], trainer.folder, late)
    assert run.returncode == 1, run.stderr
    # torch has lines of its own before.
    assert re.match(r"error: rank 0 cannot reach torchrun's store at 127.0.0.1", run.stderr.strip().splitlines()[-1])


def test_a_process_of_another_user_that_has_got_a_ranks_number_is_not_the_rank(monkeypatch):
    def denied(pid, number):
        raise PermissionError

    assert ranks.pid_exists(os.getpid()) and not ranks.pid_exists(2**22 + 1)
    monkeypatch.setattr(os, "kill", denied)
    assert not ranks.pid_exists(os.getpid())
