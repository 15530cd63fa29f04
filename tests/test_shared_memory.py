"""Ranks of one host exchange tensors through memory that they share: the bits that gloo gives, and nothing is left."""

import mmap
import os
import random
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, eventually
from test_train import same

from mini_llm import shared_memory
from mini_llm.ranks import RankEnded
from mini_llm.shared_memory import LINE, SharedMemory

linux_x86 = pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.uname().machine != "x86_64",
                               reason="gloo is used elsewhere")


@pytest.fixture
def together(monkeypatch):
    """`together(size, work)` calls `work(memory, rank)` in a thread for each rank → what they return, in rank order."""
    monkeypatch.setattr(shared_memory, "BUFFER", 1024)

    def run(size, work):
        memory, results = mmap.mmap(-1, size * (LINE + 2 * shared_memory.BUFFER)), [None] * size

        def rank(number):
            results[number] = work(SharedMemory(memory, number, size), number)

        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
        return results

    return run


@pytest.mark.parametrize("size", [2, 3, 5])
def test_exchanges_of_every_kind_in_turn(together, size):
    """More than a place holds, and less; at any time some ranks are ahead of others."""
    lengths = [1, 255, 256, 257, 1500, 3, 700]

    def tensor(rank, turn):
        return torch.randn(lengths[turn % 7], generator=torch.Generator().manual_seed(100 * turn + rank))

    def work(memory, rank):
        found, pause = [], random.Random(rank)
        for turn in range(70):
            time.sleep(pause.choice([0, 0, 0, 0.003]))
            mine = tensor(rank, turn)
            memory.average(mine)
            found += [mine, memory.gather([rank, turn / 3])]
        return found

    for found in together(size, work):
        for turn in range(70):
            mean = sum(tensor(rank, turn) * (1 / size) for rank in range(size))
            assert torch.equal(found[2 * turn], mean), "added up in rank order, on every rank"
            assert found[2 * turn + 1] == [[rank, turn / 3] for rank in range(size)]


def test_a_tensor_keeps_its_dtype(together):
    def work(memory, rank):
        mine = torch.full((600,), 1.0 + rank, dtype=torch.bfloat16)
        memory.average(mine)
        return mine

    for found in together(2, work):
        assert found.dtype == torch.bfloat16 and found.unique().tolist() == [1.5]


def test_a_rank_waits_without_using_its_core(together):
    def work(memory, rank):
        if rank:
            time.sleep(1)
        before = time.thread_time()
        memory.gather([0])
        return time.thread_time() - before

    assert together(2, work)[0] < 0.2


def test_a_rank_that_has_ended_is_waited_for_no_longer_but_one_that_is_late(together, monkeypatch):
    monkeypatch.setattr(shared_memory, "PATIENCE", 0.01)
    ended = subprocess.Popen(["true"])
    ended.wait()

    def work(memory, rank):
        if rank == 2:
            eventually(lambda: memory.counters[1])
            memory.pids[1] = ended.pid  # as if it had ended then
            time.sleep(0.3)
        everyone = memory.gather([rank])
        if rank != 1:
            with pytest.raises(RankEnded, match="rank 1 has ended"):
                memory.gather([rank])
        return everyone

    assert together(3, work) == 3 * [[[0], [1], [2]]]


def a_world(**changes):
    """Rank 0's view of two ranks on a CPU, of which the other does as it does."""
    return SimpleNamespace(**dict(device=torch.device("cpu"), size=2, local_size=2, rank=0, is_main=True,
                                  comm_hook=None, heartbeat=SimpleNamespace(counters=[]),
                                  from_main=lambda make: make(), max=lambda values: values) | changes)


@pytest.fixture
def made(monkeypatch):
    """The paths of temporary files that are made."""
    paths, make = [], tempfile.mkstemp

    def noted(**where):
        file, path = make(**where)
        paths.append(path)
        return file, path

    monkeypatch.setattr(tempfile, "mkstemp", noted)
    return paths


@linux_x86
def test_its_file_is_gone_once_all_have_it(made):
    memory = shared_memory.share(a_world())
    assert isinstance(memory, SharedMemory) and len(made) == 1 and not os.path.exists(made[0])


@linux_x86
@pytest.mark.parametrize("changes", [dict(local_size=1), dict(size=1, local_size=1), dict(size=9, local_size=9),
                                     dict(device=torch.device("cuda")), dict(comm_hook=print),
                                     dict(max=lambda values: [1]),
                                     dict(from_main=lambda make: "/dev/shm/of-another-host", rank=1, is_main=False)])
def test_several_hosts_many_ranks_gpus_a_hook_and_a_rank_that_cannot_open_it_have_gloo(made, changes):
    assert shared_memory.share(a_world(**changes)) is None and not any(map(os.path.exists, made))


@linux_x86
def test_without_room_there_is_gloo(made, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert shared_memory.share(a_world()) is None and len(made) == 1 and not os.path.exists(made[0])


OVER_GLOO = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from mini_llm import shared_memory
from train import main
from train_ddp import DDPWorld
shared_memory.MAX_RANKS = 0
main(DDPWorld)
"""


@linux_x86
def test_two_ranks_train_to_the_bits_that_gloo_gives(trainer):
    flags = ["--grad-accum-steps", 2, "--num-steps", 12, "--eval-steps", 6, "--log-steps", 3]
    shared = trainer(*flags, ranks=2)
    script = trainer.folder / "over_gloo.py"
    script.write_text(OVER_GLOO)
    over_gloo = trainer(*flags, ranks=2, checkpoint="gloo.pt", script=script)
    assert "2 ranks, which exchange gradients through shared memory" in shared.out
    assert "through shared memory" not in over_gloo.out
    assert same(shared, over_gloo)
