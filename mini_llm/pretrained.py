"""Trained weights from our checkpoints and from Hugging Face folders of GPT-2, Llama, Qwen3 and NanoChat. For a run
that starts from them (--init-from), `resolve_init` adopts their sizes and `load_initial` loads them."""

import contextlib
import dataclasses
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mini_llm import resume
from mini_llm.archive import DamagedCheckpoint, load
from mini_llm.checkpoint import State
from mini_llm.config import arg, flag, part_of
from mini_llm.errors import UserError, first_line
from mini_llm.files import beside_run, read_json
from mini_llm.hugging_face import from_hugging_face, gpt_config
from mini_llm.tokenizer import (
    LEARNED,
    end_of_text,
    hub_problem,
    id_count,
    load_tokenizer,
    open_tokenizer,
    tokenizer_hash,
)
from model import GPT, GPTConfig

# The flags that the weights decide.
SIZES = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in GPTConfig.RUN_FLAGS]

log = logging.getLogger("mini_llm")


@dataclass
class InitConfig:
    """Weights to start from"""

    init_from: str = arg("", "start from trained weights, which decide the model's sizes and the tokenizer: a Hugging "
                             "Face folder or name (GPT-2, Llama, Qwen3, NanoChat), or a checkpoint",
                         metavar="DIR|NAME|FILE.pt", empty=False)
    keep_optimizer: bool = arg(False, "with a checkpoint's weights, take its optimizer state, too; the same data is "
                                      "read on from where its run was, other data from the first sample")

    def validate(self):
        if self.keep_optimizer and not self.init_from:
            raise UserError("--keep-optimizer goes with --init-from FILE.pt; --resume takes the optimizer state anyway")
        if self.init_from in ("resume", "scratch") and not os.path.exists(self.init_from):  # nanoGPT's words
            advice = dict(resume="to continue a run, give --resume instead", scratch="leave it out for that")
            raise UserError(f"--init-from {self.init_from}: {advice[self.init_from]}")


def resolve_init(cfg, resume_from):
    """The (model, init, data) configs that the flags resolve to, on the main rank. Sizes, sequence length and tokenizer
    come from --init-from's weights or, on a resume of a run that began with some, its checkpoint. Raises UserError."""
    model, init, seq_len, tokenizer_name = cfg.model, cfg.init, cfg.data.seq_len, cfg.data.tokenizer_name
    prepared = cfg.data.is_shards or cfg.data.use_toy_data  # both come with their tokenizer
    given = {name: getattr(model, name) for name in SIZES if name in cfg.given}
    stated = {name: value for name, value in given.items() if value or value is False}  # None and 0 mean not stated
    saved = resume.first_readable(resume_from, cfg.checkpoint)[1].get("config", {})
    if resume_from and not saved:
        resume.load_latest(resume_from, cfg.checkpoint)  # raises if damaged: now, not after tokenizing a large text
    if saved and (init.init_from or saved.get("init_from")):
        if init.init_from:
            log.info("--init-from %s is not read: the weights are those of %s", init.init_from, resume_from)
        sizes = {name: saved[name] for name in SIZES if name in saved}
        if saved.get("init_from") and stated.get("max_position_embeddings", 0) > sizes["max_position_embeddings"]:
            # The source run's own value is accepted at the start, which drops positions that were not trained on.
            log.info("--max-position-embeddings %d does not count: the weights of %s have %d",
                     stated.pop("max_position_embeddings"), resume_from, sizes["max_position_embeddings"])
        model = dataclasses.replace(model, **sizes | stated)
        init = part_of(InitConfig, saved)
        seq_len = seq_len if "seq_len" in cfg.given else saved["seq_len"]
        if saved.get("init_from") and not prepared:
            tokenizer_name = _resumed_tokenizer(cfg, saved["tokenizer_name"], resume_from)
    elif init.init_from:
        model, seq_len, tokenizer_name = _resolve_source(cfg, stated, prepared)
    model.validate_sizes()
    if seq_len > model.max_position_embeddings:
        longest = f"give --seq-len {model.max_position_embeddings} or less"
        advice = longest if init.init_from else "raise the latter or lower the former"
        raise UserError(f"--seq-len {seq_len} is above --max-position-embeddings "
                        f"{model.max_position_embeddings}{init.init_from and ' of --init-from'}; {advice}")
    if model.vocab_size and not prepared and (tokenizer := load_tokenizer(tokenizer_name)):  # before tokenizing a text
        resolve_vocab_size(model, init, id_count(tokenizer), tokenizer_name)
    return model, init, dataclasses.replace(cfg.data, seq_len=seq_len, tokenizer_name=tokenizer_name)


def _resolve_source(cfg, stated, prepared):
    """The GPTConfig, --seq-len and --tokenizer-name for --init-from's weights. Raises UserError if flags do not fit."""
    source, seq_len, tokenizer_name = cfg.init.init_from, cfg.data.seq_len, cfg.data.tokenizer_name
    if cfg.checkpoint.overwrite and cfg.checkpoint.continues(source):
        raise UserError(f"--init-from {source}: --overwrite would remove it; name another --checkpoint-path")
    theirs = _source_config(source)
    # A checkpoint also fits its own run's flags, though positions that were not trained on are dropped (model_parts).
    own = resume.peek_run(source)["config"]  # {} of a folder
    if "seq_len" not in cfg.given:
        seq_len = own.get("seq_len", min(1024, theirs.max_position_embeddings))
    if theirs.parts.rope_theta:
        # No weights belong to positions: sequences may be longer than before.
        theirs.max_position_embeddings = max(theirs.max_position_embeddings, seq_len)
    sizes = {name: getattr(theirs, name) for name in SIZES} | dict(
        n_kv_heads=theirs.kv_heads, d_ff=theirs.ff_size, head_dim=theirs.head_size, tie_embeddings=theirs.tied)
    if cfg.init.keep_optimizer and own.get("optimizer") != cfg.optim.optimizer:
        state = (f"that of --optimizer {own['optimizer']}; give this, too" if "optimizer" in own else
                 f"no optimizer state{' that this version can take' if own else ''}; give a checkpoint")
        raise UserError(f"--keep-optimizer: {source} has {state}, or leave --keep-optimizer out")
    for name, value in stated.items():
        if value not in (sizes[name], own.get(name)):
            raise UserError(f"{flag(name)} {value}: the weights of --init-from {source} have {sizes[name]}; leave it "
                            f"out")
    if not prepared:
        tokenizer_name = _source_tokenizer(cfg, own.get("tokenizer_name"))
    return dataclasses.replace(cfg.model, **sizes), seq_len, tokenizer_name


def _source_tokenizer(cfg, own):
    """The --tokenizer-name or, unless it is given, the tokenizer beside the weights of --init-from. `own`: the name in
    the flags of their run, which means the same one. Raises UserError."""
    name, source = cfg.data.tokenizer_name, cfg.init.init_from
    if name not in LEARNED:
        return name
    if "tokenizer_name" in cfg.given and name != own:
        raise UserError(f"--tokenizer-name {name}: the weights of --init-from {source} fit only the tokenizer they "
                        f"were trained with; leave it out, to take that")
    name = str(beside_run(source, ".tokenizer")) if os.path.isfile(source) else source
    if os.path.exists(source) and not _is_tokenizer(name):
        raise UserError(f"--init-from {source}: no tokenizer can be read at {name}; name the one that these weights "
                        f"were trained with: --tokenizer-name")
    return name


def _resumed_tokenizer(cfg, saved, resume_from):
    """The --tokenizer-name of a run that began with --init-from: unless given, the `saved` one; if that cannot be read,
    such as a relative path from another folder, the run's copy."""
    name = cfg.data.tokenizer_name if "tokenizer_name" in cfg.given else saved
    copy = beside_run(resume_from, ".tokenizer")
    return str(copy) if copy.is_dir() and not _is_tokenizer(name) else name


def _is_tokenizer(name):
    """Whether there is a tokenizer of that name, or in that folder."""
    with contextlib.suppress(UserError):
        return load_tokenizer(name) is not None
    return False


def resolve_vocab_size(model, init, size, tokenizer_name):
    """How many ids the model has: the `size` of the tokenizer, or --vocab-size. Raises UserError if that is less."""
    if 0 < model.vocab_size < size:
        whose, advice = f"--vocab-size {model.vocab_size}", "leave it out"
        if init.init_from:
            whose = f"--init-from {init.init_from}: an embedding of {model.vocab_size} tokens"
            advice = "give the tokenizer of these weights"
        raise UserError(f"{whose} is below the {size} tokens of --tokenizer-name {tokenizer_name}; {advice}")
    return max(model.vocab_size, size)


def load_initial(raw, optimizer, init, identity, world):
    """Collective. Loads --init-from's weights into `raw` and, under --keep-optimizer, the state into `optimizer`; the
    main rank reads them for all. Returns the State in which a run of this `identity` begins. Raises UserError."""
    if not init.init_from:
        return State()

    def read():
        theirs = resume.peek_run(init.init_from)["identity"].get("the tokenizer")  # a folder states none
        if theirs not in (None, identity.get("the tokenizer")):
            log.warning("the tokens are not of the tokenizer that %s was trained with, or not as it was then",
                        init.init_from)
        if init.keep_optimizer:
            return _source_weights_and_moments(init.init_from, identity)
        return _source_weights(init.init_from, raw.cfg), None, 0

    weights, moments, first_sample = world.from_main(read)
    weights = resume.of_this_rank(weights, raw, world)
    try:
        raw.load_state_dict(weights)
    except RuntimeError as error:  # the sizes are the source's, so the model's code must have changed since
        raise UserError(f"--init-from {init.init_from}: its weights do not fit this code's model "
                        f"({' '.join(str(error).split())[:300]}); use the version that wrote them") from None
    if moments:
        try:
            resume.distribute_moments(moments, optimizer, world)
        except ValueError as error:
            raise UserError(f"--keep-optimizer: {init.init_from}: {error}; leave it out") from None
        optimizer.load_state_dict(moments)
    return State(first_sample=first_sample)


def _source_config(source):
    """The GPTConfig of --init-from's weights."""
    if os.path.isfile(source):
        return model_parts(_checkpoint(source, "--init-from"))[0]
    return gpt_config(_hugging_face("AutoConfig", source), source)


def _source_weights(source, cfg):
    """--init-from's weights, as a state dict in our format."""
    if os.path.isfile(source):
        return model_parts(_checkpoint(source, "--init-from"))[1]
    theirs, found = _hugging_face("AutoModelForCausalLM", source, dtype=torch.float32, use_safetensors=True,
                                  output_loading_info=True)
    for what in ("missing", "unexpected"):  # masked_bias: a constant that transformers saved before version 4.27
        if names := sorted(name for name in found[f"{what}_keys"] if not name.endswith(".attn.masked_bias")):
            raise UserError(f"--init-from {source}: {len(names)} tensors are {what}, such as {names[0]}; the weights "
                            f"are not complete, or of another model than config.json says")
    return from_hugging_face(cfg, theirs.state_dict())


def _source_weights_and_moments(source, identity):
    """The weights and the optimizer state of --init-from's checkpoint and, if `identity` has its data in its order, the
    number of the sample that its run would have read next; else 0."""
    saved = _checkpoint(source, "--init-from", mapped=False)  # a run on a CPU keeps using the optimizer's tensors
    _, weights = model_parts(saved)
    moments, state, was = saved["optimizer"], saved["state"], saved["identity"]
    for group in moments["param_groups"]:
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False):
            if name == "pos_emb.weight":  # only the positions that model_parts has kept, cloned to save no others
                kept = moments["state"].get(index, {})
                kept.update({key: value[:len(weights[name])].clone() for key, value in kept.items() if value.ndim})
    if any(was.get(name) != identity[name] for name in resume.ORDER):
        log.info("the data, or its order, is not that of %s: it is read from its first sample", source)
        return weights, moments, 0
    first_sample = state.get("first_sample", 0) + state["step"] * was["sequences in a step"]
    log.info("the data is that of %s: it is read on from sample %d, which its run would have read next", source,
             first_sample)
    return weights, moments, first_sample


def _hugging_face(auto, source, **options):
    """What transformers' class `auto` loads from a folder or from a name on the Hub. Raises UserError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = _folder(source)
    try:
        return getattr(transformers, auto).from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                           **options)
    except Exception as error:  # many types: huggingface_hub's, safetensors', bare RuntimeError
        raise UserError(f"--init-from {source}: {first_line(error)}") from None


def _folder(source):
    """The folder with the configuration and the weights of `source`: itself, or its copy in the local cache, downloaded
    if incomplete. Raises UserError, within seconds if the Hub is not reachable."""
    from huggingface_hub import snapshot_download

    def whole(folder):
        weights = list(Path(folder).glob("[!.]*.safetensors"))
        return weights and all(map(Path.is_file, [Path(folder) / "config.json", *weights]))  # opening a pipe blocks

    def snapshot(**options):
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        try:
            return snapshot_download(source, allow_patterns=wanted, **options)
        except Exception:  # many types, of httpx and XET as well: a connection lost midway is not an OSError
            return source  # which is not a folder

    if source.endswith(".pt") and not os.path.isdir(source):
        raise UserError(f"--init-from {source}: no such file; give a checkpoint, or a Hugging Face folder or name")
    folder, problem = source, ""
    if not os.path.isdir(source):
        folder = snapshot(local_files_only=True)
        if not whole(folder):
            problem = hub_problem(f"api/models/{source}/revision/main", f"{source}/resolve/main/config.json")
            folder = folder if problem else snapshot()
    if not whole(folder):
        why = (f"no such folder, not whole in the local cache (HF_HOME), and {problem}" if problem else
               "no config.json with *.safetensors there")
        inside = sorted(file.parent for file in Path(folder).glob("checkpoint-*/config.json"))  # as the Trainer saves
        such_as = f", such as {inside[-1]}" if inside else ""
        raise UserError(f"--init-from {source}: {why}; give a folder that transformers' save_pretrained has written"
                        f"{such_as}, or a checkpoint")
    _require_own_files(folder, source)
    return folder


def _require_own_files(folder, source):
    """Raises UserError if an index names a file outside of the folder: transformers would open any path."""
    for index in Path(folder).glob("[!.]*.index.json"):
        try:
            files = read_json(index)["weight_map"].values()
            outside = next((file for file in files if Path(file).name != file), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--init-from {source}: {index.name} is damaged ({error})") from None
        if outside is not None:
            raise UserError(f"--init-from {source}: {index.name} names {outside}, which is not a file of this folder")


def load_model(path):
    """A checkpoint's model in evaluation mode, and the checkpoint itself. Raises UserError."""
    saved = _checkpoint(path, "--checkpoint-path")
    try:
        cfg, weights = model_parts(saved)
        # fp32 even if saved again in 16 bits; copied, because a network file system may not keep a file being replaced.
        model = GPT.of(cfg, {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()})
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"--checkpoint-path {path}: its weights do not fit its own configuration "
                        f"({' '.join(str(error).split())[:300]})") from None
    return model.eval(), saved


def tokenizer_folder(path):
    """The tokenizer beside a checkpoint, shared by all checkpoints of a run. Raises UserError if it is missing."""
    folder = beside_run(path, ".tokenizer")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--checkpoint-path {path}: its tokenizer, {folder}, is missing; copy it there")
    return folder


def load_run(path):
    """The model of a checkpoint or Hugging Face folder, in evaluation mode, its tokenizer, the id of the end-of-text
    token or None, and the checkpoint or what one of the folder would say. Raises UserError."""
    if os.path.isdir(path):
        folder = str(path)
        model, saved, tokenizer = _load_folder(folder)
    else:
        model, saved = load_model(path)
        folder = tokenizer_folder(path)
        tokenizer = open_tokenizer(folder)
    if id_count(tokenizer) > model.cfg.vocab_size:
        raise UserError(f"--checkpoint-path {path}: {folder} has {id_count(tokenizer)} tokens, the model "
                        f"{model.cfg.vocab_size}; copy the one that it was trained with")
    known = tokenizer_hash(tokenizer).hex()[:16]
    if saved["identity"].setdefault("the tokenizer", known) != known:  # a Hugging Face folder states none
        # Only a warning: another version of `tokenizers` may serialize the same one differently.
        print(f"warning: {folder} is not the tokenizer that {path} was trained with, or not as it was then",
              file=sys.stderr)
    return model, tokenizer, end_of_text(tokenizer, folder), saved


def _load_folder(folder):
    """A Hugging Face folder's model, what a checkpoint of it would say, and its tokenizer."""
    try:
        cfg = _source_config(folder)
        model = GPT.of(cfg, _source_weights(folder, cfg))
    except UserError as error:  # names training's flag
        raise UserError(str(error).replace("--init-from", "--checkpoint-path")) from None
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        raise UserError(f"--checkpoint-path {folder}: no tokenizer in it that can be read; copy the one that it was "
                        f"trained with") from None
    saved = dict(config=dict(seq_len=min(1024, cfg.max_position_embeddings)), state=dict(step=None), identity={},
                 prefix=_before_texts(tokenizer))
    with contextlib.suppress(ValueError):  # none there, or damaged
        start = read_json(Path(folder, "generation_config.json")).get("bos_token_id")
        if type(start) is int and 0 <= start < id_count(tokenizer):
            saved["start"] = start
    return model.eval(), saved, tokenizer


def _before_texts(tokenizer):
    """The ids that the tokenizer puts before a text, such as Llama's <s>, which the weights then expect; often []."""
    with contextlib.suppress(Exception):  # tokenizers raises bare Exception if it has no token for this text
        found = tokenizer.encode("a")
        n_special = [*found.special_tokens_mask, 0].index(0)  # at its beginning
        return found.ids[:n_special]
    return []


def model_parts(saved):
    """The GPTConfig of a checkpoint's model, and its weights, without the positions beyond --seq-len, which were not
    trained on (except in weights of --init-from)."""
    cfg = part_of(GPTConfig, saved["config"] | {"vocab_size": saved["identity"]["--vocab-size"]})
    weights = saved["model"]
    if saved["config"].get("init_from"):
        return cfg, weights
    trained = min(saved["config"]["seq_len"], cfg.max_position_embeddings)
    if not cfg.parts.rope_theta:
        weights = weights | {"pos_emb.weight": weights["pos_emb.weight"][:trained]}
    return dataclasses.replace(cfg, max_position_embeddings=trained), weights


def _checkpoint(path, named_by, mapped=True):
    """The verified checkpoint of a run. `named_by`: the flag that names it. Raises UserError."""
    try:
        saved = load(path, mapped)
    except DamagedCheckpoint as error:
        others = sorted(str(file) for file in Path(path).parent.glob("[!.]*.pt") if file != Path(path))
        advice = f"beside it: {', '.join(others[:5])}" if others else "python train.py makes one"
        if os.path.isfile(path) and (Path(path).parent / "config.json").is_file():
            advice = f"give its folder, {Path(path).parent}"
        elif resume.is_of_another_program(path):
            advice = "docs/coming-from.md converts nanoGPT's, and says how to bring others"
        raise UserError(f"{named_by}: {error}; {advice}") from None
    if not resume.is_of_a_run(saved):
        raise UserError(f"{named_by} {path}: not a checkpoint of this version of mini-llm; use the one that wrote it")
    return saved
