"""Plot curves of runs, as matplotlib figures and as text for a terminal.

A run here is anything with a `name` and with `series(metric, x)` → (xs, ys), two lists of finite numbers.
"""

import math
import statistics
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from mini_llm.errors import visible

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"]  # Okabe and Ito
ANSI = [94, 91, 92, 95, 93, 96, 37, 90]
LINES = ["solid", "dashed", "dotted"]  # one per eight runs; CSS uses the same names
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # letters for runs, since a terminal may have no colors


@dataclass
class Panel:
    """One plot. `line`: a metric drawn faintly, under its moving average; `points`: one drawn with markers."""

    name: str
    title: str
    unit: str
    line: str = ""
    points: str = ""
    band: tuple = ()  # the metrics of its lower and upper edge
    band_label: str = ""
    line_label: str = "train"
    log_above: float = math.inf  # log scale if the maximum exceeds this many times the median
    from_zero: bool = False
    smooth: bool = True
    log_x: bool = False

    def metrics(self):
        return [metric for metric in (self.line, self.points) if metric]

    def is_log(self, values):
        return min(values) > 0 and max(values) > self.log_above * statistics.median(values)


PANELS = [
    Panel("loss", "Loss", "nats per token", "train/loss", "val/loss", log_above=20),
    Panel("perplexity", "Validation perplexity", "exp(loss)", points="val/ppl", log_above=3),
    Panel("bits_per_byte", "Validation bits per byte", "comparable across tokenizers", points="val/bits_per_byte"),
    Panel("lr", "Learning rate", "AdamW's rate", "lr", smooth=False),
    Panel("grad_norm", "Gradient norm before clipping", "L2 norm", "train/grad_norm", line_label="norm", log_above=20),
    Panel("speed", "Speed per rank", "tokens per second", "tokens_per_sec_per_rank", line_label="tokens per second",
          band=("tokens_per_sec_per_rank/min", "tokens_per_sec_per_rank/max"), band_label="slowest to fastest rank",
          from_zero=True),
    Panel("memory", "GPU memory", "GB", "gpu/peak_gb", line_label="peak", smooth=False, from_zero=True,
          band=("gpu/allocated_gb", "gpu/reserved_gb"), band_label="allocated to reserved"),
]


def sparkline(values, width=40):
    """Finite numbers, at least one → at most `width` bars, each the mean of its share, from minimum to maximum."""
    n = min(width, len(values))
    means = [statistics.fmean(values[i * len(values) // n:(i + 1) * len(values) // n]) for i in range(n)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def comparable(runs):
    """The metric by which the runs can be compared: losses per token only if they have the same tokens."""
    return "val/loss" if len({run.config.get("tokenizer_hash") for run in runs}) == 1 else "val/bits_per_byte"


def panels(runs, x="step"):
    """The panels that have values over `x`, one per validation source; bits per byte only if losses do not compare."""
    sources = dict.fromkeys(metric.removeprefix("val/loss/") for run in runs for row in run.rows for metric in row
                            if metric.startswith("val/loss/"))
    names = ["val_" + "".join(c if c.isalnum() else "_" for c in source) for source in sources]
    own = [Panel(name if names.count(name) == 1 else f"{name}_{i}", f"Validation loss: {visible(source)}",
                 "nats per token", points=f"val/loss/{source}")
           for i, (name, source) in enumerate(zip(names, sources, strict=True))]
    return [replace(panel, log_x=x == "flops") for panel in PANELS + own
            if not (panel.name == "bits_per_byte" and comparable(runs) == "val/loss")
            and any(run.series(metric, x)[0] for run in runs for metric in panel.metrics())]


def short(value, like=None, digits=3):
    """12,345,678 → 12.3M, for tables and axis ticks. `like`: the largest tick, whose unit all ticks use."""
    if abs(like or value) >= 0.9995e15:  # FLOPs, of which nobody says 3P
        return f"{value:.{digits}g}".replace("e+", "e")
    for bound, unit, sign in (1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"):
        if value and abs(like or value) >= 0.9995 * bound:  # a value that rounds up to the bound gets its unit
            return f"{value / unit:.{digits}g}{sign}"
    thousands = float(f"{abs(value):.{digits}g}") >= 1000  # as it will be rounded
    return f"{value:,.{max(0, digits - 4)}f}" if thousands else f"{value:.{digits}g}"


def ticks(values, like=None):
    """Axis labels in `short` form, with as many digits as their spacing requires."""
    near = min((high - low for low, high in pairwise(sorted(set(values)))), default=math.inf) / 50
    digits = next((n for n in range(3, 10) if all(abs(float(f"{value:.{n}g}") - value) < near for value in values)), 9)
    return [short(value, like, digits) for value in values]


def smoothed(values, window):
    """The centered moving average over `window` values. Near the ends, where the window is cut off, the least-squares
    line through it, clamped to the range of its values: this neither lags nor hooks."""
    half, out = window // 2, []
    sums = list(accumulate(values, initial=0.0))  # sums[i]: of the first i values
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        n, center = high - low, (low + high - 1) / 2
        at = (sums[high] - sums[low]) / n
        if i != center:
            near = values[low:high]
            slope = sum((j - center) * value for j, value in enumerate(near, low)) / (n * (n * n - 1) / 12)
            at = min(max(at + slope * (i - center), min(near)), max(near))
        out.append(at)
    return out


def window_of(values, smooth):
    """`smooth`, or by default a 25th of the run, at most 100; made odd, so that the window is symmetric."""
    return (smooth or min(100, len(values) // 25)) | 1


def looks(i):
    """Colour and line style of the i-th run."""
    return COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]


def axis(runs, x):
    """The label of the x axis, and the divisor for its values."""
    if x != "time":
        return {"flops": "training FLOPs"}.get(x, x), 1
    longest = max((run.series(metric, x)[0][-1] for run in runs for metric in ("train/loss", "val/loss")
                   if run.series(metric, x)[0]), default=0)
    unit, seconds = ("s", 1) if longest < 180 else ("min", 60) if longest < 3 * 3600 else ("h", 3600)
    return f"time of the run ({unit})", seconds


def figure(panel, runs, x="step", smooth=0, size=(7.2, 3.4)):
    """A matplotlib Figure of `panel` for all `runs`. `smooth`: reports per mean; 0: see window_of."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "axes.edgecolor": "#999999", "axes.labelcolor": "#333333",
                     "xtick.color": "#555555", "ytick.color": "#555555", "text.parse_math": False}):
        fig = Figure(size, layout="constrained")
        ax = fig.add_subplot()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e8e8e8", linewidth=0.8)
        ax.set_axisbelow(True)
        label, scale = axis(runs, x)
        handles = [handle for i, run in enumerate(runs)
                   for handle in _draw(ax, panel, run, i, len(runs) > 1, x, scale, smooth)]
        _axes(ax, panel, runs, x, label)
        if len(runs) > len(COLORS) * len(LINES):
            handles = []  # as looks repeat, a legend would not tell the runs apart, and take the place of the curves
        fig.suptitle(panel.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        handles += _key(panel, runs, smooth) if len(runs) > 1 else []
        if len(handles) > 1 or handles and "mean" in handles[0].get_label():
            inches = 0.6 + 0.07 * max(len(handle.get_label()) for handle in handles)  # approximate width of a column
            columns = max(1, int(size[0] / inches))
            fig.set_figheight(size[1] + 0.17 * ((len(handles) - 1) // columns))  # legend rows must not shrink the plot
            ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1), fontsize=9, frameon=False,
                      ncols=columns, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4)
        return fig


def _draw(ax, panel, run, i, several, x, scale, smooth):
    """Draw one run → its legend handles: one per curve or, if there are `several` runs, one for the run."""
    color, style = looks(i)
    handles = []
    if band := _band(panel, run, x):
        xs, low, high = band
        handles.append(ax.fill_between([at / scale for at in xs], low, high, color=color, alpha=0.18, linewidth=0,
                                       label=panel.band_label))
    xs, ys = run.series(panel.line, x)
    if xs:
        xs = [at / scale for at in xs]
        window = window_of(ys, smooth) if panel.smooth else 1
        if window > 1:
            ax.plot(xs, ys, color=color, linewidth=0.8, alpha=0.3)
        text = f"{panel.line_label}, mean of {window:,} reports" if window > 1 else panel.line_label
        handles += ax.plot(xs, smoothed(ys, window), linestyle=style, color=color, linewidth=1.7, label=text,
                           marker="o" if len(xs) == 1 else None, markersize=4)
    xs, ys = run.series(panel.points, x)
    if xs:
        beside = panel.line and not several  # next to the same run's line, which has the first color
        handles += ax.plot([at / scale for at in xs], ys, linestyle=style, linewidth=0.9,
                           color=COLORS[1] if beside else color, marker="o", markersize=5, markeredgecolor="white",
                           markeredgewidth=0.8, markevery=max(1, len(xs) // 40), label="validation", zorder=3)
    return [_swatch(run.name, color, style)] if several and handles else handles


def _band(panel, run, x):
    """(xs, lower edge, upper edge), or None if there is no band, as with a single rank."""
    if not panel.band:
        return None
    (xs, low), (_, high) = (run.series(metric, x) for metric in panel.band)
    return (xs, low, high) if low != high and len(low) == len(high) else None


def _swatch(label, color, style="solid", **more):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, label=label, linewidth=1.7, **more)


def _key(panel, runs, smooth):
    """Legend handles that explain line, points and band when colors distinguish runs."""
    from matplotlib.patches import Patch

    longest = max((run.series(panel.line, "step")[1] for run in runs), key=len)
    mean = ", smoothed" if panel.smooth and window_of(longest, smooth) > 1 else ""
    found = [_swatch(panel.line_label + mean, "#777777")] if panel.line else []
    if panel.points:
        found.append(_swatch("validation", "#777777", marker="o", markersize=5, markeredgecolor="white"))
    if panel.band and any(_band(panel, run, "step") for run in runs):
        found.append(Patch(facecolor="#777777", alpha=0.25, label=panel.band_label))
    return found if len(found) > 1 or mean else []


def _axes(ax, panel, runs, x, label):
    from matplotlib.ticker import FuncFormatter

    values = [value for run in runs for metric in (*panel.metrics(), *panel.band)
              for value in run.series(metric, "step")[1]]
    ax.set_xlabel(label)
    ax.set_ylabel(panel.unit)
    if panel.log_x:
        ax.set_xscale("log")
        _label_log(ax.xaxis, [at for run in runs for metric in panel.metrics() for at in run.series(metric, x)[0]])
    if panel.is_log(values):
        ax.set_yscale("log")
        _label_log(ax.yaxis, values)
    elif panel.from_zero:
        ax.set_ylim(0, 1.1 * max(values))
    ax.margins(x=0.015)
    for direction, greatest in (ax.xaxis, ax.get_xlim()[1]), (ax.yaxis, 0 if panel.is_log(values) else max(values)):
        formatter = FuncFormatter(lambda value, _, like=greatest: short(value, like))
        formatter.format_ticks = lambda values, like=greatest: ticks(values, like)  # formats all ticks together
        direction.set_major_formatter(formatter)


def _label_log(axis, values):
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(axis.get_label_text() + ", log scale")


def terminal_plot(panel, runs, x, smooth, width, height, color):
    """The lines of a text plot: curves in braille, points as ● or, of several runs, as each curve's letter."""
    (label, scale), several = axis(runs, x), len(runs) > 1
    curves = list(_curves(panel, runs, x, scale, smooth))
    values = [value for *_, ys in curves for value in ys]
    log = panel.is_log(values)
    left, right = min(xs[0] for *_, xs, _ in curves), max(xs[-1] for *_, xs, _ in curves)
    bottom, top = 0 if panel.from_zero else min(values), max(values)
    edges = dict(zip((0, height - 1), ticks((top, bottom)), strict=True))
    margin = max(map(len, edges.values())) + 2
    columns = width - margin

    def place(at, value):
        """The dot's (x, y), counted from the upper left."""
        across, up = _share(at, left, right, panel.log_x), _share(value, bottom, top, log)
        return round(across * (2 * columns - 1)), round((1 - up) * (4 * height - 1))

    canvas = _Canvas(columns, height)
    for i, is_line, xs, ys in sorted(curves, key=lambda curve: not curve[1]):  # draw points over lines
        dots = [place(at, value) for at, value in zip(xs, ys, strict=True)]
        if is_line:
            canvas.line(dots, i)
            dots = dots[-1:] if several else []
        for dot in dots:
            letter, color_of = (MARKS[i % len(MARKS)], i) if several else ("●", 1)
            canvas.mark(*dot, letter, color_of)
    key = f"   ⠒ {panel.line_label}   ● validation" if panel.line and panel.points else ""
    out = [f"{panel.title} ({panel.unit})" + ("" if several else key)]
    for row, text in enumerate(canvas.rows(color)):
        out.append(f"{edges.get(row, ''):>{margin - 2}} {'┤' if row in edges else '│'}{text}")
    label += ", log scale" if panel.log_x else ""
    first, last = ticks((left, right))
    ends = f"{first:<{max(0, columns - len(label)) // 2}}{label}"
    return [*out, f"{'':{margin - 1}}└{'─' * columns}", f"{'':{margin}}{ends}{last:>{max(0, columns - len(ends))}}"]


def _curves(panel, runs, x, scale, smooth):
    """Yields (index of the run, whether it is the panel's line and not its points, xs, ys) of every curve."""
    for i, run in enumerate(runs):
        for metric in panel.metrics():
            xs, ys = run.series(metric, x)
            is_line = metric == panel.line
            if xs:
                yield (i, is_line, [at / scale for at in xs],
                       smoothed(ys, window_of(ys, smooth)) if is_line and panel.smooth else ys)


def _share(value, low, high, log):
    """Where `value` is between `low` (0) and `high` (1)."""
    value, low, high = map(math.log, (value, low, high)) if log else (value, low, high)
    return (value - low) / ((high - low) or 1)


class _Canvas:
    """A grid of characters, each with 2 × 4 braille dots, or a mark that replaces them."""

    BITS = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]]  # bit of the dot at [row % 4][column % 2]

    def __init__(self, columns, rows):
        self.columns, self.n_rows = columns, rows
        self.dots, self.marks, self.owner = {}, {}, {}  # (row, column) of a character → bits, mark, run

    def line(self, dots, run):
        for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(steps + 1):
                x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
                cell = y // 4, x // 2
                self.dots[cell] = self.dots.get(cell, 0) | self.BITS[y % 4][x % 2]
                self.owner[cell] = run

    def mark(self, x, y, text, run):
        self.marks[y // 4, x // 2], self.owner[y // 4, x // 2] = text, run

    def rows(self, color):
        for row in range(self.n_rows):
            yield "".join(self._text((row, column), color) for column in range(self.columns)).rstrip()

    def _text(self, cell, color):
        text = self.marks.get(cell) or (chr(0x2800 + self.dots[cell]) if cell in self.dots else " ")
        return f"\033[{ANSI[self.owner[cell] % len(ANSI)]}m{text}\033[0m" if color and cell in self.owner else text
