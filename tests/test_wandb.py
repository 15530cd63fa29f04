"""The real SDK, offline: what it wrote is read back record by record."""

import json
import signal
import subprocess
import sys

from conftest import ROOT, SHARED, environment, interrupt_after
from wandb_file import run_files

WANDB = ["--use-wandb", "--wandb-project", "mini-llm", "--wandb-run-name", "named"]


def test_a_run_is_tracked_with_all_its_config_and_rows(trainer):
    run = trainer("--num-steps", 20, "--log-steps", 5, *WANDB)
    assert run.code == 0, run.err
    (tracked,) = run_files(trainer.folder)
    assert (tracked.project, tracked.name, tracked.exit_code) == ("mini-llm", "named", 0)
    assert tracked.config["d_model"] == 32 and tracked.config["lr"] == 1e-3 and tracked.config["world_size"] == 1
    assert [row["step"] for row in tracked.rows] == [0, 5, 10, 15, 20]
    for row in tracked.rows:
        jsonl = run.rows[row["step"]]
        assert {name: value for name, value in row.items() if not name.startswith("_")} == {
            name: value for name, value in jsonl.items() if name != "time"}
    assert json.loads((trainer.folder / "c.wandb.json").read_text())["run_id"] == tracked.run_id


def test_a_killed_run_and_its_resume_are_one_run(trainer):
    flags = ["--log-steps", 100, "--eval-steps", 0, "--save-steps", 200, "--lr-scheduler", "none", *WANDB]
    interrupt_after(trainer.arguments([*flags, "--num-steps", 100000]), trainer.folder, r"step 2500/", signal.SIGKILL)
    resumed = trainer(*flags, "--num-steps", 2800, "--resume", "auto")
    first, second = run_files(trainer.folder)
    assert first.run_id == second.run_id and second.rows[0]["step"] == 2500
    for part in (first, second):
        for row in part.rows:
            assert not row["step"] or row["train/loss"] == resumed.rows[row["step"]]["train/loss"]
    seen = {row["step"] for part in (first, second) for row in part.rows}
    # Only what the last second before the kill brought may be missing, and metrics.jsonl has it.
    assert seen <= resumed.rows.keys() and len(seen) > len(resumed.rows) / 2


def test_a_run_killed_before_its_first_checkpoint_keeps_its_id(trainer):
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, "--save-steps", 0, *WANDB]
    interrupt_after(trainer.arguments(flags), trainer.folder, r"step 20/100000", signal.SIGKILL)
    kept = json.loads((trainer.folder / "c.wandb.json").read_text())["run_id"]
    assert not (trainer.folder / "c.pt").exists()
    trainer("--num-steps", 5, *WANDB, "--resume", "auto")
    assert [part.run_id for part in run_files(trainer.folder)][-1] == kept
    trainer("--num-steps", 5, *WANDB, "--overwrite")
    assert [part.run_id for part in run_files(trainer.folder)][-1] != kept, "a new run is a new chart"


def test_sigterm_is_told_and_loses_no_row(trainer):
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0, *WANDB]
    stopped = interrupt_after(trainer.arguments(flags), trainer.folder, r"step 50/100000")
    assert stopped.returncode == 143
    (tracked,) = run_files(trainer.folder)
    assert tracked.exit_code == 143 and {10, 20, 30, 40, 50} <= {row["step"] for row in tracked.rows}


def test_weights_with_wandb_are_those_without(trainer):
    import torch

    plain = trainer("--num-steps", 12, "--dropout", 0.1, checkpoint="plain.pt")
    tracked = trainer("--num-steps", 12, "--dropout", 0.1, *WANDB, checkpoint="tracked.pt")
    assert all(torch.equal(tensor, tracked.weights()[name]) for name, tensor in plain.weights().items())


def test_a_wandb_that_fails_is_one_warning(trainer):
    run = trainer("--num-steps", 6, *WANDB, env={"WANDB_MODE": "no-such-mode"})
    assert run.code == 0 and run.out.count("wandb: ") == 1 and "training goes on without it" in run.out, run.out
    assert sorted(run.rows) == [0, 6]


def test_without_the_package_training_goes_on(trainer, tmp_path):
    (tmp_path / "wandb").mkdir()  # a run folder of that name is importable, too
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1))\n"
            "class Gone:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'wandb': raise ModuleNotFoundError('No module named wandb', name='wandb')\n"
            "sys.meta_path.insert(0, Gone())\n"
            "from train import main; main()\n")
    (tmp_path / "without.py").write_text(code)
    arguments = trainer.arguments(["--num-steps", 6, *WANDB])
    arguments[1:2] = [str(tmp_path / "without.py"), str(ROOT)]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=120)
    assert run.returncode == 0 and "pip install wandb" in run.stdout, run.stdout


def test_nothing_of_wandb_is_imported_without_the_flag():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import train, train_ddp; "
            "print([name for name in sys.modules if name.split('.')[0] in "
            "('wandb', 'wandb_sink', 'datasets', 'transformers', 'tensorboard', 'matplotlib', 'tokenizers')])")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_the_tutorials_command_reports_every_field_it_prints(trainer, tmp_path):
    """Document 001's command, with fewer layers' worth of time: torchrun, GPT-2's tokenizer, W&B."""
    import math
    import shutil

    import pytest

    if not (SHARED / "hf-home").exists():
        pytest.skip("no local Hugging Face cache with gpt2 in it")
    (tmp_path / "data").mkdir()
    shutil.copy(SHARED / "corpora" / "tinyshakespeare.txt", tmp_path / "data" / "train.txt")
    run = trainer("--train-data", "data/train.txt", "--tokenizer-name", "gpt2", "--seq-len", 512, "--batch-size", 2,
                  "--num-steps", 50, "--use-wandb", "--wandb-project", "mini-llm", "--wandb-run-name", "ddp_test",
                  "--n-layers", 2, "--n-heads", 4, "--d-model", 128, "--eval-tokens", 4096, "--device", "cpu",
                  ranks=2, tiny=False, data=False, env={"HF_HOME": str(SHARED / "hf-home")}, timeout=400)
    assert run.code == 0, run.err
    assert run.rows[0]["val/loss"] == pytest.approx(math.log(50257), rel=0.02)
    for step in (10, 20, 30, 40, 50):
        line = next(line for line in run.out.splitlines() if f"step {step}/50" in line)
        for part in ("epoch 1", "lr ", "step time ", "/rank", " global", "train loss ", "val loss ", "val ppl ", "dt ",
                     "eta ", "amp "):
            assert part in line, (part, line)
    (tracked,) = run_files(tmp_path)
    summary = {"amp", "global_tokens_per_sec", "lr", "tokens_per_sec_per_rank", "train/loss", "val/loss", "val/ppl"}
    assert summary <= tracked.rows[-1].keys() and tracked.name == "ddp_test"
