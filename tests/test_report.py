"""report.py: what it shows of a run is what the run's rows say."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment

import report
from mini_llm.files import read_records
from mini_llm.plots import PANELS, _Canvas, figure, looks, panels, short, smoothed, sparkline, terminal_plot, ticks

NASTY = "Once <script>alert('x')</script> & <img src=http://example.com/x.png>\n\x1b[31m```red \ud83d"


def write_run(path, steps=40, lr=1e-3, code=0, extra=(), width=1e13, **flags):
    """A metrics.jsonl as the tracker writes it, of a run of two ranks on a GPU, killed and resumed at step 20."""
    config = dict(arch="gpt2", lr=lr, num_steps=40, train_data=["a.txt", "b.txt"], command="python <train.py>",
                  checkpoint_path=str(path), world_size=2, n_params=4_470_272) | flags
    records = [dict(step=0, time=0.0, event="config", config=config),
               {"step": 0, "time": 0.0, "val/loss": 800.0, "val/ppl": None, "train/tokens": 0, "train/flops": 0.0}]
    for step in range(2, steps + 1, 2):
        loss = 2 + 6 * math.exp(-step / 9) + 0.1 * (step % 3)
        row = {"step": step, "time": 1000.0 * step, "train/loss": loss, "train/grad_norm": 1.0, "lr": lr,
               "time/dt_sec": 60.0, "train/tokens": step * 2048, "train/flops": step * width,
               "global_tokens_per_sec": 20_000 + step,
               "tokens_per_sec_per_rank": 1e4, "tokens_per_sec_per_rank/min": 9e3, "tokens_per_sec_per_rank/max": 11e3,
               "gpu/allocated_gb": 2.0, "gpu/peak_gb": 5.0, "gpu/reserved_gb": 6.0}
        if step % 10 == 0:
            row |= {"val/loss": loss + 0.1, "val/ppl": math.exp(loss + 0.1), "val/bits_per_byte": loss / 3,
                    "val/loss/books": loss}
        records.append(row)
        if step == 20:
            records.append(dict(step=step, time=2e4, event="config", config=config))
    records += [dict(step=steps, time=1.0, event="sample", text=NASTY), *extra]
    records += [] if code is None else [dict(step=steps, time=1.0, event="exit", code=code)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def run_report(*args, cwd, start=(str(ROOT / "report.py"),)):
    return subprocess.run([sys.executable, *start, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=environment(), timeout=200)


def in_process(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the command, without the seconds that matplotlib's import takes."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    code = 0
    try:
        report.main()
    except SystemExit as leave:
        code = leave.code
    return code, *capsys.readouterr()


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, text):
        self.texts.append(text)


def test_the_rows_of_a_run_share_the_names_in_them(tmp_path):
    """Else each has its own: half of the memory that a long run takes."""
    rows = report.Run(write_run(tmp_path / "c.metrics.jsonl")).rows
    assert len({id(name) for row in rows for name in row}) == len({name for row in rows for name in row})


def test_a_page_of_two_runs_shows_what_their_rows_say(trainer):
    flags = ["--num-steps", 20, "--log-steps", 2, "--eval-steps", 10]
    runs = [trainer(*flags, "--lr", lr, checkpoint=f"{lr}.pt") for lr in ("1e-3", "9e-3")]
    shown = run_report("1e-3.pt", "9e-3.best.pt", "9e-3.pt", cwd=trainer.folder)
    assert shown.returncode == 0, shown.stderr
    folder = trainer.folder / "1e-3.report"
    assert shown.stdout.startswith("wrote 1e-3.report/index.html") and (folder / "loss.png").stat().st_size > 10_000
    page = Page((folder / "index.html").read_bytes().decode())  # a sample may have carriage returns
    for run in runs:
        last, best = run.rows[20], min((row["val/loss"], step) for step, row in run.rows.items() if "val/loss" in row)
        for text in (f"{last['train/loss']:.4f}", f"{last['val/loss']:.4f}", f"{last['val/ppl']:,.2f}",
                     f"{last['val/bits_per_byte']:.4f}", f"{best[0]:.4f} at {best[1]}", run.checkpoint.stem):
            assert text in page.texts, text
        sample = next(record["text"] for record in run.records if record.get("event") == "sample")
        assert any(sample in shown for shown in page.texts), sample
    loaded = report.load([trainer.folder / "1e-3.pt", trainer.folder / "9e-3.pt"])
    assert report.differences(loaded) == {"lr": [9e-3, 1e-3]}  # the best first
    fig = figure(panels(loaded)[0], loaded)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in fig.axes[0].lines]
    for run in runs:
        points = [(step, row["val/loss"]) for step, row in run.rows.items() if "val/loss" in row]
        assert tuple(map(list, zip(*points, strict=True))) in drawn
    assert [text.get_text() for text in fig.axes[0].get_legend().texts][:2] == ["9e-3", "1e-3"]
    assert len({line.get_color() for line in fig.axes[0].get_legend().get_lines()[:2]}) == 2


def test_the_page_loads_nothing_and_shows_a_sample_as_text(tmp_path, monkeypatch, capsys):
    alert = dict(step=1030, time=1.0, event="alert", title="steps skipped", text="two of <them>", level="WARN")
    write_run(tmp_path / "c.metrics.jsonl", extra=[alert])
    assert "steps skipped: two of <them> (step 1,030)" in in_process(monkeypatch, capsys, tmp_path, "--terminal")[1]
    code, out, _ = in_process(monkeypatch, capsys, tmp_path / "c.metrics.jsonl", "--output", tmp_path / "o")
    assert code == 0, out
    assert {file.stem for file in (tmp_path / "o").glob("*.png")} == {panel.name for panel in PANELS} - {
        "bits_per_byte"} | {"val_books"}
    text = (tmp_path / "o" / "index.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "default-src 'none'" in text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert any("<script>alert('x')</script> &" in shown for shown in page.texts)
    assert {"python <train.py>", "a.txt b.txt", "40", "4.47M", "20k", "0:20:00",
            "steps skipped: two of <them> (step 1,030)"} <= set(page.texts)


def test_a_browser_shows_the_page(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    from matplotlib.image import imread

    write_run(tmp_path / "c.metrics.jsonl")
    report.write_page(report.load([tmp_path / "c.pt"]), tmp_path / "o", "step", 0)
    shot = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1800",
                           f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "o" / "index.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert (tmp_path / "shot.png").exists(), shot.stderr
    assert "CONSOLE" not in shot.stderr, shot.stderr
    pixels = (imread(tmp_path / "shot.png")[:, :, :3] * 255).round().astype(int)  # (height, width, 3)
    for name, color in ("train", (0x00, 0x72, 0xb2)), ("validation", (0xd5, 0x5e, 0x00)), ("text", (0x22,) * 3):
        assert (abs(pixels - color).max(2) < 12).sum() > 100, f"{name} is not to be seen"


def test_the_terminal_needs_no_matplotlib(tmp_path):
    write_run(tmp_path / "a" / "c.metrics.jsonl")
    write_run(tmp_path / "b" / "c.metrics.jsonl", lr=2e-3, steps=30, code=143)
    without = ("-c", f"import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {str(ROOT)!r}); "
                     "import report; report.main()")
    shown = run_report("a/c.pt", "b/c.pt", "--terminal", cwd=tmp_path, start=without)
    assert shown.returncode == 0, shown.stderr
    assert any("\u2800" < c <= "\u28ff" for c in shown.stdout) and "\x1b" not in shown.stdout
    table = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in shown.stdout.splitlines() if "  " in line}
    assert table["run"] == ["A", "a/c", "B", "b/c"] and table["lr"] == ["0.001", "0.002"]
    assert table["exit"] == ["0", "143", "(SIGTERM)"] and table["steps"] == ["40", "30", "of", "40"]
    refused = run_report("a/c.pt", cwd=tmp_path, start=without)
    assert refused.returncode == 2 and "pip install matplotlib" in refused.stderr and "--terminal" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_where_no_page_can_be_written_another_folder_is_asked_for(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "c.metrics.jsonl")
    (tmp_path / "c.report").touch()
    code, _, err = in_process(monkeypatch, capsys, tmp_path / "c.pt")
    assert code == 2 and err.endswith("name a folder of your own: --output DIR\n") and err.count("\n") == 1, err


def test_in_a_terminal_more_than_four_runs_have_a_row_each(tmp_path, monkeypatch, capsys):
    for i in range(4):
        write_run(tmp_path / f"{i}.metrics.jsonl")
    assert "train loss" in in_process(monkeypatch, capsys, *(tmp_path / f"{i}.pt" for i in range(4)), "--terminal")[1]
    for i in range(4):
        (tmp_path / f"{i}.metrics.jsonl").unlink()
    for i in range(12):
        write_run(tmp_path / f"rate-{i:02}.metrics.jsonl", lr=(i + 1) / 1000, steps=40 - 10 * (i == 7))
    code, out, _ = in_process(monkeypatch, capsys, tmp_path, "--terminal")
    lines = out.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("run ")]
    assert code == 0 and max(map(len, lines[start:start + 13])) < 80
    assert re.split("  +", lines[start]) == "run,steps,val loss,best val loss,tokens/s,time,lr".split(",")
    rows = [re.split("  +", line) for line in lines[start + 1:start + 13]]
    assert [row[:2] for row in rows[:2] + rows[-1:]] == [["A", "rate-00"], ["B", "rate-01"], ["L", "rate-07"]]
    assert rows[-1][2:] == ["30 of 40", "2.3140", "2.3140 at 30", "20k", "0:15:00", "0.008"]
    for i in range(12):  # losses per token then compare nothing
        write_run(tmp_path / f"rate-{i:02}.metrics.jsonl", tokenizer_hash=str(i))
    out = in_process(monkeypatch, capsys, tmp_path, "--terminal")[1]
    assert re.search("^run  +steps  +val loss  +bits per byte  ", out, re.MULTILINE)


def test_no_flag_acts_on_the_terminal(tmp_path, monkeypatch, capsys):
    for name in "ab":
        write_run(tmp_path / f"{name}.metrics.jsonl", device=f"\x1b[31m{name}")
    code, out, _ = in_process(monkeypatch, capsys, tmp_path, "--terminal")
    assert code == 0 and "\x1b" not in out and out.count("\\x1b[31ma") == 2  # in the table, and in the run's story


def test_no_name_acts_on_the_terminal_or_is_taken_for_a_formula(tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("a$x^{$", "b\x1b[31m", "c")):
        sources = "$\\frac{$", "\x1b[31m", "\ud800"
        row = {"step": 40, "time": 2.0, "val/loss": 2.0} | {f"val/loss/{source}": 2.0 for source in sources}
        sample = dict(step=40, time=3.0, event="sample", text="once")
        write_run(tmp_path / f"{name}.metrics.jsonl", extra=[row, sample], command=5, **{"\x1b[31m": i + 1})
    code, out, _ = in_process(monkeypatch, capsys, tmp_path, "--terminal")
    assert code == 0 and "\x1b" not in out and "b\\x1b[31m, sample at step 40:" in out, out
    assert "Validation loss: \\x1b[31m" in out and "against --\\x1b[31m" in out
    assert in_process(monkeypatch, capsys, tmp_path, "--output", tmp_path / "o")[0] == 0


def test_a_sweep_is_shown_against_its_flag(tmp_path, monkeypatch, capsys):
    for name, (lr, seed) in {"a": (1e-4, 1), "b": (2e-3, 1), "c": (1e-3, 1), "d": (1e-3, 2)}.items():
        write_run(tmp_path / "lr" / f"{name}.metrics.jsonl", lr=lr, seed=seed, data_seed=seed, device=f"host {name}",
                  accum_steps=name)
    code, out, _ = in_process(monkeypatch, capsys, tmp_path / "lr", "--terminal")
    title, *plot = out.split("\n\n")[1].splitlines()
    assert code == 0 and title == "Best validation loss against --lr (nats per token)"
    assert plot[-1].split() == ["0.0001", "--lr,", "log", "scale", "0.002"]
    assert {mark for line in plot[:-1] for mark in line if mark.isalpha()} == {"A", "B", "D"}  # C lies under D
    ((panel, points, label),) = report.sweep(report.load([tmp_path / "lr"]))
    ax = figure(panel, points, label).axes[0]
    loss = 2 + 6 * math.exp(-40 / 9) + 0.1 + 0.1
    drawn = [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines]
    assert [x for x, _ in drawn] == [1e-4, 2e-3, 1e-3, 1e-3] and [y for _, y in drawn] == pytest.approx([loss] * 4)
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "--lr, log scale" and ax.get_yscale() == "linear"
    assert {"0.0005", "0.001"} <= {text.get_text() for text in ax.get_xticklabels()}
    code, out, _ = in_process(monkeypatch, capsys, tmp_path / "lr")
    assert code == 0 and "sweep.png" in out


@pytest.mark.parametrize("flags, shown", [
    ([dict(dropout=0.0), dict(dropout=0.1), dict(dropout=0.9)], "linear"),
    ([dict(batch_size=2), dict(batch_size=4), dict(batch_size=9)], "linear"),
    ([dict(batch_size=2), dict(batch_size=4), dict(batch_size=10)], "log"),
    ([dict(dropout=0.0), dict(dropout=0.1), dict(dropout=0.1)], None),  # two values: the table tells as much
    ([dict(seed=1), dict(seed=2), dict(seed=3)], None),
    ([dict(dropout=0.0, d_ff=1), dict(dropout=0.1, d_ff=2), dict(dropout=0.2, d_ff=3)], None),
    ([dict(dropout=0.0), dict(dropout=0.1), dict(dropout=0.2, optimizer="muon")], None),
    ([dict(min_lr=None), dict(min_lr=0.1), dict(min_lr=0.2), dict(min_lr=0.3)], None),
    # Models of several sizes differ in several flags: the axis is their parameters, unless those differ by the way.
    ([dict(d_model=1, lr=3, n_params=10), dict(d_model=2, lr=2, n_params=30), dict(d_model=3, n_params=50)], "log"),
    ([dict(d_model=1, lr=3, n_params=10), dict(d_model=2, lr=2, n_params=15), dict(d_model=3, n_params=20)], "linear"),
    ([dict(arch="gpt2", n_params=10), dict(d_ff=2, n_params=12), dict(d_ff=3, n_params=19)], None),
    ([dict(d_model=1, lr=3, n_params=10), dict(d_model=2, lr=2, n_params=50)], None),
    ([dict(arch="gpt2"), dict(arch="llama"), dict(arch="qwen3")], None),
], ids=str)
def test_a_sweep_is_of_one_flag_that_is_a_number(tmp_path, flags, shown):
    runs = report.load([write_run(tmp_path / f"{i}.metrics.jsonl", **some) for i, some in enumerate(flags)])
    found = report.sweep(runs)
    assert ["log" if panel.log_x else "linear" for panel, *_ in found] == ([shown] if shown else [])
    assert [panel.name for panel, *_ in report.plots(runs, "step")][:2] == ["loss", "sweep" if shown else "perplexity"]


def test_models_of_several_sizes_over_the_cost_of_training_them(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "large.metrics.jsonl", width=4e15, n_layers=8, d_model=512)
    write_run(tmp_path / "small.metrics.jsonl", width=1e13, n_layers=2, d_model=128)
    runs = report.load([tmp_path])
    assert {run.name: run.series("val/loss", "flops")[0] for run in runs} == {  # none at 0, which a log scale lacks
        "large": [4e16, 8e16, 1.2e17, 1.6e17], "small": [1e14, 2e14, 3e14, 4e14]}
    panel, drawn, x = report.plots(runs, "flops")[0]
    ax = figure(panel, drawn, x).axes[0]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "training FLOPs, log scale")
    assert {tick.get_text() for tick in ax.get_xticklabels()} >= {"1e14", "1e15", "1e17"}
    assert {run.name: run.facts()["FLOPs"] for run in runs} == {"large": "1.6e17", "small": "400T"}
    code, out, _ = in_process(monkeypatch, capsys, tmp_path, "--x", "flops", "--terminal")
    assert code == 0 and "training FLOPs, log scale" in out and "1.6e17" in out
    for run in runs:
        for row in run.rows:
            del row["train/flops"]
    with pytest.raises(report.UserError, match="no report of these runs has train/flops above 0; take --x step"):
        report.plots(runs, "flops")


def test_a_run_that_was_resumed_and_is_still_going(tmp_path):
    path = write_run(tmp_path / "c.metrics.jsonl", code=None)
    path.write_text(path.read_text() + '{"step": 42, "time": 17')
    run = report.Run(path)
    assert run.ending() == "none yet" and "resumed at step 20" in run.story() and "last report" in run.story()
    assert run.rows[-1]["step"] == 40 and run.series("train/loss")[0] == list(range(2, 41, 2))
    assert run.series("val/ppl")[0] == [10, 20, 30, 40]  # at step 0 it has overflowed
    run.rows[-1] |= {"val/ppl": None, "val/loss": None}
    assert run.last("val/ppl") == math.inf and math.isnan(run.last("val/loss")) and run.last("no such") is None
    assert run.series("lr", "time")[0][-1] == 20 * 60  # not the hours in which nothing ran
    assert run.series("lr", "tokens")[0][-1] == 40 * 2048


def test_a_run_resumed_with_other_flags_says_which_and_is_no_point_of_a_sweep(tmp_path):
    for name, lr in dict(a=1e-4, b=2e-3, c=1e-3, d=4e-3).items():
        path = write_run(tmp_path / f"{name}.metrics.jsonl", lr=lr, num_steps=40, warmup_steps=5)
    path.write_text(path.read_text().replace('"lr": 0.004, "num_steps": 40', '"lr": 0.008, "num_steps": 20', 1))
    runs = {run.name: run for run in report.load([tmp_path])}
    assert runs["d"].story().endswith("resumed at step 20 (lr 0.008 → 0.004, num_steps 20 → 40)")
    assert runs["c"].story().endswith("resumed at step 20")
    assert {point.name for point in report.sweep(list(runs.values()))[0][1]} == {"a", "b", "c"}


def test_runs_that_differ_in_seeds_alone_are_trials_of_one_setting(tmp_path, monkeypatch, capsys):
    paths = {name: write_run(tmp_path / f"{name}.metrics.jsonl", data_seed=flags["seed"], device=name, **flags)
             for name, flags in dict(a=dict(lr=1e-3, seed=1), b=dict(lr=1e-3, seed=2), c=dict(lr=2e-3, seed=1),
                                     going=dict(lr=1e-3, seed=3, steps=20), changed=dict(lr=1e-3, seed=4),
                                     branch=dict(lr=1e-3, seed=5, resume="a.pt")).items()}
    for name, was, now in [("changed", '"lr": 0.001', '"lr": 0.002'), ("branch", '"step": 0,', '"step": 10,'),
                           # Begun on another machine, by an older version that lacked a flag: no change of the setting.
                           ("b", '"device": "b"', '"device": "gone"'), ("b", '"world_size": 2, ', ""),
                           # What a run saves and shows, and the commit, are no settings.
                           ("a", '"lr"', '"git_commit": "0f", "save_steps": 9, "time_limit": 5, "lr"')]:
        paths[name].write_text(paths[name].read_text().replace(was, now, 1))
    lower = (tmp_path / "a.metrics.jsonl").read_text().splitlines()
    for i, row in enumerate(map(json.loads, lower)):
        if row.get("val/loss"):
            lower[i] = json.dumps(row | {"val/loss": row["val/loss"] - 1})
    (tmp_path / "a.metrics.jsonl").write_text("\n".join(lower) + "\n")
    runs = report.load([tmp_path])
    assert [run.story().split(" · ")[-1] for run in runs if run.name == "b"] == ["resumed at step 20 (device gone → b)"]
    a, b = (next(run.best()[0] for run in runs if run.name == name) for name in "ab")
    assert a == b - 1
    titles = ("lr", "runs", "best val loss", "± standard deviation")
    assert report.over_seeds(runs) == [titles, ("0.001", "2", f"{(a + b) / 2:.4f}", f"{math.sqrt(0.5):.4f}"),
                                       ("0.002", "1", f"{b:.4f}", "–")]
    assert report.over_seeds([run for run in runs if run.name in "ac"]) == []
    assert report.over_seeds([run for run in runs if run.name in "ab"])[1] == ("2", f"{(a + b) / 2:.4f}", "0.7071")
    code, out, _ = in_process(monkeypatch, capsys, tmp_path, "--terminal")
    assert code == 0 and re.search(rf"over seeds:\nlr +runs .*\n0\.001 +2 +{(a + b) / 2:.4f} +0\.7071\n0\.002 +1 ", out)
    page = Page(report.page(runs, []))
    assert {"Over seeds", "0.7071", *titles} <= set(page.texts)
    assert page.tags.count("table") == 3 + len(runs) and page.tags.count("tr") > 3


def test_a_branch_says_where_it_began(trainer):
    flags = ["--save-steps", 4, "--eval-steps", 4, "--log-steps", 2]
    trainer(*flags, "--num-steps", 8, "--keep-last", 3, checkpoint="a.pt")
    trainer(*flags, "--num-steps", 8, "--resume", "a.step-00000004.pt", checkpoint="b.pt")
    trainer(*flags, "--num-steps", 10, "--resume", checkpoint="b.pt")
    (run,) = report.load([trainer.folder / "b.pt"])
    assert run.rows[0]["step"] == 6 and run.story().endswith(
        "branched from a.pt at step 4 · resumed at step 8 (num_steps 8 → 10)")
    trainer(*flags, "--num-steps", 4, "--init-from", "a.pt", "--tokenizer-name", "a.tokenizer", "--keep-optimizer",
            "--device", "cpu", checkpoint="c.pt", tiny=False)
    (run,) = report.load([trainer.folder / "c.pt"])
    assert run.story().endswith(" · weights and optimizer state from a.pt")


@pytest.mark.parametrize("resume, says", [
    ("latest", "resumed at step 180"), ("auto", "resumed at step 180"), ("./c.best.pt", "resumed at step 180"),
    ("c.kept-00000180.pt", "resumed at step 180"), ("old/c.prev.pt", "branched from old/c.pt at step 180")])
def test_a_run_whose_first_metrics_were_lost_is_no_branch(tmp_path, resume, says):
    config = dict(resume=resume, checkpoint_path="c.pt")
    (tmp_path / "c.metrics.jsonl").write_text("\n".join(map(json.dumps, [
        dict(step=180, time=1.0, event="config", config=config), {"step": 190, "time": 2.0, "train/loss": 1.0},
        dict(step=190, time=1.0, event="exit", code=0)])))
    assert report.Run(tmp_path / "c.metrics.jsonl").story().endswith(says)


@pytest.mark.parametrize("line", [
    '{"step": "x", "time": 1, "train/loss": 9}', '{"step": 1, "time": "x", "train/loss": 9}',
    '{"step": -1, "time": 1, "train/loss": 9}', '{"step": 1, "time": 1e300, "train/loss": 9}',
    '{"step": 1, "time": 1, "train/loss": "x"}', '{"step": 1, "time": 1, "event": "config", "config": []}',
    '{"step": 1, "time": 1, "event": "sample"}', '{"step": 1, "time": 1, "event": "exit", "code": "x"}', "[" * 100_000,
    '{"step": 1, "time": 1, "event": [1]}', "[1]", "null"], ids=range(12))
def test_a_line_that_no_run_writes_is_skipped(tmp_path, line):
    path = write_run(tmp_path / "run.metrics.jsonl")
    records, facts = list(read_records(path)), report.Run(path).facts()
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{line}\n{rest}")
    assert list(read_records(path)) == records and report.Run(path).facts() == facts


def test_a_run_of_one_row(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path / "c.metrics.jsonl", steps=0)
    code, out, _ = in_process(monkeypatch, capsys, path)
    assert code == 0 and out.rstrip().endswith("beside it loss.png")
    code, out, _ = in_process(monkeypatch, capsys, path, "--terminal", "--x", "time")
    assert code == 0 and "∞" in out and "800.0000 at 0" in out


def test_names_tell_runs_apart_and_a_run_named_twice_is_shown_once(tmp_path):
    paths = [write_run(tmp_path / folder / f"{name}.metrics.jsonl") for folder, name in ("ac", "bc", "bd")]
    (tmp_path / "b" / "d.best.pt").touch()
    runs = report.load([*paths, tmp_path / "b" / "d.best.pt", tmp_path / "b" / "d.step-20.pt"])
    assert [run.name for run in runs] == ["a/c", "b/c", "d"]


def test_a_folder_means_all_runs_in_it_each_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a.rank1", "begun"):
        write_run(tmp_path / "lr" / f"{name}.metrics.jsonl")
    for name in ("a.pt", "a.best.pt", "a.kept-00000020.pt", "no metrics.pt"):
        (tmp_path / "lr" / name).touch()
    (tmp_path / "lr" / "begun.metrics.jsonl").write_text("")
    assert [run.name for run in report.load(["lr", "lr/a.best.pt"])] == ["a", "b"]
    assert capsys.readouterr().err.startswith("left out lr/begun.metrics.jsonl: no report in it yet")
    code, out, _ = in_process(monkeypatch, capsys, "lr/")
    assert code == 0 and out.startswith("wrote lr/report/index.html")


def test_runs_are_listed_from_the_best_to_the_worst_and_then_those_never_evaluated(tmp_path):
    def write(name, val, of="", bits=None):
        config = dict(step=0, time=1, event="config", config=dict(tokenizer_hash=of))
        rows = [{"step": step, "time": 1, "train/loss": 1.0, "val/loss": loss, "val/bits_per_byte": bits}
                for step, loss in enumerate(val)] or [{"step": 1, "time": 1, "train/loss": 1.0}]
        (tmp_path / f"{name}.metrics.jsonl").write_text("\n".join(map(json.dumps, [config, *rows])))

    write("a", [])
    write("b", [9, 4.5, 8])
    write("c", [9, 5, 5])
    write("d", [None])
    write("e", [9, 4, None])
    runs = report.load([tmp_path])
    assert [run.name for run in runs] == ["e", "b", "c", "a", "d"]
    assert report.page(runs, []).count("class=best>4.0000 at 1<") == report.page(runs, []).count("class=best") == 1
    write("b", [9, 4.5], of="x", bits=1.0)  # whose tokens are others: its loss says nothing
    write("e", [9, 4], bits=2.0)
    write("c", [9, 5], bits=3.0)
    runs = report.load([tmp_path])
    assert [run.name for run in runs] == ["b", "e", "c", "a", "d"] and "class=best" not in report.page(runs, [])


@pytest.mark.parametrize("args, says", [
    (["nope.pt"], "nope.pt: there is no nope.metrics.jsonl; there: c.pt, empty.pt"),
    (["many/x.pt"], "report.py many\n"),
    (["none/x.pt"], "there is no none/x.metrics.jsonl; python train.py makes one"),
    ([], "checkpoints/minigpt.pt: there is no"),
    (["nested"], "nested: is a folder without runs; there: nested/a, 'nested/b c'"),
    (["nested/none"], "nested/none: is a folder without runs; python train.py makes one"),
    (["empty.pt"], "empty.metrics.jsonl: no report in it yet"),
    (["c.pt", "--smooth", "0"], "--smooth: 0: expected a whole number"),
    (["c.pt", "--x", "steps"], "--x: invalid choice: 'steps'"),
    (["c.pt", "--output", "empty.metrics.jsonl"], "empty.metrics.jsonl: File exists"),
], ids=str)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "c.metrics.jsonl")
    for name in ("nested/none", "nested/a", "nested/b c", "many"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("nested/a/r", "nested/b c/r", *(f"many/{i}" for i in range(6))):
        (tmp_path / f"{name}.metrics.jsonl").touch()
    (tmp_path / "empty.metrics.jsonl").write_text('{"step": 0, "time": 1, "event": "config", "config": {}}\n[1]\n7\n')
    code, _, err = in_process(monkeypatch, capsys, *args)
    assert code == 2 and err.startswith("error: ") and says in err and len(err.splitlines()) == 1


def test_the_readme_changes_between_the_markers_alone(tmp_path):
    write_run(tmp_path / "c.metrics.jsonl")
    stamp = "[2026-01-31 11:11:42] "
    reports = [f"{stamp}epoch 1 step {step}/40 | val loss 3.0" for step in range(0, 41, 2)]
    log = [stamp + "model: gpt2", stamp + "Arguments: lr=1", *reports, f"{stamp}sample at step 40:\na text\nend",
           stamp + "Training finished."]
    (tmp_path / "c.log").write_text("\n".join(log) + "\n")
    after = "after `<!-- run:begin -->` and `<!-- run:end -->`"
    (tmp_path / "README.md").write_text(f"before\n<!-- run:begin -->\nold\n<!-- run:end -->\n{after}\n")
    for _ in range(2):
        subprocess.run([sys.executable, ROOT / "bench" / "readme.py", "c.pt", "README.md"], cwd=tmp_path, check=True)
        shown = [log[0], reports[0], reports[1], "…", reports[10], "…", reports[20], log[-1]]
        assert (tmp_path / "README.md").read_text() == "\n".join([
            "before", "<!-- run:begin -->", "```", *shown, "```", "<!-- run:end -->", after, ""])
    svg = (tmp_path / "docs" / "loss.svg").read_text()
    assert "nats per token" in svg and len(svg) < 60_000


def test_smoothing_keeps_a_line_and_averages_noise():
    line = [3.0 * i + 1 for i in range(9)]
    assert smoothed(line, 5) == pytest.approx(line) and smoothed([4.0], 5) == [4.0]
    assert smoothed([0.0, 3, 0, 3, 0, 3, 0], 3)[1:-1] == pytest.approx([1, 2, 1, 2, 1])
    assert min(smoothed([1.0, 1, 1, 900, 1, 1], 5)) >= 1  # or it had no place on a log scale


def test_runs_are_told_apart_by_color_and_line():
    assert len({looks(i) for i in range(24)}) == 24 and looks(24) == looks(0)


def a_run(x, **ys):
    """A run with these values over `x`, in the metrics whose names end so."""
    def series(metric, _):
        y = ys.get(re.sub(".*/", "", metric))
        return (list(x), list(y)) if y is not None else ([], [])

    return SimpleNamespace(name="a", series=series)


def test_a_legend_is_of_several_curves_or_of_an_average():
    def legend(panel, run):
        found = figure(next(each for each in PANELS if each.name == panel), [run], smooth=5).axes[0].get_legend()
        return found and [text.get_text() for text in found.get_texts()]

    assert legend("lr", a_run(range(9), lr=range(9))) is None
    assert legend("grad_norm", a_run(range(9), grad_norm=range(9))) == ["norm, mean of 5 reports"]


def test_hundreds_of_runs_leave_room_for_their_curves():
    """A legend of them all took it, and could not tell them apart: the looks of runs repeat."""
    lr, runs = next(each for each in PANELS if each.name == "lr"), [a_run(range(9), lr=range(9)) for _ in range(25)]
    of_few, of_many = (figure(lr, runs[:n]) for n in (24, 25))
    assert of_few.axes[0].get_legend() and of_many.axes[0].get_legend() is None


def test_curves_over_time_are_in_the_unit_that_their_axis_names():
    panel, run = PANELS[0], a_run([0, 600, 1200], loss=[5, 4, 3])
    ax = figure(panel, [run], "time").axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time of the run (min)", panel.unit)
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 10, 20]] * 2, "of training, and of validation"
    assert terminal_plot(panel, [run], "time", 0, 60, 8, False)[-1].split()[-1] == "20"


def test_the_ends_of_an_axis_in_the_terminal_tell_late_steps_apart():
    """A run that goes on at step 1,000,000, as another's branch, for 1,000 steps."""
    run = a_run([10**6, 10**6 + 1000], loss=[5, 4])
    assert terminal_plot(PANELS[0], [run], "step", 0, 60, 8, False)[-1].split() == ["1M", "step", "1.001M"]


def test_a_line_in_the_terminal_goes_straight_from_dot_to_dot():
    canvas = _Canvas(4, 2)
    canvas.line([(1, 7), (5, 3), (5, 1)], 0)
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]  # of Unicode's dots 1 to 8
    found = {(2 * column + x, 4 * row + y) for row, text in enumerate(canvas.rows(False))
             for column, char in enumerate(text) if char != " "
             for bit, (x, y) in enumerate(places) if ord(char) - 0x2800 >> bit & 1}
    assert found == {(1, 7), (2, 6), (3, 5), (4, 4), (5, 3), (5, 2), (5, 1)}


def test_labels_tell_ticks_apart():
    assert [short(value) for value in (999.7, 9_999.7, 999_960_000, 0, -1234)] == ["1,000", "10k", "1B", "0", "-1,234"]
    assert ticks([999.2, 999.6]) == ["999.2", "999.6"] and ticks([0.5, 999.96]) == ["0.5", "1,000"]
    assert ticks([2.0012, 2.0014]) == ["2.0012", "2.0014"] and ticks([12_000, 12_010], 12_010) == ["12k", "12.01k"]
    assert ticks([0, 20_000, 40_000], 40_000) == ["0", "20k", "40k"] and ticks([5, 5]) == ["5", "5"]


def test_runs_of_different_tokenizers_are_compared_by_bits_per_byte(tmp_path):
    for name in ("a", "b"):
        path = write_run(tmp_path / f"{name}.metrics.jsonl")
        path.write_text(path.read_text().replace('"arch": "gpt2"', f'"arch": "gpt2", "tokenizer_hash": "{name}"'))
    both = report.load([tmp_path / f"{name}.metrics.jsonl" for name in ("a", "b")])
    assert "bits_per_byte" in [panel.name for panel in panels(both)]
    assert "bits_per_byte" not in [panel.name for panel in panels(both[:1])]


def test_validation_sets_of_like_names_have_panels_of_their_own():
    class Run:
        rows, config = [dict.fromkeys([f"val/loss/{name}" for name in ("a-b.txt", "a.b.txt", "c")], 2.0)], {}

        def series(self, metric, x):
            return ([1], [2.0]) if metric.startswith("val/loss/") else ([], [])

    assert [panel.name for panel in panels([Run()])] == ["val_a_b_txt_0", "val_a_b_txt_1", "val_c"]


def test_a_sparkline_is_from_the_least_to_the_greatest():
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█" and sparkline([2.0]) == sparkline([5, 5])[:1] == "▁"
    long = sparkline([math.sin(i / 1000) for i in range(6283)], 9)
    assert len(long) == 9 and long[4] in "▃▄▅" and long[2] == "█" and long[6] == "▁"
