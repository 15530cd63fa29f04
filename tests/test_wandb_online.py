"""The real SDK, online, against a W&B server of the tests' own: lifecycles, ranks, and every way that it can fail."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import zygote
from conftest import QUICK, ROOT, TINY, Run, command, environment, eventually, interrupt_after, processes_with

LONG = ["--num-steps", 400, "--log-steps", 20, "--eval-steps", 200, "--save-steps", 100]
full = pytest.mark.full


@pytest.fixture
def online(trainer, server):
    """`online(*flags)`: a tracked run to its end."""
    def online(*flags, env=None, **options):
        return trainer("--use-wandb", *flags, env=server.environment | QUICK | (env or {}), **options)

    return online


@contextlib.contextmanager
def paused(process, server, folder, rows=3):
    """A trainer stands still, once so many rows that it has written are on the server, to the end of the block."""
    metrics = folder / "c.metrics.jsonl"
    eventually(lambda: metrics.exists() and metrics.read_text().count("train/loss") >= rows, 60)
    process.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: any(len(run.history) > rows for run in server.runs.values()), 60)  # that of step 0, too
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def only_run(server):
    (run,) = server.runs.values()
    return run


def column(run, name):
    """step → every value that the server holds of a metric, in order of arrival."""
    found = {}
    for row in run.history:
        if name in row:
            found.setdefault(row["step"], []).append(row[name])
    return found


def values(run, name="train/loss"):
    return {step: each[-1] for step, each in column(run, name).items()}


def sync(out, folder, server):
    """Run the command that the console names."""
    words = shlex.split(re.search(r"python (\S*wandb_tools\.py sync .*)", out)[1])
    done = zygote.run([sys.executable, *words], folder, environment(**server.environment | QUICK))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_online_has_its_rows_files_samples_and_facts(online, server):
    run = online("--num-steps", 40, "--log-steps", 10, "--sample-steps", 20, "--wandb-run-name", "first",
                 "--wandb-job-type", "pretrain", "--wandb-notes", "why", "--wandb-tags", "x")
    assert run.code == 0, run.err
    assert len(re.findall(r"wandb: run \w+ \(first\) at http", run.out)) == 1
    stored = only_run(server)
    assert (stored.display_name, stored.job_type, stored.notes, stored.tags) == ("first", "pretrain", "why", ["x"])
    assert (stored.state, stored.exit_code) == ("finished", 0)
    assert values(stored) == {step: row["train/loss"] for step, row in run.rows.items() if "train/loss" in row}
    assert {"c.config.toml", "output.log", "wandb-metadata.json"} <= stored.files.keys()
    started = json.loads(stored.files["wandb-metadata.json"])
    assert started["program"] == str(ROOT / "train.py") and started["codePath"] == "train.py"
    assert started["args"][started["args"].index("--wandb-notes") + 1] == "why"
    assert [row["step"] for row in stored.history if "samples" in row] == [20, 40]
    assert stored.config["world_size"] == 1 and stored.config["lr"] == 1e-3 and stored.events, "system metrics"


def test_another_training_under_the_id_of_a_run_is_warned_of(online, server):
    flags = ["--num-steps", 4, "--log-steps", 2, "--wandb-run-id", "same"]
    runs = online(*flags), online(*flags, "--num-steps", 6, "--resume"), online(*flags, "--overwrite")
    assert [run.code for run in runs] == [0, 0, 0] and len(server.runs) == 1
    assert ["run same had been there before: " in run.out for run in runs] == [False, False, True], runs[1].out


def test_a_run_killed_between_checkpoints_and_resumed_is_one_chart_of_the_whole(trainer, online, server, tmp_path):
    """Killed at step 37 of 60 with checkpoints every 10: steps 31 to 37 reach the server twice, with equal values."""
    flags = ["--num-steps", 60, "--log-steps", 1, "--save-steps", 10, "--eval-steps", 10, "--dropout", 0.1]
    whole = trainer(*flags, checkpoint="whole.pt")
    (tmp_path / "killed.py").write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mini_llm import tracking\n"
        "report = tracking.Tracker.report\n"
        "def report_and_die(self, metrics):\n"
        "    report(self, metrics)\n"
        "    if self.state.step == 37: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tracking.Tracker.report = report_and_die\n"
        "from train import main; main()\n")
    arguments = trainer.arguments(["--use-wandb", *flags])
    arguments[1] = str(tmp_path / "killed.py")
    env = environment(**server.environment | QUICK)
    assert zygote.run(arguments, tmp_path, env).returncode == -9
    resumed = online(*flags, "--resume")  # at once: what the killed run left behind may still be sending
    assert resumed.code == 0 and "Resumed at step 30" in resumed.out, resumed.out + resumed.err
    stored = only_run(server)
    assert stored.state == "finished"
    for name in ("train/loss", "val/loss"):
        expected = {step: row[name] for step, row in whole.rows.items() if name in row}
        assert values(stored, name) == expected
        assert all(len(set(each)) == 1 for each in column(stored, name).values()), "repeated steps are equal"
    assert {step: len(each) for step, each in column(stored, "train/loss").items() if len(each) > 1} == dict.fromkeys(
        range(31, 38), 2)


def torchrun(trainer, server, *flags, nodes=2):
    """A tracked run of `nodes` × 2 ranks on this machine, a folder each → (exit codes, outputs)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for node in range(nodes):
        arguments = trainer.arguments(["--use-wandb", "--num-steps", 20, *flags], ranks=2)
        arguments[arguments.index("--standalone"):arguments.index("--standalone") + 1] = [
            f"--nnodes={nodes}", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        (folder := trainer.folder / f"node{node}").mkdir()
        processes.append(zygote.Popen(arguments, cwd=folder, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, env=environment(**server.environment | QUICK)))
    outputs = [process.communicate(timeout=170)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("mode, scope, runs", [
    pytest.param("shared", "global", {"b": ("", 4)}, marks=full),
    ("new", "worker", {f"b-worker-{node}-rank-{rank}": (f"b-worker-{node}", 1) for node in (0, 1) for rank in (0, 1)}),
    pytest.param("auto", "global", {"b": ("", 1)}, marks=full),
    pytest.param("auto", "worker", {"b-worker-0": ("", 1), "b-worker-1": ("", 1)}, marks=full),
    pytest.param("shared", "worker", {"b-worker-0": ("", 2), "b-worker-1": ("", 2)}, marks=full),
    pytest.param("new", "global", {f"b-rank-{rank}": ("b", 1) for rank in range(4)}, marks=full)])
def test_two_nodes_of_two_ranks_write_the_runs_that_the_table_says(trainer, server, mode, scope, runs):
    codes, outputs = torchrun(trainer, server, "--wandb-run-mode", mode, "--wandb-rank-scope", scope,
                              "--wandb-run-id", "b", "--wandb-log-checkpoints", "last")
    assert codes == [0, 0], outputs
    assert {run.run_id: (run.group or "", max(1, len(run.writers))) for run in server.runs.values()} == runs
    for run in server.runs.values():
        assert run.state == "finished"
        assert {10, 20} <= values(run).keys(), "every run has the losses of the whole"
        assert "c.config.toml" in run.files and run.config["world_size"] == 4
        models = [each for each in list(server.artifacts) if each.type == "model"]
        assert [each.metadata["step"] for each in models] == [20], "one rank has the checkpoint, and uploads it"
        own = {name for row in run.history for name in row if name.startswith("rank/loss")}
        if mode == "shared":
            first = {"b": 0, "b-worker-0": 0, "b-worker-1": 2}[run.run_id]
            assert own == {f"rank/loss/{rank}" for rank in range(first, first + runs[run.run_id][1])}
            assert any("val/loss" in row for row in run.history_of(run.writers[0])), "the primary process came first"
            assert not any("val/loss" in row for writer in run.writers[1:] for row in run.history_of(writer))
        else:
            assert own == (set() if (mode, scope) == ("auto", "global") else {"rank/loss"})
    if mode == "shared" and scope == "global":
        means = {step: sum(values(only_run(server), f"rank/loss/{rank}")[step] for rank in range(4)) / 4
                 for step in (10, 20)}
        assert means == pytest.approx({step: values(only_run(server))[step] for step in (10, 20)}, rel=1e-6)


def test_no_other_rank_opens_a_shared_run_before_the_first(trainer, server):
    """Whose upsert the server answers late."""
    def upserts():
        return [run_id for _, kind, run_id in list(server.requests) if kind == "upsert"]

    server.fail("upsert", "hang")
    flags = ["--use-wandb", "--wandb-run-mode", "shared", "--wandb-run-id", "b", "--num-steps", 20]
    process = zygote.Popen(trainer.arguments(flags, ranks=2), cwd=trainer.folder, text=True,
                           env=environment(**server.environment | QUICK), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    eventually(upserts, 60)
    time.sleep(3)  # by then the other rank's process is up, too
    assert upserts() == ["b"]
    server.heal()
    out, _ = process.communicate(timeout=170)
    run = only_run(server)
    assert process.returncode == 0 and len(run.writers) == 2, out
    assert any("val/loss" in row for row in run.history_of(run.writers[0]))


#   fault                moment         what the console says
FAULTS = [
    ("filestream 404", "mid-run", r"server takes no more rows.*sync c\.pt"),
    pytest.param("all hang", "start", r"check the network.*offline-run.*sync c\.pt", marks=full),
    ("core frozen", "mid-run", r"not finished within 4 s, ended.*sync c\.pt"),
    *(pytest.param(fault, moment, text, marks=full) for fault, moment, text in [
        ("core killed", "mid-run", r"(Connection (lost|reset)|Broken pipe).*sync c\.pt"),
        ("all 401", "start", r"401.*wandb login.*offline-run.*sync c\.pt"),
        *((f"all {kind}", "start", r"offline-run.*sync c\.pt")
          for kind in (403, 404, 409, 429, 500, "html", "refuse")),
        *((f"filestream {kind}", "mid-run", r"server takes no more rows.*sync c\.pt")
          for kind in (401, 403, 409)),
        ("filestream html", "mid-run", r"server takes no more rows.*sync c\.pt"),
        *((f"filestream {kind}", "mid-run", r"not finished within 4 s.*sync c\.pt") for kind in (429, 500)),
        *((f"all {kind}", "mid-run", r"sync c\.pt") for kind in (401, 403, 404, 409, 429, 500, "html", "hang",
                                                                 "refuse")),
        ("server lost", "mid-run", r"not finished within 4 s.*sync c\.pt"),
        *((f"all {kind}", "finish", r"sync c\.pt") for kind in (500, "hang")),
        ("filestream 404", "finish", r"server takes no more rows.*sync c\.pt"),
        ("follower killed", "mid-run", r"its process ended with code -9.*sync c\.pt"),
        ("follower frozen", "mid-run", r"not finished within 4 s.*sync c\.pt")])]


def inject(server, fault):
    what, _, how = fault.rpartition(" ")
    if fault == "server lost":
        server.stop()
    elif what in ("core", "follower"):
        name = {"core": b"wandb-core", "follower": b"wandb_follower"}[what]
        for pid in processes_with(f"WANDB_BASE_URL={server.url}"):
            if name in open(f"/proc/{pid}/cmdline", "rb").read():
                os.kill(pid, {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}[how])
    else:
        server.fail(what, int(how) if how.isdigit() else how)


@pytest.fixture(scope="session")
def untracked(tmp_path_factory, text, cache):
    """The weights of the run that every fault must leave as they are."""
    folder = tmp_path_factory.mktemp("untracked")
    arguments = [*command("train.py"), *TINY, "--train-data", str(text), "--cache-dir", str(cache), *map(str, LONG)]
    zygote.run([*arguments, "--checkpoint-path", "c.pt"], folder, environment()).check_returncode()
    return torch.load(folder / "c.pt", weights_only=True)["model"]


@pytest.mark.parametrize("fault, moment, said", FAULTS)
def test_a_failing_wandb_costs_training_nothing_and_sync_recovers_every_row(online, trainer, server, untracked, fault,
                                                                            moment, said):
    def later(process):
        with paused(process, server, trainer.folder, {"mid-run": 3, "finish": 18}[moment]):
            inject(server, fault)

    if moment == "start":
        inject(server, fault)
    run = online(*LONG, "--wandb-init-timeout", 4, "--wandb-finish-timeout", 4,
                 meanwhile=later if moment != "start" else None)
    ended = time.time()
    lines = [line for line in run.out.splitlines() if "wandb: " in line]
    assert run.code == 0, run.out + run.err
    assert re.search(said, "\n".join(lines)), run.out
    assert all(torch.equal(tensor, untracked[name]) for name, tensor in run.weights().items())
    assert sorted(run.rows) == [0, *range(20, 401, 20)]
    finished = time.mktime(time.strptime(re.search(r"\[(.{19})\] Training finished", run.out)[1], "%Y-%m-%d %H:%M:%S"))
    assert ended - finished < 4 + 20, "the process leaves within its timeout, and not after the default's 60 s"
    server.heal()
    if fault == "server lost":
        server.start()
    held = len(values(server.runs[next(iter(server.runs))])) if server.runs else 0
    sync(run.out, trainer.folder, server)
    stored = only_run(server)
    assert values(stored) == {step: row["train/loss"] for step, row in run.rows.items() if "train/loss" in row}
    assert all(len(each) == 1 for each in column(stored, "train/loss").values()), "no row is sent twice"
    assert stored.state == "finished"
    print(f"| {fault} | {moment} | {lines[-1][22:]} | {run.code} | {ended - finished:.0f} | yes | {held} → 20 of 20 |")


def test_the_wait_for_wandb_at_the_end_is_told_and_ctrl_c_ends_it(trainer, server):
    server.fail("filestream", "hang")
    process = zygote.Popen(trainer.arguments(["--use-wandb", "--num-steps", 20]), cwd=trainer.folder, text=True,
                           env=environment(**server.environment | QUICK), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    told = next(line for line in process.stdout if "waiting" in line)
    assert re.search(r"waiting up to 58 s for W&B; Ctrl-C leaves the rest for later: python .*sync c\.pt", told)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=20)[0]
    assert re.fullmatch(r"(.* wandb: run .*\n)?", rest), "on a slow machine W&B is up only now"
    assert process.returncode == 130
    server.heal()
    eventually(lambda: only_run(server).state == "finished", 60)


def test_an_outage_in_the_middle_loses_nothing(online, trainer, server):
    def outage(process):
        with paused(process, server, trainer.folder):
            server.stop()
        time.sleep(3)
        server.start()

    run = online(*LONG, meanwhile=outage)
    assert run.code == 0 and len(values(only_run(server))) == 20 and only_run(server).state == "finished", run.out


def test_an_offline_fallback_is_completed_by_wandb_sync(online, trainer, server):
    server.fail("all", 403)
    run = online("--num-steps", 60, "--log-steps", 5, "--wandb-init-timeout", 4)
    server.heal()
    folder = re.search(r"Recorded offline in (\S+) meanwhile", run.out)[1]
    subprocess.run([sys.executable, "-m", "wandb", "sync", folder], cwd=trainer.folder, check=True, timeout=200,
                   capture_output=True, env=environment(**server.environment | QUICK))
    stored = only_run(server)
    assert values(stored) == {step: row["train/loss"] for step, row in run.rows.items() if "train/loss" in row}


def test_stop_on_the_runs_page_saves_and_leaves(online, trainer, server):
    def press(process):
        with paused(process, server, trainer.folder):
            only_run(server).stopped = True
            seen = len(server.requests)
            eventually(lambda: "filestream" in [kind for _, kind, _ in server.requests[seen:]], 60)  # which is told
            time.sleep(1)

    run = online("--num-steps", 1000000, "--log-steps", 100, "--eval-steps", 0, "--save-steps", 0, meanwhile=press)
    assert run.code == 143 and "stopped on the run's page" in run.out and run.checkpoint.exists(), run.out
    assert only_run(server).state == "failed" and max(values(only_run(server))) == max(run.rows)


def test_a_preempted_run_says_so_and_goes_on_in_the_same_chart(online, trainer, server):
    """And keeps the name and tags that it has been given on its page, in place of those that it was started with."""
    flags = ["--log-steps", 10, "--eval-steps", 0, "--wandb-tags", "a", "b"]
    named = dict(WANDB_NAME="mine")
    stopped = interrupt_after(trainer.arguments(["--use-wandb", "--num-steps", 100000, *flags]), trainer.folder,
                              r"step 300/", env=server.environment | QUICK | named)
    stored = only_run(server)
    assert stopped.returncode == 143 and (stored.state, stored.display_name, stored.tags) == (
        "preempted", "mine", ["a", "b"])
    stored.display_name, stored.tags = "renamed", ["seen"]
    step = int(re.search(r"stopped by SIGTERM at step (\d+)", stopped.stdout)[1])
    run = online("--num-steps", step + 30, *flags, "--resume", "auto", "--wandb-run-mode", "shared", env=named)
    assert "was not shared before, and loses rows if it is written both ways: it stays so" in run.out
    assert run.code == 0 and (stored.state, stored.display_name, stored.tags) == ("finished", "renamed", ["seen"])
    assert stored.config["num_steps"] == step + 30, "the configuration is that of the newest start"
    assert values(only_run(server)).keys() == run.rows.keys() - {0} and not stored.writers, "which a shared run has"


def test_a_preempted_run_is_known_as_such_though_its_checkpoint_is_not_uploaded_in_time(trainer, server):
    server.fail("upload", "hang")
    flags = ["--use-wandb", "--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, "--wandb-log-checkpoints",
             "last", "--wandb-finish-timeout", 4]
    stopped = interrupt_after(trainer.arguments(flags), trainer.folder, r"step 300/", env=server.environment | QUICK)
    assert stopped.returncode == 143 and only_run(server).reported == "preempting", stopped.stdout
    assert "checkpoints are uploading, 4 s at most (--wandb-finish-timeout)" in stopped.stdout
    assert "not finished within 4 s" in stopped.stdout.splitlines()[-1], "nothing fails after it"
    server.heal()
    assert "is ended now" in sync(stopped.stdout, trainer.folder, server)
    assert (only_run(server).state, only_run(server).exit_code) == ("preempted", 143)


@pytest.mark.parametrize("policy, steps", [
    ("last", [100, 200, 300, 400]), pytest.param("best", None, marks=full)])
def test_checkpoints_are_artifacts_in_the_background(online, trainer, server, policy, steps):
    own = trainer.folder / "SDK"
    run = online(*LONG, "--wandb-log-checkpoints", policy, env=dict(WANDB_CACHE_DIR=str(own), WANDB_DATA_DIR=str(own)))
    assert run.code == 0, run.out
    sizes = [file.stat().st_size for file in own.rglob("*")]
    assert sizes and max(sizes) < run.checkpoint.stat().st_size, "no copy of a checkpoint stays on this disk"
    models = [each for each in list(server.artifacts) if each.type == "model"]
    assert models and models[-1].name == f"model-{only_run(server).run_id}"
    uploaded = [each.metadata["step"] for each in models]
    assert uploaded == sorted(uploaded)
    assert (set(uploaded) <= set(steps) and uploaded[-1] == 400) if steps else uploaded
    last = models[-1]
    # Under `last` what is only the best is not uploaded, and so nothing is called it.
    best = {"best"} if policy == "best" else set()
    assert set(last.aliases) == {"latest", f"step-{uploaded[-1]}"} | best
    assert last.metadata["seed"] == 1337 and last.metadata["config"]["d_model"] == 32
    assert last.metadata["tokens"] == uploaded[-1] * 4 * 32 and last.metadata["val_loss"] > 0
    assert not list(trainer.folder.glob("*.upload-*"))


def test_a_halt_is_an_alert(online, server):
    run = online("--num-steps", 100000, "--log-steps", 20, "--lr", 1e6, "--grad-clip-norm", 0, "--no-amp",
                 "--warmup-steps", 0, "--eval-steps", 0)
    assert run.code == 1 and "not finite" in run.err
    stored = only_run(server)
    assert stored.state == "failed" and stored.exit_code == 1
    ((title, text, level),) = stored.alerts
    assert "NonFinite" in title and "not finite in" in text and level == "ERROR"


def test_the_finish_of_a_signalled_rank_is_told(trainer, server):
    """A rank dies: torchrun ends the others by SIGTERM, and the run says so, with every row there."""
    flags = ["--use-wandb", "--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, "--save-steps", 20]
    process = zygote.Popen(trainer.arguments(flags, ranks=2), cwd=trainer.folder, text=True,
                           env=environment(**server.environment | QUICK), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    for line in process.stdout:
        if "step 300/" in line:
            break
    victim = next(pid for pid in processes_with("RANK=1")
                  if f"WANDB_BASE_URL={server.url}\0".encode() in open(f"/proc/{pid}/environ", "rb").read())
    os.kill(victim, signal.SIGKILL)
    process.stdout.read()
    assert process.wait(timeout=200) != 0
    eventually(lambda: not processes_with(f"WANDB_BASE_URL={server.url}"), 40)
    stored = only_run(server)
    local = Run(subprocess.CompletedProcess([], 1, "", ""), trainer.folder, "c.pt").rows
    assert stored.state in ("failed", "preempted") and values(stored).keys() == local.keys() - {0}


def test_a_resume_sends_the_rows_that_an_earlier_start_could_not(online, server):
    """Offline up to step 20, refused behind step 30, and tracked again: one chart of the whole."""
    flags = ["--log-steps", 5, "--eval-steps", 0]
    assert online("--num-steps", 20, *flags, "--wandb-mode", "offline").code == 0 and not server.runs
    run = online("--num-steps", 30, *flags, "--resume")
    assert run.code == 0 and "rows of earlier starts that were not there: 5" in run.out, run.out
    assert values(only_run(server)).keys() == {5, 10, 15, 20, 25, 30}
    server.fail("filestream", 404)
    assert online("--num-steps", 40, *flags, "--resume").code == 0
    server.heal()
    run = online("--num-steps", 50, *flags, "--resume")
    assert run.code == 0 and "rows of earlier starts that were not there: 2" in run.out, run.out
    assert column(only_run(server), "train/loss") == {
        step: [row["train/loss"]] for step, row in run.rows.items() if "train/loss" in row}
    assert only_run(server).config["num_steps"] == 50 and "not logged" not in run.out, "its configuration is today's"
