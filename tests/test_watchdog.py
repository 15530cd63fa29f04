import json
import os
import re
import threading
from types import SimpleNamespace

import pytest
from conftest import Clock

from mini_llm import watchdog
from mini_llm.checkpoint import State
from mini_llm.config import parse
from mini_llm.watchdog import Watchdog
from train import Config


@pytest.mark.parametrize("lasted, limit", [
    ([], 600), ([0.1] * 19, 600), ([0.1] * 20, 30), ([5.0] * 20, 50), ([5.0] * 19 + [40.0], 80)])
def test_what_counts_as_a_hang_is_far_beyond_what_has_been(lasted, limit):
    """Steps with a report, for one, take longer than others."""
    dog = Watchdog.__new__(Watchdog)
    dog.meter = SimpleNamespace(lasted={"step": lasted, "eval": [1e9] * 99})
    assert dog._limit("step") == limit


def test_each_rank_has_its_own_stacks_and_the_main_one_the_heartbeat(tmp_path):
    cfg = parse(Config, ["--checkpoint-path", str(tmp_path / "c.pt"), "--heartbeat-file", str(tmp_path / "beat")])
    dogs = [Watchdog(None, None, cfg, rank) for rank in (0, 3)]
    assert [dog.heartbeat_file for dog in dogs] == [str(tmp_path / "beat"), ""]
    assert [dog.stacks.name for dog in dogs] == ["c.stacks.txt", "c.rank3.stacks.txt"]
    assert all(dog.thread.daemon for dog in dogs), "a disk that hangs does not keep the process"


def test_a_run_that_ends_waits_a_moment_at_most_for_a_disk_that_hangs():
    dog, waited = Watchdog.__new__(Watchdog), []
    dog.done, dog.thread = threading.Event(), SimpleNamespace(join=lambda seconds=None: waited.append(seconds))
    dog.__exit__()
    assert waited == [2.0] and dog.done.is_set()


def test_a_heartbeat_begins_at_once_and_may_stop_but_end_no_run(tmp_path):
    dog = Watchdog.__new__(Watchdog)
    dog.heartbeat_file, dog.state, dog.thread = tmp_path / "beat", State(step=7), SimpleNamespace(start=lambda: None)
    dog.heartbeat_file.write_text("of a run before")
    dog.__enter__()
    beat = json.loads(dog.heartbeat_file.read_text())
    assert (beat["step"], beat["doing"], beat["pid"]) == (7, "start", os.getpid())
    dog.heartbeat_file = tmp_path / "gone" / "beat"
    dog._beat("step")
    assert not dog.heartbeat_file.exists()


def test_stacks_are_below_the_line_that_says_whose_they_are_and_above_those_of_the_next_hang(tmp_path):
    dog = Watchdog.__new__(Watchdog)
    dog.stacks, dog.state = tmp_path / "gone" / "c.stacks.txt", State(step=7)
    for _ in range(2):
        dog._dump("eval", 601.4)
    said = re.findall(r"eval after step 7 has taken 601 s$|^Current thread|in _dump$", dog.stacks.read_text(), re.M)
    assert said == ["eval after step 7 has taken 601 s", "Current thread", "in _dump"] * 2


def test_every_advance_is_a_beat_and_every_hang_is_told_once(monkeypatch):
    clock, dog = Clock(monkeypatch, watchdog), Watchdog.__new__(Watchdog)
    meter = dog.meter = SimpleNamespace(doing=("step", clock.now), lasted=dict(step=[], eval=[]))
    beats, told, dog.heartbeat_file = [], [], "beat"

    def dump(what, seconds):
        told.append((what, seconds))
        raise OSError("the disk hangs, too")

    def wait(seconds):  # what happens meanwhile, look by look
        assert seconds == 1.0
        happens = next(moments, None)
        if isinstance(happens, str):
            meter.doing = happens, clock.now
        clock.sleep(happens if isinstance(happens, int) else 1)
        return happens is None

    dog._beat, dog._dump, dog.done = beats.append, dump, SimpleNamespace(wait=wait)
    moments = iter([1, 597, 2, 300, 1, "eval", "step", 600])
    dog._watch()
    assert beats == ["step", "eval", "step"] and told == [("step", 900), ("step", 601)]
