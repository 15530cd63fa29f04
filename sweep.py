"""Hyperparameter sweeps with Weights & Biases.

python sweep.py create configs/sweep-lr.yaml                make the sweep; prints its id
python sweep.py agent ENTITY/PROJECT/ID --count 4           run trials of it, one after another
python sweep.py agent ENTITY/PROJECT/ID --nproc-per-node 2  each trial under torchrun, of a sweep of train_ddp.py

`wandb sweep` (in whose YAML 1e-4 has to be 1.0e-4) and `wandb agent` do the same. Every process of a trial gets its
parameters as flags. Each trial is a separate run with its own checkpoint (checkpoints/minigpt.RUN_ID.pt). Start agents
in this folder, where the programs of a sweep are.
"""

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from mini_llm.config import Parser, coerce, flag_fields, override, positive, refuse_unknown
from mini_llm.errors import UserError
from mini_llm.wandb_client import import_wandb
from mini_llm.wandb_runs import WandbConfig, with_environment
from wandb_tools import TIMEOUT, located, run_command

MOST_AGENTS = 20
METHODS = "grid", "random", "bayes"
FLAGS = ["${program}", "--use-wandb", "--resume", "auto", "${args}"]  # a preempted trial is resumed
COMMANDS = {"train.py": ["${env}", "${interpreter}", *FLAGS],
            **dict.fromkeys(("train_ddp.py", "train_fsdp.py"), ["${env}", "torchrun", "--standalone", *FLAGS])}


def read_sweep(path):
    """Read a sweep's configuration, in W&B's schema, from TOML or YAML; fill in its command. Raises UserError."""
    try:
        text = Path(path).read_text("utf-8")
        sweep = tomllib.loads(text) if Path(path).suffix == ".toml" else _load_yaml(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # yaml.YAMLError among them, which may not be importable
        raise UserError(f"{path}: not readable as TOML or YAML: {' '.join(str(error).split())}") from None
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    specs = parameters.items() if isinstance(parameters, dict) else []
    if not specs or "method" not in sweep or not all(
            isinstance(name, str) and isinstance(spec, dict) and isinstance(spec.get("values", []), list)
            for name, spec in specs):
        raise UserError(f"{path}: a sweep has a method (grid, random, bayes) and parameters, each with value, values, "
                        f"or min and max; see configs/sweep-lr.yaml")
    for name, kind in dict(program=str, project=str, entity=str, command=list, metric=dict).items():
        if name in sweep and not isinstance(sweep[name], kind):
            raise UserError(f"{path}: {name} {sweep[name]!r}: expected {kind.__name__}")
    if sweep["method"] not in METHODS:
        raise UserError(f"{path}: method {sweep['method']}: one of {', '.join(METHODS)}")
    if sweep["method"] == "bayes" and not sweep.get("metric", {}).get("name"):
        raise UserError(f"{path}: method bayes needs a metric, such as name: val/loss, goal: minimize")
    program = sweep.setdefault("program", "train.py")
    if "command" not in sweep and program not in COMMANDS:
        raise UserError(f"{path}: program {program}: one of {', '.join(COMMANDS)}, or give a command of your own")
    sweep.setdefault("command", COMMANDS.get(program))
    return sweep


def require_flags(path, sweep):
    """Raises UserError for parameters or values that our programs refuse as flags, or a metric that they never log."""
    from train import Config

    if sweep["program"] not in COMMANDS or "${args}" not in sweep["command"]:
        return
    known = flag_fields(Config)
    for name, spec in sweep["parameters"].items():
        if (declared := known.get(name.replace("-", "_"))) is None:
            refuse_unknown(name, known, f"{path}: the parameter")
        for value in [spec["value"]] if "value" in spec else spec.get("values") or []:
            if value is not None and not isinstance(value, str):
                coerce(f"{path}: {name}", declared, value)
    # Refuses two lengths of one run, say.
    override({}, {name.replace("-", "_"): True for name in sweep["parameters"]}, Config, f"{path}: ")
    metric = str(sweep.get("metric", {}).get("name", ""))
    if metric and "/" not in metric:
        refuse_unknown(metric, ["val/loss", "train/loss", "val/ppl"], f"{path}: the metric", "; such as val/loss")


def _load_yaml(text):
    """YAML, in which 1e-4 is a number, as in YAML 1.2, and not a text."""
    import yaml  # installed with wandb

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
                                 list("-+.0123456789"))
    return yaml.load(text, Loader)


def create(args):
    sweep = read_sweep(args.sweep)
    require_flags(args.sweep, sweep)
    wandb = import_wandb()
    os.environ["WANDB_SILENT"] = "true"  # what matters is printed here
    settings = with_environment(WandbConfig(use_wandb=True, wandb_project=args.project or sweep.get("project", ""),
                                            wandb_entity=args.entity or sweep.get("entity", "")))
    settings.validate()
    if settings.wandb_mode != "online":
        raise UserError(f"a sweep needs W&B online, and WANDB_MODE or `wandb offline` says {settings.wandb_mode}")
    entity = settings.wandb_entity or wandb.Api(timeout=TIMEOUT).default_entity
    sweep_id = wandb.sweep(sweep, project=settings.wandb_project, entity=entity)
    print(shlex.join(["python", "sweep.py", "agent", f"{entity}/{settings.wandb_project}/{sweep_id}"]))
    return 0


def agent(args):
    if args.agents > MOST_AGENTS:
        raise UserError(f"--agents {args.agents}: at most {MOST_AGENTS}")
    environment = trial_environment(args.nproc_per_node)  # before the SDK's import sets a TMPDIR for this process
    api, path = located(args.sweep)
    sweep = api.sweep(path)  # raises if there is none
    if args.nproc_per_node and "torchrun" not in sweep.config.get("command", []):
        raise UserError(f"--nproc-per-node {args.nproc_per_node}: the trials of {args.sweep} are not started by "
                        f"torchrun; create the sweep with program: train_ddp.py or train_fsdp.py")
    owned = shares(args.agents)
    if any(0 < len(gpus) < (args.nproc_per_node or 1) for gpus in owned):
        raise UserError(f"--agents {args.agents} --nproc-per-node {args.nproc_per_node}: more than this machine's GPUs")
    path = f"{sweep.entity}/{sweep.project}/{sweep.id}"  # with "sweeps/" in it, W&B's agent would exit with 0
    count = ["--count", str(args.count)] if args.count else []
    # Forward signals, so that the trial saves and exits before the agent does: else both die before it has saved.
    # -P: the working folder may have a module named like one of the SDK's imports.
    command = [sys.executable, "-P", "-m", "wandb", "agent", "--forward-signals", *count, path]
    visible = [dict(CUDA_VISIBLE_DEVICES=",".join(gpus)) if gpus else {} for gpus in owned]
    return wait_for([subprocess.Popen(command, env=environment | own, preexec_fn=_end_with_this_process)
                     for own in visible])


def trial_environment(nproc_per_node):
    """The environment of the agents, and so of their trials."""
    environment = dict(os.environ)
    # The agent looks up `python` and `torchrun` on PATH: make it find those of this Python environment.
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment.get("PATH", "")
    if sys.platform == "darwin":  # what it takes for the machine's name may lead nowhere: torchrun's --local-addr
        environment.setdefault("PET_LOCAL_ADDR", "127.0.0.1")
    if nproc_per_node:  # torchrun's environment variable for this flag
        environment["PET_NPROC_PER_NODE"] = str(nproc_per_node)
    return environment


def wait_for(agents):
    """Wait for these processes, passing SIGTERM on to them → exit code."""
    received = []

    def forward(number, frame):
        received.append(number)
        if number == signal.SIGTERM:  # SIGINT has already reached the agents, from the terminal
            for one in agents:
                one.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    codes = [code if code >= 0 else 128 - code for code in [one.wait() for one in agents]]  # -9: killed by signal 9
    return 128 + received[0] if received else max(codes)


def shares(agents):
    """Each agent's GPUs: an equal number, or one that several share; []: CUDA's choice, of one agent or no GPUs."""
    if agents == 1:
        return [[]]
    import torch

    known = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = known.split(",") if known else []
    if not gpus:
        return [[]] * agents
    if n := len(gpus) // agents:
        return [gpus[i * n:(i + 1) * n] for i in range(agents)]
    return [[gpus[i % len(gpus)]] for i in range(agents)]


def _end_with_this_process():
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, on Linux


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="create|agent")
    command = commands.add_parser("create", help="make a sweep from a TOML or YAML file")
    command.add_argument("sweep", metavar="FILE")
    command.add_argument("--wandb-project", dest="project", default="", help="WANDB_PROJECT; else mini-llm")
    command.add_argument("--wandb-entity", dest="entity", default="", help="WANDB_ENTITY; else the key's own")
    command.set_defaults(run_command=create)
    command = commands.add_parser("agent", help="run trials of a sweep")
    command.add_argument("sweep", metavar="SWEEP_ID", help="ENTITY/PROJECT/ID, as create prints it, or a link")
    command.add_argument("--count", type=positive, help="trials of each agent; else until the sweep is done")
    command.add_argument("--agents", type=positive, default=1, help=f"agents to run in parallel, at most {MOST_AGENTS}")
    command.add_argument("--nproc-per-node", type=positive, help="processes of each trial, under torchrun")
    command.set_defaults(run_command=agent)
    run_command(parser)


if __name__ == "__main__":
    main()
