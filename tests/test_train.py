import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import zygote
from conftest import ROOT, Run, command, environment, eventually, interrupt_after

from mini_llm.tracking import ReportConfig
from optim import OptimConfig, lr_at

full = pytest.mark.full


def same(a, b):
    """Bit for bit: every weight, and every loss that both runs report."""
    ours, theirs = a.weights(), b.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    common = a.losses().keys() & b.losses().keys()
    assert common >= {key for key in b.losses() if key[0] > 0}
    return all(a.losses()[key] == b.losses()[key] for key in common)


def test_a_run_reports_what_is_documented_and_writes_what_it_says(trainer):
    run = trainer("--num-steps", 20, "--log-steps", 5, "--save-steps", 10, "--use-tensorboard")
    assert run.code == 0, run.err
    losses = [row["train/loss"] for step, row in sorted(run.rows.items()) if step]
    assert re.search(rf"\ntrain loss [▁-█]{{4}} +{losses[0]:.4g} → {losses[-1]:.4g}\n", run.out), run.out
    assert sorted(run.rows) == [0, 5, 10, 15, 20]
    assert run.rows[0]["val/loss"] == pytest.approx(math.log(257), rel=0.02)
    assert run.rows[20]["val/loss"] < run.rows[0]["val/loss"]
    names = {"train/loss", "val/loss", "val/ppl", "val/bits_per_byte", "lr", "tokens_per_sec_per_rank",
             "tokens_per_sec_per_rank/min", "tokens_per_sec_per_rank/max", "global_tokens_per_sec", "train/grad_norm",
             "train/step_time_sec", "train/tokens", "train/epoch", "smoothed/loss", "smoothed/tokens_per_sec",
             "smoothed/step_time", "amp", "time/eval_sec", "time/dt_sec"}
    assert names <= run.rows[20].keys(), names - run.rows[20].keys()
    assert run.rows[20]["val/ppl"] == pytest.approx(math.exp(run.rows[20]["val/loss"]))
    assert run.rows[20]["train/tokens"] == 20 * 4 * 32
    assert 0 < run.rows[20]["train/forward_time_sec"] < run.rows[20]["train/step_time_sec"]
    per_token = float(re.search(r"(\S+) FLOPs per token", run.out)[1])
    assert run.rows[20]["train/flops"] == pytest.approx(20 * 4 * 32 * per_token, 0.01)
    assert f": {run.rows[20]['train/epoch']:.3g} epochs, " in run.out
    line = next(line for line in run.out.splitlines() if "step 10/20" in line)
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] epoch 1 step 10/20 \| lr \S+ \| step time "
                        r"\S+s \| tok/s \S+/rank \S+ global \| train loss \S+ \| val loss \S+ \| val ppl \S+ \| "
                        r"val bpb \S+ \| grad norm \S+ \| (mfu \S+%|\S+ TFLOP/s) \| dt \S+s \| eta \S+ \| amp \S+",
                        line), line
    assert run.rows[10]["amp"] == (not line.endswith("amp off"))
    assert "\r" not in run.out + run.err, "a progress bar in a pipe"
    written = {path.name for path in run.checkpoint.parent.iterdir()}
    assert written == {"c.pt", "c.prev.pt", "c.best.pt", "c.log", "c.metrics.jsonl", "c.config.toml", "c.tokenizer",
                       "c.tensorboard", "c.lock"}
    assert all(name in run.out for name in written - {"c.lock"})
    assert (run.checkpoint.parent / "c.log").read_text() in run.out, "the log file is what the console showed"
    assert "Arguments: " in (run.checkpoint.parent / "c.log").read_text()
    assert "sample at step 20" in run.out


def test_the_loss_reported_is_the_loss_computed(trainer, text, cache):
    """An oracle of the whole pipeline: the same first steps by hand, in plain PyTorch."""
    from data import Corpus, DataConfig
    from model import GPT, GPTConfig

    flags = ["--log-steps", 3, "--no-amp", "--grad-accum-steps", 2, "--warmup-steps", 4, "--weight-decay", 0.2,
             "--grad-clip-norm", 0.5, "--lr-scheduler", "none", "--lr", 0.01]
    run = trainer(*flags, "--num-steps", 6, "--save-steps", 4, "--keep-last", 2)
    corpus = Corpus(DataConfig(train_data=[str(text)], cache_dir=str(cache), tokenizer_name="byte", seq_len=32))
    torch.manual_seed(1337)
    model = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=32, max_position_embeddings=64, vocab_size=257))
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / 4)
        x, y = map(torch.from_numpy, corpus.batch(step, 8))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert run.rows[3]["train/loss"] == pytest.approx(sum(losses[:3]) / 3, abs=1e-5)
    assert run.rows[6]["train/loss"] == pytest.approx(sum(losses[3:]) / 3, abs=1e-5)
    assert run.rows[6]["train/grad_norm"] == pytest.approx(norms[5], rel=1e-3)
    assert run.rows[3]["lr"] == pytest.approx(0.0075) and run.rows[6]["lr"] == pytest.approx(0.01)
    # Resumed within an interval: in other micro-batches it is the same loss, in other intervals that of its own steps.
    flags += ["--batch-size", 2, "--grad-accum-steps", 4]
    on = trainer(*flags, "--num-steps", 5, "--resume", "c.step-00000004.pt", checkpoint="on.pt")
    assert on.rows[5]["train/loss"] == pytest.approx(sum(losses[3:5]) / 2, abs=1e-5)
    assert "another --batch-size: was 4, is 2" in on.out and "--grad-accum-steps: " not in on.out
    on = trainer(*flags, "--num-steps", 6, "--log-steps", 2, "--resume", checkpoint="on.pt")
    assert on.rows[6]["train/loss"] == pytest.approx(losses[5], abs=1e-5)


def test_several_validation_sources_have_a_loss_each(trainer, text):
    """The oracle of each is a run with that one alone; `val/loss` is their mean by tokens."""
    whole = text.read_text()
    sources = {"a": whole[:9_000].upper(), "b": whole[:3_000]}
    for name, content in sources.items():
        (trainer.folder / f"{name}.txt").write_text(content)
    flags = ["--num-steps", 4, "--log-steps", 2, "--eval-steps", 2, "--no-amp", "--eval-tokens", 0, "--lr", 0.01]
    both = trainer(*flags, "--val-data", "a.txt", "b.txt", checkpoint="both.pt")
    assert both.code == 0 and sorted(both.rows) == [0, 2, 4], both.err
    tokens = {name: len(content) // 32 * 32 for name, content in sources.items()}  # in whole windows; a byte is a token
    for name in sources:
        alone = trainer(*flags, "--val-data", f"{name}.txt", checkpoint=f"{name}.pt")
        assert not any(key.startswith("val/loss/") for key in alone.rows[0])
        for step, row in alone.rows.items():
            assert both.rows[step][f"val/loss/{name}"] == pytest.approx(row["val/loss"], abs=1e-6)
    few = trainer(*flags, "--num-steps", 1, "--eval-tokens", 96, "--val-data", "a.txt", "b.txt", checkpoint="few.pt")
    for row in [*both.rows.values(), *few.rows.values()]:  # few: of three windows the smaller one has a third
        mean = sum(row[f"val/loss/{name}"] * tokens[name] for name in sources) / sum(tokens.values())
        assert row["val/loss"] == pytest.approx(mean, abs=1e-6)
    assert abs(both.rows[4]["val/loss/a"] - both.rows[4]["val/loss/b"]) > 0.01, "equal sources would show nothing"


def test_each_source_of_a_mixture_has_a_loss_of_its_own(trainer, text):
    """On what is held out of it, if that is a sequence or more."""
    whole = text.read_text()
    for name, content in {"a": whole[:9_000].upper(), "b": whole[:3_000], "c": whole[:300]}.items():
        (trainer.folder / f"{name}.txt").write_text(content)
    flags = ["--num-steps", 2, "--log-steps", 1, "--eval-tokens", 0, "--no-amp", "--train-data", "a.txt", "b.txt"]
    plain = trainer(*flags, checkpoint="plain.pt")
    mixed = trainer(*flags, "--train-weights", 1, 1, checkpoint="mixed.pt")
    assert plain.code == mixed.code == 0, mixed.err
    assert not any(key.startswith("val/loss/") for key in plain.rows[0])
    folder = next(record["config"]["corpus"] for record in mixed.records if record.get("event") == "config")
    spans = json.loads((trainer.folder / folder / "meta.json").read_text())["val_sources"]
    row, windows = mixed.rows[0], {name: (count - 1) // 32 for name, (_, count) in spans.items()}
    mean = sum(row[f"val/loss/{name}"] * count for name, count in windows.items()) / sum(windows.values())
    assert row["val/loss"] == pytest.approx(mean, abs=1e-6) and row["val/loss/a"] != row["val/loss/b"]
    short = trainer(*flags, "c.txt", "--train-weights", 1, 1, 1, checkpoint="short.pt")
    assert short.code == 0 and not any(key.startswith("val/loss/") for key in short.rows[0]), short.err
    for run in (mixed, short):  # and the same by evaluate.py
        found = zygote.run([*command("evaluate.py"), "--checkpoint-path", run.checkpoint.name, "--no-amp", "--json",
                            "--device", "cpu"], trainer.folder, environment())
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["loss"] == pytest.approx(run.rows[2]["val/loss"], abs=1e-5)


# The runs of the next test cross an epoch boundary (99 windows, 8 a step) and stop at a multiple of no interval.
RESUMED = ["--max-tokens", 3200, "--batch-size", 4, "--grad-accum-steps", 2, "--dropout", 0.2, "--log-steps", 5,
           "--eval-steps", 4, "--save-steps", 6, "--warmup-steps", 5, "--lr-scheduler", "none"]


@pytest.mark.parametrize(("precision", "optimizer"), [
    ("fp32", "adamw"), ("bf16", "muon"), ("fp16", "adamw"),
    *(pytest.param(*both, marks=full) for both in [("fp32", "muon"), ("bf16", "adamw"), ("fp16", "muon")])])
def test_resume_repeats_the_run_bit_for_bit(trainer, precision, optimizer):
    precision = ["--no-amp"] if precision == "fp32" else ["--amp-dtype", precision]
    precision += ["--optimizer", optimizer]
    straight = trainer(*RESUMED, *precision, "--num-steps", 23, checkpoint="straight.pt")
    first = trainer(*RESUMED, *precision, "--num-steps", 17, checkpoint="resumed.pt")
    assert straight.code == first.code == 0, straight.err + first.err
    second = trainer(*RESUMED, *precision, "--num-steps", 23, "--resume", checkpoint="resumed.pt")
    assert second.code == 0 and "Resumed at step 17" in second.out, second.out + second.err
    assert same(second, straight)
    assert straight.rows[23]["train/epoch"] > 1
    assert (23, "train/loss") in straight.losses()


def test_a_run_stopped_by_sigterm_and_resumed_is_the_uninterrupted_run(trainer):
    flags = ["--num-steps", 250, "--log-steps", 10, "--eval-steps", 25, "--save-steps", 60, "--dropout", 0.1]
    straight = trainer(*flags, checkpoint="straight.pt")
    stopped = interrupt_after(trainer.arguments(flags), trainer.folder, r"step 80/250")
    assert stopped.returncode == 143, stopped.stderr
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved; go on with --resume", stopped.stdout)[1])
    assert 80 <= step < 250 and torch.load(trainer.folder / "c.pt", weights_only=True)["state"]["step"] == step
    resumed = trainer(*flags, "--resume", "auto")
    assert f"Resumed at step {step}" in resumed.out
    assert same(resumed, straight)
    assert list(resumed.rows) == list(straight.rows)


@pytest.mark.parametrize("change", ["appended to", "removed"])
def test_a_run_keeps_its_tokens_if_its_text_changes(trainer, text, change):
    own = trainer.folder / "own.txt"
    shutil.copy(text, own)
    flags = ["--train-data", "own.txt", "--log-steps", 5]
    straight = trainer(*flags, "--num-steps", 20, checkpoint="straight.pt")
    trainer(*flags, "--num-steps", 10)
    own.write_text(own.read_text() + "More of it.") if change == "appended to" else own.unlink()
    tried = trainer(*flags, "--num-steps", 20, "--resume", "--dry-run")
    resumed = trainer(*flags, "--num-steps", 20, "--resume")
    assert resumed.code == tried.code == 0 and same(resumed, straight), resumed.err + tried.err
    told = {"appended to": "the text has changed, or what splits it or makes tokens of it",
            "removed": "--train-data own.txt: no such file or folder"}[change]
    assert f"{told}: this run goes on with the tokens that it began with" in resumed.out
    assert "tokenized" not in resumed.out
    other = trainer(*flags, "--max-tokens", 9000, "--num-steps", 20, "--resume", checkpoint="straight.pt")
    assert other.code == 2, "with other flags it is another text that is wanted"
    (trainer.folder / "c.pt").write_bytes(b"damaged")
    mended = trainer(*flags, "--num-steps", 30, "--resume")
    assert mended.code == 0 and "falling back to c.prev.pt" in mended.out and told in mended.out, mended.err


def test_a_runs_own_config_goes_with_it(trainer, text, cache):
    """A copied or moved run is the one that is resumed, not what is where it was."""
    (trainer.folder / "runs").mkdir()
    assert trainer("--num-steps", 5, checkpoint="runs/a.pt").code == 0
    shutil.copytree(trainer.folder / "runs", trainer.folder / "moved")
    before = (trainer.folder / "runs" / "a.pt").read_bytes()
    for more in (["--resume", "--num-steps", "7"], ["--resume", "auto", "--num-steps", "9"]):
        run = zygote.run([*command("train.py"), "--config", "moved/a.config.toml", *more], trainer.folder,
                         environment())
        assert run.returncode == 0 and " from moved/a.pt" in run.stdout, run.stdout + run.stderr
    assert (trainer.folder / "runs" / "a.pt").read_bytes() == before
    assert torch.load(trainer.folder / "moved" / "a.pt", weights_only=True)["state"]["step"] == 9
    again = trainer("--config", "moved/a.config.toml", "--num-steps", 3, checkpoint="new.pt")
    assert again.code == 0 and again.checkpoint.exists(), "a flag wins"


def test_ctrl_c_saves_and_leaves_with_130(trainer):
    flags = ["--num-steps", 100000, "--log-steps", 10, "--eval-steps", 0]
    stopped = interrupt_after(trainer.arguments(flags), trainer.folder, r"step 30/100000", signal.SIGINT)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert (trainer.folder / "c.pt").exists()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(trainer):
    flags = ["--num-steps", 30, "--save-steps", 10, "--log-steps", 10]
    straight = trainer(*flags)
    damaged = straight.checkpoint.read_bytes()
    straight.checkpoint.write_bytes(damaged[:len(damaged) // 2])
    resumed = trainer(*flags, "--resume")
    assert resumed.code == 0 and "falling back to c.prev.pt" in resumed.out and "Resumed at step 20" in resumed.out
    assert torch.load(resumed.checkpoint, weights_only=True)["state"]["step"] == 30


def test_a_finished_run_has_nothing_to_resume(trainer):
    first = trainer("--num-steps", 5)
    assert re.search(r"curves: python \S+report.py c.pt --terminal$", first.out, re.M), "from here"
    again = trainer("--num-steps", 4, "--resume")
    assert again.code == 0 and "already at step 5 of 4: raise --num-steps" in again.out and "W&B" not in again.out
    again = trainer("--num-steps", 5, "--resume", "--use-wandb")
    assert again.code == 0 and "W&B lacks" not in again.out, "of a run that was not tracked"
    (trainer.folder / "c.wandb.json").write_text("{}")
    again = trainer("--num-steps", 5, "--resume", "--use-wandb")
    assert again.code == 0 and re.search(r"rows that W&B lacks: python \S+wandb_tools.py sync c.pt$", again.out, re.M)
    branch = trainer("--num-steps", 4, "--resume", again.checkpoint, "--use-wandb", checkpoint="new.pt")
    assert branch.code == 0 and "already at step 5 of 4" in branch.out and "W&B lacks" not in branch.out, branch.err


@pytest.mark.parametrize("length", [["--num-epochs", 1.5], ["--num-tokens", "1e3"]], ids=str)
def test_a_run_is_as_long_as_so_many_epochs_or_tokens(trainer, length):
    flags = ["--max-tokens", 3200, "--log-steps", 10, "--warmup-steps", 2]
    run = trainer(*flags, *length)
    assert run.code == 0, run.err
    n_windows = int(re.search(r"train dataset size: ([\d,]+)", run.out)[1].replace(",", ""))
    n = max(run.rows)
    assert n == math.ceil({"--num-epochs": 1.5 * n_windows, "--num-tokens": 1e3 / 32}[length[0]] / 4)
    assert run.rows[n]["train/epoch"] == pytest.approx(4 * n / n_windows)
    assert run.rows[n]["lr"] == pytest.approx(1e-4), "the schedule ends with the run"
    toml = (trainer.folder / "c.config.toml").read_text()
    assert f"num_steps = {n}\n" in toml and "num_epochs = 0.0" in toml and "num_tokens = 0.0" in toml
    for again in (flags + length, ["--config", "c.config.toml"]):
        run = trainer(*again, "--resume", tiny=again[0] != "--config")
        assert run.code == 0 and f"already at step {n} of {n}" in run.out, run.err
        assert "resumed with another" not in run.out


def test_the_log_of_a_resumed_run_goes_on(trainer):
    trainer("--num-steps", 5)
    assert trainer("--num-steps", 8, "--resume").code == 0
    log = (trainer.folder / "c.log").read_text()
    for once in ("Starting from scratch", " step 5/5 | ", "Resumed at step 5 from c.pt", " step 8/8 | "):
        assert log.count(once) == 1, once


def test_the_configuration_of_a_run_that_replaced_another_replaces_none(trainer):
    assert trainer("--num-steps", 2, "--overwrite").code == 0
    again = trainer("--config", trainer.folder / "c.config.toml", tiny=False)
    assert again.code == 2 and "there is a checkpoint already" in again.err


def test_another_schedule_may_be_resumed_and_is_said(trainer):
    trainer("--num-steps", 5)
    again = trainer("--num-steps", 8, "--lr", 0.002, "--resume")
    assert again.code == 0 and "another --lr: was 0.001, is 0.002" in again.out
    assert again.rows[8]["lr"] == lr_at(7, OptimConfig(lr=0.002, num_steps=8))


@pytest.mark.parametrize("before, now", [("adamw", "muon"), pytest.param("muon", "adamw", marks=full)])
def test_another_optimizer_is_another_run(trainer, before, now):
    trainer("--num-steps", 5, "--optimizer", before)
    again = trainer("--num-steps", 8, "--resume", "--optimizer", now)
    assert again.code == 2 and f"--optimizer was {before}, is {now}" in again.err and again.err.count("\n") == 1
    assert "--init-from c.pt with another --checkpoint-path" in again.err, "without its --keep-optimizer"


def test_decay_and_betas_of_a_resumed_run_are_the_flags(trainer):
    trainer("--num-steps", 5)
    again = trainer("--num-steps", 6, "--resume", "--weight-decay", 0.5, "--beta2", 0.99)
    group = torch.load(again.checkpoint, weights_only=True)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.9, 0.99)


def test_precision_may_change_on_the_way(trainer):
    trainer("--num-steps", 5, "--amp-dtype", "bf16")
    for steps, flags in ((8, ["--amp-dtype", "fp16"]), (11, ["--no-amp"])):
        again = trainer("--num-steps", steps, "--resume", *flags)
        assert again.code == 0, again.err


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=full)])
def test_a_step_that_overflows_in_fp16_is_repeated_at_a_smaller_scale(trainer, optimizer):
    flags = ["--amp-dtype", "fp16", "--lr", 0.3, "--grad-clip-norm", 0, "--warmup-steps", 0, "--lr-scheduler", "linear",
             "--log-steps", 1, "--eval-steps", 0, "--optimizer", optimizer, "--num-steps", 30]
    straight = trainer(*flags, "--save-steps", 20, "--keep-last", 2, checkpoint="straight.pt")
    assert straight.code == 0, straight.err
    saved = torch.load(straight.checkpoint, weights_only=True)
    assert saved["scaler"]["scale"] < 65536, "nothing has overflowed: the test shows nothing"
    assert sorted(straight.rows) == list(range(31)) and saved["state"]["tokens"] == 30 * 4 * 32
    schedule = OptimConfig(lr=0.3, warmup_steps=0, lr_scheduler="linear", num_steps=30)
    assert [straight.rows[step]["lr"] for step in range(1, 31)] == [lr_at(step, schedule) for step in range(30)]
    assert straight.rows[30]["train/skipped_steps"] == 0, "else the schedule has gone on without a step"
    resumed = trainer(*flags, "--resume", "straight.step-00000020.pt", checkpoint="resumed.pt")
    assert all(torch.equal(weight, resumed.weights()[name]) for name, weight in straight.weights().items())
    assert all(straight.rows[step]["train/loss"] == resumed.rows[step]["train/loss"] for step in range(21, 31))


def test_an_overwritten_run_is_never_resumed_as_the_new_one(trainer):
    trainer("--num-steps", 30, "--save-steps", 10)
    flags = ["--log-steps", 10, "--eval-steps", 0, "--save-steps", 0, "--num-steps", 100000]
    interrupt_after(trainer.arguments([*flags, "--overwrite"]), trainer.folder, "step 20/100000", signal.SIGKILL)
    again = trainer("--num-steps", 5, "--resume", "auto")
    assert again.code == 0 and "Starting from scratch" in again.out


def test_a_branch_leaves_its_trunk_alone(trainer):
    trunk = trainer("--num-steps", 10, "--save-steps", 5, "--keep-last", 2)
    before = trunk.checkpoint.read_bytes()
    branch = trainer("--num-steps", 12, "--resume", "c.step-00000005.pt", checkpoint="branch.pt")
    assert "Resumed at step 5" in branch.out and trunk.checkpoint.read_bytes() == before


def test_a_run_killed_with_nothing_but_its_best_checkpoint_goes_on_from_that(trainer):
    flags = ["--eval-steps", 20, "--log-steps", 20, "--save-steps", 0, "--lr-scheduler", "none"]
    interrupt_after(trainer.arguments([*flags, "--num-steps", 100_000]), trainer.folder, r"step 60/", signal.SIGKILL)
    assert (trainer.folder / "c.best.pt").exists() and not (trainer.folder / "c.pt").exists()
    refused = trainer(*flags, "--num-steps", 200)
    assert refused.code == 2 and "there is a checkpoint already" in refused.err
    whole = trainer(*flags, "--num-steps", 200, checkpoint="whole.pt")
    resumed = trainer(*flags, "--num-steps", 200, "--resume", "auto")
    assert resumed.code == 0 and same(resumed, whole), resumed.err
    assert re.search(r"Resumed at step [1-9]", resumed.out)


def test_a_sample_is_not_training_time(trainer):
    run = trainer("--num-steps", 10, "--log-steps", 5, "--sample-steps", 5, "--eval-steps", 0,
                  "--sample-prompt", "To be")
    assert len(re.findall(r"sample at step (5|10):\nTo be", run.out)) == 2
    assert 0 < run.rows[10]["time/sample_sec"] < run.rows[10]["time/dt_sec"]
    assert run.rows[10]["train/step_time_sec"] * 5 + run.rows[10]["time/sample_sec"] < run.rows[10]["time/dt_sec"]


def test_a_prompt_that_the_tokenizer_does_not_know_is_refused_at_the_start(trainer):
    run = trainer("--num-steps", 10, "--tokenizer-name", "char", "--sample-prompt", "Ж")
    assert run.code == 2 and run.err.count("\n") == 1 and not run.checkpoint.exists(), run.err
    assert "--sample-prompt 'Ж': the tokenizer knows none of these characters; give another" in run.err


def test_a_console_that_is_closed_or_narrow_is_no_reason_to_end(trainer):
    flags = ["--num-steps", 20, "--sample-steps", 10]
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *trainer.arguments(flags)],
                            cwd=trainer.folder, env=environment(), timeout=200)
    assert closed.returncode == 0 and "Training finished" in (trainer.folder / "c.log").read_text()
    (script := trainer.folder / "odd.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "train.sample_text = lambda *_: 'Zwölf €'\n"
        "train.main()\n")
    narrow = trainer(*flags, "--overwrite", script=script, env=dict(PYTHONIOENCODING="ascii"))
    assert narrow.code == 0 and "Zw?lf ?" in narrow.out, narrow.err
    assert "Zwölf €" in (trainer.folder / "c.log").read_text("utf-8")


def test_two_runs_never_write_to_one_path(trainer):
    """The second is refused, or where it is to go on from the first, waits for that to end."""
    long = ["--num-steps", 100_000, "--log-steps", 1000, "--eval-steps", 0]  # few lines: nobody reads them
    first = second = zygote.Popen(trainer.arguments(long), cwd=trainer.folder, text=True, env=environment(),
                                  stdout=subprocess.PIPE)
    try:
        next(line for line in first.stdout if "step 0/" in line)
        before = (trainer.folder / "c.config.toml").stat()
        for flags in ([], ["--overwrite"]):
            other = trainer("--num-steps", 2, *flags)
            assert other.code == 2 and other.err.count("\n") == 1 and "another run writes there now" in other.err
        assert (trainer.folder / "c.config.toml").stat() == before
        first.send_signal(signal.SIGUSR1)  # a checkpoint
        eventually((trainer.folder / "c.pt").exists)
        second = zygote.Popen(trainer.arguments([*long, "--resume", "auto"]), cwd=trainer.folder, text=True,
                              env=environment(), stdout=subprocess.PIPE)
        next(line for line in second.stdout if "waiting for the run that still writes to c.pt" in line)
        first.send_signal(signal.SIGTERM)
        stopped = re.search(r"stopped by SIGTERM at step (\d+)", first.communicate(timeout=30)[0])[1]
        resumed = next(line for line in second.stdout if "Resumed at step" in line)
        assert resumed.endswith(f"Resumed at step {stopped} from c.pt\n"), (resumed, stopped)
    finally:
        for run in (first, second):
            run.kill()
            run.communicate()


def test_fp16_clips_gradients_of_their_true_size(trainer):
    flags = ["--num-steps", 6, "--log-steps", 2, "--eval-steps", 0]
    exact = trainer(*flags, "--no-amp", checkpoint="exact.pt")
    scaled = trainer(*flags, "--amp-dtype", "fp16", checkpoint="scaled.pt")
    for step in (2, 4, 6):
        assert scaled.rows[step]["train/grad_norm"] == pytest.approx(exact.rows[step]["train/grad_norm"], rel=0.02)


def test_histograms_are_of_the_step_reported_and_of_gradients_of_their_true_size(trainer):
    flags = ["--num-steps", 4, "--eval-steps", 0, "--wandb-watch", "all", "--grad-clip-norm", 0.01]
    exact = trainer(*flags, "--no-amp", "--log-steps", 2, checkpoint="exact.pt")
    every = trainer(*flags, "--no-amp", "--log-steps", 1, checkpoint="every.pt")
    scaled = trainer(*flags, "--amp-dtype", "fp16", "--log-steps", 2, checkpoint="scaled.pt")
    for step in (2, 4):
        found, same_step, of_fp16 = ({name: value for name, value in run.rows[step].items() if isinstance(value, dict)}
                                     for run in (exact, every, scaled))
        assert found == same_step and "parameters/tok_emb.weight" in found
        edges = [values["gradients/tok_emb.weight"]["edges"] for values in (found, of_fp16)]
        assert edges[0] == pytest.approx(edges[1], abs=0.1 * edges[0][-1]) and edges[0][-1] > 0.01, "clipped"
    assert "not tracked by W&B" not in exact.out, "a flag that counts without W&B, too"


def test_histograms_are_made_of_no_other_steps(trainer, tmp_path):
    (tmp_path / "counted.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mini_llm import meter\n"
        "histograms = meter.histograms\n"
        "meter.histograms = lambda *args: print('made') or histograms(*args)\n"
        "from train import main; main()\n")
    flags = ["--num-steps", 8, "--log-steps", 3, "--eval-steps", 1, "--wandb-watch", "all"]
    arguments = trainer.arguments(flags)
    arguments[1] = str(tmp_path / "counted.py")
    run = zygote.run(arguments, tmp_path, environment())
    assert run.returncode == 0 and run.stdout.splitlines().count("made") == 3, run.stdout + run.stderr


def test_compiled_training_is_training(trainer):
    flags = ["--num-steps", 4, "--log-steps", 2, "--no-amp", "--n-layers", 1]
    eager = trainer(*flags, checkpoint="eager.pt")
    compiled = trainer(*flags, "--compile", checkpoint="compiled.pt")
    assert compiled.code == 0, compiled.err[-2000:]
    for key, value in eager.losses().items():
        assert compiled.losses()[key] == pytest.approx(value, abs=1e-4)
    assert eager.weights().keys() == compiled.weights().keys()


@full
def test_compiled_runs_on_two_threads_are_equal(trainer):
    flags = ["--num-steps", 40, "--compile", "--dropout", 0.1]
    first, second = (trainer(*flags, checkpoint=name, env={"OMP_NUM_THREADS": "2"}) for name in ("a.pt", "b.pt"))
    assert first.code == 0 and same(second, first), first.err + second.err


def test_without_a_compiler_one_line_says_how_to_do_without(trainer):
    run = trainer("--num-steps", 4, "--compile", env=dict(CXX="/no/compiler",
                                                          TORCHINDUCTOR_CACHE_DIR=str(trainer.folder / "inductor")))
    assert run.code == 1 and run.err.count("\n") == 1, run.err
    assert "torch.compile failed" in run.err and "compiler" in run.err and "--no-compile" in run.err


def test_no_checkpoint_is_replaced_by_weights_that_give_no_finite_loss(trainer):
    """After step 22 the weights become useless. The steps that follow are saved only where that is asked for, and
    however often it is, the checkpoint from before stays, from which the run goes on."""
    def steps():
        return [torch.load(trainer.folder / name, weights_only=True)["state"]["step"] for name in ("c.pt", "c.prev.pt")]

    flags = ["--save-steps", 10, "--log-steps", 100, "--eval-steps", 0, "--no-amp", "--warmup-steps", 0]
    assert trainer(*flags, "--num-steps", 22).code == 0
    endless = ["--num-steps", 10**6, "--max-bad-steps", 10**6, "--resume", "--lr", 1e30]
    stopped = zygote.Popen(trainer.arguments([*flags, *endless]), cwd=trainer.folder, text=True,
                           env=environment(), stdout=subprocess.PIPE)
    try:
        next(line for line in stopped.stdout if "steps skipped" in line)
        stopped.send_signal(signal.SIGUSR1)
        next(line for line in stopped.stdout if "steps skipped" in line)
        stopped.terminate()
        step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", stopped.communicate(timeout=30)[0])[1])
        assert stopped.returncode == 143 and step > 200 and steps() == [step, 22]
    finally:
        stopped.kill()
    trainer.folder.joinpath("c.prev.pt").rename(trainer.folder / "c.pt")
    broken = trainer(*flags, "--num-steps", 60, "--resume", "--lr", 1e30, "--max-bad-steps", 100)
    assert broken.code == 0 and broken.rows[60]["train/skipped_steps"] == 37
    halted = trainer(*flags, "--num-steps", 100, "--resume", "--log-steps", 10)
    assert steps() == [60, 22], "the last step's is saved, whatever it is"
    assert halted.code == 1 and "--resume c.prev.pt --overwrite with a lower --lr goes on from step 22" in halted.err
    again = trainer(*flags, "--num-steps", 40, "--resume", "c.prev.pt", "--overwrite")
    assert again.code == 0 and again.rows[40]["train/skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "steps"), [
    pytest.param("gpt2", 400, marks=full), pytest.param("qwen3", 300, marks=full), ("nanochat", 350)])
def test_toy_data_is_learned_to_its_entropy(trainer, arch, steps):
    run = trainer("--arch", arch, "--use-toy-data", "--device", "cpu", "--n-layers", 1, "--n-heads", 2, "--d-model", 64,
                  "--seq-len", 64, "--batch-size", 32, "--num-steps", steps, "--lr", 1e-2, "--log-steps", 50,
                  "--eval-tokens", 0, "--weight-decay", 0, "--warmup-steps", 20, "--tokenizer-name", "char", tiny=False,
                  data=False)
    assert run.code == 0, run.err
    entropy = float(re.search(r"below a loss of (\S+) nats", run.out)[1])
    assert entropy * 0.99 < run.rows[steps]["val/loss"] < entropy * 1.02


@pytest.mark.parametrize("flags", [[], ["--no-save-best"]], ids=["best", "none"])
def test_the_best_checkpoint_is_of_the_lowest_loss_and_no_other(trainer, flags):
    flags = ["--eval-steps", 10, "--save-steps", 5, "--keep-last", 12, "--warmup-steps", 60, "--lr", 0.5, "--no-amp",
             *flags]
    run = trainer("--num-steps", 60, *flags)
    losses = {step: row["val/loss"] for step, row in run.rows.items()}
    assert losses[60] > min(losses.values()) < losses[0], "it is to fall and then to rise"
    best = trainer.folder / "c.best.pt"
    assert best.exists() == ("--no-save-best" not in flags)
    if best.exists():
        state = torch.load(best, weights_only=True)["state"]
        assert losses[state["step"]] == state["best_val"] == min(losses.values())
        (trainer.folder / "c.step-00000005.pt").replace(run.checkpoint)  # as if killed before it saved another
        again = trainer("--num-steps", 6, *flags, "--resume")
        assert min(losses.values()) < again.rows[6]["val/loss"] < losses[0], again.err
        assert torch.load(best, weights_only=True)["state"] == state


def test_a_trial_of_a_sweep_that_was_asked_to_stop_has_not_failed(trainer):
    """W&B's agent gives up after five failures, or three within a minute."""
    flags = ["--num-steps", 100_000, "--log-steps", 10, "--eval-steps", 0]
    run = interrupt_after(trainer.arguments(flags), trainer.folder, "step 20/",
                          env=dict(WANDB_SWEEP_ID="s", WANDB_RUN_ID="trial"))
    assert run.returncode == 0 and "stopped by SIGTERM" in run.stdout, run.stdout
    assert (trainer.folder / "c.trial.pt").exists()


def test_a_dry_run_says_the_size_takes_a_step_and_writes_nothing(trainer, text):
    run = trainer("--train-data", text, "--dry-run", "--grad-accum-steps", 3, "--vocab-size", 40_000,
                  "--sample-prompt", "the king", data=False)
    assert run.code == 0, run.err
    for fact in ("parameters", "FLOPs per token", "GB", "384 tokens = batch 4 x sequence 32 x accumulation 3",
                 "one step:"):
        assert fact in run.out, fact
    assert "M1 and M2" not in run.out, "on another device"
    assert not list(trainer.folder.iterdir())


def test_the_profiler_writes_a_trace_and_names_it(trainer):
    run = trainer("--num-steps", 8, "--use-profiler")
    assert "c.trace.json" in run.out
    events = json.loads((trainer.folder / "c.trace.json").read_text())["traceEvents"]
    assert len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")}) == 3
    (trainer.folder / "c.trace.json").unlink()
    for last, there in (11, False), (15, True):  # 3 steps and 4
        run = trainer("--num-steps", last, "--use-profiler", "--resume")
        assert run.code == 0 and (trainer.folder / "c.trace.json").exists() == there
        assert ("no trace, which begins with the fourth step of a start: there are 3 to come" in run.out) != there


def test_help_answers_at_once_and_has_every_flag():
    run = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"], capture_output=True,
                         text=True)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "torch" in imported  # nothing else that takes long, by name: a shared machine's clock would not tell
    slow = {"transformers", "tokenizers", "datasets", "pyarrow", "pandas", "wandb", "torch._dynamo", "torch._inductor"}
    assert not imported & slow
    for flag in ("--n-layers", "--arch", "--use-activation-checkpoint", "--train-data", "--global-batch-tokens",
                 "--lr-scheduler", "--no-amp", "--compile", "--eval-tokens", "--resume", "--use-wandb", "--dry-run"):
        assert flag in run.stdout


def test_evaluations_default_to_twenty_a_run_and_no_more_often_than_reports():
    assert ReportConfig().eval_every(1000) == 50 and ReportConfig().eval_every(50) == 10
    assert ReportConfig(eval_steps=0).eval_every(1000) == 0


# Wrong inputs: one line on stderr that names the flag and a way out, exit code 2, at once, nothing written.


@pytest.fixture
def wrong(trainer):
    folder = trainer.folder
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("just a few words")
    (folder / "no text here").mkdir()
    (folder / "picture.png").write_bytes(bytes(range(256)) * 100)
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (folder / "columns.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (folder / "bad.toml").write_text("n_layers = = 4")
    (folder / "unknown.toml").write_text("n_layer = 4")
    (folder / "truncated.pt").write_bytes(b"PK\3\4 and no more")
    (folder / "there.pt").write_bytes(b"a checkpoint")
    (folder / "sealed").mkdir()
    (folder / "file").touch()
    return trainer


WRONG = {
    "missing file": (["--train-data", "missing.txt"], ["--train-data missing.txt", "no such file"]),
    "empty file": (["--train-data", "empty.txt"], ["empty.txt", "empty"]),
    "short text": (["--train-data", "short.txt"], ["fewer than one sequence", "--seq-len"]),
    "folder without text": (["--train-data", "no text here"], ["no text here", ".jsonl"]),
    "glob without files": (["--train-data", "*.nothing"], ["*.nothing", "no file matches"]),
    "binary file": (["--train-data", "picture.png"], ["picture.png", "not text"]),
    "toy data": (["--use-toy-data"], ["--use-toy-data makes its own text"]),
    "rope without RoPE": (["--rope-theta", "1e5"], ["--rope-theta 100000.0", "learned positions"]),
    "bad jsonl": (["--train-data", "bad.jsonl"], ["bad.jsonl", "not readable"]),
    "jsonl without text": (["--train-data", "columns.jsonl"], ["no column named text", "a, b"]),
    "no such dataset offline": (["--train-data", "some/dataset"], ["some/dataset", "cannot be reached"]),
    "missing validation file": (["--val-data", "missing.txt"], ["--val-data missing.txt"]),
    "short validation file of two": (["--val-data", str(ROOT / "README.md"), "short.txt"],
                                     ["--val-data short.txt", "fewer than one sequence", "--seq-len"]),
    "unknown tokenizer offline": (["--tokenizer-name", "no/such"], ["--tokenizer-name no/such", "byte"]),
    "window above positions": (["--seq-len", "65"], ["--seq-len 65", "--max-position-embeddings 64"]),
    "heads": (["--n-heads", "3"], ["--n-heads 3", "--d-model 32", "try --d-model 30"]),  # not 33: RoPE
    "kv heads": (["--n-kv-heads", "3"], ["--n-kv-heads 3", "--n-heads 2"]),
    "no checkpoint to resume": (["--resume"], ["--resume", "no checkpoint"]),
    "nothing to resume": (["--resume", ""], ["--resume ''", "is empty"]),
    "steps without end": (["--num-steps", "10000000000"], ["--num-steps", "at most"]),
    "no such file to resume": (["--resume", "nowhere.pt"], ["--resume nowhere.pt: no such file", "leave --resume out"]),
    "a name of another of its files": (["--checkpoint-path", "c.best.pt"], ["c.best.pt", "NAME.pt"]),
    "another suffix": (["--checkpoint-path", "c.ckpt"], ["c.ckpt", "NAME.pt"]),
    "truncated checkpoint": (["--resume", "truncated.pt"], ["truncated.pt", "cut short", "--overwrite"]),
    "batch that does not divide": (["--global-batch-tokens", "1000", "--cache-dir", "not yet"],
                                   ["--global-batch-tokens 1000", "try 1024"]),
    "two ways to say the batch": (["--global-batch-tokens", "1024", "--grad-accum-steps", "1"], ["give one of them"]),
    "two lengths": (["--num-tokens", "1e6", "--num-epochs", "2"], ["--num-tokens and --num-epochs: ", "give one"]),
    "a length without end": (["--num-tokens", "1e15"], ["--num-tokens 1e+15:", "at most", "raise --batch-size"]),
    "negative learning rate": (["--lr", "-1"], ["--lr -1", "greater than 0"]),
    "learning rate that is no number": (["--lr", "nan"], ["--lr nan", "finite"]),
    "negative steps": (["--num-steps", "-5"], ["--num-steps -5", "at least 1"]),
    "dropout of one": (["--dropout", "1"], ["--dropout 1", "less than 1"]),
    "unknown flag": (["--n-layer", "3"], ["--n-layer", "did you mean --n-layers"]),
    "bad TOML": (["--config", "bad.toml"], ["bad.toml", "not valid TOML"]),
    "another program's flag": (["--learning_rate", "1"], ["--learning_rate is not known; did you mean --lr?"]),
    "uploads of what is not saved": (["--use-wandb", "--wandb-log-checkpoints", "best", "--no-save-best"],
                                     ["--wandb-log-checkpoints best", "take last"]),
    "a weight for nothing": (["--train-weights", "0.7", "0.3"], ["--train-weights 0.7 0.3", "there are 1"]),
    "a weight of nothing": (["--train-weights", "0"], ["--train-weights 0", "greater than 0"]),
    "nanochat's flag": (["--device-batch-size=8"], ["--device-batch-size is not known; did you mean --batch-size?"]),
    "unknown key in TOML": (["--config", "unknown.toml"], ["n_layer", "did you mean n_layers"]),
    "checkpoint already there": (["--checkpoint-path", "there.pt"], ["there.pt", "--resume", "--overwrite"]),
    "checkpoint path is a folder": (["--checkpoint-path", "sealed"], ["sealed", "is a folder"]),
    "checkpoint path below a file": (["--checkpoint-path", "file/c.pt"], ["--checkpoint-path", "cannot be written"]),
    "checkpoint path not writable": (["--checkpoint-path", "/proc/c.pt"], ["--checkpoint-path", "cannot be written"]),
    "checkpoint path too long": (["--checkpoint-path", "c" * 235 + ".pt"], ["cannot be written (File name too long)"]),
    "cache not writable": (["--cache-dir", "/proc/cache"], ["--cache-dir"]),
    "vocabulary below the tokenizer's": (["--vocab-size", "100", "--cache-dir", "not yet"],
                                         ["--vocab-size 100 is below the 257 tokens", "leave it out"]),
    "vocabulary below the bytes": (["--tokenizer-name", "bpe", "--vocab-size", "100"], ["--vocab-size 100", "257"]),
    "shards of one process": (["--shard-ranks", "2"], ["--shard-ranks 2", "only train_fsdp.py"]),
    "spikes in fp16": (["--skip-loss-spikes", "6", "--amp-dtype", "fp16", "--cache-dir", "not yet"],
                       ["--skip-loss-spikes: in fp16", "--amp-dtype bf16"]),
    "no CUDA": (["--device", "cuda"], ["--device cuda", "--device cpu"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_that_names_it(wrong, case):
    flags, words = WRONG[case]
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = sorted(path for path in wrong.folder.rglob("*"))
    run = zygote.run(wrong.arguments(flags), wrong.folder, environment())
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.seconds < 10
    line = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(line) == 1 and line[0].startswith("error: "), run.stderr
    assert all(word in line[0] for word in words), line[0]
    assert sorted(path for path in wrong.folder.rglob("*")) == before, "something was written"


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(trainer):
    first = trainer("--num-steps", 3)
    before = first.checkpoint.read_bytes()
    for name, value, words in [
            ("--d-model", "64", "--d-model was 32, is 64"),
            ("--tokenizer-name", "char", "--tokenizer-name was byte, is char"),
            ("--val-ratio", "0.2", "--val-ratio was 0.1, is 0.2"), ("--arch", "qwen3", "--arch was gpt2, is qwen3"),
            ("--data-seed", "5", "--data-seed was 1337, is 5"),
            ("--batch-size", "8", "is 8 (--batch-size x --grad-accum-steps x ranks has to be 4)")]:
        run = trainer("--num-steps", 6, "--resume", name, value)
        assert run.code == 2 and len(run.err.strip().splitlines()) == 1 and words in run.err, run.err
    tried = trainer("--dry-run", "--resume", name, value)
    assert tried.code == 2 and words in tried.err
    tried = trainer("--dry-run", "--resume", "--num-steps", 6)
    assert tried.code == 0 and "Resumed at step 3" in tried.out and "one step: loss" in tried.out, tried.err
    assert first.checkpoint.read_bytes() == before and 3 in first.rows


def test_a_mixture_goes_on_as_the_same_mixture_only(trainer):
    for name in "ab":
        (trainer.folder / f"{name}.txt").write_text(f"All of {name}. " * 200)
    flags = ["--train-data", "a.txt", "b.txt", "--train-weights"]
    first = trainer(*flags, 3, 1, "--num-steps", 3)
    assert first.code == 0 and "samples: 75.0% of a (" in first.out, first.err
    other = trainer(*flags, 1, 1, "--num-steps", 5, "--resume")
    assert other.code == 2 and "--train-weights was [0.75, 0.25], is [0.5, 0.5]" in other.err
    same = trainer(*flags, 0.75, 0.25, "--num-steps", 5, "--resume")
    assert same.code == 0 and 5 in same.rows, same.err


@pytest.mark.parametrize("known", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}], ids=["nothing", "as srun"])
def test_ddp_without_torchrun_says_how_to_launch(tmp_path, known):
    run = zygote.run(command("train_ddp.py"), tmp_path, environment(**known))
    assert run.returncode == 2 and "torchrun --nproc-per-node" in run.stderr and "MASTER_ADDR" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_torchrun_is_told_which_trainers_it_starts(tmp_path):
    run = zygote.run([*command("train.py", ranks=2), "--use-toy-data"], tmp_path, environment())
    assert run.stderr.count("error: torchrun: train.py trains on one device; start train_ddp.py") == 1, run.stderr
    assert run.returncode and not list(tmp_path.iterdir())


def test_a_bar_is_shown_on_a_terminal(trainer):
    import os
    import pty
    import termios

    main, worker = pty.openpty()
    termios.tcsetwinsize(worker, (24, 100))
    process = zygote.Popen(trainer.arguments(["--num-steps", 60]), cwd=trainer.folder, stdout=worker, stderr=worker,
                           env=environment())
    os.close(worker)
    seen = b""
    try:
        while block := os.read(main, 4096):
            seen += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0 and re.search(rb"\r[^\n]* [1-9]\d*/60 \[[^\n]*step/s", seen)
    os.close(main)
    assert Run(process, trainer.folder, "c.pt").rows[60]
