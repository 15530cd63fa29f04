"""Sweeps as they are run: `sweep.py` and W&B's own agent against a server on loopback."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zygote
from conftest import QUICK, ROOT, TINY, environment, eventually, processes_with

import sweep
import wandb_tools
from mini_llm.config import flatten, parse
from mini_llm.errors import UserError
from sweep import COMMANDS, read_sweep, require_flags, shares
from train import Config

AGENT = [sys.executable, "-m", "wandb", "agent"]
SWEEP = [sys.executable, str(ROOT / "sweep.py")]
FIXED = dict(zip([name.removeprefix("--").replace("-", "_") for name in TINY[::2]], TINY[1::2], strict=True))


def processes_of(server):
    """pid → command line of what was started with this server in its environment, and still runs."""
    found = {}
    for pid in processes_with(f"WANDB_BASE_URL={server.url}"):
        with contextlib.suppress(OSError):  # gone by now
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def start(server, tmp_path):
    """`start(*command)` in a folder of its own. Nothing of it outlives the test."""
    here = str(Path(sys.executable).parent)
    others = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != here]
    tracked = server.environment | QUICK

    def start(*command, stream=subprocess.DEVNULL, **env):
        # Agents run "python" and "torchrun": sweep.py has to make W&B's find those of this Python environment.
        ours = command[1] == SWEEP[1]
        env |= dict(PATH=os.pathsep.join(others if ours else [here, *others]))
        return (zygote if ours else subprocess).Popen(command, cwd=tmp_path, text=True, stdout=stream, stderr=stream,
                                                      env=environment(**tracked | env))

    yield start
    for pid in processes_of(server):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def run(start):
    """`run(*command)` to its end → (exit code, stdout, stderr)."""
    def run(*command):
        process = start(*command, stream=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.fixture
def create(run, tmp_path, text, cache):
    """`create(program, name=values)` makes a sweep, a grid of tiny models → its id, as `sweep.py agent` takes it."""
    def create(program, file="sweep.yaml", **axes):
        fixed = FIXED | dict(train_data=str(text), cache_dir=str(cache))
        parameters = {name: dict(value=value) for name, value in fixed.items()}
        parameters |= {name: dict(values=values) for name, values in axes.items()}
        command = [str(ROOT / program) if word == "${program}" else word for word in COMMANDS[program]]
        sweep = dict(program=program, project="trials", method="grid", command=[*command, "--resume", "auto"])
        if file.endswith(".toml"):
            lines = [f"{name} = {json.dumps(value)}" for name, value in sweep.items()]
            lines += [f"parameters.{name}.{kind} = {json.dumps(value)}" for name, spec in parameters.items()
                      for kind, value in spec.items()]
            (tmp_path / file).write_text("\n".join(lines))
        else:
            (tmp_path / file).write_text(json.dumps(sweep | dict(parameters=parameters)))  # which is YAML
        code, out, err = run(*SWEEP, "create", file)
        assert code == 0, err
        command, sweep_id = out.splitlines()[-1].rsplit(" ", 1)
        assert command == "python sweep.py agent" and sweep_id.startswith("loopback/trials/"), "the key's own entity"
        return sweep_id

    return create


def reports(path):
    """The rows of a metrics.jsonl that W&B charts, by step."""
    rows = map(json.loads, path.read_text().splitlines())
    return {row["step"]: row for row in rows if "train/tokens" in row}


def assert_is_the_trial(run, sweep_id, folder, **parameters):
    """What the server has of a run is what its own files have, and these are of these parameters."""
    assert (run.sweep, run.state, run.exit_code) == (sweep_id.split("/")[-1], "finished", 0)
    saved = torch.load(folder / f"checkpoints/minigpt.{run.run_id}.pt", weights_only=True)
    for config in (run.config, saved["config"]):
        assert {name: config[name] for name in parameters} == parameters
    memory = json.loads((folder / f"checkpoints/minigpt.{run.run_id}.wandb.json").read_text())
    assert run.project == memory["init"]["project"] == "trials"
    assert run.config["wandb_run_id"] == saved["state"]["wandb_run_id"] == run.run_id
    rows = reports(folder / f"checkpoints/minigpt.{run.run_id}.metrics.jsonl")
    stored = {row["step"]: row for row in run.history if "train/tokens" in row}
    assert stored.keys() == rows.keys() == {0, 2, 4}
    assert all(stored[step]["val/loss"] == row["val/loss"] for step, row in rows.items())


def leave_another_run(folder):
    """At the path that every trial is given."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "minigpt.pt").write_bytes(b"of another run")
    (folder / "checkpoints" / "minigpt.wandb.json").write_text('{"base": "another"}')


@pytest.mark.slow
def test_each_point_of_a_grid_is_a_run_with_its_own_parameters_and_files(server, create, run, tmp_path):
    leave_another_run(tmp_path)
    sweep_id = create("train.py", "sweep.toml", lr=[1e-3], warmup_steps=[1, 2], num_steps=[4], log_steps=[2])
    code, _, err = run(*AGENT, sweep_id)
    assert code == 0 and len(server.runs) == 2, err
    for (lr, warmup), trial in zip([(1e-3, 1), (1e-3, 2)], server.runs.values(), strict=True):
        assert_is_the_trial(trial, sweep_id, tmp_path, lr=lr, warmup_steps=warmup)
        assert trial.config["world_size"] == 1
    assert (tmp_path / "checkpoints" / "minigpt.pt").read_bytes() == b"of another run"


def test_a_trial_under_torchrun_is_one_run_of_all_ranks(server, create, run, tmp_path):
    leave_another_run(tmp_path)
    sweep_id = create("train_ddp.py", lr=[1e-3, 2e-3, 3e-3], num_steps=[4], log_steps=[2])
    (tmp_path / "click.py").write_text("raise SystemExit('a file of the working folder')")  # the SDK imports one
    link = f"{server.url}/{sweep_id.replace('trials/', 'trials/sweeps/')}?nw=x"
    code, _, err = run(*SWEEP, "agent", link, "--agents", "2", "--count", "1", "--nproc-per-node", "2")
    assert code == 0 and len(server.runs) == 2, err
    for lr, trial in zip((1e-3, 2e-3), sorted(server.runs.values(), key=lambda trial: trial.run_id), strict=True):
        assert_is_the_trial(trial, sweep_id, tmp_path, lr=lr)
        assert trial.config["world_size"] == 2
    assert not list((tmp_path / "checkpoints").glob("*.rank1.*")), "only the first rank opens a run"


@pytest.mark.parametrize(("agent", "signal_number", "code"), [
    ([*SWEEP, "agent"], signal.SIGTERM, 128 + signal.SIGTERM),
    pytest.param(AGENT, signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.full),
    pytest.param(AGENT, signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.full),
    pytest.param([*SWEEP, "agent"], signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.full)])
def test_a_trial_is_saved_and_no_process_of_it_outlives_its_agent(server, create, start, tmp_path, agent,
                                                                  signal_number, code):
    sweep_id = create("train_ddp.py", lr=[0.002], num_steps=[1000000], log_steps=[10], save_steps=[0], eval_steps=[0])
    process = start(*agent, sweep_id, "--count", "1", PET_NPROC_PER_NODE="2")
    stem = f"minigpt.{sweep_id.split('/')[-1]}run0"
    file = tmp_path / "checkpoints" / f"{stem}.metrics.jsonl"
    eventually(lambda: file.exists() and len(reports(file)) > 2 and server.runs, 60)
    commands = processes_of(server).values()
    ranks = [words for words in commands if "train_ddp.py" in words and "torchrun" not in words]
    assert len(ranks) == 2 and all("--lr=0.002" in words for words in ranks)
    for program in ("torchrun", "mini_llm.wandb_follower"):
        assert any(program in words for words in commands), program
    process.send_signal(signal_number)
    assert process.wait(20) == code
    eventually(lambda: not processes_of(server), 20)
    saved = torch.load(tmp_path / "checkpoints" / f"{stem}.pt", weights_only=True)
    (trial,) = server.runs.values()
    assert saved["state"]["step"] >= max(reports(file)) > 10 and trial.exit_code == 143
    assert trial.state == "failed", "one that is preempted would be queued again"
    assert {row["step"] for row in trial.history} == reports(file).keys()


def test_numbers_of_a_sweep_are_numbers(tmp_path):
    (tmp_path / "sweep.yaml").write_text("method: random\nparameters: {lr: {min: 1e-5, max: 1.5E-2}, beta1: {values: "
                                         "[.9, 1e-1, -2e+3]}, name: {values: [1e, e5, 1e-4x]}}\n")
    parameters = read_sweep(tmp_path / "sweep.yaml")["parameters"]
    assert parameters["lr"] == dict(min=1e-5, max=1.5e-2) and parameters["beta1"]["values"] == [0.9, 0.1, -2000.0]
    assert parameters["name"]["values"] == ["1e", "e5", "1e-4x"]


GRID = "method: grid\nparameters: {lr: {values: [1, 2]}}\n"


@pytest.mark.parametrize(("contents", "words"), [
    ("method: [grid", "line 1"), ("- a\n- b", "parameters"), ("method: grid", "parameters"),
    ("method: grid\nparameters:", "parameters"), ("method: grid\nparameters: {lr: 1}", "parameters"),
    ("method: grid\nparameters: {1: {values: [1]}}", "parameters"), (GRID.replace("[1, 2]", "3"), "parameters"),
    (GRID + "program: other.py", "one of train.py, train_ddp.py, train_fsdp.py"),
    (GRID + "command: 3", "command 3: expected list"),
    (GRID.replace("lr:", "learning_rate:"), "the parameter learning_rate is not known; did you mean lr?"),
    (GRID.replace("lr:", "num-epochs: {value: 2}, num_steps:"), "--num-steps and --num-epochs: one decides the other"),
    (GRID.replace("lr:", "batch_size:").replace("2", "-1"), "batch_size -1: must be at least 1"),
    (GRID.replace("grid", "gird"), "method gird: one of grid, random, bayes"),
    (GRID.replace("grid", "bayes"), "method bayes needs a metric"),
    (GRID.replace("grid", "bayes") + "metric: {name: loss}", "the metric loss is not known; such as val/loss")])
def test_a_sweep_file_that_is_none_is_refused(tmp_path, contents, words):
    (file := tmp_path / "sweep.yaml").write_text(contents)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        require_flags(file, read_sweep(file))
    assert str(refused.value).startswith(f"{file}: ")


@pytest.mark.parametrize(("contents", "words"), [
    (None, "sweep.yaml: No such file"), (GRID.replace("grid", "gird"), "sweep.yaml: method gird"),
    (GRID + "project: runs", "--wandb-project runs")])
def test_a_sweep_that_is_refused_is_one_line(run, tmp_path, contents, words):
    if contents is not None:
        (tmp_path / "sweep.yaml").write_text(contents)
    code, out, err = run(*SWEEP, "create", "sweep.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize(("flags", "words"), [
    (["--agents", "21"], "at most 20"), (["--count", "0"], "--count: 0: expected a whole number, at least 1"),
    (["--nproc-per-node", "x"], "--nproc-per-node: x: expected"), (["--cuont", "1"], "--cuont"),
    (None, "create|agent")])
def test_a_wrong_flag_is_one_line(run, flags, words):
    code, out, err = run(*SWEEP, *([] if flags is None else ["agent", "loopback/mini-llm/sweep0", *flags]))
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize(("visible", "agents", "expected"), [
    ("0,1,2,3", 2, ["01", "23"]), ("4,5,6", 2, ["4", "5"]), ("0,1", 4, ["0", "1", "0", "1"]), ("", 2, ["", ""]),
    ("0,1", 1, [""]),
])
def test_agents_have_gpus_of_their_own(monkeypatch, visible, agents, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ["".join(gpus) for gpus in shares(agents)] == expected


def test_trials_have_the_users_temporary_folder_and_compile_cache(monkeypatch):
    """Not the one that this process has while it uses the SDK, and removes."""
    class Agent:
        def __init__(self, command, env, **options):
            environments.append(env)

        def wait(self):
            return 0

    def import_wandb():
        monkeypatch.setenv("TMPDIR", "of the SDK")
        return SimpleNamespace(Api=lambda *_, **__: SimpleNamespace(sweep=lambda path: found))

    environments, found = [], SimpleNamespace(entity="us", project="p", id="1")
    monkeypatch.setenv("TMPDIR", "mine")
    monkeypatch.setattr(wandb_tools, "import_wandb", import_wandb)
    monkeypatch.setattr(sweep.subprocess, "Popen", Agent)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    assert sweep.agent(SimpleNamespace(sweep="us/p/1", agents=1, nproc_per_node=None, count=None)) == 0
    assert [env["TMPDIR"] for env in environments] == ["mine"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # one is enough for an agent
    assert sweep.agent(SimpleNamespace(sweep="us/p/1", agents=2, nproc_per_node=None, count=None)) == 0
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments[1:]] == ["4", "5"]


@pytest.mark.parametrize("path, code, words", [
    ("us/mini-llm/nosuch", 1, "us/mini-llm/nosuch"), ("nosuch", 1, "loopback/mini-llm/nosuch"),
    ("us/p/nosuch/4", 1, ""), ("", 2, "names no")])
def test_an_agent_of_no_sweep_says_so_in_one_line(run, path, code, words):
    ended, out, err = run(*SWEEP, "agent", path)
    assert (ended, out, err.count("\n")) == (code, "", 1) and words in err and "; give ENTITY/PROJECT/ID" in err


def test_processes_are_refused_where_torchrun_does_not_start_the_trials(create, run):
    code, out, err = run(*SWEEP, "agent", create("train.py", lr=[1e-3]), "--nproc-per-node", "2")
    assert (code, out, err.count("\n")) == (2, "", 1) and "program: train_ddp.py" in err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("sweep-*")), ids=lambda path: path.name)
def test_the_sweeps_that_come_along_set_flags_that_there_are(path):
    sweep = read_sweep(path)
    assert sweep["command"] == COMMANDS[sweep["program"]]
    for name, spec in sweep["parameters"].items():
        for value in spec.get("values", [spec.get("value", spec.get("min"))]):
            assert flatten(parse(Config, [f"--{name}={value}"]))[name] == value
