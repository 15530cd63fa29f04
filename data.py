"""Text → documents → tokens → token shards → batches.

Text is tokenized once into two files, `train.bin` and `val.bin`, in a cache folder named by a hash of everything that
determines their content. Training reads windows of them; which windows a step reads is a pure function of the step.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import toy
from config import UserError, arg, write_whole
from shards import FORMAT, Shard, ShardWriter, read_meta, read_windows, spread_windows
from text import (
    Piece,
    builtin_sources,
    find_sources,
    pieces,
    require_hub,
    require_own_tokenizer,
    source_names,
    take,
)
from tokenizer import (
    encode,
    encode_pieces,
    end_of_text,
    gives_back,
    identity,
    known_characters,
    load_tokenizer,
    open_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

CODE_VERSION = 3  # bump it when the same text would give different tokens: old caches are then not reused
BATCH = 1 << 21  # characters, or ids of token files, per parallel batch: bounds the memory use of tokenization
BPE_SAMPLE = 1 << 25  # maximum number of characters that a bpe tokenizer is trained on
PREPARE_PATIENCE = 900  # seconds without progress after which a process stops waiting for another to tokenize

log = logging.getLogger("mini_llm")


@dataclass
class DataConfig:
    """Data"""

    train_data: list[str] = arg([], "text to train on: .txt, .jsonl (also .gz, .zst, .bz2) or .parquet files, globs, "
                                    "folders, a Hugging Face dataset, .bin token files of nanoGPT or llm.c, or a "
                                    "folder of token shards; nothing: Python's own standard library", metavar="PATH")
    val_data: list[str] = arg([], "text to validate on; several also get a loss each; nothing: a share of the "
                                  "training text", metavar="PATH")
    text_column: str = arg("text", "column of JSONL, Parquet and Hugging Face data that has the text; where there is "
                                   "no such column, the only one with strings", metavar="NAME")
    val_ratio: float = arg(0.1, "share of the training text kept for validation where there is no --val-data",
                           gt=0, lt=1)
    tokenizer_name: str = arg("bpe", "bpe (trained on the text), byte, char, or a Hugging Face tokenizer's name or "
                                     "folder, such as gpt2", metavar="NAME")
    seq_len: int = arg(256, "tokens in a training sequence", ge=1)
    use_toy_data: bool = arg(False, "train on a Markov chain whose entropy is known, and so the best possible loss")
    max_tokens: int = arg(0, "train on the first N tokens only; 0: all", ge=0)
    data_seed: int = arg(1337, "seed of the order of the samples and of the choice of validation documents", ge=0)
    cache_dir: str = arg("data/cache", "where token shards are kept", metavar="DIR")

    def validate(self):
        if self.use_toy_data and (self.train_data or self.val_data):
            raise UserError("--use-toy-data makes its own text: leave out --train-data and --val-data")
        if self.use_toy_data and self.tokenizer_name not in ("bpe", "char"):
            raise UserError(f"--tokenizer-name {self.tokenizer_name}: --use-toy-data is tokenized by characters; leave "
                            f"it out, or say char")

    @property
    def is_shards(self):
        """Whether --train-data is already a folder of token shards."""
        return len(self.train_data) == 1 and os.path.exists(os.path.join(self.train_data[0], "train.bin"))


@dataclass
class BatchConfig:
    """Batch"""

    batch_size: int = arg(8, "sequences in one micro-batch of one rank", ge=1)
    grad_accum_steps: int = arg(1, "micro-batches in one optimizer step", ge=1)
    global_batch_tokens: int = arg(0, "tokens in one step of all ranks, from which --grad-accum-steps follows", ge=0)
    dry_run: bool = arg(False, "print the model's size and what a step costs, take one step, write nothing")

    def validate(self):
        if self.global_batch_tokens and self.grad_accum_steps > 1:
            raise UserError("--global-batch-tokens decides --grad-accum-steps: give one of them")

    def accum_steps(self, world_size, seq_len):
        """Micro-batches per rank in one optimizer step. Raises UserError if the global batch does not divide evenly."""
        micro = self.batch_size * world_size * seq_len
        if self.global_batch_tokens % micro:
            nearest = max(1, round(self.global_batch_tokens / micro)) * micro
            raise UserError(f"--global-batch-tokens {self.global_batch_tokens} is not a multiple of --batch-size "
                            f"{self.batch_size} x {world_size} ranks x --seq-len {seq_len} = {micro}; try {nearest}")
        accum = self.global_batch_tokens // micro or self.grad_accum_steps
        if (sequences := self.batch_size * world_size * accum) > 1 << 27:
            raise UserError(f"--batch-size {self.batch_size}: {sequences:,} sequences in a step fill the memory with "
                            f"their numbers alone; lower it")
        return accum


def prepare(cfg, vocab_size=0, writes=True, scratch=None):
    """The folder of token shards that `cfg` describes, created if it does not exist. Safe against concurrent processes
    and against being killed: one process writes, under a lock that is released when it dies, into a draft folder that
    is renamed only when complete. Without `writes`, waits for another process to write it. With `scratch`, a folder
    provided by the caller, shards that are not in the cache are created there.

    Raises UserError for unusable text, and then leaves nothing behind.
    """
    if cfg.is_shards:
        theirs = read_meta(Path(cfg.train_data[0]))["tokenizer"]
        if cfg.val_data or cfg.max_tokens or cfg.tokenizer_name not in ("bpe", theirs):
            raise UserError(f"--train-data {cfg.train_data[0]}: token shards are trained on as they are; leave out "
                            f"--val-data, --max-tokens and --tokenizer-name")
        return Path(cfg.train_data[0])
    if cfg.use_toy_data:
        sources, val_sources = [], []
    else:
        sources = find_sources(cfg.train_data, column=cfg.text_column) if cfg.train_data else builtin_sources()
        val_sources = find_sources(cfg.val_data, "--val-data", cfg.text_column)
        if both := sorted({source.real_path for source in sources} & {source.real_path for source in val_sources}):
            log.warning("%s (%d in all) is in --train-data and in --val-data, and so validates text that is trained on",
                        both[0], len(both))
    require_own_tokenizer(sources, val_sources, cfg.tokenizer_name)
    tokenizer = load_tokenizer(cfg.tokenizer_name)
    key = hashlib.blake2b(digest_size=12)
    settings = [CODE_VERSION, FORMAT, cfg.use_toy_data, cfg.max_tokens, cfg.text_column,
                *([] if val_sources else [cfg.val_ratio, cfg.data_seed]),
                cfg.tokenizer_name if tokenizer is None else tokenizer.to_str(),
                vocab_size if cfg.tokenizer_name == "bpe" else 0,
                tokenizer and end_of_text(tokenizer, cfg.tokenizer_name),
                *source_names(cfg.val_data), *(source.argument for source in val_sources if source.argument)]
    key.update(json.dumps(settings).encode())
    n_bytes = sum(source.size for source in [*sources, *val_sources])
    for source in [*sources, None, *val_sources]:
        key.update(source.digest(whole=n_bytes <= 1 << 30) if source else b"|")
    folder = Path(cfg.cache_dir) / key.hexdigest()
    if scratch and not os.path.exists(folder):  # unlike Path.exists, not an error where access is denied
        folder, writes = Path(scratch) / key.hexdigest(), True
    if writes and not os.path.exists(folder):
        require_hub(sources)
        require_hub(val_sources, "--val-data")
    if not writes:
        _wait(lambda: not os.path.exists(folder), folder.with_name(folder.name + ".draft"))
    while not os.path.exists(folder):
        with _locked_draft(folder) as draft:
            if draft is not None:
                _write_shards(draft, cfg, vocab_size, tokenizer, sources, val_sources)
                os.replace(draft, folder)
                (folder / ".lock").unlink()  # after the rename: else another process could lock and empty the draft
    return folder


@contextlib.contextmanager
def _locked_draft(folder):
    """Yields an empty folder that this process alone writes, to be renamed to `folder` when complete; None if another
    process has just created `folder`. The lock is in the draft itself, so a killed writer leaves an unlocked draft."""
    draft = folder.with_name(folder.name + ".draft")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        if draft.is_symlink():  # its target is not ours to empty
            raise NotADirectoryError(errno.ENOTDIR, f"{draft.name} is a link")
        # Opened for writing, because network file systems grant no exclusive lock otherwise.
        fd = os.open(draft / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        _wait(lambda: not _lock(fd), draft)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and folder.parent.exists():  # the draft has just been renamed
            yield None
            return
        unlocked = error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
        advice = "on a file system with locks, such as a local disk" if unlocked else "that can be written"
        raise UserError(f"--cache-dir {folder.parent}: {error.strerror}; give a folder {advice}") from None
    try:
        if not (draft / ".lock").exists() or not os.path.samestat(os.fstat(fd), os.stat(draft / ".lock")):
            yield None
            return
        if folder.exists():
            shutil.rmtree(draft)
            yield None
            return
        for leftover in draft.iterdir():
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        try:
            yield draft
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
            if isinstance(error, OSError):  # a full disk, or a text file that has vanished
                raise UserError(f"{error.filename or f'--cache-dir {folder.parent}'}: {error.strerror or error}; make "
                                f"room, or give another --cache-dir") from None
            raise
    finally:
        os.close(fd)


def _lock(fd):
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(blocked, draft):
    """Waits while `blocked()` is true. Raises UserError if nothing in `draft` changes for PREPARE_PATIENCE seconds."""
    begun = changed = time.monotonic()  # not compared with the files' times, which are of another clock
    told, before = False, None
    while blocked():
        now = time.monotonic()
        if not told and now - begun > 1:
            log.info("waiting for the process that prepares this data in %s", draft)
            told = True
        with contextlib.suppress(OSError):  # it may just have been renamed
            newest = max(file.stat().st_mtime for file in [draft, *draft.iterdir()])
            changed, before = (now if newest != before else changed), newest
        if now - changed > PREPARE_PATIENCE:
            raise UserError(f"{draft}: the process that prepares this data has written nothing for "
                            f"{PREPARE_PATIENCE} s; kill it, remove the folder and start again")
        time.sleep(0.1)


def _write_shards(draft, cfg, vocab_size, tokenizer, sources, val_sources):
    def stream():
        if cfg.use_toy_data:
            return iter([Piece(text, split, False) for split, text in toy.text(cfg.data_seed)])
        own = pieces(sources, "train", 0.0 if val_sources else cfg.val_ratio, cfg.data_seed)
        return chain(pieces(val_sources, "val"), own)

    entropy = None
    if cfg.use_toy_data:
        tokenizer, entropy = train_tokenizer("char", [toy.ALPHABET], 0), toy.entropy_rate(cfg.data_seed)
    elif tokenizer is None:
        tokenizer = _trained_tokenizer(cfg.tokenizer_name, stream(), vocab_size)
    eos = save_tokenizer(tokenizer, draft / "tokenizer", cfg.tokenizer_name)
    if eos is None:
        log.warning("the tokenizer %s has no end-of-text token: documents are concatenated without a separator",
                    cfg.tokenizer_name)
    size, tokenizer_hash = tokenizer.get_vocab_size(with_added_tokens=True), identity(tokenizer)
    limits = dict(train=cfg.max_tokens, val=0)
    if cfg.max_tokens and not val_sources:
        limits["val"] = max(1, int(cfg.max_tokens * cfg.val_ratio))
    writers = {split: ShardWriter(draft / f"{split}.bin", size, eos, tokenizer_hash, limit)
               for split, limit in limits.items()}
    n_bytes, n_tokens, left_out, whole, started = dict(train=0, val=0), Counter(), 0, True, time.perf_counter()
    total = sum(source.size for source in [*sources, *val_sources])
    with tqdm(total=total or None, unit="B", unit_scale=True, desc="tokenizing", leave=False, disable=None) as bar:
        source = stream()  # --val-data comes first and is read in full
        while not (writers["train"].full and (val_sources or writers["val"].full)) and (batch := take(source, BATCH)):
            if not n_tokens and known_characters(tokenizer) is None:  # a few pieces of the first batch
                texts = [piece.content for piece in batch if isinstance(piece.content, str)]
                whole = all(gives_back(tokenizer, text) for text in texts[::max(1, len(texts) // 8)])
            wanted = [piece for piece in batch if not writers[piece.split].full]
            for piece, ids, encoded, lost in encode_pieces(tokenizer, wanted, eos):
                written = writers[piece.split].write(ids)
                n_bytes[piece.split] += round(encoded * written / max(1, len(ids)))
                n_tokens[piece.split, piece.argument] += written
                left_out += lost
            bar.update(sum(getattr(piece.content, "nbytes", len(piece.content)) for piece in batch))
    for writer in writers.values():
        writer.close()
    if left_out:
        log.warning("%s characters are left out: the tokenizer %s has no token for them", f"{left_out:,}",
                    cfg.tokenizer_name)
    if not whole:
        log.warning("the tokenizer %s changes the text: its tokens do not decode to what they were made from",
                    cfg.tokenizer_name)
    parts = [n_tokens["val", argument] for argument in range(len(cfg.val_data))]
    _require_a_sequence(cfg, writers["train"].count, writers["val"].count, parts)
    seconds = time.perf_counter() - started
    tokens = sum(writer.count for writer in writers.values())
    log.info("tokenized %.1f MB into %s tokens in %.1f s (%.1f MB/s)", sum(n_bytes.values()) / 1e6, f"{tokens:,}",
             seconds, sum(n_bytes.values()) / 1e6 / max(seconds, 1e-9))
    meta = dict(tokens={split: writer.count for split, writer in writers.items()}, bytes=n_bytes, vocab_size=size,
                eos=eos, tokenizer=cfg.tokenizer_name if not cfg.use_toy_data else "char",
                tokenizer_hash=tokenizer_hash.hex(), entropy_rate=entropy,
                val_sources={name: [sum(parts[:i]), parts[i]] for i, name in enumerate(source_names(cfg.val_data))},
                fingerprint={split: writer.digest.hexdigest() for split, writer in writers.items()})
    with open(draft / "meta.json", "w") as file:
        file.write(json.dumps(meta, indent=1))
        file.flush()
        os.fsync(file.fileno())


def _require_a_sequence(cfg, train, val, parts):
    """Raises UserError if there are too few tokens. `parts`: how many of those of `val` each --val-data has."""
    named = [(f"--val-data {path}", "val", count) for path, count in zip(cfg.val_data, parts, strict=True)]
    for where, split, count in [("--train-data", "train", train), *(named or [("--train-data", "val", val)])]:
        if count < cfg.seq_len + 1:
            raise UserError(f"{where}: {count:,} {split} tokens are fewer than one sequence of --seq-len "
                            f"{cfg.seq_len} + 1; give more text, a smaller --seq-len"
                            f"{', a larger --val-ratio' if split == 'val' and not named else ''}, or "
                            f"{'a larger --max-tokens' if cfg.max_tokens else 'another --val-data'}")


def _trained_tokenizer(name, stream, vocab_size):
    """bpe: trained on up to BPE_SAMPLE characters of the training text; char: on all text, including validation."""
    began, texts = time.perf_counter(), (piece for piece in stream if piece.split == "train" or name == "char")
    texts = take(texts, BPE_SAMPLE) if name == "bpe" else texts
    tokenizer = train_tokenizer(name, (piece.content for piece in texts), vocab_size or 4096)
    log.info("trained a %s tokenizer of %s tokens in %.1f s", name, f"{tokenizer.get_vocab_size():,}",
             time.perf_counter() - began)
    return tokenizer


class Corpus:
    """Token shards with disjoint training and validation documents, and the order in which training reads them."""

    def __init__(self, cfg, vocab_size=0, writes=True, scratch=False):
        """`scratch`: leave nothing behind. Shards that are not in the cache are created in a temporary folder, which is
        deleted once they are open."""
        if scratch:
            with tempfile.TemporaryDirectory(prefix="mini-llm-", ignore_cleanup_errors=True) as folder:
                self._open(cfg, prepare(cfg, vocab_size, scratch=folder), checks=True)
        else:
            self._open(cfg, prepare(cfg, vocab_size, writes), checks=writes)  # once per node: a failure ends all ranks

    def _open(self, cfg, folder, checks):
        self.seq_len, self.seed, self.folder = cfg.seq_len, cfg.data_seed, folder
        self.meta = read_meta(self.folder)
        if not (cfg.is_shards or cfg.use_toy_data):  # the cached shards may have been made with one of another name
            self.meta["tokenizer"] = cfg.tokenizer_name
        self.facts = {f"corpus_{name}": self.meta[name] for name in ("tokens", "tokenizer")} | dict(
            corpus=str(folder), tokenizer_hash=self.meta["tokenizer_hash"][:16])
        self.train, self.val = (Shard(self.folder / f"{split}.bin") for split in ("train", "val"))
        if checks:
            self.train.verify(self.meta, "train")
            self.val.verify(self.meta, "val")
        self.vocab_size, self.eos, self.fingerprint = self.train.vocab_size, self.train.eos, self.meta["fingerprint"]
        self.start = self._start()
        self.val_sources = {name: Shard(self.val.path, *span) for name, span in self.meta["val_sources"].items()}
        self.n_windows = self.train.windows(self.seq_len)
        self.n_val_windows = sum(shard.windows(self.seq_len) for shard in self.val_sources.values())
        for name, shard in [("", self.train), *self.val_sources.items()]:
            if not shard.windows(self.seq_len):
                raise UserError(f"--seq-len {self.seq_len}: {shard.path}{name and f' ({name})'} holds {shard.count:,} "
                                f"tokens, less than one sequence; give more text or a smaller --seq-len")

    def _start(self):
        """The token that unconditional generation starts from: end-of-text if it precedes other text within the first
        million training tokens; otherwise, as with a single document, the newline token, if the tokenizer has one."""
        if self.eos is None or self.eos not in self.train.read(0, min(self.train.count - 1, 1 << 20)):
            with contextlib.suppress(UserError, ImportError, IndexError):  # shards may come without their tokenizer
                return encode(open_tokenizer(self.folder / "tokenizer"), ["\n"])[0][-1]
        return self.eos or 0

    def export_tokenizer(self, folder):
        """Copy the tokenizer to `folder`, to use the checkpoint without the data; another corpus's there is removed."""
        files = [file for file in (self.folder / "tokenizer").glob("*") if file.is_file()]  # a device may be endless
        try:
            for file in files:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / file.name, file.read_bytes())
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}; the tokenizer cannot be copied") from None
        with contextlib.suppress(UserError):  # shards may come without their tokenizer, and be trained on without any
            if not files and identity(open_tokenizer(folder)).hex() != self.meta["tokenizer_hash"]:
                shutil.rmtree(folder)

    @property
    def val_bytes_per_token(self):
        return self.meta["bytes"]["val"] / self.meta["tokens"]["val"]

    def samples(self, step, n):
        """Indices of the n windows of one optimizer step, (n,): without replacement within an epoch, in a new order
        each epoch, independent of the number of ranks."""
        position = step * n + np.arange(n)
        epoch, index = position // self.n_windows, position % self.n_windows
        order = np.empty(n, dtype=np.int64)
        for one in np.unique(epoch):
            order[epoch == one] = permute(index[epoch == one], self.n_windows, self.seed * 1_000_003 + int(one))
        return order

    def batch(self, step, micro, accum, batch_size, rank=0, size=1):
        """Inputs and targets of one micro-batch of one rank, (B, T) int64 each.

        The step's samples are assigned in the order micro-batch, rank, row, so that two micro-batches on one rank are
        the same step as one on each of two ranks.
        """
        order = self.samples(step, accum * size * batch_size)
        start = (micro * size + rank) * batch_size
        return read_windows(self.train, order[start:start + batch_size] * self.seq_len, self.seq_len)

    def val_batches(self, max_tokens, batch_size, rank=0, size=1):
        """Yields this rank's share of the validation windows as (source, inputs, targets, number of real rows), with
        (B, T) int64 inputs and targets. `max_tokens` > 0 takes windows spread evenly over the set, at least one per
        source. A source's last batch is padded by repeating a row, to keep its shape."""
        for name, indices in spread_windows(self.val_sources, self.seq_len, max_tokens).items():
            chosen = iter(indices[rank::size])
            rank = (rank - len(indices)) % size  # the round robin continues across sources
            while rows := list(islice(chosen, batch_size)):
                firsts = [row * self.seq_len for row in rows + rows[-1:] * (batch_size - len(rows))]
                yield name, *read_windows(self.val_sources[name], firsts, self.seq_len), len(rows)


def permute(index, n, key):
    """Apply a pseudorandom permutation of range(n) to the array `index` in O(1) memory: a Feistel network over the next
    power of four (Luby & Rackoff 1988), with cycle walking until the value is below n (Black & Rogaway 2002)."""
    half = np.uint64((max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    out = np.array(index, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key * 4 + turn) & mask)
        out[outside] = left << half | right
        outside = out >= n
    return out.astype(np.int64)


def _mix(x, key):
    """splitmix64's finalizer (Steele et al. 2014) on a uint64 array x, keyed by `key`."""
    x = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
