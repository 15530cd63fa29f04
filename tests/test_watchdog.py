from types import SimpleNamespace

import pytest
from conftest import Clock

import watchdog
from config import parse
from train import Config
from watchdog import Watchdog


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
    assert [dog.heartbeat for dog in dogs] == [str(tmp_path / "beat"), ""]
    assert [dog.stacks.name for dog in dogs] == ["c.stacks.txt", "c.rank3.stacks.txt"]


def test_every_advance_is_a_beat_and_every_hang_is_told_once(monkeypatch):
    clock, dog = Clock(monkeypatch, watchdog), Watchdog.__new__(Watchdog)
    meter = dog.meter = SimpleNamespace(doing=("step", clock.now), lasted=dict(step=[], eval=[]))
    beats, told, dog.heartbeat = [], [], "beat"

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
