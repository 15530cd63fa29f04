"""The real SDK, offline: what it wrote is read back record by record."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import zygote
from conftest import REMOTE, ROOT, SHARED, Run, environment, eventually, interrupt_after, on_small_disk, processes_with
from wandb_file import run_files

from mini_llm.config import flag_fields
from train import Config

WANDB = ["--use-wandb", "--wandb-project", "mini-llm", "--wandb-run-name", "named"]


def plain(row):
    """A row without what W&B adds."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_a_run_is_tracked_with_all_its_config_and_rows(trainer):
    temporary = trainer.folder / "tmp"
    temporary.mkdir()
    run = trainer("--num-steps", 20, "--log-steps", 5, *WANDB, "--wandb-tags", "a", "b", "--wandb-group", "g",
                  env={"TMPDIR": str(temporary)} | REMOTE)
    assert run.code == 0, run.err
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
    (tracked,) = run_files(trainer.folder)
    assert (tracked.project, tracked.name, tracked.group, tracked.exit_code) == ("mini-llm", "named", "g", 0)
    expected = dict(d_model=32, lr=1e-3, world_size=1, rank=0, wandb_tags=["a", "b"], device=tracked.config["device"],
                    accum_steps=1, n_params=sum(weight.numel() for weight in run.weights().values()))
    assert expected.items() <= tracked.config.items() and flag_fields(Config).keys() <= tracked.config.keys()
    assert sys.version.startswith(tracked.config["version/python"])
    assert "train.py" in tracked.config["command"] and torch.__version__.startswith(tracked.config["version/torch"])
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert commit.returncode or (tracked.config["git_commit"], tracked.remote) == (commit.stdout.strip(),
                                                                                   "https://here.test/clone")
    assert [row["step"] for row in tracked.rows] == [0, 5, 10, 15, 20]
    for row in tracked.rows:
        jsonl = run.rows[row["step"]]
        assert plain(row) == {name: value for name, value in jsonl.items() if name != "time"}
        assert row["_timestamp"] == jsonl["time"]
    assert [row["step"] for row in tracked.samples] == [20]
    assert tracked.axes == {"step": "", "*": "step"}, "W&B's own step would drop what a resume repeats"
    memory = json.loads((trainer.folder / "c.wandb.json").read_text())
    assert memory["base"] == memory["init"]["id"] == tracked.run_id
    resolved = tracked.folder / "files" / "c.config.toml"
    assert 'd_model = 32' in resolved.read_text()
    assert "wandb_run_id" not in resolved.read_text()  # else what is begun with it would go on in this run
    again = trainer("--config", resolved, "--dry-run", tiny=False, checkpoint="again.pt")
    assert again.code == 0 and "d_model=32" in again.out, again.err
    log = (tracked.folder / "files" / "output.log").read_text()
    assert "step 20/20" in log and "Training finished" in log


def test_a_checkpoint_path_with_the_signs_of_a_pattern(trainer):
    run = trainer("--num-steps", 2, *WANDB, checkpoint="it's r[1].pt")
    (tracked,) = run_files(trainer.folder)
    assert run.code == 0 and "it's r[1].config.toml" in tracked.files, run.err
    again = trainer("--num-steps", 2, *WANDB, "--resume", checkpoint="it's r[1].pt")
    send = again.out.rsplit("rows that W&B lacks: ")[1].splitlines()[0]
    assert shlex.split(send)[1:] == [os.path.relpath(ROOT / "wandb_tools.py", trainer.folder), "sync", "it's r[1].pt"]


@pytest.mark.parametrize("command", ["offline", "disabled"])
def test_what_the_wandb_command_has_switched_off_stays_off(trainer, server, command):
    subprocess.run([sys.executable, "-m", "wandb", command], cwd=trainer.folder, check=True, capture_output=True)
    run = trainer("--num-steps", 5, *WANDB, env=server.environment | dict(
        WANDB_MODE="", WANDB_TAGS="a,", WANDB_FORK_FROM="other?_step=3", WANDB_RESUME_FROM="other?_step=3"))
    assert run.code == 0 and not server.requests, run.err
    assert len(run_files(trainer.folder)) == (command == "offline")


def test_a_crash_leaves_its_traceback_in_the_runs_log(trainer):
    (trainer.folder / "crash.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "train.lr_at = lambda step, cfg: 1 / (5 - step)\n"
        "train.main()\n")
    arguments = trainer.arguments(["--num-steps", 20, *WANDB])
    arguments[1] = str(trainer.folder / "crash.py")
    crashed = zygote.run(arguments, trainer.folder, environment())
    (tracked,) = run_files(trainer.folder)
    assert crashed.returncode == 1 and crashed.stderr.count("Traceback") == 1 and "Traceback" not in crashed.stdout
    for log in (trainer.folder / "c.log", tracked.folder / "files" / "output.log"):
        assert "ZeroDivisionError: division by zero" in log.read_text() and "in train_step" in log.read_text()


def test_a_killed_run_loses_no_row_and_its_resume_is_the_same_run(trainer):
    flags = ["--log-steps", 25, "--eval-steps", 0, "--save-steps", 50, "--lr-scheduler", "none", *WANDB]
    interrupt_after(trainer.arguments([*flags, "--num-steps", 100000]), trainer.folder, r"step 200/", signal.SIGKILL,
                    env={"MINI_LLM_TEST": str(trainer.folder)})
    eventually(lambda: not processes_with(f"MINI_LLM_TEST={trainer.folder}"))
    (first,) = run_files(trainer.folder)
    rows = [json.loads(line) for line in (trainer.folder / "c.metrics.jsonl").read_text().splitlines()]
    assert [plain(row) for row in first.rows] == [
        {name: value for name, value in row.items() if name != "time"} for row in rows if "event" not in row]
    assert first.exit_code == 137
    resumed = trainer(*flags, "--num-steps", 400, "--resume", "auto")
    first, second = run_files(trainer.folder)
    assert first.run_id == second.run_id and second.rows[0]["step"] in range(175, 400, 50)
    for part in (first, second):
        for row in part.rows:
            assert not row["step"] or row["train/loss"] == resumed.rows[row["step"]]["train/loss"]
    assert {row["step"] for part in (first, second) for row in part.rows} == resumed.rows.keys()


def test_a_run_killed_before_its_first_checkpoint_keeps_its_id(trainer):
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, "--save-steps", 0, *WANDB]
    interrupt_after(trainer.arguments(flags), trainer.folder, r"step 20/100000", signal.SIGKILL)
    kept = json.loads((trainer.folder / "c.wandb.json").read_text())["base"]
    assert not (trainer.folder / "c.pt").exists()
    for flag, same in (("--resume=auto", True), ("--overwrite", False)):
        trainer("--num-steps", 5, *WANDB, flag)
        assert (json.loads((trainer.folder / "c.wandb.json").read_text())["base"] == kept) == same


def test_an_untracked_run_in_its_place_is_not_taken_for_it(trainer):
    killed = interrupt_after([*trainer.arguments(["--num-steps", 100000, "--log-steps", 20, *WANDB])], trainer.folder,
                             "step 20/", signal.SIGKILL)
    memory = trainer.folder / "c.wandb.json"
    assert killed.returncode == -signal.SIGKILL and memory.exists() and not (trainer.folder / "c.pt").exists()
    other = trainer("--num-steps", 5)
    assert other.code == 0 and not memory.exists(), "sync would send its rows to the killed run"


def test_what_the_environment_says_of_the_run_is_heeded(trainer):
    """Among it a locale that knows ASCII only, and SageMaker, under which the SDK makes up ids of its own."""
    run = trainer("--num-steps", 40, "--log-steps", 20, "--sample-steps", 20, "--lr", 1e-6, *WANDB, env=dict(
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", SM_TRAINING_ENV="{}", TRAINING_JOB_NAME="job7",
        WANDB_HOST="alias", WANDB_GIT_COMMIT="deadbeef"))
    assert run.code == 0 and "\ufffd" in (trainer.folder / "c.log").read_text("utf-8"), run.err
    (tracked,) = run_files(trainer.folder)
    assert [row["step"] for row in tracked.rows] == [0, 20, 40] and tracked.exit_code == 0
    assert json.loads((trainer.folder / "c.wandb.json").read_text())["init"]["id"] == tracked.run_id
    assert (tracked.host, tracked.commit, tracked.config["git_commit"]) == ("alias", "deadbeef", "deadbeef")


def test_a_resumed_run_may_be_given_another_id(trainer):
    trainer("--num-steps", 2, *WANDB)
    run = trainer("--num-steps", 4, *WANDB, "--resume", "--wandb-run-id", "another")
    assert run.code == 0 and json.loads((trainer.folder / "c.wandb.json").read_text())["base"] == "another", run.err
    assert torch.load(run.checkpoint, weights_only=True)["state"]["wandb_run_id"] == "another"
    (trainer.folder / "c.wandb.json").unlink()  # a checkpoint that has been moved by itself
    trainer("--num-steps", 6, *WANDB, "--resume")
    assert json.loads((trainer.folder / "c.wandb.json").read_text())["base"] == "another"


def test_an_overwritten_run_and_a_branch_leave_the_others_chart_alone(trainer):
    def base(checkpoint="c"):
        return json.loads((trainer.folder / f"{checkpoint}.wandb.json").read_text())["base"]

    steps = ["--num-steps", 4, "--log-steps", 2]
    trainer(*steps, *WANDB)
    first = base()
    trainer(*steps, "--overwrite")  # another run, of which W&B knows nothing
    assert not (trainer.folder / "c.wandb.json").exists()
    trainer("--num-steps", 8, *WANDB, "--resume")
    second = base()
    assert second != first
    branch = trainer("--num-steps", 10, *WANDB, "--resume", "c.pt", checkpoint="branch.pt")
    assert branch.code == 0 and base("branch") not in (first, second), branch.err
    branched = base("branch")
    trainer("--num-steps", 12, *WANDB, "--resume", "c.pt", "--overwrite", checkpoint="branch.pt")
    assert base("branch") not in (first, second, branched)
    trainer("--num-steps", 12, *WANDB, "--resume", "c.prev.pt", "--overwrite")
    assert base() == second, "rolled back to an earlier step of the same run"


def test_sigterm_is_told_and_loses_no_row(trainer):
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, *WANDB]
    stopped = interrupt_after(trainer.arguments(flags), trainer.folder, r"step 50/100000")
    assert stopped.returncode == 143
    (tracked,) = run_files(trainer.folder)
    assert tracked.exit_code == 143 and {10, 20, 30, 40, 50} <= {row["step"] for row in tracked.rows}


def test_weights_with_wandb_are_those_without(trainer):
    plain = trainer("--num-steps", 12, "--dropout", 0.1, checkpoint="plain.pt")
    tracked = trainer("--num-steps", 12, "--dropout", 0.1, *WANDB, "--wandb-watch", "all", checkpoint="tracked.pt")
    assert all(torch.equal(tensor, tracked.weights()[name]) for name, tensor in plain.weights().items())
    for name, tensor in tracked.weights().items():
        for kind in ("gradients", "parameters"):
            histogram = tracked.rows[10][f"{kind}/{name}"]
            assert sum(histogram["counts"]) == tensor.numel() and len(histogram["edges"]) == 65


def test_a_setting_that_wandb_does_not_know_is_refused_only_where_wandb_is_on(trainer):
    run = trainer("--num-steps", 6, *WANDB, env={"WANDB_MODE": "no-such-mode"})
    assert run.code == 2 and run.err.count("\n") == 1 and "WANDB_MODE no-such-mode: not one of" in run.err
    assert list(trainer.folder.iterdir()) == []
    assert trainer("--num-steps", 6, env={"WANDB_MODE": "no-such-mode"}).code == 0


def test_disabled_is_like_no_flag(trainer):
    run = trainer("--num-steps", 6, *WANDB, "--wandb-mode", "disabled")
    assert run.code == 0 and "wandb:" not in run.out and not (trainer.folder / "wandb").exists()


def test_a_folder_that_cannot_be_one_is_left_for_that_of_the_checkpoint(trainer):
    (trainer.folder / "file").touch()
    run = trainer("--num-steps", 20, *WANDB, "--wandb-dir", "file/folder")
    (tracked,) = run_files(trainer.folder)
    assert run.code == 0 and [row["step"] for row in tracked.rows] == [0, 10, 20], run.out


def test_a_folder_that_is_full_costs_one_warning(trainer, tmp_path):
    command = trainer.arguments(["--num-steps", 300, *WANDB, "--wandb-dir", "disk"])
    run = Run(on_small_disk("64k", '"$@"', command, tmp_path), tmp_path, "c.pt")
    assert run.code == 0 and run.rows[300] and "wandb_tools.py sync c.pt" in run.out, run.out


def test_a_folder_that_may_not_be_written_is_left_for_that_of_the_checkpoint(trainer, tmp_path):
    command = trainer.arguments(["--num-steps", 20, *WANDB, "--wandb-dir", "disk", "--wandb-log-checkpoints", "last"])
    run = Run(on_small_disk("64k", 'mount -o remount,ro disk; "$@"', command, tmp_path), tmp_path, "c.pt")
    (tracked,) = run_files(tmp_path)
    assert run.code == 0 and tracked.rows and list(tracked.folder.rglob("*.pt")), run.out


def test_without_the_package_training_goes_on(trainer, tmp_path):
    (tmp_path / "wandb").mkdir()  # a run folder of that name is importable, too
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'wandb': raise ModuleNotFoundError('No module named wandb', name='wandb')\n"
        "sys.meta_path.insert(0, Gone())\n")
    run = trainer("--num-steps", 20, *WANDB, env={"PYTHONPATH": str(tmp_path)})
    assert run.code == 0 and run.out.count("wandb: ") == 1 and "pip install wandb" in run.out, run.out


def test_the_code_may_be_in_a_folder_of_any_name(trainer, tmp_path):
    """PYTHONPATH could not name one with a colon. Nor is anything of the working folder taken for ours."""
    name = "a:b ü"
    shutil.copytree(ROOT / "mini_llm", tmp_path / name / "mini_llm")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path / name)
    (tmp_path / "mini_llm").mkdir()
    for theirs in "mini_llm/__init__.py", "data.py", "model.py":
        (tmp_path / theirs).write_text("raise SystemExit('not ours')")
    command = [part.replace(str(ROOT), str(tmp_path / name)) for part in trainer.arguments(["--num-steps", 2, *WANDB])]
    run = Run(zygote.run(command, tmp_path, environment()), tmp_path, "c.pt")
    (tracked,) = run_files(tmp_path)
    assert run.code == 0 and [row["step"] for row in tracked.rows] == [0, 2], run.out
    (advice,) = re.findall(r"recorded in .*; send it later: (.*)", run.out)
    assert shlex.split(advice) == ["python", f"{name}/wandb_tools.py", "sync", "c.pt"]


def test_nothing_of_wandb_is_imported_without_the_flag():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import train, train_ddp; "
            "print([name for name in sys.modules if name.removeprefix('mini_llm.').split('.')[0] in "
            "('wandb', 'wandb_sink', 'wandb_follower', 'wandb_client', 'datasets', 'transformers', 'tensorboard', "
            "'matplotlib', 'tokenizers')])")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_flags_of_wandb_that_track_nothing_are_told(trainer):
    run = trainer("--dry-run", "--wandb-project", "mine")
    assert run.code == 0 and "] warning: not tracked by W&B" in run.out
    assert "not tracked" not in trainer("--dry-run").out


def test_the_tutorials_command_reports_every_field_it_prints(trainer, tmp_path):
    """Document 001's command, with a smaller model and shorter sequences: torchrun, GPT-2's tokenizer, W&B."""
    if not (SHARED / "hf-home").exists():
        pytest.skip("no local Hugging Face cache with gpt2 in it")
    (tmp_path / "data").mkdir()
    shutil.copy(SHARED / "corpora" / "tinyshakespeare.txt", tmp_path / "data" / "train.txt")
    run = trainer("--train-data", "data/train.txt", "--tokenizer-name", "gpt2", "--seq-len", 128, "--batch-size", 2,
                  "--num-steps", 50, "--use-wandb", "--wandb-project", "mini-llm", "--wandb-run-name", "ddp_test",
                  "--n-layers", 2, "--n-heads", 2, "--d-model", 64, "--eval-tokens", 2048, "--device", "cpu",
                  ranks=2, tiny=False, data=False, env={"HF_HOME": str(SHARED / "hf-home")}, timeout=400)
    assert run.code == 0, run.err
    assert run.rows[0]["val/loss"] == pytest.approx(math.log(50257), rel=0.02)
    for step in (10, 20, 30, 40, 50):
        line = next(line for line in run.out.splitlines() if f"step {step}/50" in line)
        for part in ("epoch 1", "lr ", "step time ", "/rank", " global", "train loss ", "val loss ", "val ppl ",
                     "val bpb ", "dt ", "eta ", "amp "):
            assert part in line, (part, line)
    (tracked,) = run_files(tmp_path)
    summary = {"amp", "global_tokens_per_sec", "lr", "tokens_per_sec_per_rank", "train/loss", "val/loss", "val/ppl"}
    assert summary <= tracked.rows[-1].keys() and tracked.name == "ddp_test"
