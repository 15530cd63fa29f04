"""A run's checkpoints: where they are, which one it resumes from, and which process may write there.

`--checkpoint-path checkpoints/minigpt.pt` names the newest. Beside it, with the same stem, are `.prev.pt` (the one
before), `.best.pt` (lowest validation loss), `.step-N.pt` and `.kept-N.pt` (with `--keep-last`, `--keep-every`), and
the run's log and metrics. train.py calls `plan_together`, the functions of resume.py, and then `claim`.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mini_llm.config import arg
from mini_llm.errors import UserError
from mini_llm.files import OTHER_CHECKPOINT, beside_run, exists, make_folder, matching_files, same_file
from mini_llm.processes import lock_until_exit

SUFFIXES = (".prev.pt", ".best.pt", ".nonfinite.pt", ".log", ".metrics.jsonl", ".config.toml", ".tokenizer",
            ".tensorboard", ".trace.json", ".wandb.json")
PATIENCE = 180  # seconds that --resume waits for the lock of a run that may still be saving, or whose node is gone

log = logging.getLogger("mini_llm")


@dataclass
class CheckpointConfig:
    """Checkpoints"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the newest checkpoint; log and metrics lie beside it",
                               metavar="FILE.pt")
    resume: str = arg("", "resume from --checkpoint-path; auto: if it exists, else start; FILE: from FILE",
                      const="latest", metavar="auto|FILE", empty=False)
    overwrite: bool = arg(False, "start over and replace the existing run; with --resume FILE, from that file")
    save_steps: int = arg(250, "steps between checkpoints; 0: by --save-minutes and after the last step only", ge=0)
    save_minutes: float = arg(30.0, "minutes after a checkpoint until the next, if no other has been saved by then; 0: "
                                    "by --save-steps only", ge=0, le=10**7)
    save_best: bool = arg(True, "save a checkpoint at each new lowest validation loss, too, as FILE.best.pt")
    keep_last: int = arg(0, "how many of the newest checkpoints to keep as FILE.step-N.pt, too; 0: none", ge=0)
    keep_every: int = arg(0, "keep the first checkpoint of every N steps as FILE.kept-N.pt, for good; 0: none", ge=0)
    async_save: bool = arg(False, "write checkpoints from a copy in the CPU's memory while training goes on")
    time_limit: float = arg(0.0, "minutes after which the run saves and exits, with exit code 142; 0: none", ge=0,
                            le=10**7)

    def validate(self):
        if self.overwrite and self.resume in ("latest", "auto"):
            raise UserError("--resume continues the checkpoint that --overwrite discards: give only one of them")
        if os.path.isdir(self.checkpoint_path):
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
        """Whether a resume from that file continues the run at the checkpoint path, rather than branching off."""
        file, path = map(Path, map(os.path.realpath, (resume_from, self.checkpoint_path)))
        return file == path or same_file(file, path) or file.suffix == ".pt" and beside_run(file, ".pt") == path


@dataclass
class State:
    """A run's progress. Batch, learning rate and randomness are functions of `step`."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    best_val: float = math.inf
    val_loss: float | None = None  # the latest
    wandb_run_id: str = ""
    first_sample: int = 0  # of this run; with --keep-optimizer, the earlier run has read those before it


def plan(cfg, locks=True):
    """The file this run resumes from, or None to start from scratch. Writes nothing. With `locks`, takes the lock of an
    earlier run at that path, for which --resume waits. Raises UserError if the flags do not match the existing files,
    the folder is not writable, or another run writes there."""
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
    # With a .prev.pt, `path` even if it is missing: load_latest falls back, with a warning. Else the first that exists:
    # a run killed before its first --save-steps may have left only its best checkpoint.
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
    if os.path.isdir(cfg.resume):  # the Trainer's way
        raise UserError(f"--resume {cfg.resume}: is a folder; give a checkpoint in it or, if it is a Hugging Face "
                        f"folder, --init-from, which starts a run from its weights")
    if not os.path.isfile(cfg.resume):
        advice = f"--resume alone takes {newest}" if newest else "name a checkpoint, or leave --resume out to start"
        raise UserError(f"--resume {cfg.resume}: no such file; {advice}")
    if known and not cfg.overwrite and not os.path.samefile(cfg.resume, known[0]):
        effect = "rolls it back to that file" if cfg.continues(cfg.resume) else "replaces that run and its metrics"
        raise UserError(f"--resume {cfg.resume}: {path} exists, too; --overwrite {effect}, a new --checkpoint-path "
                        f"branches off")
    return Path(cfg.resume)


def plan_together(cfg, world, dry_run=False):
    """Collective. The main rank's `plan`, on every rank; a dry run locks nothing, and resumes only if asked to. Raises
    UserError if only other nodes have a checkpoint there, on disks of their own: the run would silently start again."""
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
        make_folder(own.beside(".lock").parent)
        free = lock_until_exit(own.beside(".lock"))
    except OSError as error:
        raise UserError(f"--checkpoint-path {own.checkpoint_path}: {error.strerror}; give another path") from None
    if not free or (resume_from is None and not own.overwrite and os.path.exists(own.checkpoint_path)):
        raise _in_use(own)


def require_space(cfg, n_bytes, n_steps, uploads=0):
    """Raises UserError if the disk cannot hold the checkpoints of `n_steps` steps, about `n_bytes` each: the newest and
    the one before (which count toward --keep-last), the best, the one being written, and those kept for uploads or
    for good; and a copy of the metrics, which a resume rewrites."""
    files = [file for file in map(Path, cfg.files()) if file.suffix == ".pt" and ".kept-" not in file.name]
    files += cfg.drafts()
    ours = {file.stat().st_ino: file.stat().st_size for file in files}  # by inode: several names of a file count once
    saves = math.ceil(n_steps / cfg.save_steps) if cfg.save_steps else 1
    saves += cfg.save_minutes > 0  # at least one, if the run takes that long
    wanted = 1 + cfg.save_best + uploads + min(max(2, cfg.keep_last), saves + len(ours))
    wanted += min(saves, n_steps // cfg.keep_every + 1) if cfg.keep_every else 0
    metrics = cfg.beside(".metrics.jsonl")
    needed = wanted * n_bytes + (metrics.stat().st_size if metrics.exists() else 0)
    missing = needed - sum(ours.values()) - _free_bytes(_nearest_folder(cfg.checkpoint_path))
    if missing > 0:
        raise UserError(f"--checkpoint-path {cfg.checkpoint_path}: {wanted} checkpoints of {n_bytes / 1e9:.2g} GB need "
                        f"{missing / 1e9:.2g} GB more than is free; make room, or name a path on another disk")


def _free_bytes(folder):
    """Infinity if unknown: some FUSE file systems do not tell, or report a size of 0."""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(folder)
        if disk.total:
            return disk.free
    return math.inf


def _in_use(cfg):
    return UserError(f"--checkpoint-path {cfg.checkpoint_path}: another run writes there now (it holds "
                     f"{cfg.beside('.lock')}); name another path, or stop that one first; processes that are to "
                     f"train together need train_ddp.py or train_fsdp.py")


def _nearest_folder(path):
    """The nearest folder above `path` that exists."""
    return next(parent for parent in Path(path).absolute().parents if parent.exists())


def step_of(file):
    """The step in the name of a checkpoint that --keep-last or --keep-every keeps."""
    return int(Path(file).stem.rpartition("-")[2])
