"""Show a run in the README: its log, shortened, and its loss curve.

    python train.py && python bench/readme.py checkpoints/minigpt.pt README.md

rewrites README.md between two markers, and docs/loss.svg beside it, which the README shows at its top.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mini_llm.errors import UserError, one_line_errors  # noqa: E402
from mini_llm.files import beside_run  # noqa: E402
from mini_llm.plots import figure, panels  # noqa: E402
from report import load  # noqa: E402

BEGIN, END = "<!-- run:begin -->", "<!-- run:end -->"


def excerpt(log):
    """A log without its flags and samples, with four of its reports."""
    entries = re.split(r"\n(?=\[\d{4}-)", log.rstrip("\n"))
    reports = [entry for entry in entries if re.match(r"\[[^]]*\] epoch \d+ step ", entry)]
    kept = {*reports[:2], *reports[len(reports) // 2:][:1], *reports[-1:]}
    lines = []
    for entry in entries:
        if re.match(r"\[[^]]*\] (Arguments: |sample at step )", entry):
            continue
        if entry not in reports or entry in kept:
            lines.append(entry)
        elif lines[-1] != "…":
            lines.append("…")
    return "\n".join(lines)


@one_line_errors()
def main():
    if len(sys.argv) != 3:
        raise UserError("python bench/readme.py CHECKPOINT README.md")
    from matplotlib import rc_context

    (run,), readme = load(sys.argv[1:2]), Path(sys.argv[2])
    text = readme.read_text()
    marked = re.search(f"^{BEGIN}\n.*?^{END}$", text, re.MULTILINE | re.DOTALL)
    if not marked:
        raise UserError(f"{readme}: no line {BEGIN} and after it {END}; put both where the run is to be shown")
    log = beside_run(run.path, ".log")
    if not log.is_file():
        raise UserError(f"{log}: not there, and the console's lines are in it")
    lines = excerpt(log.read_text("utf-8", errors="replace"))
    plot = readme.parent / "docs" / "loss.svg"
    plot.parent.mkdir(exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mini-llm"}):  # small, and equal for equal runs
        figure(panels([run])[0], [run]).savefig(plot, metadata={"Date": None})
    readme.write_text(f"{text[:marked.start()]}{BEGIN}\n```\n{lines}\n```\n{END}{text[marked.end():]}")
    print(f"wrote {readme}, {plot}")


if __name__ == "__main__":
    main()
