"""The trainer's end of W&B: what it leaves on disk, without starting anything."""

import errno
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from conftest import ROOT, eventually

from mini_llm import wandb_client, wandb_follower, wandb_sink
from mini_llm.wandb_client import Publisher, import_wandb, open_run, reports_before, settings_of
from mini_llm.wandb_follower import Delivery, Follower
from mini_llm.wandb_runs import Job, WandbConfig, plan_run, remember_sent, with_environment
from mini_llm.wandb_sink import FAILURE_TIMEOUT, UPLOADS, WandbSink


class Running:
    """A process that is there."""

    returncode = None

    def poll(self):
        return None


@pytest.fixture
def sink(tmp_path):
    def make(rank=0, policy="last"):
        info = dict(rank=rank, local_rank=rank, worker_index=0, num_workers=1)
        cfg = with_environment(WandbConfig(wandb_log_checkpoints=policy, wandb_run_name="n" * 128), {})
        made = WandbSink(cfg, plan_run("new", "global", "b", info), lambda suffix: tmp_path / f"c{suffix}",
                         f".rank{rank}" if rank else "", dict(wandb_run_id="b", seed=1) | info, ("", 0), None, "")
        made.process = Running()
        return made

    (tmp_path / "c.pt").write_bytes(b"newest")
    return make


def test_a_process_that_does_not_read_holds_nothing_up(sink, tmp_path, monkeypatch):
    (tmp_path / "idle.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(wandb_sink, "FOLLOWER", [tmp_path / "idle.py"])
    made, began = sink(), time.monotonic()
    made.job.files["diff.patch"] = "+ a line\n" * 10**5  # more than a pipe holds
    made.job.finish_timeout = 0.1
    made.process = made._start()
    made.close(0)
    assert time.monotonic() - began < 20 and made.given_up and made.process.poll() is not None


def test_what_fails_because_the_process_ends_itself_is_not_told(sink, tmp_path, monkeypatch):
    """The SDK says "Problem finishing run" when its wandb-core is ended at the timeout, which has been told by then."""
    (tmp_path / "late.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mini_llm import wandb_follower\n"
        "def run(self):\n"
        "    for self.overdue in (False, True):\n"
        "        print('wandb: ERROR overdue', self.overdue, file=sys.stderr)\n"
        "wandb_follower.Follower.run = run\n"
        "wandb_follower.main()\n")
    monkeypatch.setattr(wandb_sink, "FOLLOWER", [tmp_path / "late.py"])
    made, said = sink(), []
    monkeypatch.setattr(made, "_say", lambda level, text: said.append(text))
    made._start()
    made.listener.join(30)
    assert said == ["overdue False"]


@pytest.fixture
def starting(sink, tmp_path, monkeypatch):
    """`starting(code)`: a sink whose process, this Python code, is still to be started."""
    def starting(code):
        (tmp_path / "follower.py").write_text(code)
        monkeypatch.setattr(wandb_sink, "FOLLOWER", [tmp_path / "follower.py"])
        monkeypatch.chdir(tmp_path)
        made = sink()
        made.process = None
        return made

    return starting


def test_a_process_that_cannot_be_started_costs_one_warning(starting, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise BlockingIOError("too many processes")

    made = starting("")
    monkeypatch.setattr(wandb_sink.subprocess, "Popen", refuse)
    for step in (1, 2):
        made.log(step, {"train/loss": 3.0})
        assert made.checkpoint_to_upload(tmp_path / "c.pt", step, False) is None
    made.close(0)
    (told,) = caplog.messages
    assert "too many processes" in told and made.job.sync in told


def test_one_process_is_started_at_the_first_report_and_how_it_ends_is_told(starting, tmp_path, caplog):
    made = starting("open('started', 'a').write('x'); raise SystemExit(3)")
    made.log(0, {"event": "config"})
    assert made.process is None
    for step in (1, 2):
        made.log(step, {"train/loss": 3.0})
        made.process.wait()
    assert made.checkpoint_to_upload(tmp_path / "c.pt", 2, False) is None, "nobody would upload it"
    made.listener.join()
    made.close(0)
    (told,) = caplog.messages
    assert "ended with code 3" in told and made.job.sync in told and (tmp_path / "started").read_text() == "x"


def test_what_a_report_costs_is_measured_as_the_tracker_makes_its_sinks(tmp_path, monkeypatch):
    (tmp_path / "follower.py").write_text("input()")
    monkeypatch.setattr(wandb_sink, "FOLLOWER", [tmp_path / "follower.py"])
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from wandb_cost import report_cost

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    costs = report_cost(tmp_path)
    assert len(costs) == 2 and all(0 < median <= most for _, median, most in costs.values())


@pytest.mark.parametrize("run_id, kept", [("", "None"), ("r", "s")])
def test_a_run_is_in_a_sweep_only_if_its_agent_has_named_the_run(starting, tmp_path, monkeypatch, run_id, kept):
    """For a WANDB_SWEEP_ID alone the SDK ignored the project: the run was in `uncategorized`."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", run_id)
    made = starting("import os; open('told', 'w').write(str(os.environ.get('WANDB_SWEEP_ID')))")
    made.log(1, {"train/loss": 3.0})
    made.close(0)
    assert (tmp_path / "told").read_text() == kept and made.job.sweep == (run_id and "s")


@pytest.mark.parametrize("code", [0, 143])
def test_a_checkpoint_before_any_report_starts_the_process_and_the_end_leaves_none(starting, tmp_path, code):
    made = starting("import sys; open('started', 'a').write('x'); open('told', 'w').write(sys.stdin.read())")
    for step in (1, 2):
        assert made.checkpoint_to_upload(tmp_path / "c.pt", step, False)
    made.close(code)
    assert (tmp_path / "started").read_text() == "x" and made.process.returncode == 0 and links(tmp_path) == []
    whole = made.job.finish_timeout
    assert json.loads((tmp_path / "told").read_text()) == [code, min(whole, FAILURE_TIMEOUT) if code else whole]


def test_what_another_rank_has_to_say_of_wandb_is_shown(sink, caplog):
    caplog.set_level(logging.CRITICAL + 1, "mini_llm")  # as tracking.setup_logging leaves it there
    caplog.handler.setLevel(0)
    sink(rank=1)._say(logging.INFO, "finished")
    assert caplog.messages == ["wandb rank-1: finished"]


def test_one_rank_of_a_machine_records_how_busy_it_is(sink):
    assert ["x_disable_stats" in settings_of(sink(rank=rank).job) for rank in (0, 1)] == [False, True]


def test_what_wandb_takes_long_for_is_left_out_unless_asked_for(starting, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_X_DISABLE_VIEWER", "false")
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    made = starting("import json, os; json.dump(dict(os.environ), open('environment', 'w'))")
    made.log(1, {"train/loss": 3.0})
    made.process.wait()
    made.close(0)
    found = json.loads((tmp_path / "environment").read_text())
    assert (found["WANDB_ERROR_REPORTING"], found["WANDB_X_DISABLE_VIEWER"]) == ("false", "false")
    assert found["WANDB_RUN_ID"] == made.job.init["id"]


def test_an_event_that_cannot_be_logged_costs_one_warning_and_no_row():
    class Run:
        rows, offline = [], False

        def log(self, row):
            if "samples" in row:
                raise OSError("no room")
            self.rows.append(row["step"])

    said = []
    publisher = Publisher(Run(), Job({}, {}, sync="sync c.pt"), lambda level, text: said.append(text))
    samples = [dict(step=step, time=2.0, event="sample", text="x") for step in (1, 2)]
    records = [dict(step=1, time=1.0, loss=3.0), *samples, dict(step=3, time=3.0, loss=2.0)]
    publisher.publish(map(json.dumps, records))
    assert Run.rows == [1, 3] and said == ["sample of step 1 not logged: no room; send it later: sync c.pt"]


def test_a_run_that_takes_long_to_open_is_told_once_and_one_that_does_not_never(monkeypatch):
    said, after = [], []

    class Timer(threading.Timer):
        def __init__(self, seconds, *args):
            after.append(seconds)
            super().__init__(0.01, *args)

    monkeypatch.setattr(wandb_follower.threading, "Timer", Timer)
    follower = Follower(Job({}, {}, init_timeout=5, sync="sync c.pt"), lambda level, text: said.append(text))
    with follower._patience():
        eventually(lambda: said)
    monkeypatch.setattr(Timer, "start", lambda self: None)
    with follower._patience():
        pass
    assert after[0] > 5, "W&B's own error comes first"
    assert len(said) == 1 and f"not up after {after[0]} s" in said[0] and "sync c.pt" in said[0]


def test_a_configuration_that_cannot_be_logged_costs_a_warning(tmp_path, monkeypatch):
    def describe(*_):
        raise OSError("no room")

    said, run = [], SimpleNamespace(offline=True, resumed=False, id="one", name="", dir="f/files",
                                 define_metric=lambda *_, **__: None)
    wandb = SimpleNamespace(Settings=dict, init=lambda **_: run)
    monkeypatch.setattr(wandb_client, "import_wandb", lambda: wandb)
    monkeypatch.setattr(wandb_client, "describe", describe)
    job = Job(dict(dir=str(tmp_path)), {}, mode="offline")
    assert open_run(job, lambda level, text: said.append((level, text))) is run
    assert said == [("INFO", "run one offline in f"), ("WARNING", "configuration or files not logged: no room")]


def test_what_a_killed_wandb_core_leaves_behind_lies_in_the_folder_that_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=None))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(wandb_client, "scratch", lambda: SimpleNamespace(name="removed"))
    for name, value in dict(HOME=str(tmp_path / "none"), WANDB_DATA_DIR="", WANDB_CACHE_DIR="mine").items():
        monkeypatch.setenv(name, value)
    del os.environ["WANDB_DATA_DIR"]
    import_wandb()
    assert tempfile.gettempdir() == os.environ["WANDB_DATA_DIR"] == "removed", "which would be in the home folder"
    assert os.environ["WANDB_CACHE_DIR"] == "mine"
    assert os.environ["TMPDIR"] == ("removed" if sys.platform == "linux" else str(tmp_path))


def test_without_a_home_the_sdk_has_one_that_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=None))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(wandb_client, "scratch", lambda: SimpleNamespace(name=str(tmp_path)))
    monkeypatch.setenv("HOME", "~")  # what expanduser gives where neither HOME nor the user's number says more
    import_wandb()
    assert os.environ["HOME"] == str(tmp_path)


def links(folder):
    return sorted(path.name for path in folder.glob("*upload-*"))


def test_the_table_of_samples_has_the_last_hundred_in_order(monkeypatch):
    """It is sent whole with each sample."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda columns, data: data))
    tables = []
    run = SimpleNamespace(offline=False, log=lambda row: tables.append(row["samples"]))
    publisher = Publisher(run, Job({}, {}), None, [dict(step=step, text="before") for step in range(60)])
    publisher.publish(json.dumps(dict(step=step, time=1.0, event="sample", text="now")) for step in range(60, 130))
    assert [step for step, _ in tables[0]] == list(range(61)) and tables[0][-1] == [60, "now"]
    assert [step for step, _ in tables[-1]] == list(range(30, 130))


def test_what_json_has_no_number_for_is_sent_as_the_number_it_was():
    rows = []
    publisher = Publisher(SimpleNamespace(offline=False, log=rows.append), Job({}, {}), None)
    publisher.publish([json.dumps({"step": 1, "time": 2.0, "val/ppl": None, "val/loss": 800.0, "train/loss": None})])
    assert math.isnan(rows[0].pop("train/loss"))
    assert rows == [{"step": 1, "_timestamp": 2.0, "val/ppl": math.inf, "val/loss": 800.0}]


@pytest.mark.parametrize("policy", ["last", "all"])
def test_checkpoints_that_newer_ones_have_overtaken_are_not_uploaded_unless_all_are(tmp_path, policy):
    publisher = Publisher(SimpleNamespace(offline=False), Job({}, {}, policy=policy), None)
    publisher.uploading = SimpleNamespace(is_alive=lambda: True)  # the one before takes long
    files = [tmp_path / f"{step}.pt" for step in (1, 2, 3)]
    for step, file in enumerate(files, 1):
        file.touch()
        publisher.publish([json.dumps(dict(step=step, time=1.0, event="checkpoint", path=str(file), best=False))])
    left = files if policy == "all" else files[-1:]
    assert [record["path"] for record in publisher.waiting] == list(map(str, left))
    assert [file for file in files if file.exists()] == left


def test_at_the_end_all_that_wait_are_uploaded_one_after_another(monkeypatch):
    publisher, uploaded = Publisher(SimpleNamespace(offline=False), Job({}, {}, policy="all"), None), []
    monkeypatch.setattr(publisher, "_upload", lambda step, **_: (time.sleep(0.3 / step), uploaded.append(step)))
    publisher.publish(json.dumps(dict(step=step, time=1.0, event="checkpoint", path="", best=False))
                      for step in (1, 2, 3))
    assert uploaded == [] and publisher.is_uploading(), "the first is under way, in the background"
    publisher.upload_waiting(last=True)
    assert uploaded == [1, 2, 3]


def test_a_checkpoint_that_cannot_be_read_or_removed_does_not_keep_a_run_from_its_end(monkeypatch):
    def fail(path, **_):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    said = []
    publisher = Publisher(SimpleNamespace(offline=False), Job({}, {}), lambda level, text: said.append(text))
    publisher.waiting = [dict(step=3, path="c.upload-00000003.pt", best=False)]
    for name in "exists", "unlink":
        monkeypatch.setattr(wandb_client.Path, name, fail)
    publisher.upload_waiting(last=True)
    (told,) = said
    assert re.fullmatch(r"checkpoint of step 3 not uploaded: .* Stale file handle: 'c.upload-00000003.pt'; .*", told)


@pytest.mark.parametrize("offline", [False, True])
def test_a_link_beside_a_tokenizer_is_not_uploaded(tmp_path, monkeypatch, offline):
    names = []
    artifact = SimpleNamespace(add_file=lambda *_, name, **__: names.append(name), wait=lambda: None)
    monkeypatch.setattr(import_wandb(), "Artifact", lambda *_, **__: artifact)
    run = SimpleNamespace(offline=offline, id="one", dir=str(tmp_path / "run" / "files"),
                          log_artifact=lambda *_, **__: artifact)
    for folder in "run/files", "c.tokenizer":
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "c.tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "c.tokenizer" / "notes.json").symlink_to(tmp_path / "secret.json")
    (path := tmp_path / "c.pt").touch()
    publisher = Publisher(run, Job({}, dict(seed=1), tokenizer=str(tmp_path / "c.tokenizer")), pytest.fail)
    publisher._upload(1, path, False)
    assert names == ["model.tokenizer/tokenizer.json", "model.pt"]
    assert not list(tmp_path.glob("run/**/notes.json"))


def test_that_checkpoints_are_not_uploaded_is_told_once_until_one_is(tmp_path, monkeypatch):
    """While W&B refuses them, a long run saves many."""
    artifact = SimpleNamespace(add_file=lambda *_, **__: None, wait=lambda: None)
    monkeypatch.setattr(import_wandb(), "Artifact", lambda *_, **__: artifact)
    outcomes = iter(["quota", "quota", None, "quota"])

    def log_artifact(*_, **__):
        if outcome := next(outcomes):
            raise RuntimeError(outcome)
        return artifact

    said = []
    run = SimpleNamespace(offline=False, id="one", log_artifact=log_artifact)
    publisher = Publisher(run, Job({}, dict(seed=1)), lambda level, text: said.append(text))
    for step in range(4):
        (path := tmp_path / f"{step}.pt").touch()
        publisher._upload(step, path, False)
    assert [text.partition(" not")[0] for text in said] == ["checkpoint of step 0", "checkpoint of step 3"]


def test_what_a_shared_run_lacks_is_not_guessed(tmp_path):
    """The last of its rows may be another rank's."""
    (rows := tmp_path / "m.jsonl").write_text('{"step": 10, "time": 9.0, "x": 1}\n')
    run = SimpleNamespace(offline=False, summary={"_timestamp": 5.0})
    for shared, found in (True, 0), (False, 1):
        job = Job({}, {}, shared=shared, rows=(str(rows), rows.stat().st_size))
        assert len(list(Follower(job, lambda level, text: None)._unsent(run))) == found


def test_that_the_server_takes_no_more_is_told_once(tmp_path):
    (log := tmp_path / "debug-internal.log").touch()
    said = []
    delivery = Delivery(SimpleNamespace(settings=SimpleNamespace(log_internal=log)), Job({}, {}, sync="sync c.pt"),
                        lambda level, text: said.append(text))
    for _ in range(2):
        with open(log, "a") as file:
            file.write('{"msg": "filestream: fatal error: filestream: failed to upload: 403 url=x"}\n')
        delivery.check()
    assert len(said) == 1 and "(403)" in said[0] and "sync c.pt" in said[0]


def test_a_rank_leaves_the_checkpoints_alone_that_another_uploads(sink, tmp_path):
    main = sink()
    assert main.checkpoint_to_upload(tmp_path / "c.pt", 10, False) == str(tmp_path / "c.upload-00000010.pt")
    other = sink(rank=1)
    other._remove_links()
    assert links(tmp_path) == ["c.upload-00000010.pt"]


def test_the_next_life_of_a_run_forgets_what_the_last_could_not_upload(sink, tmp_path):
    sink().checkpoint_to_upload(tmp_path / "c.pt", 10, False)
    sink()
    assert links(tmp_path) == []


@pytest.mark.parametrize("policy", ["best", "last", "all"])
def test_waiting_uploads_take_a_bounded_space_and_the_newest_is_among_them(sink, tmp_path, policy):
    """Each checkpoint replaces the one before, as best ones do that no --save-steps is between."""
    main, name = sink(policy=policy), tmp_path / ("c.pt" if policy == "last" else "c.best.pt")
    for step in range(1, 10):
        (tmp_path / "new").write_bytes(b"another")
        os.replace(tmp_path / "new", name)
        main.checkpoint_to_upload(name, step, policy != "last")
    assert links(tmp_path)[0].startswith("c.upload-00000001."), "the one that may be under way"
    assert links(tmp_path)[-1].startswith("c.upload-00000009.")
    replaced = [link for link in links(tmp_path) if not (tmp_path / link).samefile(name)]
    on, off = (WandbConfig(use_wandb=use_wandb, wandb_log_checkpoints=policy).uploads for use_wandb in (True, False))
    assert (len(replaced), 0) == (on, off), "what the disk has to have room for"
    assert WandbConfig(use_wandb=True).uploads == 0


def test_the_best_checkpoint_is_not_the_one_that_is_skipped(sink, tmp_path):
    main = sink(policy="all")
    (tmp_path / "c.best.pt").write_bytes(b"best")
    for step in range(1, 10):
        main.checkpoint_to_upload(tmp_path / "c.pt", step, best=step == 2)
    assert "c.upload-00000002.best.pt" in links(tmp_path) and len(links(tmp_path)) == UPLOADS["all"]
    assert links(tmp_path)[-1] == "c.upload-00000009.pt"


@pytest.mark.parametrize("policy, best, name, wanted", [
    ("none", True, ".pt", False), ("last", False, ".pt", True), ("last", True, ".best.pt", False),
    ("best", False, ".pt", False), ("best", True, ".best.pt", True), ("all", False, ".pt", True)])
def test_the_policy_says_which_checkpoints_are_uploaded(sink, tmp_path, policy, best, name, wanted):
    (tmp_path / "c.best.pt").write_bytes(b"best")
    assert bool(sink(policy=policy).checkpoint_to_upload(tmp_path / f"c{name}", 3, best)) == wanted


def test_a_checkpoint_that_cannot_be_linked_or_copied_costs_a_warning(sink, tmp_path):
    assert sink().checkpoint_to_upload(tmp_path / "missing.pt", 3, False) is None


def test_only_what_the_server_has_had_need_not_be_sent_again(sink):
    assert sink().job.sent == sink().job.sent == []
    remember_sent(sink().job)
    assert sink().job.sent == sink().job.sent == ["name", "group"]


def test_which_run_it_is_is_kept_before_anything_starts(sink, tmp_path):
    sink(rank=1)
    facts = json.loads((tmp_path / "c.rank1.wandb.json").read_text())
    assert facts["base"] == "b" and facts["init"]["id"] == "b-rank-1" and facts["init"]["group"] == "b"
    assert facts["init"]["name"] == "n" * 121 + "-rank-1", "no longer than the server takes"


def test_what_the_server_lacks_is_what_is_later_or_of_a_later_step(tmp_path):
    """After a rollback steps come again: 10 and 20, rolled back to 10, 20 again. The last is of this start."""
    rows = [dict(step=step, time=at, loss=1.0) for step, at in ((10, 1.5), (20, 2.5), (20, 3.5), (30, 4.5))]
    lines = [json.dumps(row) + "\n" for row in rows]
    lines.insert(3, json.dumps(dict(step=20, time=3.6, event="sample", text="a")) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(lines))
    before = sum(map(len, lines[:-1]))
    assert list(reports_before(tmp_path / "m.jsonl", before, after=2.504, step=20)) == lines[2:3]
    assert list(reports_before(tmp_path / "m.jsonl", before, after=0, step=20)) == lines[:3]
    later = list(reports_before(tmp_path / "m.jsonl", before, after=1e9, step=10))
    assert later == lines[1:3], "the clock has been set back"


def test_rows_that_the_server_lacks_are_not_in_memory_together(tmp_path):
    histogram = json.dumps([0] * 30_000)  # 90 kB
    (tmp_path / "m.jsonl").write_text("".join(
        f'{{"step": {step}, "time": {step}.5, "gradients/w": {histogram}}}\n' for step in range(1, 101)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in reports_before(tmp_path / "m.jsonl", 10**9, after=0, step=0)) == 100
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
