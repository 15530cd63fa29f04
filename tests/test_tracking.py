import json
import logging
import math
import os
import re
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SOURCES, Clock

from mini_llm import hardware, sinks, tracking
from mini_llm import meter as meter_module
from mini_llm.checkpoint import State
from mini_llm.errors import UserError, visible
from mini_llm.facts import activation_bytes, state_bytes
from mini_llm.meter import Meter, histograms
from mini_llm.saver import NonFinite
from mini_llm.sinks import JsonlSink, TensorboardSink
from mini_llm.tracking import Tracker, console_line
from model import ARCHS, GPT, GPTConfig
from train import World


class Alone(World):
    def __init__(self):
        self.device = torch.device("cpu")


class Pair(Alone):
    """The main rank of two, the other of which has done the same at half the speed."""

    size = 2

    def sum(self, values):
        return [2 * value for value in values]

    def gather(self, values):
        tokens, seconds, forward = values
        return [[tokens, seconds, forward], [tokens, 2 * seconds, 3 * forward]]


def test_the_console_line_is_the_documented_one():
    metrics = {"train/epoch": 0.02, "lr": 3.3e-5, "train/step_time_sec": 0.1571, "tokens_per_sec_per_rank": 6537.89,
               "global_tokens_per_sec": 13075.78, "train/loss": 10.9411, "val/loss": 10.9447, "val/ppl": 56653.4597,
               "val/bits_per_byte": 3.5541, "train/grad_norm": 1.02, "train/mfu": 0.123, "time/dt_sec": 1.98}
    assert console_line(10, 50, metrics, 0.15, "bf16") == (
        "epoch 1 step 10/50 | lr 3.30e-05 | step time 0.157s | tok/s 6,538/rank 13,076 global | train loss 10.9411 | "
        "val loss 10.9447 | val ppl 56653.46 | val bpb 3.5541 | grad norm 1.02 | mfu 12.3% | dt 1.98s | eta 0:00:06 | "
        "amp bf16")


def test_the_time_left_is_of_all_that_comes_between_steps_but_not_of_the_first_evaluation(monkeypatch):
    clock = Clock(monkeypatch, tracking)
    tracker = Tracker.__new__(Tracker)
    tracker.num_steps, tracker.amp, tracker.is_main, tracker.plan, tracker.sinks = 150, "off", True, None, []
    tracker.flops_per_token = 10
    tracker.epochs = lambda state: 0.1 * state.step
    tracker.lately, tracker.drawn = deque([(clock.now, 50)], 100), {title: {} for title in tracking.DRAWN}
    lines = []
    monkeypatch.setattr(tracking.log, "info", lambda form, line: lines.append(line))
    for step, seconds in ((50, 50), (60, 10), (70, 30)):  # an evaluation, steps, steps with an evaluation
        clock.sleep(seconds)
        tracker.state = State(step=step)
        tracker.report({"lr": 0.1} if step > 50 else {"val/loss": 1.0})
    assert [re.findall(r"eta (\S+)", line) for line in lines] == [[], ["0:01:30"], ["0:02:40"]]


def test_what_is_kept_to_be_drawn_does_not_grow_with_the_run(monkeypatch):
    tracker = Tracker.__new__(Tracker)
    tracker.num_steps, tracker.amp, tracker.is_main, tracker.plan, tracker.sinks = 5000, "off", True, None, []
    tracker.flops_per_token, tracker.epochs, tracker.beside = 10, lambda state: 0.1, Path
    tracker.lately, tracker.drawn = deque([(0, 0)], 100), {title: {} for title in tracking.DRAWN}
    for step in range(5001):
        tracker.state = State(step=step)
        tracker.report({"lr": 1 + step} if step else {"val/loss": 7.0})
    kept = tracker.drawn["lr"]
    assert len(kept) <= 1001 and [*kept.values()][:2] == [2, 6]
    lines = []
    monkeypatch.setattr(tracking.log, "info", lambda form, line: lines.append(line))
    tracker.finished([])
    if (sys.stdout.encoding or "").lower().startswith("utf"):
        assert lines[0].endswith("2 → 5,001"), "the last report is drawn, too"


def test_a_metric_may_be_a_tensor_in_every_sink(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker.__new__(Tracker)
    tracker.num_steps, tracker.amp, tracker.is_main, tracker.plan = 9, "off", True, None
    tracker.flops_per_token = 10
    tracker.lately, tracker.drawn = deque([(0, 0)]), {title: {} for title in tracking.DRAWN}
    tracker.sinks = [JsonlSink(tmp_path / "m.jsonl", 0), TensorboardSink(tmp_path / "events", 0)]
    metrics = {"mine": torch.tensor(0.5), "theirs": np.float32(2), "none": torch.tensor(math.nan)}
    tracker.state, tracker.epochs = State(step=1), lambda state: 0.1 * state.step
    tracker.report(metrics)
    for sink in tracker.sinks:
        sink.close(0)
    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["mine"], row["theirs"], row["none"]) == (0.5, 2.0, None)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [events.Scalars(name)[0].value for name in ("mine", "theirs")] == [0.5, 2.0]


def test_a_log_that_the_disk_cannot_take_ends_no_run_that_is_done(tmp_path):
    file = tracking._LogFile(tmp_path / "c.log", encoding="utf-8")
    file.stream.close()
    file.stream = open("/dev/full", "w")  # noqa: SIM115 - closed below
    file.stream.write("the last line")
    tracker = Tracker.__new__(Tracker)
    tracker.bar, tracker.sinks, tracker.log_file = SimpleNamespace(close=int), [], file
    tracker.exit_code, tracker.state = 0, State(step=9)
    tracker.__exit__(None, None, None)


@pytest.mark.parametrize("is_main, error, events, code", [
    (True, ValueError("planted"), ["alert", "exit"], 1), (False, NonFinite("x"), ["exit"], 1),
    (True, UserError("planted"), ["alert", "exit"], 2), (True, KeyboardInterrupt(), ["alert", "exit"], 130)], ids=repr)
def test_an_error_is_one_alert_of_all_ranks_and_names_the_checkpoint_to_go_on_from(
        tmp_path, caplog, is_main, error, events, code):
    (tmp_path / ".best.pt").touch()
    caplog.set_level("INFO", "mini_llm")
    records, tracker = [], Tracker.__new__(Tracker)
    tracker.bar, tracker.log_file, tracker.beside = SimpleNamespace(close=int), None, lambda suffix: tmp_path / suffix
    tracker.sinks = [SimpleNamespace(log=lambda step, record, to=records: to.append(record), close=int)]
    tracker.exit_code, tracker.state, tracker.is_main = 0, State(step=9), is_main
    tracker.__exit__(type(error), error, None)
    assert [record["event"] for record in records] == events and records[-1]["code"] == code
    named = f"the last checkpoint is {tmp_path / '.best.pt'}" in caplog.text
    assert named != isinstance(error, NonFinite), "which says itself from where"


def test_each_rank_is_told_to_need_what_it_keeps():
    model = GPT(GPTConfig(vocab_size=99, max_position_embeddings=16, n_layers=4, n_heads=2, d_model=16))
    weights, blocks = (4 * sum(p.numel() for p in part.parameters()) for part in (model, model.blocks))

    def needed(ranks, shards, accum):
        return state_bytes(model, 2 * weights, SimpleNamespace(size=ranks, shards=shards), accum)

    assert needed(1, 1, 1) == needed(1, 1, 2) == needed(2, 1, 1) == 4 * weights, "gradients, and the optimizer's"
    assert needed(2, 1, 2) == 5 * weights, "and the buckets of DDP"
    gathered = 2 * (weights - blocks + blocks // 2)  # two of four blocks, and their gradients
    assert needed(2, 2, 2) == 4 * weights // 2 + gathered and needed(8, 4, 1) == 4 * weights // 4 + gathered
    model.blocks.requires_grad_(False)
    assert needed(1, 1, 1) == 4 * weights - blocks and needed(2, 1, 2) == 5 * weights - 2 * blocks, "no gradients"


@pytest.mark.parametrize("seq_len", [64, 576])  # with and without attention by explicit products in bf16
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_memory_of_activations_is_about_what_autograd_keeps(arch, half, seq_len):
    def kept(model, batch_size):
        """Bytes, with the parameters and autocast's copies of them: the difference of two batches has neither."""
        storages, x = {}, torch.randint(257, (batch_size, seq_len))

        def note(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor.detach()  # what made it would keep it for good, as its own output

        with (torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
              torch.autocast("cpu", torch.bfloat16, enabled=half)):
            loss = model(x, x)
        assert loss.isfinite()
        return sum(storage.nbytes() for storage in storages.values())

    sizes = [dict(d_ff=1536), dict(head_dim=128), dict(head_dim=32), dict(dropout=0.1)]
    for changed in ({}, *sizes):
        model = GPT(GPTConfig(arch=arch, n_layers=2, d_model=256, vocab_size=257, **changed))
        counted = kept(model, 2) - kept(model, 1)
        assert 0.8 < activation_bytes(model, 1, seq_len, torch.bfloat16 if half else None, False) / counted < 1.35


def test_a_trace_that_the_disk_cannot_take_does_not_fill_it(tmp_path, monkeypatch, caplog):
    """As PyTorch leaves one, without an error."""
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda _, path: Path(path + ".tmp").touch())
    with tracking.make_profiler(True, tmp_path / "c.trace.json", 9) as profiler:
        for _ in range(6):
            profiler.step()
    assert "the profile could not be written" in caplog.text and not list(tmp_path.iterdir())


def test_a_line_leaves_out_what_was_not_measured():
    assert console_line(0, 50, {"train/epoch": 0, "val/loss": 10.8, "val/ppl": 49020.8}, 0, "off") == (
        "epoch 1 step 0/50 | val loss 10.8000 | val ppl 49020.80 | amp off")


def test_the_loss_is_the_mean_over_every_micro_batch_since_the_last_report():
    meter = Meter(Alone(), 1.0, None)
    for step in range(4):
        meter.add(torch.tensor([1.0 + step, 3.0 + step]), torch.tensor(0.5), torch.tensor(True), tokens=10)
    metrics = meter.report()
    assert metrics["train/loss"] == metrics["rank/loss"] == 3.5 and metrics["train/grad_norm"] == 0.5
    meter.add(torch.tensor([9.0]), torch.tensor(0.5), torch.tensor(True), tokens=10)
    assert meter.report()["train/loss"] == 9.0


def test_a_skipped_step_counts_as_such_and_not_in_the_loss():
    meter = Meter(Alone(), 1.0, None)
    for loss, norm, taken in ((2.0, 1.0, True), (3.0, math.nan, False), (9.0, 1.0, False), (math.nan, math.nan, False)):
        meter.add(torch.tensor([loss, loss]), torch.tensor(norm), torch.tensor(taken), tokens=10)
    assert meter.skipped_in_row == 1, "a spike, whose norm is finite, is in between"
    metrics = meter.report()
    assert metrics["train/loss"] == 2.0 and metrics["train/skipped_steps"] == 3


def test_the_last_report_of_a_run_leaves_the_averages_to_the_one_that_ends_the_interval():
    meter = Meter(Alone(), 1.0, None)
    for loss, ends, smoothed in ((1.0, True, 1.0), (5.0, False, 1.0), (5.0, True, 0.9 * 1.0 + 0.1 * 5.0)):
        meter.add(torch.tensor([loss]), torch.tensor(0.5), torch.tensor(True), tokens=10)
        assert meter.report(ends_interval=ends)["smoothed/loss"] == pytest.approx(smoothed)


def test_the_forward_time_is_of_a_step(monkeypatch):
    clock = Clock(monkeypatch, meter_module, hardware)
    meter = Meter(Pair(), 1.0, None)
    for _ in range(5):
        with meter.forward:
            clock.sleep(0.02)
        meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=10)
    metrics = meter.report()
    assert metrics["rank/forward_time_sec"] == metrics["train/forward_time_sec/min"] == pytest.approx(0.02)
    assert metrics["train/forward_time_sec/max"] == pytest.approx(0.06)


def test_speed_counts_training_time_only(monkeypatch):
    clock = Clock(monkeypatch, meter_module)
    meter = Meter(Alone(), flops_per_token=1e9, peak_flops=1e12)
    # The first warms up: neither its tokens nor its time count.
    clock.sleep(0.01)
    meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=1_000_000)
    for seconds in (0.07, 0.03):
        clock.sleep(seconds)
        meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=100)
    with meter.excluded("eval"):
        clock.sleep(0.2)
    with meter.excluded("checkpoint"):
        clock.sleep(0.1)
    metrics = meter.report()
    assert metrics["tokens_per_sec_per_rank"] == pytest.approx(200 / 0.1)
    assert metrics["train/step_time_sec"] == metrics["rank/step_time_sec"] == pytest.approx(0.05)
    assert metrics["rank/tokens_per_sec"] == metrics["tokens_per_sec_per_rank"]
    assert metrics["train/mfu"] == pytest.approx(metrics["tokens_per_sec_per_rank"] * 1e9 / 1e12)
    assert metrics["smoothed/mfu"] == metrics["train/mfu"], "the first is not smoothed"
    assert metrics["time/warmup_sec"] == pytest.approx(0.01) and metrics["time/eval_sec"] == pytest.approx(0.2)
    assert metrics["time/checkpoint_sec"] == pytest.approx(0.1)
    assert metrics["time/dt_sec"] == pytest.approx(0.41)
    for _ in range(3):
        clock.sleep(0.02)
        meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=100)
    metrics = meter.report()  # of its own interval
    assert metrics["tokens_per_sec_per_rank"] == pytest.approx(100 / 0.02) and "time/eval_sec" not in metrics
    assert metrics["train/step_time_sec"] == pytest.approx(0.02) and metrics["time/dt_sec"] == pytest.approx(0.06)


def test_work_that_a_device_has_yet_to_do_is_timed_as_what_has_asked_for_it(monkeypatch):
    """A GPU works on after the call that submits it has returned, until it is waited for."""
    clock, submitted = Clock(monkeypatch, meter_module), []
    monkeypatch.setattr(meter_module, "synchronize", lambda device: (clock.sleep(sum(submitted)), submitted.clear()))
    meter = Meter(Alone(), 1.0, None)
    for seconds in (5, 1, 1):  # the first compiles
        submitted.append(seconds)
        meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=10)
    with meter.excluded("eval"):
        submitted.append(3)
    submitted.append(1)
    meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=10)
    metrics = meter.report()
    assert (metrics["time/warmup_sec"], metrics["time/eval_sec"], metrics["train/step_time_sec"]) == (5, 3, 1)


def test_a_step_that_an_evaluation_interrupts_has_taken_no_longer(monkeypatch):
    """For the watchdog, to which it would else be a step that hangs."""
    clock = Clock(monkeypatch, meter_module)
    meter = Meter(Alone(), 1.0, None)
    for seconds in (0, 100):
        clock.sleep(1)
        with meter.excluded("eval"):
            clock.sleep(seconds)
        assert meter.doing == ("step", clock.now - 1)
        meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=1)
    assert list(meter.lasted["step"]) == [1, 1] and list(meter.lasted["eval"]) == [0, 100]


def test_what_a_resumed_run_has_smoothed_and_skipped_goes_on():
    """Intervals of skipped steps alone, whose loss is no number, leave the averages as they are."""
    first, second = Meter(Alone(), 1.0, None), Meter(Alone(), 1.0, None)
    for norm in (1.0, math.nan, math.nan):
        first.add(torch.tensor([10.0]), torch.tensor(norm), torch.tensor(math.isfinite(norm)), tokens=1)
        first.report()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.skipped, second.skipped_in_row) == (2, 2)
    second.add(torch.tensor([20.0]), torch.tensor(1.0), torch.tensor(True), tokens=1)
    assert second.report()["smoothed/loss"] == pytest.approx(11.0)


def test_global_speed_is_all_tokens_over_the_slowest_ranks_time():
    meter = Meter(Pair(), 1e9, None)
    meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=100)
    time.sleep(0.02)
    meter.add(torch.ones(1), torch.ones(()), torch.tensor(True), tokens=100)
    metrics = meter.report()
    fast, slow = metrics["tokens_per_sec_per_rank/max"], metrics["tokens_per_sec_per_rank/min"]
    assert fast == pytest.approx(2 * slow) and metrics["tokens_per_sec_per_rank"] == pytest.approx(1.5 * slow)
    assert metrics["global_tokens_per_sec"] == pytest.approx(2 * slow)
    assert metrics["train/tflops_per_rank"] == pytest.approx(slow * 1e9 / 1e12)  # the slow one's time is both's
    assert "train/mfu" not in metrics, "of a device whose peak is not known"


def test_an_interval_that_a_resume_cuts_has_the_same_loss_to_the_bit():
    losses = torch.randn(10, 3)
    straight, first, second = (Meter(Alone(), 1.0, None) for _ in range(3))
    for row in losses:
        straight.add(row, torch.ones(()), torch.tensor(True), tokens=1)
    for row in losses[:7]:
        first.add(row, torch.ones(()), torch.tensor(True), tokens=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for row in losses[7:]:
        second.add(row, torch.ones(()), torch.tensor(True), tokens=1)
    assert second.report()["train/loss"] == straight.report()["train/loss"]


def test_a_resume_with_other_intervals_averages_its_own_steps_only():
    first, second = (Meter(Alone(), 1.0, None, log_steps=log_steps) for log_steps in (10, 4))
    for meter, loss in (first, 9.0), (second, 1.0):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        meter.add(torch.tensor([loss]), torch.ones(()), torch.tensor(True), tokens=1)
    assert second.report()["train/loss"] == 1.0


def test_a_resume_cuts_metrics_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path, 0)
    for step in range(0, 50, 10):
        sink.log(step, {"x": math.inf})
    sink.close(0)
    path.write_text(path.read_text() + '{"step": 50, "x"')  # killed while writing
    sink = JsonlSink(path, 20)
    sink.log(30, {"x": 1})
    sink.close(0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20, 30]
    JsonlSink(path, 0).close(0)
    assert path.read_text() == ""
    path.unlink()
    JsonlSink(path, 20).close(0)
    assert path.read_text() == "", "a run whose metrics are gone goes on without"


def test_a_record_is_where_the_file_is_said_to_end(tmp_path):
    sink, places = JsonlSink(tmp_path / "m.jsonl", 0), []
    for step in range(3):
        places.append(sink.place())
        sink.log(step, {"x": 1.0})
    sink.close(0)
    content = (tmp_path / "m.jsonl").read_bytes()
    assert {path for path, _ in places} == {str(tmp_path / "m.jsonl")}
    assert [json.loads(content[at:].split(b"\n")[0])["step"] for _, at in places] == [0, 1, 2]


def test_a_resumed_run_drops_what_it_writes_again_and_keeps_why_it_ended(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [dict(step=20, time=1.0, loss=2.0), dict(step=25, time=2.0, loss=1.0),
            dict(step=27, time=3.0, event="alert", title="stopped by ValueError", text="planted"),
            dict(step=27, time=3.0, event="exit", code=1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    JsonlSink(path, 20).close(0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [rows[0], rows[2]]


def test_the_events_of_metrics_jsonl_are_those_that_docs_describe(tmp_path, monkeypatch):
    docs = (ROOT / "docs" / "metrics.md").read_text().split("\n## The format of metrics.jsonl\n")[1]
    # wandb_tools.py writes some of them as a run has: test_what_a_downloaded_run_reported.
    code = "".join(file.read_text() for file in SOURCES if file.name != "wandb_tools.py")
    calls = re.findall(r'_record\([\w.]+, event="(\w+)", (.*?)\)\n', code, re.S)
    written = {event: re.findall(r"(\w+)=", arguments) for event, arguments in calls}
    told = {event: re.findall(r"`(\w+)`", fields) for event, fields in re.findall(r"^\| `(\w+)` \| (.*?):", docs, re.M)}
    assert told.pop("event", []) == [] and told == written and len(written) == code.count('event="')
    pytest.importorskip("pandas")
    path = tmp_path / "checkpoints" / "minigpt.metrics.jsonl"
    path.parent.mkdir()
    sink = JsonlSink(path, 0)
    for step, record in [(0, dict(event="config", config={})), (0, {"val/loss": 5.0}), (9, {"train/loss": math.nan}),
                         (9, dict(event="alert", title="A", text="B"))]:
        sink.log(step, record)
    sink.close(0)
    monkeypatch.chdir(tmp_path)
    exec(docs.split("```python\n")[1].split("```")[0], found := {})
    assert list(found["d"].step) == [0, 9] and found["d"]["val/loss"].iloc[0] == 5 and found["d"].time.iloc[0] > 1e9


def test_a_row_that_a_power_cut_has_torn_is_dropped_though_its_checkpoint_is_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10, "time": 1.0, "x": 1}\n{"step": 20, "time": 2.0, "x')
    sink = JsonlSink(path, 20)
    sink.log(30, {"x": 1})
    sink.close(0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 30]


def test_the_rows_that_a_resume_keeps_are_on_the_disk_before_they_replace_the_old_ones(tmp_path, monkeypatch):
    path, draft, synced = tmp_path / "m.jsonl", tmp_path / "m.jsonl.tmp", []
    path.write_text('{"step": 10, "time": 1.0, "x": 1}\n{"step": 20, "time": 2.0, "x": 1}\n')
    monkeypatch.setattr(sinks, "sync", lambda fd: synced.append((os.fstat(fd).st_ino, draft.read_bytes())))
    JsonlSink(path, 10).close(0)
    assert synced == [(path.stat().st_ino, path.read_bytes())] and path.read_bytes().count(b"\n") == 1


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in (0, (0, 10, 20)), (0, (0, 10, 20, 30)), (20, (30, 40)):  # begun anew, then resumed
        sink = TensorboardSink(tmp_path, start)
        for step in steps:
            sink.log(step, {"train/loss": step + start})
        sink.close(0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 0), (10, 10), (20, 20), (30, 50),
                                                                            (40, 60)]


def test_tensorboard_has_the_same_names_values_and_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(tmp_path, 0)
    for step in (10, 20):
        sink.log(step, {"train/loss": step / 4, "lr": 0.5, "a histogram": {"of": "W&B"}})
    sink.log(20, dict(event="sample", text="Once upon"))
    sink.log(20, dict(event="exit", code=1))
    sink.close(0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 5.0)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr"}
    assert events.Tensors("samples/text_summary")[0].tensor_proto.string_val == [b"Once upon"]


def test_events_that_cannot_be_written_cost_one_warning(caplog):
    calls, sink = [], TensorboardSink.__new__(TensorboardSink)

    def fails(*args):
        calls.append(args)
        raise OSError("No space left on device")

    sink.writer, sink.broken = SimpleNamespace(add_scalar=fails, close=fails), False
    for step in 1, 2:
        sink.log(step, {"lr": 0.1})
    sink.close(0)
    assert calls == [("lr", 0.1, 1)] and [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_resumed_interval_is_of_all_ranks_but_a_ranks_own_loss_is_its_own():
    meter = Meter(Alone(), 1.0, None)
    meter.load_state_dict(dict(loss_sum=10.0, micro_batches=2, batch_size=1, smoothed={}, skipped=[0, 0]))
    meter.add(torch.tensor([2.0]), torch.tensor(0.5), torch.tensor(True), tokens=10)
    assert meter.state_dict()["loss_sum"] == 12.0
    metrics = meter.report()
    assert metrics["train/loss"] == 4.0 and metrics["rank/loss"] == 2.0
    meter.add(torch.tensor([3.0]), torch.tensor(0.5), torch.tensor(True), tokens=10)
    assert meter.report()["train/loss"] == 3.0


def test_an_interval_resumed_in_other_micro_batches_weighs_them_by_their_sequences():
    saved = dict(loss_sum=12.0, micro_batches=2, batch_size=4, smoothed={}, skipped=[0, 0])  # 8 sequences of mean 6
    meter = Meter(Alone(), 1.0, None, batch_size=2)
    meter.load_state_dict(saved)
    meter.add(torch.tensor([2.0, 4.0]), torch.ones(()), torch.tensor(True), tokens=10)  # 4 of mean 3
    assert meter.report()["train/loss"] == 5.0


def test_a_histogram_counts_every_value_between_its_edges():
    model = torch.nn.Linear(4, 5)
    torch.nn.init.ones_(model.bias)
    counts, low, high = histograms(model, "parameters", bins=8)["parameters/bias"]
    assert counts.sum() == 5 and counts[0] == 5 and low == 1 and high == 2
    counts, low, high = histograms(model, "all", bins=8)["parameters/weight"]
    expected = torch.histc(model.weight.detach(), 8)
    assert counts.tolist() == expected.long().tolist() and (low, high) == torch.aminmax(model.weight)
    assert "gradients/weight" not in histograms(model, "all"), "before the first backward pass there is none"
    model.bias.grad = torch.tensor([math.nan, math.inf, -math.inf, 0, 2])
    counts, low, high = histograms(model, "gradients", bins=8)["gradients/bias"]
    assert counts.tolist() == [4, 0, 0, 0, 0, 0, 0, 1] and (low, high) == (0, 2), "what is not finite counts as 0"


def test_a_histogram_of_many_values_is_counted_in_parts(monkeypatch):
    """Two int64 tensors of an embedding's size, at the first report, would be the run's peak of memory."""
    model, sizes, add = torch.nn.Linear(20, 5), [], torch.Tensor.scatter_add_
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *args: sizes.append(args[-1].numel()) or add(*args))
    counts = histograms(model, "parameters")["parameters/weight"][0]
    monkeypatch.setattr("mini_llm.meter.PART", 30)
    sizes.clear()
    assert histograms(model, "parameters")["parameters/weight"][0].equal(counts) and counts.sum() == 100
    assert sizes == [30, 30, 30, 10, 5]


def test_no_message_acts_on_the_terminal():
    record = logging.LogRecord("mini_llm", logging.INFO, "", 0, "was %s\nis %s", ("\x1b]0;x\x07", 1), None)
    assert tracking._Formatter().format(record).endswith("was \\x1b]0;x\\x07\nis 1")


def test_a_sample_does_not_act_on_the_terminal():
    assert visible("\u202e") == "\\u202e", "text that is written backwards"
    assert visible("\x1b[31m red\r\n\t\x00\x9b é 日本") == "\\x1b[31m red\\r\n\t\\x00\\x9b é 日本"
