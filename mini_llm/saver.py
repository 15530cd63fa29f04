"""What a run saves: the newest checkpoint, with the one before it, the best, and the state that it halted with."""

import dataclasses
import logging
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from mini_llm import hardware
from mini_llm.archive import save
from mini_llm.checkpoint import step_of
from mini_llm.errors import RunFailed
from mini_llm.files import sync_path
from mini_llm.resume import peek_run

log = logging.getLogger("mini_llm")


class NonFinite(RunFailed):
    """The loss or gradient was NaN or infinite for --max-bad-steps steps in a row."""


class NotSaved(RunFailed):
    """The last checkpoint of a run could not be written."""


def save_run(cfg, payload, step, newest, best, kept=False):
    """Save at the checkpoint path (`newest`), as `.best.pt` (`best`), or both with one write. Returns the file's path.

    The previous checkpoint stays as `.prev.pt`; the new one also gets a name with its step: `.step-N.pt` under
    --keep-last, `.kept-N.pt` if `kept`. One saved while steps were not finite may be of no use, and is neither kept nor
    named. The names are hard links: nothing is written twice, and at every moment an intact checkpoint has one. The
    best is named before the newest: a run killed in between goes on from the one before, and finds the best again.
    """
    try:
        sync_path(metrics := cfg.beside(".metrics.jsonl"))  # a resume from this checkpoint does not write them again
    except OSError as error:  # the checkpoint matters more
        log.warning("a power cut may take rows from %s: %s", metrics, error.strerror)
    path, best_path = Path(cfg.checkpoint_path), cfg.beside(".best.pt")
    if not newest:
        save(best_path, payload)
        return best_path
    named = cfg.keep_last > 0 and _is_sound(payload)
    names = [best_path] if best else []
    if named:
        names.append(cfg.beside(f".step-{step:08d}.pt"))
    if kept:
        names.append(cfg.beside(f".kept-{step:08d}.pt"))
    save(path, payload, cfg.beside(".prev.pt") if _is_sound(peek_run(path)) else None, names)
    if named:
        ours = sorted(cfg.matching(r"\.step-\d+\.pt"), key=step_of)  # by number: some have nine digits
        # Later steps, from before the run fell back, do not count: they would outlive the new ones.
        for old in [file for file in ours if step_of(file) <= step][:-cfg.keep_last]:
            old.unlink(missing_ok=True)
    return path


def _is_sound(payload):
    """Whether the last step before this checkpoint was finite."""
    return not payload.get("meter", {}).get("skipped", [0, 0])[1]


class Saver:
    """Saves a run's checkpoints, on the main rank; with --async-save, from a copy on a thread while training continues.
    Its methods are collective: all ranks learn of a failed save together."""

    def __init__(self, cfg, world, state, track):
        """`state` is the run's own; the Tracker `track` is told of each file saved, and of the first failure."""
        self.cfg, self.world, self.state, self.track = cfg, world, state, track
        self.failing = False  # whether the last save failed
        self.pool = ThreadPoolExecutor(1, "save")
        self.copies = []  # the tensors on the CPU that --async-save writes from
        self.future = None  # on the main rank: what `_write` will return
        self.under_way = None  # on every rank: (step, best_val before) of the save in progress
        self.since = time.monotonic()  # the newest checkpoint, or the beginning

    def is_overdue(self):
        """Whether --save-minutes have passed since the newest checkpoint, by the main rank's clock."""
        limit = self.cfg.save_minutes * 60
        return self.world.is_main and 0 < limit <= time.monotonic() - self.since

    def save(self, payload, newest, best, last):
        """Save what `payload()` returns as the `newest` checkpoint, as the `best` (the lowest validation loss), or as
        both. A failure is logged, and the next save tries again; if the `last` one fails, raises NotSaved."""
        self.conclude()
        before = self.state.best_val
        if best:
            self.state.best_val = self.state.val_loss
        now = payload()
        self.under_way = self.state.step, before
        self.world.from_main(lambda: self._begin(now, newest, best))
        if last or not self.cfg.async_save:
            self.conclude(last=last)
        if newest:
            self.since = time.monotonic()

    def conclude(self, wait=True, last=False):
        """Finish the save in progress, if it is done or after waiting if `wait`: report its file or its failure."""
        if not self.under_way:
            return
        try:
            if not self.world.from_main(lambda: self._ended(wait)):
                return
        except OSError as error:
            step, self.state.best_val = self.under_way
            if last:
                raise NotSaved(f"step {step} could not be saved: {error}") from None
            log.error("step %d could not be saved, and training goes on to the next try: %s", step, error)
            if not self.failing:
                self.track.alert("not saved", f"step {step} could not be saved: {error}")
            self.failing = True
        else:
            self.failing = False
        self.under_way = None

    def _ended(self, wait):
        if not wait and not self.future.done():
            return False
        self.track.saved(*self.future.result())
        return True

    def _begin(self, payload, newest, best):
        if self.cfg.async_save and self.world.shards == 1:  # of shards, World.full_state has made a copy
            payload = self._copied(payload)
        kept = newest and self._opens_interval() and _is_sound(payload)
        self.future = self.pool.submit(self._write, payload, dataclasses.replace(self.state), newest, best, kept)

    def _write(self, payload, state, newest, best, kept):
        with self.world.saving:
            return save_run(self.cfg, payload, state.step, newest, best, kept), state, best

    def _opens_interval(self):
        """Whether this is the first checkpoint of its interval of --keep-every steps, except for the interval at 0."""
        if not (every := self.cfg.keep_every):  # do not read the folder, which may have many files
            return False
        kept = self.cfg.matching(r"\.kept-\d+\.pt")
        return self.state.step // every > max((step_of(file) // every for file in kept), default=0)

    def _copied(self, payload):
        """Copy to the CPU, into the buffers of the previous copy, which the last save no longer needs."""
        tensors = [leaf for leaf in tree_leaves(payload) if isinstance(leaf, torch.Tensor)]
        if [tensor.shape for tensor in tensors] != [copy.shape for copy in self.copies]:
            self.copies = _buffers(tensors)
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        hardware.synchronize(self.world.device)
        copies = iter(self.copies)
        return tree_map_only(torch.Tensor, lambda _: next(copies), payload)


def _buffers(tensors, block_bytes=2**30):
    """Uninitialized tensors like these on the CPU, cut from blocks of up to a GiB: an allocation of pinned memory is
    rounded up to a power of two bytes, so one for each tensor, or for all, might take almost twice what is needed."""
    sizes = [-(-tensor.nbytes // 16) * 16 for tensor in tensors]  # aligned for any dtype
    left, block, parts = sum(sizes), torch.empty(0, dtype=torch.uint8), []
    pinned = any(tensor.is_cuda for tensor in tensors)
    for tensor, size in zip(tensors, sizes, strict=True):
        if size > len(block):
            block = torch.empty(max(size, min(left, block_bytes)), dtype=torch.uint8, pin_memory=pinned)
        part, block = block[:tensor.nbytes], block[size:]
        left -= size
        parts.append(part.view(tensor.dtype).view(tensor.shape))
    return parts


def raise_nonfinite(cfg, payload, saving, samples):
    """Save what a run halts with, and raise NonFinite, naming the last step's `samples` and how to continue."""
    path, step, in_row = cfg.beside(".nonfinite.pt"), payload["state"]["step"], payload["meter"]["skipped"][1]
    try:
        with saving:
            save(path, payload)
        kept = f"the weights, which these steps left unchanged, are in {path}"
    except OSError as error:
        kept = f"the weights could not be saved ({error.strerror})"
    raise NonFinite(f"loss or gradient was not finite in {in_row} steps in a row, the last at step {step}, which read "
                    f"the training tokens from {samples} on; {kept}; {_way_on(cfg, payload, step - in_row)}")


def _way_on(cfg, payload, step):
    """Advice for a run whose weights at `step` give no finite loss."""
    rate = "a lower --lr and --muon-lr" if payload["config"]["optimizer"] == "muon" else "a lower --lr"
    files = cfg.candidates()
    for file in files:
        if 0 < (before := peek_run(file)["state"].get("step", 0)) < step:
            resume = "--resume" if file == files[0] else f"--resume {shlex.quote(str(file))} --overwrite"
            return f"{resume} with {rate} goes on from step {before}"
    return f"no checkpoint is from before step {step}: start as before, with --overwrite and {rate}"
