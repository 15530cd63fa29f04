"""The loopback W&B server speaks the real SDK's language: online, resumed, shared, artifacts, sweeps, and failing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, environment, eventually


@pytest.fixture
def start(server, tmp_path):
    """`start(code)` runs a program of its own: the SDK keeps global state. What is left of it is killed."""
    started = []

    def start(*command, **env):
        arguments = list(command) if len(command) > 1 else [sys.executable, "-c", "import os, wandb\n" + command[0]]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `wandb agent` runs "python"
        started.append(subprocess.Popen(arguments, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT,
                                        env=environment(**server.environment | QUICK, PATH=path, **env)))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def finished(process, code=0, timeout=200):
    out = process.communicate(timeout=timeout)[0]
    assert process.returncode == code, out
    return out


def test_a_resumed_run_continues_where_it_ended(server, start):
    finished(start("""
run = wandb.init(project="p", id="r", name="named", group="g", tags=["a"], config={"lr": 0.1, "depth": 2})
run.config.update({"lr": 0.2}, allow_val_change=True)
for step in range(5): run.log({"loss": step})
print("a line"); open("user.txt", "w").write("kept"); run.save("user.txt", policy="now")
run.alert("title", "text", level="WARN")
run.finish(exit_code=3)"""))
    run = server.runs["loopback", "p", "r"]
    assert (run.display_name, run.group, run.tags, run.state, run.exit_code) == ("named", "g", ["a"], "failed", 3)
    assert run.config == {"lr": 0.2, "depth": 2} and run.files["user.txt"] == b"kept"
    assert run.alerts == [("title", "text", "WARN")] and any(line.endswith("a line") for line in run.console)
    out = finished(start("""
run = wandb.init(project="p", id="r", resume="must")
print("starts at", run.starting_step, "with", run.config["lr"])
for step in range(3): run.log({"loss": 10 + step})
run.finish()"""))
    assert "starts at 5 with 0.2" in out and run.state == "finished"
    assert [row["_step"] for row in run.history] == list(range(8))
    assert [row["loss"] for row in run.history] == [0, 1, 2, 3, 4, 10, 11, 12]
    assert run.summary["loss"] == 12


def test_two_processes_share_a_run(server, start):
    writers = [start(f"""
settings = wandb.Settings(mode="shared", x_primary={rank == 0}, x_label="rank{rank}", x_update_finish_state=True)
run = wandb.init(project="p", id="r", config={{"rank{rank}": True}}, settings=settings)
for step in range(20): run.log({{"step": step, "rank": {rank}}})
run.finish()""") for rank in range(2)]
    for writer in writers:
        finished(writer)
    run = server.runs["loopback", "p", "r"]
    assert len(run.writers) == 2 and run.state == "finished" and run.config == {"rank0": True, "rank1": True}
    assert sorted((row["rank"], row["step"]) for row in run.history) == [(r, s) for r in range(2) for s in range(20)]


def test_what_was_logged_is_read_back(server, start):
    finished(start("""
run = wandb.init(project="p", id="r", config={"lr": 0.1})
for step in range(20): run.log({"loss": 1 / (step + 1)})
run.log({"samples": wandb.Table(columns=["text"], data=[["once"]])})
for contents in ("one", "two", "two"):
    open("weights", "w").write(contents)
    weights = wandb.Artifact("weights", type="model", metadata={"contents": contents})
    weights.add_file("weights")
    run.log_artifact(weights, aliases=["latest", "best"]).wait()
run.finish()"""))
    models = [one for one in server.artifacts if one.type == "model"]
    assert [(one.version, one.aliases, one.files) for one in models] == [
        ("v0", [], {"weights": b"one"}), ("v1", ["best", "latest"], {"weights": b"two"})]
    assert any(name.startswith("media/table/samples") for name in server.runs["loopback", "p", "r"].files)
    out = finished(start("""
api = wandb.Api()
run = api.run(f"{api.default_entity}/p/r")
assert run.config == {"lr": 0.1} and run.state == "finished" and run.summary["loss"] == 0.05
assert [row["loss"] for row in run.scan_history(keys=["loss"])] == [1 / (step + 1) for step in range(20)]
assert len(run.history(pandas=False)) == 21 and [one.id for one in api.runs("loopback/p")] == ["r"]
folder = api.artifact("loopback/p/weights:best").download()
assert open(os.path.join(folder, "weights")).read() == "two"
assert [one.name for one in run.logged_artifacts() if one.type == "model"] == ["weights:v0", "weights:v1"]
try: api.run("loopback/p/missing").config
except wandb.CommError as error: print(error)"""))
    assert "Could not find run" in out


def test_an_agent_runs_a_grid_to_its_end(server, start, tmp_path):
    (tmp_path / "program.py").write_text(
        "import wandb\nwith wandb.init() as run: run.log({'loss': run.config['lr']})\n")
    finished(start("""
wandb.sweep({"method": "grid", "program": "program.py", "parameters": {"lr": {"values": [0.1, 0.2]}}}, project="p")"""))
    (sweep_id,) = server.sweeps
    finished(start(sys.executable, "-m", "wandb", "agent", f"loopback/p/{sweep_id}"))
    assert server.sweeps[sweep_id].state == "FINISHED"
    assert [(run.sweep, run.config, run.history[0]["loss"], run.state) for run in server.runs.values()] == [
        (sweep_id, {"lr": 0.1}, 0.1, "finished"), (sweep_id, {"lr": 0.2}, 0.2, "finished")]


@pytest.mark.parametrize("outage", [
    "gone", *(pytest.param(kind, marks=pytest.mark.full) for kind in (500, "refuse", "hang"))])
def test_every_row_arrives_after_an_outage(server, start, outage):
    process = start("""
import time
run = wandb.init(project="p", id="r")
for step in range(40): run.log({"step": step}); time.sleep(0.05)
run.finish()""")
    eventually(lambda: "filestream" in [kind for _, kind, _ in server.requests])
    if outage == "gone":
        server.stop()
        time.sleep(1.5)
        server.start()
    else:
        server.fail("filestream", outage)
        known = len(server.requests)
        eventually(lambda: "filestream" in [kind for _, kind, _ in server.requests[known:]])
        server.heal()
    finished(process)
    run = server.runs["loopback", "p", "r"]
    assert [row["step"] for row in run.history] == list(range(40)) and run.state == "finished"


@pytest.mark.parametrize(("answer", "error"), [(401, "CommError: "), ("html", "Error initializing run: invalid char")])
def test_a_server_that_refuses_is_an_error_at_init(server, start, answer, error):
    server.fail("all", answer)
    assert error in finished(start("wandb.init(project='p', settings=wandb.Settings(init_timeout=8))"), code=1)
