"""W&B from the command line: check the setup, send rows that a run could not, download a run.

python wandb_tools.py check                              package, key, server, project; a row written and read back
python wandb_tools.py sync checkpoints/minigpt.pt        send from metrics.jsonl what the server lacks of a run
python wandb_tools.py sync RUN.pt --wandb-run-id NEW     send it as a new run: its own was deleted, or there was none
python wandb_tools.py download PROJECT/RUN_ID [DIR]      files, history and artifacts of a run, or of a sweep's runs
"""

import glob
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from mini_llm.config import RUN_CONFIG, Parser
from mini_llm.errors import UserError, visible
from mini_llm.files import beside_run, matching_files, read_records, without_infinity, write_whole
from mini_llm.processes import only_one
from mini_llm.wandb_client import LOST_CODE, Publisher, awaited, import_wandb, leave, open_run
from mini_llm.wandb_errors import advice, reason, with_advice
from mini_llm.wandb_runs import (
    ENVIRONMENT,
    IDENTITY,
    Job,
    WandbConfig,
    local_folder,
    recalled,
    run_path,
    upload_links,
    with_environment,
)

TIMEOUT = 30  # seconds per request
ARRIVAL = 30  # seconds to wait until what was sent can be read back


def check(args):
    """Go through each step that a tracked run takes; if one fails, say how to fix it."""
    settings = with_environment(WandbConfig(use_wandb=True, wandb_project=args.project, wandb_entity=args.entity))
    settings.validate()
    forget_environment()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        steps = checks(settings, folder)
        for name in ("package", "login", "server", "write", "read"):
            try:
                say("INFO", f"{name:8} ok    {next(steps)}")
            except Exception as error:
                print(f"{name:8} FAIL  {reason(error)}\n{'':14} {advice(error)}", flush=True)
                return 1
    print("W&B is ready: add --use-wandb")
    return 0


def checks(settings, folder):
    """Takes one step after another, and yields what to say about each. Raises where a step fails."""
    wandb = import_wandb()
    yield f"wandb {wandb.__version__}"

    api = wandb.Api(timeout=TIMEOUT)
    if not api.api_key:
        raise RuntimeError("no API key: not logged in")
    yield f"a key for {api.settings['base_url']}"

    yield f"logged in as {api.viewer.username}, entity {api.default_entity}"

    init = dict(project=settings.wandb_project, entity=settings.wandb_entity or None, job_type="check", name="check",
                id=None, dir=folder)
    run = open_run(Job(init, {}, live=False, finish_timeout=TIMEOUT), lambda *_: None)
    run.log({"step": 0, "check": 1.0})
    run.finish()
    target = f"{run.entity}/{run.project}/{run.id}"
    yield f"a row written to {run.entity}/{run.project}, run {run.id}"

    rows = awaited(lambda: rows_of(api, target), ARRIVAL) or []
    if [row.get("check") for row in rows] != [1.0]:
        raise RuntimeError(f"the row did not arrive: the server has {rows}")
    try:
        api.run(target).delete()
    except Exception as error:  # not every key has permission to delete runs
        yield f"the row read back; the run stays there: {reason(error)}"
    else:
        yield "the row read back, and the run deleted"


def rows_of(api, target):
    """The rows that the server has of a run, `slim`; None if there is no such run. Other errors are raised."""
    api.flush()
    try:
        return list(map(slim, history(api.run(target))))
    except Exception as error:
        if "could not find run" in str(error).lower():
            return None
        raise


def history(run):
    """Yields all rows of a run on the server, without what a row lacks. Rows with histograms take a megabyte."""
    size = 1000 if run.config.get("wandb_watch", "none") == "none" else 20
    # Not from the SDK's cache, which may hold an export from before a resume.
    for row in run.scan_history(page_size=size, use_cache=False):
        yield {name: value for name, value in row.items() if value is not None}


def slim(row):
    """A row or record with {} for each histogram, of which a run's rows together may not fit into memory."""
    return {sys.intern(name): {} if isinstance(value, dict) and name != "config" else value
            for name, value in row.items()}


def forget_environment():
    """Drop the WANDB_* variables that describe a run: they are for the next training run, not those handled here."""
    more = {"WANDB_SWEEP_ID", "WANDB_FORK_FROM", "WANDB_RESUME_FROM"}
    for variable in more | {*ENVIRONMENT.values()} - {"WANDB_MODE", "WANDB_DIR"}:
        os.environ.pop(variable, None)


def sync(args):
    """Send the rows of a run that the server lacks, from the files beside its checkpoint. If another W&B run is named,
    they are sent to that, which is the run's own from then on."""
    if args.project and not args.run_id:
        raise UserError(f"--wandb-project {args.project}: that of a new run; give --wandb-run-id NEW, too")
    named = with_environment(WandbConfig(use_wandb=True, wandb_project=args.project, wandb_run_id=args.run_id))
    forget_environment()
    path = Path(args.run)
    if not path.name:  # as of an unset shell variable
        raise UserError(f"sync {args.run!r}: names no file; give the path of a run's checkpoint")
    if args.run_id:
        named.validate()
    if args.run_id and not memory_files(path):  # it has been trained without W&B
        next(read_records(beside_run(path, ".metrics.jsonl")), None)  # raises if there is none
        init = dict(project=named.wandb_project, entity=named.wandb_entity or None, id=args.run_id)
        found = [(beside_run(path, ".wandb.json"), dict(base=args.run_id, init=init))]
    else:
        found = [(file, renamed(facts, args.run_id, args.project)) for file, facts in memories(path)]
    for memory, facts in found:
        with only_one(memory.with_suffix(".lock")) as alone, only_one(beside_run(path, ".lock")) as ended:
            if not alone or not ended:
                raise UserError(f"{memory}: this run is still {'training' if alone else 'being sent'}; wait for it to "
                                f"end{', at most its --wandb-finish-timeout' if ended else ''}")
            rows = memory.with_name(memory.name.replace(".wandb.json", ".metrics.jsonl"))
            say("INFO", f"{rows}: {send(facts, rows, args.run_id)}")
            if args.run_id:
                write_whole(memory, json.dumps(facts).encode())
            for link in upload_links(memory):  # which a killed run has left: it takes up a checkpoint's space
                link.unlink(missing_ok=True)
    return 0


def memory_files(path):
    """The .wandb.json files of all ranks of the run at this checkpoint path."""
    files = matching_files(beside_run(path, ""), r"(\.rank\d+)?\.wandb\.json")
    # Shortest name first: rank 0, whose files have no tag, opens the run that other ranks may share.
    return sorted(files, key=lambda file: (len(file.name), file.name))


def renamed(facts, run_id, project):
    """The `facts` of a .wandb.json file with a new id and project, if given; `was`: the id that the checkpoint has."""
    if not run_id:
        return facts
    init = facts["init"] | (dict(project=project) if project else {})
    pattern = re.escape(facts["base"]) + r"((-worker-\d+)?(-rank-\d+)?)"
    init |= {name: run_id + found[1] for name in ("id", "group")
             if (found := re.fullmatch(pattern, init.get(name) or ""))}
    return facts | dict(base=run_id, was=facts.get("was", facts["base"]), init=init)


def memories(path):
    """[(file, its facts)] of the .wandb.json files of the run at this checkpoint path. Raises UserError."""
    if not (files := memory_files(path)):
        raise UserError(f"{path}: no {beside_run(path, '.wandb.json').name} beside it: not a run that was started with "
                        f"--use-wandb; sync --wandb-run-id NEW makes one of it")
    found = [(file, recalled(file)) for file in files]
    for file, facts in found:
        if not facts:
            raise UserError(f"{file}: damaged; restore it, or resume the run with --wandb-project and --wandb-run-id")
    return found


def send(facts, path, new_id=""):
    """Send the rows of `path`, a metrics.jsonl, that the server's run lacks, and end that run, also if only its end is
    lacking → a message saying what was done. A run of a `new_id` may have no rows of others. Raises UserError."""
    wandb = import_wandb()
    records = list(map(slim, read_records(path)))
    config = next((record["config"] for record in reversed(records) if record.get("event") == "config"), {})
    # If the run was resumed and then killed, its last exit event is that of an earlier start.
    last = next((record for record in reversed(records) if record.get("event") in ("config", "exit")), {})
    api = wandb.Api(timeout=TIMEOUT)
    target = run_path(facts["init"], api)
    stored = rows_of(api, target)
    note = ""  # on the files of offline runs, if these are sent
    new = stored is None or not stored and facts.get("sweep")  # a server makes a trial's run before it begins
    if new and (folders := offline_folders(facts["init"], path)):  # else their rows would be there twice
        stored, note = sync_folders(folders, api, target, records)
    missing = list(lacking(records, stored or []))
    if new_id and stored and facts.get("primary", True) and missing == list(lacking(records, [])):
        raise UserError(f"--wandb-run-id {new_id}: {target} has rows of another run; give an id that is not taken")
    state = api.run(target).state if stored is not None else ""
    if not missing and state not in ("running", "crashed", "preempting"):
        return f"{target} has every row{note}" if stored is not None else "no rows yet"
    init = facts["init"] | dict(dir=None)
    if stored is not None:  # keep the name, tags and notes that it has been given since
        init = {name: init[name] for name in ("project", "entity", "id")}
    job = Job(init, config, live=False, **{name: facts[name] for name in IDENTITY if name in facts})
    run = open_run(job, say)
    unsent = set(map(id, missing))  # comparing each sample with each row would take minutes
    publisher = Publisher(run, job, say, [record for record in records if record.get("event") == "sample"
                                          and id(record) not in unsent])
    publisher.publish(map(json.dumps, lacking(read_records(path), stored or [])))  # read again, now with histograms
    publisher.summarize(records)  # the SDK takes the last rows that were sent for the newest
    if state == "preempting":
        run.mark_preempting()
    run.finish(exit_code=last.get("code", LOST_CODE))
    # The SDK does not report uploads that have failed permanently.
    if lost := awaited(lambda: list(lacking(missing, rows_of(api, target) or [])), ARRIVAL, lambda lost: not lost):
        raise RuntimeError(f"{len(lost)} of {len(missing)} rows cannot be read back from {target} after {ARRIVAL} s")
    return f"{len(missing)} rows sent to {target}" if missing else f"{target} has every row, and is ended now"


def say(level, text):
    print(visible(text), flush=True)


def sync_folders(folders, api, target, records):
    """Send offline runs whole, with `wandb sync` → the rows that the server has then, and what to say of the files. If
    that fails, the rows can be sent all the same; if some are late, not: raises RuntimeError."""
    print(f"wandb sync {shlex.join(folders)}", flush=True)
    # -P: the working folder may have a module named like one of the SDK's imports.
    synced = subprocess.run([sys.executable, "-P", "-m", "wandb", "sync", *folders], capture_output=True, text=True)
    stored = awaited(lambda: rows_of(api, target), ARRIVAL, lambda rows: rows and not any(lacking(records, rows)))
    if stored is None or synced.returncode and not stored:
        print(f"wandb sync failed: {reason((synced.stdout + synced.stderr).strip())}", flush=True)
        return stored, ""
    if late := list(lacking(records, stored)):  # on their way, or never written to those folders, as before a kill
        raise RuntimeError(f"{len(late)} rows cannot be read back from {target} {ARRIVAL} s after wandb sync")
    return stored, ", with its files" + _checkpoints_sent(api.run(target), folders)


def _checkpoints_sent(run, folders):
    """What to say of the checkpoints in the folders that `wandb sync` has sent, which is silent about them."""
    if not (kept := [folder for folder in folders if list(Path(folder, "checkpoints").glob("*.pt"))]):
        return ""
    if awaited(lambda: [one for one in run.logged_artifacts() if one.type == "model"], ARRIVAL):
        return " and checkpoints"
    return f"; the checkpoints in {shlex.join(kept)} did not arrive: was it moved after it was recorded?"


def offline_folders(init, path):
    """A run's offline recordings that were not synced, oldest first: below --wandb-dir or beside the checkpoint."""
    roots = {init.get("dir") or os.environ.get("WANDB_DIR") or ".", str(path.parent)}
    found = {str(folder): folder.name for root in roots
             for folder in Path(local_folder(root)).glob(f"offline-run-????????_??????-{glob.escape(init['id'])}")
             if not list(folder.glob("*.synced"))}
    return sorted(found, key=found.get)


def lacking(records, stored):
    """Yields the reports and samples among the records of a metrics.jsonl that the server's rows lack. Rows are
    matched by step and time: a run that was rolled back reaches the same step again. NaN may not be there as such."""
    held = defaultdict(list)  # step → rows
    for row in stored:
        held[row.get("step")].append(row)

    def missing(record):
        needs = {"samples"} if "event" in record else {name for name, value in record.items() if value is not None}
        rows = [row for row in held[record["step"]] if abs(row.get("_timestamp", 0) - record["time"]) < 0.01]
        return needs.difference(("step", "time"), *rows)

    for record in records:
        if record.get("event", "sample") == "sample" and missing(record):
            yield record


def located(name):
    """A wandb.Api, and the path by which it finds the run or sweep `name`: ENTITY/PROJECT/ID, less what the settings
    have, or a link to its page, https://wandb.ai/ENTITY/PROJECT/runs/ID/workspace. Raises UserError."""
    path = unquote(re.sub(r"^\w+://[^/]*|[?#].*", "", name)).strip("/")
    if not path:
        raise UserError(f"{name!r}: names no run or sweep; give ENTITY/PROJECT/ID, or a link to its page")
    settings = with_environment(WandbConfig())
    defaults = dict(entity=settings.wandb_entity, project=settings.wandb_project)
    # It begins with a slash because the SDK looks for "/runs/" and "/sweeps/" in it.
    return import_wandb().Api(defaults, timeout=TIMEOUT), re.sub(r"(/(runs|sweeps)/[^/]+).*", r"\1", f"/{path}")


def download(args):
    """Download a run, those of all ranks of a checkpoint path, or a sweep's: a folder each and what report.py reads."""
    api, path = located(args.run)
    if args.run.endswith(".pt"):
        targets = [run_path(facts["init"], api) for _, facts in memories(Path(args.run))]
        return fetch(map(api.run, dict.fromkeys(targets)), args.folder)  # ranks may share one
    runs = list(api.sweep(path).runs) if "/sweeps/" in path else [api.run(path)]
    if not runs:
        print(f"{args.run}: no runs yet")
    return fetch(runs, args.folder)


def fetch(runs, where):
    """Download the runs to folders of their ids in `where` → exit code."""
    code = 0
    for run in runs:
        if not _stays_inside(run.id) or "/" in run.id:
            raise UserError(f"{run.id}: the server's id of a run leads out of the folder; nothing is fetched of it")
        folder = Path(where or ".") / run.id
        rows = folder.with_name(f"{run.id}.metrics.jsonl")
        if beside_run(rows, RUN_CONFIG).exists():  # --wandb-run-id may be the name of the checkpoint
            raise UserError(f"{rows}: is that of a run that has trained there; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(run.config, indent=1))
        (folder / "summary.json").write_text(json.dumps(dict(run.summary), indent=1, default=dict))
        n_rows, reports = 0, {}
        with open(folder / "history.jsonl", "w") as file:
            for row in history(run):
                file.write(json.dumps(row) + "\n")
                n_rows += 1
                add_report(reports, row)
        if reports:
            write_whole(rows, metrics_jsonl(run, reports).encode())
        wanted = [(file, "files", dict(replace=True)) for file in run.files() if _stays_inside(file.name)]
        wanted += [(artifact, f"artifacts/{artifact.name.replace(':', '-')}", {})
                   for artifact in run.logged_artifacts() if _stays_inside(artifact.name)]
        fetched = Counter()
        for item, place, options in wanted:
            try:
                item.download(root=str(folder / place), **options)
                fetched[place.partition("/")[0]] += 1
            except Exception as error:  # the rest is wanted all the same
                print(visible(f"error: {folder / place}: {item.name} not fetched: {with_advice(error)}"),
                      file=sys.stderr)
                code = 1
        say("INFO", f"{folder}: {n_rows} rows, {fetched['files']} files, {fetched['artifacts']} artifacts")
    return code


def add_report(reports, row):
    """Adds a row of W&B's to `reports`: step → record of a metrics.jsonl, in which NaN and infinity are null."""
    if isinstance(step := row.get("step"), int) and isinstance(when := row.get("_timestamp"), int | float):
        numbers = {name: value for name, value in row.items() if name[0] != "_" and isinstance(value, int | float)}
        numbers |= {name: None for name, value in row.items() if value in ("NaN", "Infinity", "-Infinity")}
        reports[step] = reports.get(step, {}) | numbers | {"time": when}


def metrics_jsonl(run, reports):
    """What report.py reads of a run: its configuration, its reports in the order of their steps, and how it ended."""
    ends = dict(step=max(reports), time=reports[max(reports)]["time"])
    records = [dict(step=0, time=0.0, event="config", config=dict(run.config)),
               *({"step": step} | reports[step] for step in sorted(reports))]
    records += [ends | dict(event="exit", code=0)] if run.state == "finished" else []
    return "".join(json.dumps(without_infinity(record)) + "\n" for record in records)


def _stays_inside(name):
    """Whether a file name chosen by the server stays inside the download folder (no path traversal)."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def run_command(parser):
    """Run the command that the user chose; an error is printed as one line, with what to do about it."""
    try:
        args = parser.parse_args()
        code = args.run_command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except FileNotFoundError as error:
        print(f"error: {error.filename}: no such file; give the path of a run's checkpoint", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        print(f"error: {with_advice(error)}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    leave(code)


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="check|sync|download")
    command = commands.add_parser("check", help="check everything that a tracked run needs, and say how to fix it")
    command.add_argument("--wandb-project", dest="project", default="", help="WANDB_PROJECT; else mini-llm")
    command.add_argument("--wandb-entity", dest="entity", default="", help="WANDB_ENTITY; else the key's own")
    command.set_defaults(run_command=check)
    command = commands.add_parser("sync", help="send the rows of a run that the server lacks")
    command.add_argument("run", metavar="RUN", help="the run's checkpoint path")
    command.add_argument("--wandb-run-id", dest="run_id", default="", help="send it as the W&B run of this new id, "
                         "also when it is resumed: its own was deleted, or it was trained without W&B")
    command.add_argument("--wandb-project", dest="project", default="", help="the new run's; else as before")
    command.set_defaults(run_command=sync)
    command = commands.add_parser("download", help="fetch a run, or the runs of a sweep")
    command.add_argument("run", metavar="RUN", help="a run's checkpoint path, "
                         "[[ENTITY/]PROJECT/]RUN_ID, …/sweeps/SWEEP_ID, or a link")
    command.add_argument("folder", metavar="DIR", nargs="?", help="where to; a folder of the run's id is made there")
    command.set_defaults(run_command=download)
    os.environ |= dict(WANDB_MODE="online", WANDB_SILENT="true")  # what matters is printed by this program
    run_command(parser)


if __name__ == "__main__":
    main()
