"""Whether a checkpoint is of this run, and what the run takes over from it. train.py calls, in this order:
`require_same_flags`, `earlier_shards`, `run_identity`, `load_for_resume`, `log_versions`, `restore`; and, before the
first step, `remove_stale_files` and `loss_to_beat`."""

import contextlib
import dataclasses
import logging
import math
import os
import shlex
import shutil
from functools import partial
from pathlib import Path

from torch.utils._pytree import tree_map

from mini_llm import hardware
from mini_llm.archive import DamagedCheckpoint, link, load, peek, read_digest
from mini_llm.checkpoint import State, step_of
from mini_llm.config import flag, flatten, is_launch_flag
from mini_llm.errors import UserError
from mini_llm.files import beside_run, exists, same_file, sync_path

FORMAT = 1
DATA_FLAGS = ("tokenizer_name", "train_data", "val_data", "val_ratio", "max_tokens", "text_column", "use_toy_data",
              "train_weights", "data_seed", "vocab_size")  # those that decide what the tokens are
# The parts of a run's identity that are long or hashes: instead of printing them, an error names the flags behind them.
HASHED = ("the mixture", "the tokenizer", "the training data", "the validation data")
# Those that do not describe its model: a new run may train its weights with other values.
NOT_THE_MODEL = {*map(flag, DATA_FLAGS), *HASHED, "--seq-len", "--optimizer", "sequences in a step"}
# Those that decide which samples a run reads, and in which order.
ORDER = ("--seq-len", "--data-seed", "--train-weights", "the mixture", "the tokenizer", "the training data")
OTHER_BEST = r"\.best-of-\d+\.pt"  # the best by losses under another --eval-tokens

log = logging.getLogger("mini_llm")


def identity_of_flags(cfg, global_batch_size):
    """The part of `run_identity` that is known before the data is read."""
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


def require_same_flags(path, cfg, global_batch_size):
    """Raises UserError, before a text is tokenized, if the flags `cfg` are of another run than that at `path`."""
    file, found = first_readable(path, cfg.checkpoint)
    if found:
        _require_same_run(file, found, identity_of_flags(cfg, global_batch_size), flatten(cfg))


def earlier_shards(path, cfg):
    """The folder of token shards of the run at `path`, or None: it is gone, or the flags `cfg` are for other data."""
    _, found = first_readable(path, cfg.checkpoint)
    config = flatten(cfg)
    if not found or any(found["config"].get(name) != config[name] for name in DATA_FLAGS):
        return None
    folder = str(found.get("tokens", ""))
    here = os.path.join(cfg.data.cache_dir, os.path.basename(folder))  # if all has been moved, cache included
    return next(filter(os.path.isdir, (folder, here)), None)


def first_readable(path, cfg):
    """(path, plain values) of the checkpoint at `path` or, if that is damaged, of the one before; else (None, {})."""
    for file in (path, cfg.beside(".prev.pt")) if path else ():
        if is_of_a_run(found := peek(file)):
            return file, found
    return None, {}


def load_for_resume(path, cfg, identity, config, mends=True):
    """The verified checkpoint at `path` or, if that is damaged, the one before, which with `mends` takes its place.
    Raises UserError if its run has another `identity`; other differences to `config`, all flags, are only logged."""
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
        # Its other names: a damaged best would still be the one to beat, a damaged kept one would count as kept.
        for file in [cfg.beside(".best.pt"), *cfg.matching(OTHER_BEST), *cfg.numbered()]:
            if same_file(file, path):
                file.unlink()
        link(source, path)  # else the next save would replace the good file with the damaged one
    return payload


def _require_same_run(source, payload, identity, config):
    """Raises UserError, with what differs, unless the checkpoint's identity has the values of `identity`."""
    was, flags = payload["identity"], payload["config"]
    # A flag that only this code has, or only the checkpoint, counts as changed only if it is set; unset ones are falsy.
    changed = {name: (was.get(name), value) for name, value in identity.items()
               if (name in was or value) and was.get(name) != value}
    if any(name in HASHED for name in changed):
        changed |= {flag(name): (flags[name], config.get(name)) for name in DATA_FLAGS
                    if name in flags and flags[name] != config.get(name)}
    if not changed:
        return
    samples = changed.get("sequences in a step")
    hint = f" (--batch-size x --grad-accum-steps x ranks has to be {samples[0]})" if samples else ""
    own = shlex.quote(str(source))
    config_file = beside_run(source, ".config.toml")
    start = f" (--config {shlex.quote(str(config_file))})" if config_file.exists() else ""
    anew = f"train its weights in a new run: --init-from {own}"
    # Weights fit only their own tokenizer, which --init-from takes except with token shards, and GPT-2's have no more
    # positions than they were trained on.
    unfit = any(flags.get(name) != config.get(name) for name in ("tokenizer_name", "vocab_size", "use_toy_data"))
    shards = any(os.path.exists(os.path.join(path, "meta.json")) for path in config.get("train_data", ()))
    unfit |= "the tokenizer" in changed and shards
    if was.get("--arch") == "gpt2" and not flags.get("init_from"):
        unfit |= identity.get("--seq-len", 0) > was.get("--seq-len", 0)
    if unfit or any(name not in NOT_THE_MODEL for name in changed):
        anew = "start anew"
    elif "--optimizer" not in changed:
        anew += " --keep-optimizer"
    said = [f"{name} is another" if name in HASHED else f"{name} was {before}, is {now}"
            for name, (before, now) in changed.items()]
    raise UserError(f"--resume: {source} is of another run: {'; '.join(said)}{hint}; give the flags and data "
                    f"that it was started with{start}, or {anew} with another --checkpoint-path")


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
            if is_of_another_program(file):
                raise UserError(f"--resume: {error}; docs/coming-from.md says how to start from the weights of "
                                f"nanoGPT's and others") from None
            damage.append(str(error))
    raise UserError(f"--resume: {'; '.join(damage)}; {_way_back(cfg)}")


def _way_back(cfg):
    """Advice for when the checkpoint to resume from is lost."""
    for file in cfg.candidates():
        with contextlib.suppress(DamagedCheckpoint, UserError):
            load(file)
            return f"--resume {shlex.quote(str(file))} --overwrite goes back to that one, which is whole"
    return f"no other checkpoint beside {cfg.checkpoint_path} is whole; --overwrite instead of --resume starts over"


def is_of_a_run(payload):
    """Whether a checkpoint, which may come from anywhere, has the parts that ours have."""
    return (isinstance(payload, dict) and payload.get("format") == FORMAT
            and all(isinstance(payload.get(part), dict) for part in ("model", "state", "identity", "config"))
            and isinstance(payload["state"].get("step"), int))


def is_of_another_program(file):
    """Whether a checkpoint lacks both the parts and the SHA-256 that ours have: mere damage does not remove both."""
    found = peek(file)
    if not found or is_of_a_run(found):
        return False
    with open(file, "rb") as opened:
        return read_digest(opened) is None


def peek_run(file):
    """What a checkpoint says of its run, such as its config, state and identity: each {} if it cannot be read."""
    found = peek(file)
    return found if is_of_a_run(found) else {"config": {}, "state": {}, "identity": {}}


def _surely_peeked(file):
    """As `peek_run`, to decide whether to remove the file: raises UserError if it exists and cannot be read now."""
    found = peek_run(file)
    if not found["state"] and exists(file):
        with contextlib.suppress(DamagedCheckpoint):
            found = whole if is_of_a_run(whole := load(file)) else found
    return found


def log_versions(payload, versions):
    """Log which of `versions` (wandb_runs.provenance) have changed since the checkpoint."""
    was = payload.get("versions", {})
    changed = [f"{name} was {was[name]}, is {value}" for name, value in versions.items()
               if was.get(name, value) != value]
    if not was:
        changed = ["the checkpoint does not say which ones wrote it"]
    if changed:
        log.info("resumed with other versions, which may give other losses: %s", "; ".join(changed))


def restore(payload, parts, continues, world):
    """Collective. Loads a checkpoint into a run's `parts`, by their names, and returns its State. Raises UserError."""
    try:
        distribute_moments(payload["optimizer"], parts["optimizer"], world)
        for name, part in parts.items():
            found = payload[name]
            if name != "optimizer":  # whose tensors are distributed already
                found = of_this_rank(found, part, world)  # not kept in the payload, which outlives this function
            if found:  # a scaler's state is empty except in fp16
                part.load_state_dict(found)
        state = State(**payload["state"])
    except Exception as error:  # torch raises many types
        if hardware.out_of_memory(error):
            raise
        commit = payload.get("versions", {}).get("git_commit", "not noted")
        raise UserError(f"--resume: parts of the checkpoint are not those of this run ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]}); if another version of mini-llm wrote it (git commit "
                        f"{commit}), go on with that one; else name another with --resume FILE, or start anew with "
                        f"another --checkpoint-path") from None
    return state if continues else dataclasses.replace(state, wandb_run_id="")  # a branch is a separate run


def of_this_rank(saved, part, world):
    """The part that this rank loads of `saved`, a state dict of `part` that `world.from_main` returned. Collective."""
    here = part.state_dict()
    return {name: tree_map(partial(world.distribute, like=here.get(name)), value) for name, value in saved.items()}


def distribute_moments(saved, optimizer, world):
    """Turns `saved`, a checkpoint's optimizer state, into what `optimizer` of this rank loads: its part of each tensor,
    with the weight decay and betas of the flags. Raises ValueError if it is of other parameters. Collective."""

    def names(groups):
        return [name for group in groups for name in group.get("param_names", ())]

    groups = optimizer.state_dict()["param_groups"]
    was = names(saved["param_groups"])
    if was and was != names(groups):  # state is saved by position: a parameter would get the moments of another
        raise ValueError("the optimizer has other parameters, or in another order")
    saved["param_groups"] = groups
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        state.update({name: world.distribute(value, params[index]) for name, value in state.items()})


def remove_stale_files(cfg, resume_from, step):
    """Before the first step, removes the drafts of killed saves and what a replaced run left: its log and metrics
    unless this run continues it, and under --overwrite its checkpoints. A rollback to `step` makes `resume_from` the
    newest at once."""
    path, bests = Path(cfg.checkpoint_path), [cfg.beside(".best.pt"), *cfg.matching(OTHER_BEST)]
    goes_on = resume_from is not None and cfg.continues(resume_from)
    stale = cfg.drafts() + ([cfg.beside(".prev.pt"), cfg.beside(".nonfinite.pt")] if cfg.overwrite else [])
    if cfg.overwrite and goes_on:
        stale += [file for file in cfg.numbered() if step_of(file) > step]
        stale += [file for file in bests if _surely_peeked(file)["state"].get("step", 0) > step]
        link(Path(resume_from), path)
    elif not goes_on:  # such files are another run's, even if that never saved a checkpoint
        shutil.rmtree(cfg.beside(".tensorboard"), ignore_errors=True)
        stale += [cfg.beside(".metrics.jsonl"), cfg.beside(".log")]
        stale += cfg.matching(r"(\.rank\d+)?\.upload-\d+(\.best)?\.pt")
        if resume_from is not None or cfg.resume != "auto":  # auto continues the W&B run of a start that saved nothing
            stale += cfg.matching(r"\.wandb\.json|\.rank\d+\.(wandb\.json|metrics\.jsonl)")
        if cfg.overwrite:  # a branch makes its own first checkpoint: `resume_from` names another W&B run
            stale += [path, *bests, *cfg.numbered()]
    for file in stale:
        file.unlink(missing_ok=True)
    sync_path(path.parent)  # else a power cut may leave a checkpoint of the replaced run beside the metrics of this one


def loss_to_beat(cfg, state, eval_tokens):
    """The loss of `.best.pt`, which may be newer than the checkpoint resumed from; infinity if there is none. One
    measured over another number of `eval_tokens` is not comparable: it is kept under a name with that number, and an
    earlier best over this number, if there is one, becomes the best again."""
    found = _surely_peeked(best := cfg.beside(".best.pt"))
    best_eval_tokens = found["config"].get("eval_tokens", eval_tokens)
    if best_eval_tokens != eval_tokens:
        link(best, kept := cfg.beside(f".best-of-{best_eval_tokens}.pt"))
        log.info("the best loss so far is over --eval-tokens %d: not comparable; its weights stay in %s",
                 best_eval_tokens, kept)
    if best_eval_tokens != eval_tokens or not found["state"]:  # not comparable, missing or not readable
        found = _surely_peeked(before := cfg.beside(f".best-of-{eval_tokens}.pt"))
        if not found["state"]:  # the next evaluation writes one
            return math.inf
        os.replace(before, best)
    return found["state"].get("best_val", state.best_val)
