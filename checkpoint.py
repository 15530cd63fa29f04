"""A run's checkpoints: where they are, which one it resumes from, and whether that is its own.

`--checkpoint-path checkpoints/minigpt.pt` names the newest. Beside it, with the same stem, are `.prev.pt` (the one
before), `.best.pt` (lowest validation loss), `.step-N.pt` and `.kept-N.pt` (with `--keep-last`, `--keep-every`), and
the run's log and metrics.

train.py calls, in this order: `plan_together` (which file to resume from), `identity_of_flags` and `earlier_shards` (is
it this run's, by its flags? its token shards), `run_identity` and `load_for_resume` (and by its data?), `restore`;
then, before the first step, `claim` (lock, disk space) and `begin` (removes what a replaced run left).
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils._pytree import tree_map

import hardware
from archive import DamagedCheckpoint, link, load, peek
from config import UserError, arg, flag, is_launch_flag
from files import OTHER_CHECKPOINT, beside_run, exists, matching_files
from processes import lock_until_exit

FORMAT = 1
DATA_FLAGS = ("tokenizer_name", "train_data", "val_data", "val_ratio", "max_tokens", "text_column", "use_toy_data",
              "train_weights", "data_seed", "vocab_size")  # those that decide what the tokens are
# The names in a run's identity that do not describe its model: another run may train its weights with other values.
NOT_THE_MODEL = {*map(flag, DATA_FLAGS), "--seq-len", "--optimizer", "sequences in a step"}
# Those that decide which samples a run reads, and in which order.
ORDER = ("--seq-len", "--data-seed", "--train-weights", "the mixture", "the tokenizer", "the training data")
SUFFIXES = (".prev.pt", ".best.pt", ".nonfinite.pt", ".log", ".metrics.jsonl", ".config.toml", ".tokenizer",
            ".tensorboard", ".trace.json", ".wandb.json")
OTHER_BEST = r"\.best-of-\d+\.pt"  # the best by losses over another number of --eval-tokens
PATIENCE = 180  # seconds --resume waits for the previous run's lock: it may still be saving, or its node may be gone

log = logging.getLogger("mini_llm")


@dataclass
class CheckpointConfig:
    """Checkpoints"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the newest checkpoint; log and metrics lie beside it",
                               metavar="FILE.pt")
    resume: str = arg("", "resume from --checkpoint-path; auto: if it exists, else start; FILE: from FILE",
                      const="latest", metavar="auto|FILE", empty=False)
    overwrite: bool = arg(False, "start over and replace the existing run; with --resume FILE, from that file")
    save_steps: int = arg(250, "steps between checkpoints; 0: only after the last step", ge=0)
    save_best: bool = arg(True, "save a checkpoint at each new lowest validation loss, too, as FILE.best.pt")
    keep_last: int = arg(0, "how many of the newest checkpoints to keep as FILE.step-N.pt, too; 0: none", ge=0)
    keep_every: int = arg(0, "keep the first checkpoint of every N steps as FILE.kept-N.pt, for good; 0: none", ge=0)
    async_save: bool = arg(False, "write checkpoints from a copy in the CPU's memory while training goes on")
    time_limit: float = arg(0.0, "minutes after which the run saves and exits, with exit code 142; 0: none", ge=0,
                            le=10**7)

    def validate(self):
        if self.overwrite and self.resume in ("latest", "auto"):
            raise UserError("--resume continues the checkpoint that --overwrite discards: give only one of them")
        if os.path.isdir(self.checkpoint_path) or not Path(self.checkpoint_path).stem:
            raise UserError(f"--checkpoint-path {self.checkpoint_path}: is a folder; name a file in it, "
                            f"such as {os.path.join(self.checkpoint_path, 'minigpt.pt')}")
        name = Path(self.checkpoint_path).name
        taken = r"\.(prev|best|nonfinite|rank\d+|(step|kept|upload|best-of)-[^.]*)\.pt$"
        if not re.fullmatch(rf"(?s)(?!.*{taken}).+\.pt", name):
            raise UserError(f"--checkpoint-path {self.checkpoint_path}: name a file NAME.pt, and not .best.pt, "
                            f".prev.pt, .nonfinite.pt, .step-N.pt, .kept-N.pt, .rankN.pt or .upload-N.pt, which are "
                            f"names of a run's other files")

    def beside(self, suffix):
        """checkpoints/minigpt.pt, `.best.pt` → checkpoints/minigpt.best.pt"""
        return beside_run(self.checkpoint_path, suffix)

    def files(self):
        """The existing files that a run writes, at the checkpoint path and beside it, as strings."""
        return [str(file) for file in [Path(self.checkpoint_path), *map(self.beside, SUFFIXES), *self.numbered()]
                if file.exists()]

    def matching(self, pattern):
        """The files beside the checkpoint path whose names are its stem plus a match of the regex `pattern`, sorted."""
        return matching_files(self.beside(""), pattern)

    def drafts(self):
        """Temporary files left by killed saves."""
        return self.matching(rf"({OTHER_CHECKPOINT})?\.pt\.tmp")

    def numbered(self):
        """The checkpoints kept by --keep-last and --keep-every, oldest first."""
        return sorted(self.matching(r"\.(step|kept)-\d+\.pt"), key=step_of)

    def candidates(self):
        """Where checkpoints to resume from may be, the preferred one first."""
        return [self.beside(".pt"), self.beside(".prev.pt"), *reversed(self.numbered()), self.beside(".best.pt")]

    def continues(self, resume_from):
        """Whether resuming from that file continues the run at the checkpoint path (the file is one of that run's)
        rather than branching off from it."""
        file, path = map(Path, map(os.path.realpath, (resume_from, self.checkpoint_path)))
        return file == path or _one_file(file, path) or file.suffix == ".pt" and beside_run(file, ".pt") == path


@dataclass
class State:
    """A run's progress. Batch, learning rate and randomness are functions of `step`."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    best_val: float = math.inf
    val_loss: float | None = None  # the latest
    wandb_run_id: str = ""
    first_sample: int = 0  # at which the run began in the data; --init-from's run has read those before it


def plan(cfg, locks=True):
    """The file this run resumes from, or None to start from scratch. Writes nothing. With `locks`, takes the lock of an
    earlier run at that path and keeps it; with --resume, waits for that run to end. Raises UserError if the flags do
    not match the existing files, the folder is not writable, or another run writes there."""
    path = Path(cfg.checkpoint_path)
    folder = path.parent
    try:
        folder = _nearest_folder(path)
        if locks:
            tempfile.TemporaryFile(dir=folder).close()  # os.access would not do: root passes it everywhere
        lock = cfg.beside(".lock")
        if locks and exists(lock) and not lock_until_exit(lock):  # before looking: that run may still save
            if cfg.resume:
                log.info("waiting for the run that still writes to %s", path)
            if not cfg.resume or not lock_until_exit(lock, PATIENCE):
                raise _in_use(cfg)
        exists(cfg.beside(".rank0000.metrics.jsonl.tmp"))  # raises here if the name would be too long
        known = list(filter(exists, cfg.candidates()))
    except OSError as error:
        raise UserError(f"--checkpoint-path {path}: {folder} cannot be written ({error.strerror}); give a path in a "
                        f"folder of your own") from None
    # A run killed before its first --save-steps may have left only its best checkpoint.
    newest = path if cfg.beside(".prev.pt") in known else next(iter(known), None)
    if not cfg.resume:
        if newest and not cfg.overwrite:
            raise UserError(f"--checkpoint-path {path}: there is a checkpoint already; add --resume to go on, "
                            f"--overwrite to start over, or name another path")
        return None
    if cfg.resume == "latest" and not newest:
        raise UserError(f"--resume: no checkpoint at {path}; leave --resume out to start, or use --resume auto")
    if cfg.resume in ("auto", "latest"):
        return newest
    if not os.path.isfile(cfg.resume):
        advice = f"--resume alone takes {newest}" if newest else "name a checkpoint, or leave --resume out to start"
        raise UserError(f"--resume {cfg.resume}: no such file; {advice}")
    if known and not cfg.overwrite and not os.path.samefile(cfg.resume, known[0]):
        effect = "rolls it back to that file" if cfg.continues(cfg.resume) else "replaces that run and its metrics"
        raise UserError(f"--resume {cfg.resume}: {path} exists, too; --overwrite {effect}, a new --checkpoint-path "
                        f"branches off")
    return Path(cfg.resume)


def plan_together(cfg, world, dry_run=False):
    """Collective: the main rank's plan, for every rank; a dry run locks nothing, and resumes only if asked to. Raises
    UserError if only other ranks have a checkpoint there, as on nodes with disks of their own whose order has changed:
    the run would silently start again."""
    resume_from = None if dry_run and not cfg.resume else world.from_main(lambda: plan(cfg, locks=not dry_run))
    elsewhere = world.max([cfg.resume == "auto" and os.path.exists(cfg.checkpoint_path)])[0]
    if elsewhere and resume_from is None:
        raise UserError(f"--resume auto: another node has {cfg.checkpoint_path}, and that of rank 0 has not; put "
                        f"--checkpoint-path on storage that all nodes share, or start with that node as the first")
    return resume_from


def claim(cfg, resume_from, n_bytes, step):
    """Locks the run's checkpoint path against others while this process lives. Raises UserError if another run writes
    there, or has since `plan`, or if the disk cannot hold the checkpoints from `step` on, `n_bytes` each."""
    own = cfg.checkpoint
    require_space(own, n_bytes, cfg.optim.num_steps - step, cfg.wandb.uploads)
    try:
        own.beside(".lock").parent.mkdir(parents=True, exist_ok=True)
        free = lock_until_exit(own.beside(".lock"))
    except OSError as error:
        raise UserError(f"--checkpoint-path {own.checkpoint_path}: {error.strerror}; give another path") from None
    if not free or (resume_from is None and not own.overwrite and os.path.exists(own.checkpoint_path)):
        raise _in_use(own)


def _in_use(cfg):
    return UserError(f"--checkpoint-path {cfg.checkpoint_path}: another run writes there now (it holds "
                     f"{cfg.beside('.lock')}); name another path, or stop that one first; processes that are to "
                     f"train together need train_ddp.py or train_fsdp.py")


def _nearest_folder(path):
    """The nearest folder above `path` that exists."""
    return next(parent for parent in Path(path).absolute().parents if parent.exists())


def identity_of_flags(cfg, global_batch_size):
    """What of `run_identity` is known before the data is read."""
    model = dataclasses.asdict(cfg.model)
    if cfg.model.rope_theta == cfg.model.parts.rope_theta:  # as is 0
        model["rope_theta"] = 0.0
    known = {flag(name): value for name, value in model.items()
             if name != "vocab_size" and name not in cfg.model.RUN_FLAGS}
    return known | {"--seq-len": cfg.data.seq_len, "--optimizer": cfg.optim.optimizer,
                    "sequences in a step": global_batch_size}


def run_identity(cfg, corpus, vocab_size, global_batch_size):
    """What a resumed run must have in common with the run it resumes: model, optimizer, tokenizer, data, and sequences
    per step, from which the position in the data follows."""
    return identity_of_flags(cfg, global_batch_size) | {
        "--vocab-size": vocab_size, "--data-seed": corpus.seed, "--train-weights": corpus.shares,
        "the mixture": [[shard.start, shard.count] for shard in corpus.train_sources.values() if corpus.shares],
        "the tokenizer": corpus.meta["tokenizer_hash"][:16],
        "the training data": corpus.fingerprint["train"], "the validation data": corpus.fingerprint["val"]}


def earlier_shards(path, cfg, config, known):
    """The folder of token shards that the run at `path` had, if its flags for the data are those of `config` and it is
    still there; else None. Raises UserError if that run's identity differs from what is `known` of this one's: before
    a text is tokenized."""
    for file in (path, cfg.beside(".prev.pt")) if path else ():
        if is_of_a_run(found := peek(file)):  # else damaged
            _require_same_run(file, found, known, config)
            if any(found["config"].get(name) != config.get(name) for name in DATA_FLAGS):
                return None
            folder = str(found.get("tokens", ""))
            here = os.path.join(config["cache_dir"], os.path.basename(folder))  # if all has been moved, cache included
            return next(filter(os.path.isdir, (folder, here)), None)
    return None


def load_for_resume(path, cfg, identity, config, mends=True):
    """The checkpoint at `path`, verified, and checked to be from this run: same model, tokenizer, data and batch. If it
    is damaged, the one before, which with `mends` then takes its place.

    `identity` must be equal; `config` is all flags, whose differences are only logged. Raises UserError.
    """
    payload, source = load_latest(path, cfg)
    if not is_of_a_run(payload):
        raise UserError(f"--resume: {source} is not a checkpoint of this version of mini-llm; use the one that "
                        f"wrote it, or start anew with another --checkpoint-path")
    only_there = {name: None for name, value in payload["identity"].items() if name.startswith("--") and value}
    _require_same_run(source, payload, only_there | identity, config)
    flags = payload["config"]
    for name, value in config.items():
        compared = not is_launch_flag(name) and name != "grad_accum_steps"  # the step's sequences are compared
        if compared and flags.get(name, value) != value:
            log.info("resumed with another %s: was %s, is %s", flag(name), flags[name], value)
    if source != path and mends:
        # The damaged file's other names: the best would be the one to beat, one that is kept would take its turn.
        for file in [cfg.beside(".best.pt"), *cfg.matching(OTHER_BEST), *cfg.numbered()]:
            if _one_file(file, path):
                file.unlink()
        link(source, path)  # else the next save would replace the good file with the damaged one
    return payload


def _require_same_run(source, payload, identity, config):
    """Raises UserError, with what differs, unless the checkpoint's identity has the values of `identity`."""
    was, flags = payload["identity"], payload["config"]
    # A flag that only this code has, or only the checkpoint, counts as changed only if it is set; unset ones are falsy.
    changed = {name: (was.get(name), value) for name, value in identity.items()
               if (name in was or value) and was.get(name) != value}
    if any(name.startswith("the ") for name in changed):  # hashes, which say nothing: name the flags behind them
        changed |= {flag(name): (flags[name], config.get(name)) for name in DATA_FLAGS
                    if name in flags and flags[name] != config.get(name)}
    if not changed:
        return
    samples = changed.get("sequences in a step")
    hint = f" (--batch-size x --grad-accum-steps x ranks has to be {samples[0]})" if samples else ""
    own, flags_file = (shlex.quote(str(path)) for path in (source, beside_run(source, ".config.toml")))
    anew = f"train its weights in a new run: --init-from {own}"
    # Weights fit their own tokenizer only, which replaces a learned one but not that of token shards, and GPT-2's
    # have no more positions than they were trained on.
    unfit = any(flags.get(name) != config.get(name) for name in ("tokenizer_name", "vocab_size", "use_toy_data"))
    shards = any(os.path.exists(os.path.join(path, "meta.json")) for path in config.get("train_data", ()))
    unfit |= "the tokenizer" in changed and shards
    if was.get("--arch") == "gpt2" and not flags.get("init_from"):
        unfit |= identity.get("--seq-len", 0) > was.get("--seq-len", 0)
    if unfit or any(name not in NOT_THE_MODEL and not name.startswith("the ") for name in changed):
        anew = "start anew"
    elif "--optimizer" not in changed:
        anew += " --keep-optimizer"
    said = [f"{name} is another" if name.startswith("the ") else f"{name} was {before}, is {now}"
            for name, (before, now) in changed.items()]
    raise UserError(f"--resume: {source} is of another run: {'; '.join(said)}{hint}; give the flags and data "
                    f"that it was started with (--config {flags_file}), or {anew} with another --checkpoint-path")


def _one_file(a, b):
    """Whether both paths are names, such as hard links, of one file. No: one is missing, or only another node's."""
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False


def is_of_a_run(payload):
    """Whether a checkpoint, which may come from anywhere, has the parts that ours have."""
    return (isinstance(payload, dict) and payload.get("format") == FORMAT
            and all(isinstance(payload.get(part), dict) for part in ("model", "state", "identity", "config"))
            and isinstance(payload["state"].get("step"), int))


def restore(payload, parts, continues, world):
    """Load a restored payload into a run's parts (name → object with state_dict and load_state_dict) → its State.
    Raises UserError. Collective."""
    try:
        distribute_moments(payload["optimizer"], parts["optimizer"], world)
        for name, part in parts.items():
            found = payload[name]
            if name != "optimizer":  # not kept in the payload, which outlives this: it may be a copy on the device
                found = of_this_rank(found, part, world)
            if found:  # a scaler's state is empty except in fp16
                part.load_state_dict(found)
        state = State(**payload["state"])
    except Exception as error:  # torch raises many types
        if hardware.out_of_memory(error):
            raise
        raise UserError(f"--resume: parts of the checkpoint are not those of this run ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]}); name another with --resume FILE, or start anew "
                        f"with another --checkpoint-path") from None
    return state if continues else dataclasses.replace(state, wandb_run_id="")  # a branch is a separate run


def of_this_rank(saved, part, world):
    """What this rank is to load of `saved`, a state dict of `part` that `world.from_main` returned. Collective."""
    here = part.state_dict()
    return {name: tree_map(partial(world.distribute, like=here.get(name)), value) for name, value in saved.items()}


def distribute_moments(saved, optimizer, world):
    """Makes the optimizer state of a checkpoint, `saved`, one for `optimizer` to load: this rank's part of each tensor,
    with the weight decay and betas of the flags. Raises ValueError if it is of other parameters. Collective."""
    groups = optimizer.state_dict()["param_groups"]
    was, now = ([name for group in of for name in group.get("param_names", ())]
                for of in (saved["param_groups"], groups))
    if was and was != now:  # its state is saved by place: a parameter would get the moments of another
        raise ValueError("the optimizer has other parameters, or in another order")
    saved["param_groups"] = groups
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        state.update({name: world.distribute(value, params[index]) for name, value in state.items()})


def begin(cfg, resume_from, state, eval_tokens):
    """Before the first step, removes the drafts of killed saves and what a replaced run left: its log and metrics
    unless this run continues it, with --overwrite its checkpoints. A rollback makes `resume_from` the newest at once.
    Returns the validation loss to beat."""
    path, bests = Path(cfg.checkpoint_path), [cfg.beside(".best.pt"), *cfg.matching(OTHER_BEST)]
    goes_on = resume_from is not None and cfg.continues(resume_from)
    stale = cfg.drafts() + ([cfg.beside(".prev.pt"), cfg.beside(".nonfinite.pt")] if cfg.overwrite else [])
    if cfg.overwrite and goes_on:
        stale += [file for file in cfg.numbered() if step_of(file) > state.step]
        stale += [file for file in bests if _surely_peeked(file)["state"].get("step", 0) > state.step]
        link(Path(resume_from), path)
    elif not goes_on:  # any such files belong to another run, even if that one never saved a checkpoint
        shutil.rmtree(cfg.beside(".tensorboard"), ignore_errors=True)
        stale += [cfg.beside(".metrics.jsonl"), cfg.beside(".log")]
        stale += cfg.matching(r"(\.rank\d+)?\.upload-\d+(\.best)?\.pt")
        if resume_from is not None or cfg.resume != "auto":  # auto continues the W&B run of a start that saved nothing
            stale += cfg.matching(r"\.wandb\.json|\.rank\d+\.(wandb\.json|metrics\.jsonl)")
        if cfg.overwrite:  # a branch's path gets its own first checkpoint: that of `resume_from` names another W&B run
            stale += [path, *bests, *cfg.numbered()]
    for file in stale:
        file.unlink(missing_ok=True)
    return _loss_to_beat(cfg, state, eval_tokens)


def _loss_to_beat(cfg, state, eval_tokens):
    """The loss of `.best.pt`, which may be newer than the checkpoint resumed from; infinity if there is none. One that
    was measured with another `eval_tokens` is not comparable: it is kept under a name with that number, and the best
    of before with this number, if there was one, is the best again."""
    found = _surely_peeked(best := cfg.beside(".best.pt"))
    of = found["config"].get("eval_tokens", eval_tokens)
    if of != eval_tokens:
        link(best, kept := cfg.beside(f".best-of-{of}.pt"))
        log.info("the best loss so far is over --eval-tokens %d: not comparable; its weights stay in %s", of, kept)
    if of != eval_tokens or not found["state"]:  # not comparable, missing or not readable
        found = _surely_peeked(before := cfg.beside(f".best-of-{eval_tokens}.pt"))
        if not found["state"]:  # the next evaluation writes one
            return math.inf
        os.replace(before, best)
    return found["state"].get("best_val", state.best_val)


def step_of(file):
    """The step in the name of a checkpoint that --keep-last or --keep-every keeps."""
    return int(Path(file).stem.rpartition("-")[2])


def peek_run(file):
    """What a checkpoint says of its run: its config, state and identity; each {} if it cannot be read."""
    found = peek(file)
    return found if is_of_a_run(found) else {"config": {}, "state": {}, "identity": {}}


def _surely_peeked(file):
    """As `peek_run`, to decide on removing the file: raises UserError if it is there and cannot be read now."""
    found = peek_run(file)
    if not found["state"] and exists(file):
        with contextlib.suppress(DamagedCheckpoint):
            found = whole if is_of_a_run(whole := load(file)) else found
    return found


def require_space(cfg, n_bytes, n_steps, uploads=0):
    """Raises UserError if the disk cannot hold the checkpoints of `n_steps` steps, about `n_bytes` each: the newest and
    the one before (which count toward --keep-last), the best, the one being written, and those kept for uploads and
    for good; and a copy of the metrics, from which a resume removes what came after the checkpoint."""
    files = [file for file in map(Path, cfg.files()) if file.suffix == ".pt" and ".kept-" not in file.name]
    files += cfg.drafts()
    ours = {file.stat().st_ino: file.stat().st_size for file in files}
    saves = math.ceil(n_steps / cfg.save_steps) if cfg.save_steps else 1
    wanted = 1 + cfg.save_best + uploads + min(max(2, cfg.keep_last), saves + len(ours))
    wanted += min(saves, n_steps // cfg.keep_every + 1) if cfg.keep_every else 0
    metrics = cfg.beside(".metrics.jsonl")
    needed = wanted * n_bytes + (metrics.stat().st_size if metrics.exists() else 0)
    missing = needed - sum(ours.values()) - shutil.disk_usage(_nearest_folder(cfg.checkpoint_path)).free
    if missing > 0:
        raise UserError(f"--checkpoint-path {cfg.checkpoint_path}: {wanted} checkpoints of {n_bytes / 1e9:.2g} GB need "
                        f"{missing / 1e9:.2g} GB more than is free; make room, or name a path on another disk")


def load_latest(path, cfg):
    """(checkpoint, its path): that at `path` or, if damaged, the previous one. Raises UserError if neither is whole."""
    previous, damage = cfg.beside(".prev.pt"), []
    is_newest = os.path.realpath(path) == os.path.realpath(cfg.checkpoint_path)
    for file in [path, previous] if is_newest and exists(previous) else [path]:
        try:
            payload = load(file)
            if damage:
                log.warning("%s; falling back to %s", damage[0], file)
            return payload, file
        except DamagedCheckpoint as error:
            damage.append(str(error))
    raise UserError(f"--resume: {'; '.join(damage)}; {_way_back(cfg)}")


def _way_back(cfg):
    """Advice for when the checkpoint to resume from is lost."""
    for file in cfg.candidates():
        with contextlib.suppress(DamagedCheckpoint, UserError):
            load(file)
            return f"--resume {shlex.quote(str(file))} --overwrite goes back to that one, which is whole"
    return f"no other checkpoint beside {cfg.checkpoint_path} is whole; --overwrite instead of --resume starts over"
