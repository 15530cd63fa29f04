"""`wandb_tools.py` against a server on loopback: check, sync, download."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import zygote
from conftest import QUICK, REMOTE, ROOT, command, environment, eventually, processes_with
from wandb_server import ServerSweep, WandbServer

import report
import wandb_tools
from mini_llm.errors import UserError
from mini_llm.files import read_records
from mini_llm.processes import only_one
from mini_llm.wandb_runs import ENVIRONMENT, WandbConfig, run_path
from wandb_tools import (
    add_report,
    fetch,
    forget_environment,
    history,
    lacking,
    memories,
    metrics_jsonl,
    offline_folders,
    renamed,
)

TOOLS = [sys.executable, str(ROOT / "wandb_tools.py")]
FAILING = {  # what fails, and how → the step that says so, and what to do
    "no key": ("login", "wandb login, or WANDB_API_KEY"),
    "all 401": ("login", "wandb login, or WANDB_API_KEY"),
    "all gone": ("login", "check the network and WANDB_BASE_URL"),
    "upsert 403": ("write", "check --wandb-entity and --wandb-project"),
    "filestream 404": ("read", "check the network and WANDB_BASE_URL"),
}


def surroundings(server, home, **extra):
    """The environment of a person who has no W&B files at home and is told all that W&B says."""
    own = dict(HOME=str(home), WANDB_CACHE_DIR=str(home / "cache"))
    env = environment(**server.environment | QUICK | own | extra)
    return {name: value for name, value in env.items() if value and name != "WANDB_SILENT"}


@pytest.fixture(scope="module", autouse=True)
def failing_checks(tmp_path_factory):
    """Started at once, and before anything else: where nobody answers, it takes its half minute to say so."""
    started = {}
    for case in FAILING:
        folder, server = tmp_path_factory.mktemp("check"), WandbServer()
        endpoint, how = case.split()
        if how == "gone":
            server.stop()
        elif how.isdecimal():
            server.fail(endpoint, int(how))
        env = surroundings(server, folder, **({"WANDB_API_KEY": ""} if case == "no key" else {}))
        started[case] = server, subprocess.Popen([*TOOLS, "check"], cwd=folder, env=env, text=True,
                                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                                 stderr=subprocess.PIPE)
    yield {case: process for case, (_, process) in started.items()}
    for server, process in started.values():
        process.kill()
        process.communicate()
        server.stop()


@pytest.fixture
def tool(server, tmp_path):
    """`tool(*words)` → exit code, stdout, stderr of wandb_tools.py."""
    def tool(*words, **env):
        done = zygote.run([*TOOLS, *words], tmp_path, surroundings(server, tmp_path, **env), timeout=120)
        return done.returncode, done.stdout, done.stderr

    return tool


def reports(path):
    """The reports of a metrics.jsonl by step, of one that may have been killed."""
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row for row in rows if "train/tokens" in row}


def assert_same_rows(run, rows):
    """The server's rows of a run are those of its metrics.jsonl, each once."""
    stored = [row for row in run.history if "train/tokens" in row]
    assert [row["step"] for row in stored] == list(rows) and rows
    for row in stored:
        mine = {name: value for name, value in row.items() if not name.startswith("_")}
        assert mine == {name: value for name, value in rows[row["step"]].items() if name != "time"}
        assert row["_timestamp"] == pytest.approx(rows[row["step"]]["time"])


def only_run(server):
    (run,) = server.runs.values()
    return run


def test_check_goes_through_every_step_and_leaves_nothing(server, tool, tmp_path):
    code, out, err = tool("check", WANDB_RUN_ID="mine", WANDB_NAME="mine", WANDB_PROJECT="ours")
    assert (code, err) == (0, "") and "/ours, run" in out and "mine" not in out, out
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [
        [step, "ok"] for step in ("package", "login", "server", "write", "read")]
    assert "deleted" in out and not server.runs and not (tmp_path / "wandb").exists()


def test_a_key_that_may_not_delete_runs_is_told_which_one_stays(monkeypatch):
    def run(target):
        raise RuntimeError(f"403 Forbidden: {target}")

    api = SimpleNamespace(api_key="key", settings=dict(base_url="url"), viewer=SimpleNamespace(username="me"),
                          default_entity="mine", run=run)
    opened = SimpleNamespace(entity="mine", project="p", id="one", log=lambda row: None, finish=lambda: None)
    monkeypatch.setattr(wandb_tools, "import_wandb", lambda: SimpleNamespace(__version__="1", Api=lambda timeout: api))
    monkeypatch.setattr(wandb_tools, "open_run", lambda *_, **__: opened)
    monkeypatch.setattr(wandb_tools, "rows_of", lambda *_: [{"check": 1.0}])
    *_, said = wandb_tools.checks(WandbConfig(), "folder")
    assert said == "the row read back; the run stays there: 403 Forbidden: mine/p/one"


def test_of_the_environment_only_what_describes_no_run_is_kept(monkeypatch):
    for name in {"WANDB_SWEEP_ID", "WANDB_FORK_FROM", "WANDB_RESUME_FROM", *ENVIRONMENT.values()}:
        monkeypatch.setenv(name, "x")
    forget_environment()
    assert {name for name in os.environ if name.startswith("WANDB_") and os.environ[name] == "x"} == {
        "WANDB_MODE", "WANDB_DIR"}


def test_check_without_the_package_says_how_to_get_it(server, tmp_path):
    (tmp_path / "wandb").mkdir()  # a run folder of that name is importable, too
    (tmp_path / "without.py").write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'wandb': raise ModuleNotFoundError('No module named wandb', name='wandb')\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from wandb_tools import main; main()\n")
    done = subprocess.run([sys.executable, "without.py", ROOT, "check"], cwd=tmp_path, capture_output=True, text=True,
                          env=surroundings(server, tmp_path), timeout=200)
    step, advice = done.stdout.splitlines()
    assert done.returncode == 1 and step.startswith("package  FAIL") and advice.strip() == "pip install wandb"


def test_sync_completes_a_run_whose_uploads_had_failed(server, trainer, tool):
    server.fail("filestream", 404)
    run = trainer("--num-steps", 20, "--log-steps", 5, "--sample-steps", 10, "--use-wandb",
                  env=server.environment | QUICK | dict(WANDB_SILENT="false"))
    assert run.code == 0 and "wandb_tools.py sync c.pt" in run.out and only_run(server).history == []
    server.heal()
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, "") and "7 rows sent" in out
    stored, rows = only_run(server), reports(trainer.folder / "c.metrics.jsonl")
    assert_same_rows(stored, rows)
    assert [row["step"] for row in stored.history if "samples" in row] == [10, 20]
    assert (stored.state, stored.exit_code) == ("finished", 0) and stored.config["d_model"] == 32
    stored.reported, stored.exit_code = "crashed", None  # all rows have arrived, the end of the run has not
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, "") and "has every row, and is ended now" in out
    assert (stored.state, stored.exit_code) == ("finished", 0) and len(stored.history) == 7
    known = len(server.requests)
    code, out, err = tool("sync", "c.best.pt")
    assert (code, err) == (0, "") and "has every row" in out
    assert not {"filestream", "upsert"} & {kind for _, kind, _ in server.requests[known:]}


def test_sync_keeps_the_name_and_notes_that_a_run_was_given_on_its_page(server, tool, tmp_path):
    rows = [{"loss": 3.0}, {"event": "sample", "text": "a"}, {"loss": 2.0}, {"event": "sample", "text": "b"}]
    leave(tmp_path, "c", "one", rows[:2])
    assert tool("sync", "c.pt")[0] == 0
    run = only_run(server)
    run.display_name, run.tags, run.notes = "renamed", ["seen"], "good"
    leave(tmp_path, "c", "one", rows)
    assert tool("sync", "c.pt")[0] == 0 and [row["loss"] for row in run.history if "loss" in row] == [3, 2]
    assert (run.display_name, run.tags, run.notes) == ("renamed", ["seen"], "good")
    tables = [json.loads(content)["data"] for name, content in run.files.items() if "media/table/samples" in name]
    assert sorted(tables) == [[[1, "a"]], [[1, "a"], [3, "b"]]], "each has those before it"


def test_a_row_that_is_sent_late_leaves_the_summary_to_the_last(server, tool, tmp_path):
    last = {"step": 2, "time": 1.8e9 + 2, "loss": 1.0}
    leave(tmp_path, "c", "one", [{"loss": 3.0, "val/loss": 4.0}, last])
    assert tool("sync", "c.pt")[0] == 0
    leave(tmp_path, "c", "one", [{"loss": 3.0, "val/loss": 4.0}, {"loss": 2.0}, last])
    assert "c.metrics.jsonl: 1 rows sent" in tool("sync", "c.pt")[1]
    summary = only_run(server).summary
    assert [row["step"] for row in only_run(server).history] == [0, 2, 1]
    assert [summary[name] for name in ("step", "loss", "val/loss", "_timestamp")] == [2, 1.0, 4.0, 1.8e9 + 2]


def test_sync_takes_no_memory_for_the_histograms_of_a_run(tmp_path, monkeypatch):
    class Run:
        state, summary, offline, sent = "crashed", {}, False, 0

        def log(self, row):
            assert row["x/0"].histogram == counts and row["loss"] == 2.0
            self.sent += 1

        def finish(self, exit_code):
            assert exit_code == 137

    run, counts = Run(), list(range(1000, 1500))
    row = {"loss": 2.0} | {f"x/{n}": dict(counts=counts, edges=list(range(501))) for n in range(10)}
    text = json.dumps(row)  # parsed anew, it shares nothing with other rows
    leave(tmp_path, "c", "one", [row] * 12)
    api = SimpleNamespace(default_entity="me", flush=lambda: None, run=lambda target: run)
    monkeypatch.setattr(wandb_tools, "import_wandb", lambda: SimpleNamespace(Api=lambda timeout: api))
    monkeypatch.setattr(wandb_tools, "open_run", lambda job, say: run)
    monkeypatch.setattr(wandb_tools, "history", lambda run: (
        {"step": step, "_timestamp": 1.8e9} | json.loads(text) for step in range(run.sent)))
    wandb_tools.Publisher(run, None, None)._pass_on(0, 1.8e9, loss=2.0, **{"x/0": row["x/0"]})  # imports the SDK
    run.sent = 0
    tracemalloc.start()
    said = wandb_tools.send(json.loads((tmp_path / "c.wandb.json").read_text()), tmp_path / "c.metrics.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (said, run.sent, run.summary["loss"]) == ("12 rows sent to me/p/one", 12, 2.0)
    assert peak < 2.6e6, "1.6 as it is; with the histograms of the file 5.1, with those of the server's rows 3.7"


def test_sync_compares_no_sample_with_each_row(tmp_path, monkeypatch):
    class Record(dict):
        def __eq__(self, other):
            pytest.fail("a record was compared with another")

    held = [dict(step=0, _timestamp=1.8e9, loss=2.0, samples={})]
    run = SimpleNamespace(state="crashed", summary={}, offline=False, log=held.append, finish=lambda exit_code: None)
    leave(tmp_path, "c", "one", [dict(loss=2.0), dict(event="sample", text="a", step=0), dict(loss=1.0)])
    api = SimpleNamespace(default_entity="me", flush=lambda: None, run=lambda target: run)
    monkeypatch.setattr(wandb_tools, "import_wandb", lambda: SimpleNamespace(Api=lambda timeout: api))
    monkeypatch.setattr(wandb_tools, "open_run", lambda job, say: run)
    slim = wandb_tools.slim
    monkeypatch.setattr(wandb_tools, "slim", lambda row: Record(slim(row)))
    monkeypatch.setattr(wandb_tools, "history", lambda run: iter(held))
    said = wandb_tools.send(json.loads((tmp_path / "c.wandb.json").read_text()), tmp_path / "c.metrics.jsonl")
    assert said == "1 rows sent to me/p/one"


@pytest.mark.parametrize("folders", ["gone", "of a trial", *(pytest.param(where, marks=pytest.mark.full)
                                                            for where in ("there", "moved"))])
def test_sync_sends_a_run_that_was_offline_twice(server, trainer, tool, folders):
    flags = ["--log-steps", 5, "--use-wandb", "--wandb-mode", "offline", "--wandb-log-checkpoints", "last"]
    assert trainer("--num-steps", 10, *flags).code == trainer("--num-steps", 20, *flags, "--resume").code == 0
    assert not server.runs
    if folders == "gone":
        shutil.rmtree(trainer.folder / "wandb")
    if folders == "moved":  # but for its name, which begins otherwise: it stores the checkpoints' paths
        for folder in (trainer.folder / "wandb").glob("offline-run-*"):
            folder.rename(folder.with_name("offline-run-20200101_0000" + folder.name[25:]))
    if folders == "of a trial":  # whose run the server makes before it begins
        facts = json.loads((trainer.folder / "c.wandb.json").read_text())
        (trainer.folder / "c.wandb.json").write_text(json.dumps(facts | dict(sweep="s")))
        server._upsert_run(name=facts["init"]["id"], modelName="mini-llm")
    (trainer.folder / "click.py").write_text("raise SystemExit('a file of the working folder')")  # the SDK imports one
    code, out, err = tool("sync", "c.pt", WANDB_MODE="offline")  # as it may still be set
    assert (code, err) == (0, "") and ("every row, with its files" in out) == (folders != "gone"), out
    stored = only_run(server)
    assert_same_rows(stored, reports(trainer.folder / "c.metrics.jsonl"))
    assert (stored.state, stored.exit_code) == ("finished", 0)
    whole = folders != "gone"
    assert ({"c.config.toml", "output.log"} <= stored.files.keys()) == whole
    models = [one for one in server.artifacts if one.type == "model"]
    assert [sorted({"step-10", "step-20"} & set(one.aliases)) for one in models] == (
        [["step-10"], ["step-20"]] * (whole and folders != "moved"))
    assert ("did not arrive: was it moved" in out) == (folders == "moved"), out
    code, out, err = tool("download", "c.pt", "to")
    assert (code, err) == (0, "") and f", {len(server.artifacts)} artifacts" in out, out + err
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, "") and "wandb sync" not in out
    assert_same_rows(stored, reports(trainer.folder / "c.metrics.jsonl"))


def test_sync_waits_for_the_end_of_a_run_and_completes_a_killed_one(server, trainer, tool):
    server.fail("filestream", 404)
    process = zygote.Popen(trainer.arguments(["--num-steps", 1000000, "--log-steps", 50, "--use-wandb"]),
                           cwd=trainer.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=environment(**server.environment | QUICK))
    try:
        eventually(lambda: "filestream" in [kind for _, kind, _ in server.requests], 60)
        code, out, err = tool("sync", "c.pt")
        assert (code, out, err.count("\n")) == (2, "", 1) and "still being sent; wait for it to end\n" in err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    eventually(lambda: not processes_with(f"WANDB_BASE_URL={server.url}"))
    server.heal()
    (waiting := trainer.folder / "c.upload-00000050.pt").touch()  # what it still had to upload
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, "") and not waiting.exists(), out
    assert_same_rows(only_run(server), reports(trainer.folder / "c.metrics.jsonl"))
    assert (only_run(server).state, only_run(server).exit_code) == ("failed", 137)


def leave(folder, stem, run_id, rows, shared=False, label="rank-0", **more):
    """What a tracked run leaves beside its checkpoint, to be sent."""
    init = dict(project="p", entity=None, id=run_id)
    facts = dict(base=run_id, init=init, shared=shared, primary=label == "rank-0", label=label) | more
    (folder / f"{stem}.wandb.json").write_text(json.dumps(facts))
    lines = [json.dumps(dict(step=step, time=1.8e9) | row) for step, row in enumerate(rows)]
    (folder / f"{stem}.metrics.jsonl").write_text("\n".join(lines))


def test_rows_of_before_a_rollback_are_not_taken_for_those_after_it():
    stored = [{"step": 10, "_timestamp": 1.0, "loss": 3.0}, {"step": 20, "_timestamp": 2.0004, "loss": 2.0}]
    first, again = {"step": 10, "time": 1.0, "loss": 3.0}, {"step": 20, "time": 9.0, "loss": 1.5}
    more = first | {"lr": 1.0}
    assert list(lacking([first, again, more], stored)) == [again, more]
    assert not any(lacking([again | {"time": 2.0005}], stored))
    assert not any(lacking([first | {"norm": None}], stored)), "NaN, which the server may leave out"


def test_sync_says_of_a_run_what_it_was_and_not_where_it_is_sent_from(server, tool, tmp_path):
    """Finished once, resumed, killed; sent from a shell that is set up for another run."""
    configs = [{"event": "config", "config": {"git_commit": commit}} for commit in ("before", "then")]
    leave(tmp_path, "c", "one", [configs[0], {"event": "exit", "code": 0}, configs[1], {"loss": 2.0}], host="there",
          program="/there/train.py")
    facts = json.loads((tmp_path / "c.wandb.json").read_text())
    (elsewhere := tmp_path / "elsewhere").mkdir()  # its --wandb-dir
    (tmp_path / "c.wandb.json").write_text(json.dumps(facts | dict(init=facts["init"] | dict(dir=str(elsewhere)))))
    code, out, err = tool("sync", "c.pt", WANDB_RUN_ID="today", WANDB_NAME="today", WANDB_TAGS="today",
                          WANDB_NOTES="today", WANDB_SWEEP_ID="today", WANDB_DISABLE_GIT="", **REMOTE)
    run = only_run(server)
    assert (code, err) == (0, "") and (run.state, run.exit_code) == ("failed", 137), out
    assert run.config == {"git_commit": "then"} and run.run_id == run.display_name == "one"
    assert not run.tags and not run.notes and not run.sweep and run.origin == ("there", "then", "/there/train.py", None)
    assert not run.events and not {"wandb-metadata.json", "output.log", "diff.patch"} & run.files.keys()
    assert not list(elsewhere.iterdir())
    run.reported = "preempting"  # all has arrived but its end
    assert "has every row, and is ended now" in tool("sync", "c.pt")[1] and run.state == "preempted"


@pytest.mark.parametrize("command", ["download", "sync"])
def test_interrupted_it_ends_without_a_traceback(server, tool, tmp_path, command):
    leave(tmp_path, "c", "one", [{"loss": 2.0}])
    server.fail("graphql", "hang")
    process = zygote.Popen([*TOOLS, command, {"download": "p/one", "sync": "c.pt"}[command]], cwd=tmp_path,
                           env=surroundings(server, tmp_path), stderr=subprocess.PIPE, text=True)
    eventually(lambda: server.requests, 60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=200)[1] == "" and process.returncode == 130


def test_sync_sends_every_rank_of_a_shared_run_and_no_neighbour(server, tool, tmp_path):
    leave(tmp_path, "c", "one", [{"loss": 3.0}, {"loss": 2.0}], shared=True)
    leave(tmp_path, "c.rank1", "one", [{"rank/1": 3.5}, {"rank/1": 2.5}], shared=True, label="rank-1")
    leave(tmp_path, "c2", "other", [{"loss": 1.0}])
    leave(tmp_path, "c.sweep0run0", "trial", [{"loss": 1.0}])
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, ""), out
    assert [key[2] for key in server.runs] == ["one"]
    values = [(row["step"], name, row[name]) for row in only_run(server).history for name in ("loss", "rank/1")
              if name in row]
    assert sorted(values) == [(0, "loss", 3), (0, "rank/1", 3.5), (1, "loss", 2), (1, "rank/1", 2.5)]
    code, out, err = tool("sync", "c.pt", "--wandb-run-id", "two")
    assert (code, err) == (0, "") and out.count("2 rows sent to loopback/p/two") == 2, "no rows of another run's"


def test_what_the_ranks_know_of_their_runs_is_read_from_the_first_on(tmp_path):
    for tag in ("", ".rank2", ".rank10"):
        leave(tmp_path, f"c{tag}", "one", [])
    found = memories(tmp_path / "c.pt")
    assert [file.name for file, _ in found] == ["c.wandb.json", "c.rank2.wandb.json", "c.rank10.wandb.json"]
    assert run_path(dict(entity="team", project="p", id="one"), None) == "team/p/one"
    (tmp_path / "c.rank2.wandb.json").write_text("{")
    with pytest.raises(UserError, match="c.rank2.wandb.json: damaged; restore it"):
        memories(tmp_path / "c.pt")


def test_offline_folders_are_found_where_a_run_could_be_recorded_unless_they_were_sent(tmp_path, monkeypatch):
    for root, name in (("own", "0301_000000-one"), ("beside", "0201_000000-one"), ("env", "0101_000000-one"),
                       ("own", "0101_000000-other"), ("own", "0102_000000-one")):
        (tmp_path / root / "wandb" / f"offline-run-2026{name}").mkdir(parents=True)
    (tmp_path / "own" / "wandb" / "offline-run-20260102_000000-one" / "run-one.wandb.synced").touch()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "env"))
    for folder, expected in ((str(tmp_path / "own"), ["beside", "own"]), (None, ["env", "beside"])):
        found = offline_folders(dict(id="one", dir=folder), tmp_path / "beside" / "c.metrics.jsonl")
        assert [os.path.relpath(path, tmp_path).split("/")[0] for path in found] == expected, "oldest first"
    assert offline_folders(dict(id="*", dir=None), tmp_path / "c.metrics.jsonl") == [], "another's file"


def test_sync_sends_a_run_that_was_deleted_to_a_new_one(server, tool, tmp_path):
    leave(tmp_path, "c", "one", [{"loss": 3.0}, {"loss": 2.0}, {"event": "exit", "code": 0}])
    server.fail("upsert one", 409)
    (tmp_path / "quick.py").write_text(  # else the SDK tries that for half a minute
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport functools, wandb_tools as tools\n"
        "tools.Job = functools.partial(tools.Job, init_timeout=3)\ntools.main()\n")
    done = zygote.run([sys.executable, "quick.py", "sync", "c.pt"], tmp_path, surroundings(server, tmp_path))
    assert done.returncode == 1 and "--wandb-run-id NEW, with --resume or wandb_tools.py sync" in done.stderr
    code, out, err = tool("sync", "c.pt", "--wandb-run-id", "two", "--wandb-project", "q")
    assert (code, err) == (0, "") and "2 rows sent to loopback/q/two" in out
    (run,) = server.runs.values()
    assert (run.project, run.run_id, run.state) == ("q", "two", "finished")
    assert [row["loss"] for row in run.history] == [3, 2]
    assert "loopback/q/two has every row" in tool("sync", "c.pt")[1], "it is that run now"
    leave(tmp_path, "d", "three", [{"loss": 7.0, "time": 1.9e9}])
    code, out, err = tool("sync", "d.pt", "--wandb-run-id", "two", "--wandb-project", "q")
    assert (code, err.count("\n")) == (2, 1) and "has rows of another run" in err and len(run.history) == 2


def test_sync_makes_a_run_of_one_that_was_not_tracked(server, tool, tmp_path):
    leave(tmp_path, "c", "", [{"event": "config", "config": {"lr": 1.0}}, {"loss": 3.0}, {"event": "exit", "code": 0}])
    (tmp_path / "c.wandb.json").unlink()
    assert "sync --wandb-run-id NEW" in tool("sync", "c.pt")[2]
    code, out, err = tool("sync", "c.pt", "--wandb-run-id", "a/b")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--wandb-run-id a/b: letters" in err
    code, out, err = tool("sync", "c.pt", "--wandb-run-id", "two", WANDB_PROJECT="ours", WANDB_ENTITY="team")
    assert (code, err) == (0, "") and "1 rows sent to team/ours/two" in out
    assert (only_run(server).state, only_run(server).config) == ("finished", {"lr": 1.0})
    assert "team/ours/two has every row" in tool("sync", "c.pt", "--wandb-run-id", "two")[1], "that it is again"
    with only_one(tmp_path / "c.lock"):
        code, out, err = tool("sync", "c.pt")
    assert (code, out, err.count("\n")) == (2, "", 1) and "this run is still training; wait" in err
    with only_one(tmp_path / "c.wandb.lock"):  # of the process that sends the rest
        code, out, err = tool("sync", "c.pt")
    assert (code, out, err.count("\n")) == (2, "", 1) and "wait for it to end, at most its --wandb-finish-t" in err
    code, out, err = tool("sync", "none.pt", "--wandb-run-id", "three")
    assert (code, out, err.count("\n")) == (2, "", 1) and "none.metrics.jsonl: no such file" in err
    assert not list(tmp_path.glob("none*")), "nothing is left of a typing error"
    code, out, err = tool("sync", "c.pt", "--wandb-project", "q")
    assert (code, out, err.count("\n")) == (2, "", 1) and "give --wandb-run-id NEW, too" in err


def test_the_runs_of_several_ranks_are_renamed_alike():
    def facts(run_id, group):
        return dict(base="b", init=dict(id=run_id, group=group, project="p"))

    for end in "", "-rank-3", "-worker-1", "-worker-1-rank-3":
        new = renamed(facts(f"b{end}", f"b{end}"), "n", "")
        assert new == dict(base="n", was="b", init=dict(id=f"n{end}", group=f"n{end}", project="p"))
    assert renamed(facts("b", "big"), "n", "q")["init"] == dict(id="n", group="big", project="q")
    assert renamed(renamed(facts("b", None), "n", ""), "m", "")["was"] == "b", "which the checkpoint still has"
    assert renamed(facts("b", None), "", "") == facts("b", None)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_run_that_was_sent_as_another_is_resumed_as_that(trainer, tmp_path, tracked):
    flags, path = ["--save-steps", 2, *["--use-wandb"] * tracked], tmp_path / "c.wandb.json"
    assert trainer(*flags, "--num-steps", 4).code == 0
    before = json.loads(path.read_text()) if tracked else dict(base="n", init=dict(project="q", entity=None, id="n"))
    path.write_text(json.dumps(renamed(before, "n", "q") if tracked else before))
    for steps in (6, 8):
        run = trainer("--save-steps", 2, "--use-wandb", "--num-steps", steps, "--resume")
        after = json.loads(path.read_text())
        assert run.code == 0, run.err
        assert (after["base"], after["init"]["id"], after["init"]["project"]) == ("n", "n", "q")


def test_sync_puts_a_trial_into_its_sweep(server, tool, tmp_path):
    server.sweeps["s"] = ServerSweep("s", "loopback", "p")
    leave(tmp_path, "c", "trial", [{"loss": 3.0}, {"loss": 2.0}], sweep="s")
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, ""), out
    assert only_run(server).sweep == "s" and [row["loss"] for row in only_run(server).history] == [3, 2]


def test_sync_says_so_where_rows_do_not_arrive_or_cannot_be_compared(server, tool, tmp_path):
    leave(tmp_path, "c", "one", [{"loss": 3.0}, {"loss": 2.0}])
    server.fail("filestream", 404)
    (tmp_path / "quick.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                       "import wandb_tools; wandb_tools.ARRIVAL = 3; wandb_tools.main()\n")
    done = zygote.run([sys.executable, "quick.py", "sync", "c.pt"], tmp_path, surroundings(server, tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "2 of 2 rows cannot be read back" in done.stderr
    assert "in a few minutes, repeat this" in done.stderr
    server.heal()
    assert tool("sync", "c.pt")[0] == 0
    server.fail("HistoryPage", 403)
    leave(tmp_path, "c", "one", [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}])
    code, out, err = tool("sync", "c.pt")
    assert (code, out, err.count("\n")) == (1, "", 1), "what is there is not known, so that nothing may be sent twice"
    assert [row["loss"] for row in only_run(server).history] == [3, 2]


def test_sync_of_a_run_that_has_reported_nothing_yet_does_not_say_that_it_is_there(server, tool, tmp_path):
    leave(tmp_path, "c", "one", [{"event": "config", "config": {}}])
    code, out, err = tool("sync", "c.pt")
    assert (code, err) == (0, "") and out == "c.metrics.jsonl: no rows yet\n" and not server.runs


def test_sync_of_no_tracked_run_is_one_line(tool):
    code, out, err = tool("sync", "c.pt")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--use-wandb" in err


def test_download_brings_all_of_a_run(server, trainer, tool):
    run = trainer("--num-steps", 10, "--log-steps", 5, "--use-wandb", "--wandb-log-checkpoints", "last",
                  env=server.environment | QUICK)
    assert run.code == 0, run.out
    stored = only_run(server)
    stored.sweep, server.sweeps["s"] = "s", ServerSweep("s", "loopback", "mini-llm")
    link = f"{server.url}/loopback/mini-llm/runs/{stored.run_id}"
    names = ["c.pt", stored.run_id, f"mini-llm/{stored.run_id}", f"{link}/workspace?nw=x", "mini-llm/sweeps/s"]
    for number, name in enumerate(names):
        code, out, err = tool("download", name, f"to{number}")
        assert (code, err) == (0, ""), (name, err)
        folder = trainer.folder / f"to{number}" / stored.run_id
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert history == stored.history, name
    assert json.loads((folder / "config.json").read_text()) == stored.config
    assert json.loads((folder / "summary.json").read_text()) == stored.summary
    for file, content in stored.files.items():
        assert (folder / "files" / file).read_bytes() == content
    (table,) = folder.glob("files/media/table/samples*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [10]
    assert (folder / "artifacts" / f"model-{stored.run_id}-v0" / "model.pt").read_bytes() == (
        run.checkpoint.read_bytes())
    model = f"{folder.parent.name}/{folder.name}/artifacts/model-{stored.run_id}-v0/model.pt"
    theirs, = report.load([folder.parent])  # the page of a run of another machine
    ours, = report.load([run.checkpoint])
    for metric in ("train/loss", "val/loss", "val/bits_per_byte", "lr", "global_tokens_per_sec"):
        for x in report.X_METRICS:
            assert theirs.series(metric, x) == ours.series(metric, x), (metric, x)
    assert theirs.facts() == ours.facts() and theirs.name == stored.run_id and theirs.ending() == "0"
    made = zygote.run([*command("generate.py"), "--checkpoint-path", model, "--max-new-tokens", 5], trainer.folder,
                      environment())
    assert made.returncode == 0 and "5 tokens" in made.stderr, made.stderr  # its tokenizer came along


@pytest.mark.parametrize("name, path", [
    ("one", "/one"), ("sweeps/one", "/sweeps/one"), ("us/p/one/", "/us/p/one"),
    ("https://wandb.ai/us/mini%20llm/runs/one/workspace?nw=x", "/us/mini llm/runs/one"),
    ("https://wandb.ai/us/p/sweeps/one#top", "/us/p/sweeps/one")])
def test_a_link_is_a_path(monkeypatch, name, path):
    monkeypatch.setattr(wandb_tools, "import_wandb", lambda: SimpleNamespace(Api=lambda *_, **__: None))
    assert wandb_tools.located(name)[1] == path


def test_what_a_downloaded_run_reported(tmp_path):
    """Rows of one step are one report, a step that was repeated after a resume is the later one, NaN is null."""
    rows = [{"step": 5, "_timestamp": 1.5, "_step": 0, "train/loss": 3.0, "val/loss": 2.5},
            {"step": 5, "_timestamp": 1.6, "samples": {"_type": "table-file"}},
            {"step": 4, "_timestamp": 9.0, "train/loss": "NaN", "val/ppl": "Infinity", "x": "-Infinity"},
            {"step": 5, "_timestamp": 9.5, "train/loss": 2.0, "gradients/x": {"_type": "histogram"}, "amp": "on"},
            {"_timestamp": 9.5, "other": 1}]
    reports = {}
    for row in rows:
        add_report(reports, row)
    run = SimpleNamespace(config=dict(lr=math.nan), state="finished")
    (tmp_path / "r.metrics.jsonl").write_text(metrics_jsonl(run, reports))
    config, *found, ended = read_records(tmp_path / "r.metrics.jsonl")
    assert found == [{"step": 4, "time": 9.0, "train/loss": None, "val/ppl": None, "x": None},
                     {"step": 5, "time": 9.5, "train/loss": 2.0, "val/loss": 2.5}]
    assert config["config"] == dict(lr=None) and ended == dict(step=5, time=9.5, event="exit", code=0)
    run.state = "crashed"
    assert "exit" not in metrics_jsonl(run, reports)


def test_a_download_does_not_replace_what_a_run_has_written_there(tmp_path):
    (tmp_path / "one.config.toml").touch()
    with pytest.raises(UserError, match=r"one\.metrics\.jsonl: is that of a run that has trained there; name another"):
        fetch([SimpleNamespace(id="one")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.config.toml"]


def test_what_cannot_be_fetched_or_leads_out_of_the_folder_is_left_out_and_the_rest_fetched(tmp_path, capsys):
    class File:
        def __init__(self, name):
            self.name = name

        def download(self, root, replace=None):
            assert replace or "artifacts" in root, "of an earlier download"
            if self.name.startswith("gone"):
                raise OSError("404 Not Found")
            fetched.append((root, self.name))

    fetched, folder, watch = [], str(tmp_path / "one" / "files"), {}
    names = ["../out", "/etc/out", "a/../../out", "gone", "a/b", "..c"]
    artifacts = [File("../../../out:v0"), File("gone\x1b[31m")]
    run = SimpleNamespace(id="one", config=watch, summary={}, files=lambda: map(File, names),
                          logged_artifacts=lambda: artifacts,
                          scan_history=lambda page_size, use_cache: [{"x": page_size, "y": None}])
    assert fetch([run], tmp_path) == 1 and fetched == [(folder, "a/b"), (folder, "..c")]
    out, err = capsys.readouterr()
    assert "1 rows, 2 files, 0 artifacts" in out and err.count("\n") == 2 and "gone not fetched: 404" in err
    assert "gone\\x1b[31m not fetched" in err and "\x1b" not in err, "no name acts on the terminal"
    for name in "../out", "/etc/out", "..", "a/b":
        with pytest.raises(UserError, match="leads out of the folder"):
            fetch([SimpleNamespace(id=name)], tmp_path / "to")
    assert not (tmp_path / "to").exists() and not (tmp_path / "out").exists()
    (few,) = history(run)
    watch["wandb_watch"] = "all"
    (fewer,) = history(run)
    assert few.keys() == {"x"} and fewer["x"] < few["x"], "rows with histograms take a megabyte each"


def test_download_takes_the_runs_of_all_ranks(server, trainer, tool):
    run = trainer("--num-steps", 10, "--log-steps", 5, "--use-wandb", "--wandb-run-mode", "new", ranks=2,
                  env=server.environment | QUICK)
    assert run.code == 0, run.out
    code, out, err = tool("download", "c.pt", "to")
    assert (code, err) == (0, "") and out.count(" rows, ") == 2, out
    folders = sorted(path.name[-7:] for path in (trainer.folder / "to").iterdir() if path.is_dir())
    assert folders == ["-rank-0", "-rank-1"]
    code, out, err = tool("download", "none.pt", "to")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no none.wandb.json beside it" in err


def test_download_of_a_missing_run_is_one_line(tool):
    code, out, err = tool("download", "missing", WANDB_ENTITY="team", WANDB_PROJECT="ours")  # as training has them
    assert (code, out, err.count("\n")) == (1, "", 1) and "team/ours/missing" in err and "WANDB_ENTITY" in err
    assert "PROJECT/sweeps/ID" in err, "as which `sweep.py create` does not print it"


@pytest.mark.parametrize("command", ["download", "sync"])
def test_a_run_that_has_no_name_is_one_line(tool, command):
    # Of a shell variable that is not set; and before a key is asked for.
    code, out, err = tool(command, "", WANDB_API_KEY="")
    assert (code, out, err.count("\n")) == (2, "", 1) and "'': names no" in err


@pytest.mark.parametrize("case", FAILING)
def test_check_names_the_step_that_fails_and_what_to_do(failing_checks, case):
    step, words = FAILING[case]
    out, err = failing_checks[case].communicate(timeout=200)
    *_, failure, advice = out.splitlines()
    assert failing_checks[case].returncode == 1 and err == ""
    assert failure.startswith(f"{step:8} FAIL  ") and advice.strip().startswith(words), out
    assert all(" ok " in line for line in out.splitlines()[:-2])
