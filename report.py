"""Show runs, from their metrics.jsonl alone: curves, a comparison, samples.

python report.py                                        checkpoints/minigpt.pt → checkpoints/minigpt.report/index.html
python report.py checkpoints/a.pt checkpoints/b.pt      two runs in the same plots, and the flags that differ
python report.py checkpoints/lr                         all runs in a folder → checkpoints/lr/report/index.html
python report.py checkpoints/minigpt.pt --terminal      the same as text, over ssh
"""

import base64
import datetime
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mini_llm.config import Parser, flag, is_launch_flag, positive
from mini_llm.errors import UserError, needed_packages, one_line_errors, print_any_character, visible
from mini_llm.files import beside_run, command, read_records
from mini_llm.plots import MARKS, Panel, comparable, figure, looks, panels, short, terminal_plot

ROWS = ".metrics.jsonl"
DEFAULT = "checkpoints/minigpt.pt"
# Recorded beside the flags, and derived from them.
NOT_FLAGS = ("command", "n_params", "flops_per_token", "corpus", "corpus_tokens", "tokenizer_hash", "accum_steps")
# How the names begin of what may differ between trials of one setting: seeds, machine, what is saved and shown.
TRIAL = ("seed", "data_seed", "device", "rank", "world_size", "local_", "worker_", "num_workers", "git_", "version/",
         "log_steps", "sample_", "save_", "keep_last", "keep_every", "async_save", "time_limit", "use_wandb")
# The facts of a run in one row of text, by the metric that compares the runs.
ROW = {"val/loss": ("steps", "val loss", "best val loss", "tokens/s", "time"),
       "val/bits_per_byte": ("steps", "val loss", "bits per byte", "tokens/s", "time")}
EMPTY = "(nothing: the model ended the text at once)"
X_METRICS = {"step": "step", "tokens": "train/tokens", "flops": "train/flops", "time": "elapsed"}


class Run:
    """A run as recorded in its metrics.jsonl; it may still be running."""

    def __init__(self, path):
        self.path, self.rows, self.samples, self.alerts = path, [], [], []
        self.name = visible(path.name.removesuffix(ROWS))
        self.config, self.code, self.starts = {}, None, []
        for record in read_records(path):
            event, step = record.get("event"), record["step"]
            if event == "config":  # one for each start or resume of the run
                self.config, self.code = record["config"], None
                self.starts.append((step, self.config))
            elif event == "sample":
                self.samples.append((step, record["text"]))
            elif event == "alert":
                self.alerts.append(f"{record['title']}: {record['text']} (step {step:,})")
            elif event == "exit":
                self.code = record["code"]
            elif event is None and ("train/loss" in record or "val/loss" in record):
                # Without histograms, of megabytes, which only W&B shows.
                self.rows.append({sys.intern(name): value for name, value in record.items()  # the same one in each row
                                  if not isinstance(value, dict)})
        elapsed = 0
        for row in self.rows:  # not wall-clock time, which also passes while a killed run waits to be resumed
            elapsed += row.get("time/dt_sec") or 0
            row["elapsed"] = elapsed

    def series(self, metric, x="step"):
        """(xs, ys) of the metric's finite values over `x`, of X_METRICS; none at 0 FLOPs: that axis is logarithmic."""
        where = X_METRICS[x]
        pairs = [(row[where], row[metric]) for row in self.rows
                 if _is_number(row.get(metric)) and where in row and (row[where] or x != "flops")]
        return [at for at, _ in pairs], [value for _, value in pairs]

    def last(self, metric):
        """The metric's last value; if that is not finite, inf for a perplexity, else NaN; None if never measured."""
        unknown = math.inf if metric.endswith("ppl") else math.nan
        values = [unknown if row[metric] is None else row[metric] for row in self.rows if metric in row]
        return values[-1] if values else None

    def best(self, metric="val/loss"):
        """(lowest value, its step), or None."""
        steps, values = self.series(metric)
        return min(zip(values, steps, strict=True), default=None)

    def facts(self):
        """What the comparison shows of this run: title → text."""
        speeds, best = self.series("global_tokens_per_sec")[1], self.best()
        step, steps = self.rows[-1]["step"], self.config.get("num_steps", 0)
        return {
            "steps": f"{step:,}" + ("" if self.has_ended() else f" of {steps:,}"),
            "tokens": _text(self.last("train/tokens"), short),
            "parameters": _text(self.config.get("n_params"), short),
            "FLOPs": _text(self.last("train/flops"), short),
            "train loss": _text(self.last("train/loss"), "{:.4f}".format),
            "val loss": _text(self.last("val/loss"), "{:.4f}".format),
            "best val loss": f"{best[0]:.4f} at {best[1]:,}" if best else "–",
            "val ppl": _text(self.last("val/ppl"), "{:,.2f}".format),
            "bits per byte": _text(self.last("val/bits_per_byte"), "{:.4f}".format),
            "tokens/s": short(statistics.median(speeds)) if speeds else "–",
            "time": str(datetime.timedelta(seconds=round(self.rows[-1]["elapsed"]))),
            "exit": self.ending(),
        }

    def has_ended(self):
        """Whether all steps have been taken."""
        return self.rows[-1]["step"] >= self.config.get("num_steps", 0)

    def ending(self):
        if self.code is None:
            return "none yet"
        try:
            return f"{self.code} ({signal.Signals(self.code - 128).name})"
        except ValueError:
            return str(self.code)

    def origin(self):
        """The run that this one branched off from (its newest checkpoint, as it was named), or None."""
        step, config = self.starts[0] if self.starts else (0, {})
        source, own = (str(config.get(name) or "") for name in ("resume", "checkpoint_path"))
        if not step or source in ("", "latest", "auto"):
            return None
        run = beside_run(source, ".pt")
        is_own = os.path.abspath(run) == os.path.abspath(beside_run(own, ".pt"))  # and its earlier metrics are lost
        return None if is_own else run

    def story(self):
        """Where and when the run ran, and other facts that the comparison table has no column for."""
        ranks, started = self.config.get("world_size"), datetime.datetime.fromtimestamp(self.rows[0]["time"])
        parts = [str(self.path), self.config.get("arch"), self.config.get("device"),
                 f"{ranks} rank{'s' * (ranks > 1)}" if ranks else "", f"first report {started:%Y-%m-%d %H:%M}"]
        if weights := self.config.get("init_from"):
            with_state = " and optimizer state" if self.config.get("keep_optimizer") else ""
            parts.append(f"weights{with_state} from {weights}")
        starts = zip(self.starts, self.starts[:1] + self.starts, strict=False)  # each with the one before it
        resumed = [f"{step:,}{_changes(before, config)}" for (step, config), (_, before) in starts if step]
        if origin := self.origin():
            parts.append(f"branched from {origin} at step {resumed.pop(0)}")
        if resumed:
            parts.append("resumed at step " + ", ".join(resumed))
        if self.code is None:
            ago = datetime.timedelta(seconds=round(max(0, time.time() - self.rows[-1]["time"])))
            parts.append(f"running, or killed: last report {ago} ago")
        return " · ".join(filter(None, parts))


def _is_setting(name):
    return name not in NOT_FLAGS and not is_launch_flag(name)


def _changes(before, after, but=()):
    """What a resumed run was told otherwise than before: " (lr 0.001 → 0.0003)". Not a flag that is newer than that."""
    changed = ", ".join(f"{name} {show(before[name])} → {show(value)}" for name, value in after.items()
                        if _is_setting(name) and not name.startswith(but) and before.get(name, value) != value)
    return f" ({changed})" if changed else ""


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _text(value, form):
    return "–" if value is None else "∞" if value == math.inf else form(value)


def find(word):
    """Path of a checkpoint, a metrics.jsonl or a folder of runs → paths of the metrics.jsonl."""
    path = Path(word)
    if path.is_dir():
        if not (found := _runs_in(path)):
            raise UserError(f"{word}: is a folder without runs{_known(path)}")
        return found
    if not (rows := beside_run(path, ROWS)).is_file():
        raise UserError(f"{word}: there is no {rows}{_known(path.parent)}")
    return [rows]


def _runs_in(folder):
    found = filter(Path.is_file, sorted(folder.glob("[!.]*" + ROWS)))  # macOS leaves ._NAME on foreign disks
    return [rows for rows in found
            if not re.search(r"\.rank\d+$", rows.name.removesuffix(ROWS))]  # what other ranks sent to W&B


def _known(folder):
    """What can be named instead, to be pasted."""
    runs = [str(beside_run(rows, ".pt")) for rows in _runs_in(folder)]
    if len(runs) > 5:
        return f"; for all {len(runs)} runs there: {command('report.py', folder)}"
    names = runs or sorted({str(rows.parent) for rows in folder.glob("*/*" + ROWS)})
    return f"; there: {', '.join(map(shlex.quote, names[:5]))}" if names else "; python train.py makes one"


def load(words):
    """Load the runs that have a report, each once, under distinct names, best first and those never evaluated last."""
    found = [Run(path) for path in {path.resolve(): path for word in words for path in find(word)}.values()]
    runs = [run for run in found if run.rows]
    errors = [UserError(f"{run.path}: no report in it yet; a run writes its first after the evaluation at step 0")
              for run in found if not run.rows]
    if not runs:
        raise errors[0]
    for error in errors:
        print(f"left out {error}", file=sys.stderr)
    for depth in range(1, max(len(run.path.resolve().parts) for run in runs)):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:  # checkpoints/a/c.pt and checkpoints/b/c.pt: a/c and b/c
                run.name = visible("/".join((*run.path.resolve().parts[-depth - 1:-1],
                                             run.path.name.removesuffix(ROWS))))
    metric = comparable(runs)
    return sorted(runs, key=lambda run: run.best(metric) or (math.inf,))


def differences(runs):
    """flag → its value in each run, for the flags whose values differ."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return {name: [run.config.get(name) for run in runs] for name in names
            if _is_setting(name) and any(run.config.get(name) != runs[0].config.get(name) for run in runs)}


@dataclass
class Point:
    """A run in the plot of a sweep."""

    name: str
    at: float
    value: float

    def series(self, metric, x="step"):
        return ([self.at], [self.value]) if metric else ([], [])


def plots(runs, x):
    """(panel, what it draws, the x axis) of every plot."""
    found = [(panel, runs, x) for panel in panels(runs, x)]
    if not found and x == "flops":
        raise UserError(f"--x {x}: no report of these runs has {X_METRICS[x]} above 0; take --x step")
    return found[:1] + sweep(runs) + found[1:]


def settings(runs):
    """`differences`, without those of trials of one setting."""
    return {name: values for name, values in differences(runs).items() if not name.startswith(TRIAL)}


def sweep(runs):
    """A list of one plot or none: the best loss against the one setting in which the runs differ or, if there are
    several, against the number of parameters, if it varies twofold. Takes at least three values, all numbers. A run
    resumed with another value is left out: its loss is of neither."""
    flags, metric = list(settings(runs)), comparable(runs)
    name = flags[0] if len(flags) == 1 else "n_params"
    values = [run.config.get(name) for run in runs]
    sizes = name == "n_params"
    if not all(map(_is_number, values)) or len(set(values)) < 3 or (sizes and max(values) < 2 * min(values)):
        return []
    low, high, label = min(values), max(values), "parameters" if sizes else visible(flag(name))
    points = [Point(run.name, at, best[0]) for run, at in zip(runs, values, strict=True) if (best := run.best(metric))
              and all(config.get(name) == at for _, config in run.starts)]
    what, unit = {"val/loss": ("loss", "nats per token")}.get(metric, ("bits per byte", "comparable across tokenizers"))
    panel = Panel("sweep", f"Best validation {what} against {label}", unit, points=metric, log_above=20,
                  smooth=False, log_x=low > 0 and high >= 5 * low)
    return [(panel, points, label)] if points else []


def over_seeds(runs):
    """A table of text, its titles first: each setting that runs have ended with, with the mean and the standard
    deviation of their best losses, the lowest mean first. [] if no setting has two runs."""
    metric, flags, trials = comparable(runs), settings(runs), {}
    for run, *values in zip(runs, *flags.values(), strict=True):
        # Changed at a resume it is of neither setting, and the steps before a branch are another run's.
        changed = run.origin() or any(_changes(config, run.config, TRIAL) for _, config in run.starts)
        if run.has_ended() and not changed and (best := run.best(metric)):
            trials.setdefault(tuple(map(show, values)), []).append(best[0])
    if max(map(len, trials.values()), default=0) < 2:
        return []
    rows = [(*values, str(len(losses)), f"{statistics.fmean(losses):.4f}",
             f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "–")
            for values, losses in sorted(trials.items(), key=lambda trial: statistics.fmean(trial[1]))]
    return [(*flags, "runs", "best val loss" if metric == "val/loss" else "best bits per byte", "± standard deviation"),
            *rows]


def show(value):
    return "–" if value in (None, "", []) else " ".join(map(str, value)) if isinstance(value, list) else str(value)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1240px; margin: 2rem auto;
       padding: 0 1.5rem; color-scheme: light }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem } .faint { color: #666 }
.alert { color: #a40000 } .wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e6e6e6; white-space: nowrap }
th { color: #555; font-weight: 600 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td { font-variant-numeric: tabular-nums } .best { font-weight: 700 }
.swatch { display: inline-block; width: 1.5rem; margin-right: .6rem; vertical-align: middle }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.4rem 1.6rem }
.plots img { width: 100%; height: auto; display: block } .plots :first-child { grid-column: 1 / -1 }
.config { columns: 3 300px; column-gap: 2rem } .config table { width: 100% }
.config td { white-space: normal; overflow-wrap: anywhere; break-inside: avoid; padding-right: 0 }
pre { background: #f6f6f6; padding: .8rem 1rem; margin: .3rem 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: .85rem } summary { cursor: pointer; padding: .2rem 0 }
"""
# The page loads nothing external, and no script in a sample can run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(runs, images):
    """The complete HTML page. `images`: (title, PNG file) of each plot."""
    title = ", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(title)}</h1>"]
    for run in runs:
        parts.append(f'<div class="faint">{escape(run.story())}</div>')
        parts += [f'<div class="alert">{escape(alert)}</div>' for alert in run.alerts]
    parts += [f"<h2>{'Comparison' if len(runs) > 1 else 'Figures'}</h2>", _comparison(runs), "<h2>Curves</h2>",
              '<div class="plots">']
    parts += [f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
              for name, file in images]
    parts += ["</div>", "<h2>Samples</h2>" if any(run.samples for run in runs) else ""]
    for run in runs:
        for step, text in reversed(run.samples):
            is_open = " open" if step == run.samples[-1][0] else ""
            parts.append(f"<details{is_open}><summary>{escape(run.name)}, step {step:,}</summary>"
                         f"<pre>\n{escape(text or EMPTY)}</pre></details>")
    parts.append("<h2>Configuration</h2>")
    for run in runs:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(show(value))}</td></tr>"
                       for name, value in run.config.items() if name != "command"
                       and (run.config.get("use_wandb") or not name.startswith("wandb_")))
        parts.append(f"<details><summary>{escape(run.name)}</summary><pre>{escape(str(run.config.get('command', '')))}"
                     f'</pre><div class="config"><table>{rows}</table></div></details>')
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
            + "\n".join(parts) + "\n</body></html>\n")


def _comparison(runs):
    """The table of all runs, and that of the flags that differ."""
    facts = [run.facts() for run in runs]
    best = runs[0].best() if len(runs) > 1 and comparable(runs) == "val/loss" else None
    cells = [[f"<td{' class=best' if name == 'best val loss' and best is not None and run.best() == best else ''}>"
              f"{escape(text)}</td>" for name, text in mine.items()] for run, mine in zip(runs, facts, strict=True)]
    parts = [_table(runs, facts[0], cells)]
    if flags := differences(runs):
        cells = [[f"<td>{escape(show(values[i]))}</td>" for values in flags.values()] for i in range(len(runs))]
        parts += ["<h2>Flags that differ</h2>", _table(runs, flags, cells)]
    if seeds := over_seeds(runs):
        head, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in seeds]
        parts += ["<h2>Over seeds</h2>", _wide(head.replace("td>", "th>"), rows)]
    return "\n".join(parts)


def _table(runs, titles, cells):
    head = "".join(f"<th>{escape(title)}</th>" for title in ("run", *titles))
    rows = []
    for i, run in enumerate(runs):
        color, line = looks(i)
        swatch = f'<span class="swatch" style="border-top: 3px {line} {color}"></span>' if len(runs) > 1 else ""
        rows.append(f"<td>{swatch}{escape(run.name)}</td>{''.join(cells[i])}")
    return _wide(head, rows)


def _wide(head, rows):
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{lines}\n</table></div>'


def write_page(runs, folder, x, smooth):
    """Write index.html and the plots as PNG files to `folder` → the names of the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for panel, drawn, axis in plots(runs, x):
        first = not images  # the first plot is as wide as the page
        file = folder / f"{panel.name}.png"
        figure(panel, drawn, axis, smooth, size=(10, 4) if first else (6.4, 3.4)).savefig(file, dpi=150)
        images.append((panel.title, file))
    text = page(runs, images)
    (folder / "index.html").write_bytes(text.encode(errors="backslashreplace"))  # a sample may contain a lone surrogate
    return [file.name for _, file in images]


def print_text(runs, x, smooth):
    """Print the plots, the comparison and each run's last sample to the terminal."""
    size, color = shutil.get_terminal_size(), sys.stdout.isatty()
    for panel, drawn, axis in plots(runs, x):
        if panel.name == "perplexity":  # with so few lines, it shows no more than the loss
            continue
        height = 12 if panel.name in ("loss", "sweep") else 5
        print("\n".join(terminal_plot(panel, drawn, axis, smooth, min(size.columns, 100), height, color)) + "\n")
    columns, flags, main_facts = [], differences(runs), ROW[comparable(runs)]
    many = len(runs) > 4  # too many to fit beside each other: each gets a row, of its main facts
    for i, run in enumerate(runs):
        facts, letter = run.facts(), f"{MARKS[i % len(MARKS)]}  " if len(runs) > 1 else ""
        columns.append({"run": letter + run.name} | {name: facts[name] for name in (main_facts if many else facts)}
                       | {name: show(values[i]) for name, values in flags.items()})
    table = [list(columns[0]), *(list(column.values()) for column in columns)]
    _print_table(table if many else list(zip(*table, strict=True)))
    if seeds := over_seeds(runs):
        print("\nover seeds:")
        _print_table(seeds)
    for run in runs:
        print("\n" + visible("\n".join([run.story(), *run.alerts])))
        for step, text in run.samples[-1:]:
            print(f"\n{run.name}, sample at step {step:,}:\n{visible(text or EMPTY)}")


def _print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(visible("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))


@one_line_errors()
def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", default=[DEFAULT],
                        help=f"checkpoint path, metrics.jsonl, or a folder of runs (default: {DEFAULT})")
    parser.add_argument("--output", metavar="DIR", help="the folder to write (default: .report beside the first run; "
                                                        "report in a folder of runs)")
    parser.add_argument("--x", choices=tuple(X_METRICS), default="step", help="the x axis (default: step)")
    parser.add_argument("--smooth", metavar="N", type=positive, default=0,
                        help="reports that the bold curves average; 1: none (default: a 25th of the run, at most 100)")
    parser.add_argument("--terminal", action="store_true", help="print text plots, and write nothing")
    advice = ""
    try:
        args = parser.parse_args()
        runs = load(args.runs)
        if args.terminal:
            print_any_character()
            print_text(runs, args.x, args.smooth)
            return
        first = Path(args.runs[0])
        folder = Path(args.output or (first / "report" if first.is_dir() else beside_run(first, ".report")))
        advice = "; name a folder of your own: --output DIR"
        with needed_packages(", or look with --terminal"):
            images = write_page(runs, folder, args.x, args.smooth)
        print(f"wrote {folder / 'index.html'}, and beside it {', '.join(images)}")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'the report cannot be written'}: {error.strerror}{advice}") from None


if __name__ == "__main__":
    main()
