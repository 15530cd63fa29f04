"""Which W&B run a process writes to, its id and its settings, determined from flags, environment and W&B's settings
file. No network access and no import of the wandb package, so that a run without W&B pays nothing for it."""

import configparser
import contextlib
import dataclasses
import json
import logging
import os
import platform
import re
import secrets
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mini_llm.config import Declared, arg, coerce, flag, switched_on
from mini_llm.errors import UserError
from mini_llm.files import command, matching_files, read_json, write_whole

SOURCE = Path(__file__).resolve().parent.parent
# Most checkpoints that wait for their upload, by policy. Each is a hard link that may keep a replaced file on the disk:
# one may be under way, and of `best` and `last` only the newest follows it.
UPLOADS = dict(none=0, best=2, last=2, all=4)
DIFF_CHARACTERS = 1 << 20  # maximum length of the uncommitted diff stored with a run
OLD_MODES = {"run": "online", "dryrun": "offline"}  # that W&B itself still accepts in WANDB_MODE

log = logging.getLogger("mini_llm")


@dataclass
class WandbConfig:
    """Weights & Biases"""

    use_wandb: bool = arg(False, "report to Weights & Biases; flags win over the WANDB_* variables named below")
    wandb_project: str = arg("", "project (WANDB_PROJECT; else mini-llm)", metavar="NAME")
    wandb_entity: str = arg("", "team or user (WANDB_ENTITY; else the key's own)", metavar="NAME")
    wandb_run_name: str = arg("", "the run's name in the charts (WANDB_NAME; else W&B makes one up)", metavar="NAME")
    wandb_run_id: str = arg("", "the run's id (WANDB_RUN_ID; else a new one, kept beside the checkpoint)", metavar="ID")
    wandb_group: str = arg("", "group of runs (WANDB_RUN_GROUP; else as --wandb-run-mode new needs it)", metavar="NAME")
    wandb_job_type: str = arg("", "kind of run (WANDB_JOB_TYPE)", metavar="NAME")
    wandb_tags: list[str] = arg([], "tags (WANDB_TAGS, with commas)", metavar="TAG")
    wandb_notes: str = arg("", "notes (WANDB_NOTES)")
    wandb_dir: str = arg("", "where W&B keeps its local files, in a folder wandb (WANDB_DIR; else here)", metavar="DIR")
    wandb_mode: str = arg("", "offline: record it for wandb_tools.py sync (WANDB_MODE; else online)",
                          choices=("online", "offline", "disabled"))
    wandb_run_mode: str = arg("auto", "auto: one process writes; shared: every rank writes to the same run; new: "
                                      "every rank has a run, and they are grouped", choices=("auto", "shared", "new"))
    wandb_rank_scope: str = arg("global", "apply --wandb-run-mode to all nodes together, or to each node (worker)",
                                choices=("global", "worker"))
    wandb_log_checkpoints: str = arg("none", "checkpoints to upload as artifacts", choices=("none", "best", "last",
                                                                                           "all"))
    wandb_watch: str = arg("none", "histograms to log at every report",
                           choices=("none", "gradients", "parameters", "all"))
    wandb_init_timeout: float | None = arg(None, "seconds to try to reach W&B before the run is recorded offline "
                                                 "(WANDB_INIT_TIMEOUT; else 90); training never waits",
                                           gt=0)
    wandb_finish_timeout: float | None = arg(None, "most seconds to wait for uploads at the end of a run "
                                                   "(WANDB_FINISH_TIMEOUT; else 60, or 600 with checkpoints)", gt=0)

    @property
    def uploads(self):
        """The most replaced checkpoints that stay on the disk until they are uploaded: all but the newest."""
        return max(0, UPLOADS[self.wandb_log_checkpoints] - 1) * self.use_wandb

    def require_best(self, saved):
        """Raises UserError if best checkpoints are to be uploaded, and none are `saved`."""
        wanted = self.use_wandb and self.wandb_log_checkpoints == "best"
        if wanted and not saved and with_environment(self).wandb_mode != "disabled":
            raise UserError("--wandb-log-checkpoints best: with --no-save-best (save_best = false) there are none; "
                            "take last, or add --save-best")

    def validate(self):
        self.use_wandb = self.use_wandb or bool(sweep_trial())  # the command of `wandb sweep` has only the parameters
        if not self.use_wandb:
            return
        final = with_environment(self)
        if sweep_trial() and (final.wandb_run_mode, final.wandb_rank_scope) != ("auto", "global"):
            raise UserError(f"--wandb-run-mode {final.wandb_run_mode} --wandb-rank-scope {final.wandb_rank_scope}: a "
                            f"trial of a sweep is one run; leave them out")
        if final.wandb_run_mode == "shared" and final.wandb_mode == "offline":
            raise UserError("--wandb-run-mode shared: W&B can share a run online only; offline take --wandb-run-mode "
                            "new, whose runs are synced one by one, or auto")
        if not re.fullmatch(r"[\w.-]{0,64}", final.wandb_run_id, re.ASCII):
            raise UserError(f"--wandb-run-id {final.wandb_run_id}: letters, digits, _ . and -, 64 at most")
        if final.wandb_project in ("runs", "sweeps"):
            raise UserError(f"--wandb-project {final.wandb_project}: W&B reserves this word; take another")
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", final.wandb_project):
            raise UserError(f"--wandb-project {final.wandb_project}: 128 characters at most, and none of / \\ # ? % :")
        for name, most in dict(wandb_run_name=128, wandb_group=128, wandb_job_type=64).items():  # the server's limits
            if len(getattr(final, name)) > most:
                raise UserError(f"{flag(name)} {getattr(final, name)}: {most} characters at most")
        for tag in final.wandb_tags:
            if not 0 < len(tag) <= 64:
                raise UserError(f"--wandb-tags {tag!r}: a tag has 1 to 64 characters")


ENVIRONMENT = dict(wandb_project="WANDB_PROJECT", wandb_entity="WANDB_ENTITY", wandb_run_name="WANDB_NAME",
                   wandb_run_id="WANDB_RUN_ID", wandb_group="WANDB_RUN_GROUP", wandb_job_type="WANDB_JOB_TYPE",
                   wandb_tags="WANDB_TAGS", wandb_notes="WANDB_NOTES", wandb_dir="WANDB_DIR", wandb_mode="WANDB_MODE",
                   wandb_init_timeout="WANDB_INIT_TIMEOUT", wandb_finish_timeout="WANDB_FINISH_TIMEOUT")
SETTINGS = dict(wandb_project="project", wandb_entity="entity", wandb_mode="mode")  # keys in W&B's settings file
DEFAULTS = dict(wandb_project="mini-llm", wandb_mode="online", wandb_init_timeout=90.0)


def with_environment(cfg, environ=os.environ, before=None):
    """`cfg` with its unset fields filled in: from the WANDB_* variables, else with the project and entity that the run
    had `before` (its arguments of wandb.init), else from the settings file that `wandb init`, `wandb offline` and
    `wandb disabled` write, else from DEFAULTS. In a sweep, project and entity are the sweep's. Raises UserError."""
    folder = local_folder(os.path.expanduser(environ.get("WANDB_DIR", "")))  # where W&B's commands write
    written = _settings(os.path.join(folder, "settings"))
    written |= {name: value for name, value in (before or {}).items() if name in ("project", "entity") and value}
    filled = DEFAULTS | dict(wandb_finish_timeout=60.0 if cfg.wandb_log_checkpoints == "none" else 600.0)
    for name, variable in ENVIRONMENT.items():
        value = getattr(cfg, name)
        text = environ.get(variable, "").strip() or written.get(SETTINGS.get(name), "")
        is_sweeps = text and sweep_trial(environ) and name in ("wandb_project", "wandb_entity")
        if value not in ("", [], None) and not is_sweeps:
            filled[name] = value
        elif text:
            filled[name] = _value(name, variable, text)
    filled["wandb_dir"] = os.path.expanduser(filled.get("wandb_dir", ""))  # of TOML, which no shell expands
    return dataclasses.replace(cfg, **filled)


def _value(name, variable, text):
    """The value of a flag that an environment variable states as text. Raises UserError."""
    if name == "wandb_tags":
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    field = WandbConfig.__dataclass_fields__[name]
    text = OLD_MODES.get(text, text) if name == "wandb_mode" else text
    return coerce(variable, Declared("wandb", field, field.type), text)


def local_folder(root):
    """Where W&B keeps its files and settings, in the folder `root`."""
    hidden = os.path.join(root, ".wandb")
    return hidden if os.path.isdir(hidden) else os.path.join(root, "wandb")


def _settings(path):
    """The settings that W&B's own commands wrote to `path`; {} if it is missing or cannot be parsed."""
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error, KeyError):
        parser.read(path)
        return dict(parser["default"])
    return {}


def distributed_info(world):
    """This process's place among all training processes, for logging and for `plan_run`. A worker is a node."""
    return dict(rank=world.rank, world_size=world.size, local_rank=world.local_rank, local_world_size=world.local_size,
                worker_index=world.node_rank, num_workers=-(-world.size // world.local_size))


class RunPlan(NamedTuple):
    """How one process takes part in logging to W&B."""

    run_id: str
    group: str  # "": no group
    primary: bool  # opens its run before others join it, and logs what is common to all ranks
    shared: bool  # other processes write to the same run
    label: str  # this process's name within a shared run, and in messages
    suffix: str | None  # appended to the names of its own metrics, rank/...; None: does not log them


#  run mode, rank scope  → the index that must be 0 for a rank to write (None: all ranks write); run id; group
RUNS = {
    ("auto", "global"): ("rank", "{base}", ""),
    ("auto", "worker"): ("local_rank", "{base}-worker-{worker_index}", ""),
    ("shared", "global"): (None, "{base}", ""),
    ("shared", "worker"): (None, "{base}-worker-{worker_index}", ""),
    ("new", "global"): (None, "{base}-rank-{rank}", "{base}"),
    ("new", "worker"): (None, "{base}-worker-{worker_index}-rank-{local_rank}", "{base}-worker-{worker_index}"),
}


def plan_run(run_mode, rank_scope, base, info):
    """The RunPlan of the process that `info` (distributed_info) describes, or None if it does not write to W&B. `base`:
    the id that all run ids of this training derive from. On a single node, both rank scopes are the same."""
    scope = rank_scope if info["num_workers"] > 1 else "global"
    only_first, run_id, group = RUNS[run_mode, scope]
    if only_first and info[only_first] != 0:
        return None
    first = info["local_rank" if scope == "worker" else "rank"] == 0
    shared = run_mode == "shared"
    alone = only_first == "rank"  # the only writer
    suffix = f"/{info['rank']}" if shared else ""
    return RunPlan(run_id=run_id.format(base=base, **info), group=group.format(base=base, **info),
                   primary=first or run_mode == "new", shared=shared, label=f"rank-{info['rank']}",
                   suffix=None if alone else suffix)


def sweep_trial(environ=os.environ):
    """The run id that `wandb agent` assigned to this trial of a sweep; "" outside a sweep."""
    return environ.get("WANDB_RUN_ID", "") if environ.get("WANDB_SWEEP_ID") else ""


def new_run_id():
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def resolve_run(cfg, memory, resumes, run_id, info):
    """→ `cfg` with its unset fields filled in, and the id that all run ids of this training derive from. A start that
    `resumes` goes on with the run that `remember` has kept in `memory`. `run_id`: the checkpoint's, or ""; `info`: the
    main process's distributed_info. Raises UserError."""
    before = recalled(memory) if resumes else {}
    if resumes and memory.exists() and not before:
        log.warning("%s cannot be read: the W&B project is that of flags and environment", memory)
    # `was` is the id that the checkpoint still has, if wandb_tools.py has sent the run again under another, `base`.
    if run_id not in ("", before.get("base"), before.get("was")):  # the file is of another run
        before = {}
    cfg = with_environment(cfg, before=before.get("init"))
    run_id = sweep_trial() or cfg.wandb_run_id or before.get("base") or run_id or new_run_id()
    plan = plan_run(cfg.wandb_run_mode, cfg.wandb_rank_scope, run_id, info)
    if (cfg.wandb_mode == "online" and plan.run_id == before.get("init", {}).get("id")
            and plan.shared != before.get("shared", plan.shared)):
        log.warning("--wandb-run-mode %s: W&B run %s was %sshared before, and loses rows if it is written both ways: "
                    "it stays so (--wandb-run-id NEW makes another)", cfg.wandb_run_mode, plan.run_id,
                    "not " if plan.shared else "")
        cfg.wandb_run_mode = "auto" if plan.shared else "shared"
    return cfg, run_id


def run_path(init, api):
    """ENTITY/PROJECT/ID of the run that these arguments of wandb.init are of. `api`: a wandb.Api."""
    return "/".join([init["entity"] or api.default_entity, init["project"], init["id"]])


def sync_command(path):
    """The command that sends what W&B lacks of the run with this checkpoint path."""
    return command("wandb_tools.py", "sync", path)


def recalled(path):
    """What `remember` stored in `path`; {} if it is missing or damaged. Of `init` only the arguments in INIT: another's
    file may have more, such as the path of a file that wandb.init would read and send."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        facts = read_json(path)
        init = {name: value for name, value in dict(facts["init"]).items() if name in INIT}
        return facts | dict(base=facts["base"], init=init)
    return {}


def upload_links(memory):
    """The links to checkpoints that a rank has yet to upload. `memory`: the path of its .wandb.json."""
    return matching_files(memory.with_name(memory.name.replace(".wandb.json", ".upload-")), r"\d{8}.*\.pt")


INIT = ("project", "entity", "id", "name", "group", "job_type", "tags", "notes", "dir")  # arguments of wandb.init
IDENTITY = ("shared", "primary", "label", "sweep", "host", "program")  # of a Job, beside its id: kept for a later sync


def remember(path, base, job, sent):
    """Store this run's identity in `path`, to resume and to sync it. `sent`: the `init` that the server has."""
    before = recalled(path)
    # As long as no checkpoint with the new id has been saved, a resume needs `was` (see `resolve_run`).
    was = dict(was=before["was"]) if before.get("base") == base and "was" in before else {}
    facts = dict(base=base, init=job.init, sent=sent) | was | {name: getattr(job, name) for name in IDENTITY}
    write_whole(path, json.dumps(facts).encode())


def remember_sent(job):
    """Store that the server has `job.init` now."""
    path = Path(job.lock).with_suffix(".json")  # beside RUN.wandb.lock
    if facts := recalled(path):
        write_whole(path, json.dumps(facts | dict(sent=job.init)).encode())


def git(*words):
    """The output of a git command on this source tree; "" if it fails or is not wanted (WANDB_DISABLE_GIT). Without the
    lock in which `git status` may refresh the index: a `git pull` at that moment would fail."""
    if switched_on("WANDB_DISABLE_GIT"):
        return ""
    try:
        return subprocess.run(["git", "--no-optional-locks", "-C", str(SOURCE), *words], capture_output=True,
                              text=True, timeout=10, check=True, errors="replace").stdout.rstrip("\n")
    except (OSError, subprocess.SubprocessError):
        return ""


def uncommitted():
    """The uncommitted changes as a patch; "" if there are none, or W&B's WANDB_DISABLE_CODE says to leave them out."""
    diff = "" if switched_on("WANDB_DISABLE_CODE") else git("diff", "HEAD", "--", ".")[:DIFF_CHARACTERS]
    return diff and diff + "\n"


def provenance():
    """The git commit of this code, whether the tree is dirty, and the versions of Python and the main packages."""
    from importlib import metadata

    commit = os.environ.get("WANDB_GIT_COMMIT") or git("rev-parse", "HEAD")
    facts = dict(git_commit=commit, git_dirty=bool(git("status", "--porcelain", "--", "."))) if commit else {}
    for package in ("torch", "numpy", "transformers", "tokenizers", "datasets", "wandb"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[f"version/{package}"] = metadata.version(package)
    return facts | {"version/python": sys.version.split()[0]}


@dataclass
class Job:
    """Everything that the process that talks to W&B needs to know, passed to it as JSON."""

    init: dict  # arguments for wandb.init: project, entity, id, name, group, …
    config: dict
    mode: str = "online"
    live: bool = True  # training is in progress; else the sending machine is not recorded, and no run offline
    shared: bool = False
    primary: bool = True
    label: str = ""
    init_timeout: float = 30  # in seconds, as is finish_timeout
    finish_timeout: float = 600
    files: dict = dataclasses.field(default_factory=dict)  # name → text, for the run's Files tab
    policy: str = "none"  # --wandb-log-checkpoints
    rows: tuple = ("", 0)  # path of metrics.jsonl, and the byte offset from which to read it
    console: tuple | None = None  # the same for the log file
    lock: str = ""  # path of a lock file
    tokenizer: str = ""  # the folder beside the checkpoints, uploaded with each of them
    sync: str = ""  # the command to send missing rows later
    sent: list = dataclasses.field(default_factory=list)  # names of `init` that the server has from an earlier start
    monitors: bool = True  # records the machine's metrics: one process of a node
    pid: int = dataclasses.field(default_factory=os.getpid)  # the process whose system metrics are recorded
    host: str = dataclasses.field(default_factory=lambda: os.environ.get("WANDB_HOST") or platform.node())
    program: str = dataclasses.field(default_factory=lambda: os.path.abspath(sys.argv[0]))
    arguments: list = dataclasses.field(default_factory=lambda: sys.argv[1:])
    sweep: str = dataclasses.field(default_factory=lambda: sweep_trial() and os.environ["WANDB_SWEEP_ID"])
