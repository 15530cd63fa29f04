"""Token shards → batches. Which windows a step reads is a pure function of the step.

Text becomes token shards in `token_cache.py`, once.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np

from mini_llm.config import arg
from mini_llm.errors import UserError
from mini_llm.files import sync_path, tokenizer_files, write_whole
from mini_llm.shards import Shard, part_shards, read_meta, read_windows, spread_windows
from mini_llm.token_cache import prepare, require_sequences
from mini_llm.tokenizer import LEARNED, encode, open_tokenizer, tokenizer_hash

CYCLE = 1000  # samples after which the turns of several sources repeat
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio

log = logging.getLogger("mini_llm")


@dataclass
class DataConfig:
    """Data"""

    train_data: list[str] = arg([], "text to train on: .txt, .jsonl (also .gz, .zst, .bz2) or .parquet files, globs, "
                                    "folders, a Hugging Face dataset, .bin token files of nanoGPT or llm.c, or a "
                                    "folder of token shards; unset: Python's own standard library", metavar="PATH")
    val_data: list[str] = arg([], "text to validate on; with several paths, each also gets its own loss; unset: part "
                                  "of the training text, see --val-ratio", metavar="PATH")
    train_weights: list[float] = arg([], "share of samples drawn from each path of --train-data, such as 0.7 0.3; "
                                         "unset: in proportion to size", gt=0, metavar="X")
    text_column: str = arg("text", "column of JSONL, Parquet and Hugging Face data that has the text; where there is "
                                   "no such column, the only one with strings", metavar="NAME")
    val_ratio: float = arg(0.1, "fraction of the training text held out for validation if there is no --val-data",
                           gt=0, lt=1)
    tokenizer_name: str = arg("bpe", "bpe (trained on the text), byte, char, or a Hugging Face tokenizer's name or "
                                     "folder, such as gpt2; unset with --init-from: that of the weights",
                              metavar="NAME", empty=False)
    seq_len: int = arg(256, "tokens in a training sequence; unset with --init-from: as many as those weights were "
                            "trained with, 1024 at most from a Hugging Face folder", ge=1)
    use_toy_data: bool = arg(False, "train on text from a Markov chain, for which the best possible loss is known")
    max_tokens: int = arg(0, "use only the first N training tokens and, without --val-data, N x --val-ratio "
                             "validation tokens; 0: all; the length of training is --num-tokens", ge=0)
    data_seed: int = arg(1337, "seed of the order of the samples, and of the text of --use-toy-data", ge=0)
    cache_dir: str = arg("data/cache", "where token shards are kept", metavar="DIR", empty=False)

    def validate(self):
        if self.use_toy_data and (self.train_data or self.val_data):
            raise UserError("--use-toy-data makes its own text: leave out --train-data and --val-data")
        if self.use_toy_data and self.tokenizer_name not in LEARNED:
            raise UserError(f"--tokenizer-name {self.tokenizer_name}: --use-toy-data is tokenized by characters; leave "
                            f"it out, or say char")
        if self.train_weights and not self.is_shards and len(self.train_weights) != len(self.train_data):
            raise UserError(f"--train-weights {' '.join(map(str, self.train_weights))}: give one for each path of "
                            f"--train-data, of which there are {len(self.train_data)}")
        if self.train_weights:
            take_turns(self.train_weights)  # refuses what is too small

    @property
    def is_shards(self):
        """Whether --train-data is already a folder of token shards."""
        return len(self.train_data) == 1 and os.path.exists(os.path.join(self.train_data[0], "train.bin"))


@dataclass
class BatchConfig:
    """Batch"""

    ALTERNATIVES = "grad_accum_steps", "global_batch_tokens"
    batch_size: int = arg(8, "sequences in one micro-batch of one rank", ge=1, le=10**7)
    grad_accum_steps: int | None = arg(None, "micro-batches per optimizer step; unset: 1, or as many as "
                                             "--global-batch-tokens needs", ge=1, le=10**6)
    global_batch_tokens: int = arg(0, "tokens in one step of all ranks, from which --grad-accum-steps follows", ge=0)
    dry_run: bool = arg(False, "print the model's size and what a step costs, take one step, write nothing")

    def accum_steps(self, world_size, seq_len):
        """Micro-batches per rank in one optimizer step. Raises UserError if the global batch does not divide evenly."""
        micro = self.batch_size * world_size * seq_len
        if self.global_batch_tokens % micro:
            nearest = max(1, round(self.global_batch_tokens / micro)) * micro
            raise UserError(f"--global-batch-tokens {self.global_batch_tokens} is not a multiple of --batch-size "
                            f"{self.batch_size} x {world_size} ranks x --seq-len {seq_len} = {micro}; try {nearest}")
        accum = self.global_batch_tokens // micro or self.grad_accum_steps or 1
        if accum > 10**6:
            raise UserError(f"--global-batch-tokens {self.global_batch_tokens}: {accum:,} micro-batches in a step; "
                            f"lower it, or raise --batch-size")
        return accum


class Corpus:
    """Token shards with disjoint training and validation documents, and the order in which training reads them."""

    def __init__(self, cfg, vocab_size=0, writes=True, scratch=False, earlier=None, check=None):
        """`scratch`: shards that are not in the cache are made in a temporary folder, deleted once they are open.
        `earlier`: the folder of a resumed run's shards. `check(folder of the tokenizer)` may raise UserError."""
        with (tempfile.TemporaryDirectory(prefix="mini-llm-", ignore_cleanup_errors=True) if scratch else
              contextlib.nullcontext()) as folder:
            # Checked once per node: a failure ends all ranks.
            self._open(cfg, prepare(cfg, vocab_size, writes, folder, earlier), checks=writes)
            if check and writes:
                check(self.folder / "tokenizer")

    def _open(self, cfg, folder, checks):
        self.seq_len, self.seed, self.folder = cfg.seq_len, cfg.data_seed, folder
        self.meta = read_meta(self.folder)
        if not (cfg.is_shards or cfg.use_toy_data):  # the cached shards may have been made with one of another name
            self.meta["tokenizer"] = cfg.tokenizer_name
        self.facts = dict(corpus_tokens=self.meta["tokens"], corpus_tokenizer=self.meta["tokenizer"],
                          corpus=str(folder), tokenizer_hash=self.meta["tokenizer_hash"][:16])
        self.train, self.val = (Shard(self.folder / f"{split}.bin") for split in ("train", "val"))
        if checks:
            self._check(cfg)
        self.vocab_size, self.eos, self.fingerprint = self.train.vocab_size, self.train.eos, self.meta["fingerprint"]
        self.start = self._start()
        self.first_sample = 0  # where in the order of the samples the run begins (State.first_sample)
        self.next_batch, self.next_positions = None, None  # what `batch` prefetches: (first sample, size) and windows
        require_sequences(cfg, self.meta)
        self.val_sources = part_shards(self.val.path, self.meta["val_sources"], self.seq_len)
        spans = self.meta["train_sources"]
        if cfg.train_weights and len(cfg.train_weights) != len(spans):
            raise UserError(f"--train-weights {' '.join(map(str, cfg.train_weights))}: {self.folder} has {len(spans)} "
                            f"sources; give one for each, or prepare them again with these")
        self.turns = take_turns(cfg.train_weights or [1.0])
        # Unweighted: one stream, whose windows may span two sources (there may be thousands of them).
        self.train_sources = {"": self.train}
        self.shares = []  # of the samples, by source
        if len(cfg.train_weights) > 1:
            self.train_sources = {name: self.train.part(*span) for name, span in spans.items()}
            self.shares = (np.bincount(self.turns) / len(self.turns)).tolist()
        self.n_windows = sum(shard.windows(self.seq_len) for shard in self.train_sources.values())
        self.n_val_windows = sum(shard.windows(self.seq_len) for shard in self.val_sources.values())

    def _check(self, cfg):
        """Raises UserError for damaged shards; warns of a split that is far from --val-ratio."""
        self.train.verify(self.meta, "train")
        self.val.verify(self.meta, "val")
        share = self.val.count / (self.val.count + self.train.count)
        split_here = not (cfg.val_data or cfg.is_shards or cfg.use_toy_data)
        if split_here and not cfg.val_ratio / 2 <= share <= cfg.val_ratio * 2:
            log.warning("validation has %.3g %% of the tokens, for a --val-ratio of %g: documents are few, or of "
                        "unequal length; name text to validate on: --val-data", share * 100, cfg.val_ratio)

    def _start(self):
        """The token that unconditional generation starts from: end-of-text if it precedes other text within the first
        million training tokens; otherwise, as with a single document, the newline token, if the tokenizer has one."""
        if self.eos is None or self.eos not in self.train.read(0, min(self.train.count - 1, 1 << 20)):
            with contextlib.suppress(UserError, ImportError, IndexError):  # shards may come without their tokenizer
                return encode(open_tokenizer(self.folder / "tokenizer"), ["\n"])[0][-1]
        return self.eos or 0

    def export_tokenizer(self, folder):
        """Copy the tokenizer to `folder`, to use the checkpoint without the data; another corpus's there is removed."""
        files = tokenizer_files(self.folder / "tokenizer")
        try:
            for file in files:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / file.name, file.read_bytes())
            if files:
                sync_path(folder)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}; the tokenizer cannot be copied: make room "
                            f"there, or give another --checkpoint-path") from None
        with contextlib.suppress(UserError):  # shards may come without their tokenizer, and be trained on without any
            if not files and tokenizer_hash(open_tokenizer(folder)).hex() != self.meta["tokenizer_hash"]:
                shutil.rmtree(folder)

    @property
    def val_bytes_per_token(self):
        return self.meta["bytes"]["val"] / self.meta["tokens"]["val"]

    def samples(self, first, n):
        """Token positions, (n,), of the windows of the run's samples from `first` (from 0) on. Sources take turns; each
        epoch of one reads it without replacement, in another order and, after the first, with other cuts."""
        in_order = self.first_sample + first + np.arange(n)
        cycle, slot = np.divmod(in_order, len(self.turns))  # the sources' turns repeat each cycle
        positions = np.empty(n, dtype=np.int64)
        shards = list(self.train_sources.values())
        for source in np.unique(self.turns[slot]).tolist():  # of a thousand sources, few have a turn in a batch
            is_turn = self.turns == source  # (slots of a cycle,)
            drawn = np.flatnonzero(is_turn[slot])  # which of the n samples are this source's
            before = np.cumsum(is_turn) - is_turn  # turns that this source has in a cycle before each slot
            numbers = cycle[drawn] * is_turn.sum() + before[slot[drawn]]  # among the source's own samples, from 0
            positions[drawn] = shards[source].start + self._window_starts(shards[source], source, numbers)
        return positions

    def _window_starts(self, shard, source, numbers):
        """Where in the shard of a source the windows of its samples `numbers`, (n,), begin."""
        n_windows, starts = shard.windows(self.seq_len), np.empty_like(numbers)
        epochs, indices = np.divmod(numbers, n_windows)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            key = self.seed * 1_000_003 + int(epoch) + (source << 40)
            # Tokens at the start of a window are predicted from little: not the same ones again (LOG.md). Fibonacci
            # hashing (Knuth) of the key spreads the shifts of a few epochs evenly.
            shift = key * GOLDEN % 2**64 * self.seq_len >> 64 if epoch else 0
            starts[of_epoch] = permute(indices[of_epoch], n_windows, key) * self.seq_len + shift
        return np.minimum(starts, shard.count - 1 - self.seq_len)

    def batch(self, step, batch_size, micro=0, accum=1, rank=0, size=1):
        """Inputs and targets of one micro-batch of one rank, (B, T) int64 each. The step's samples are assigned in the
        order micro-batch, rank, row: two micro-batches on one rank are the same step as one on each of two ranks."""
        first = ((step * accum + micro) * size + rank) * batch_size  # number of the micro-batch's first sample
        known = self.next_batch == (first, batch_size)
        positions = self.next_positions if known else self.samples(first, batch_size)
        windows = read_windows(self.train, positions, self.seq_len)
        # While this one trains, the operating system reads this rank's next micro-batch from the disk.
        first += size * batch_size
        self.next_batch, self.next_positions = (first, batch_size), self.samples(first, batch_size)
        for position in self.next_positions:
            self.train.expect(int(position), self.seq_len + 1)
        return windows

    def val_batches(self, max_tokens, batch_size, rank=0, size=1):
        """Yields this rank's share of the validation windows: source, inputs and targets, (B, T) int64 each, and the
        number of real rows. `max_tokens` > 0 spreads the windows evenly over the set, at least one per source. Batches
        keep their shape, by repeating a row, and ranks yield equally many: a sharded forward pass needs all ranks."""
        first = rank  # of a source's windows, this rank's first
        for name, indices in spread_windows(self.val_sources, self.seq_len, max_tokens).items():
            chosen = indices[first::size]
            first = (first - len(indices)) % size  # the round robin continues across sources
            for start in range(0, -(-len(indices) // size), batch_size):
                rows = chosen[start:start + batch_size]
                padded = rows + [rows[-1] if rows else 0] * (batch_size - len(rows))
                positions = [row * self.seq_len for row in padded]
                yield name, *read_windows(self.val_sources[name], positions, self.seq_len), len(rows)


def take_turns(weights):
    """Which source each sample of a cycle is from: indices of `weights`, (CYCLE,), or (1,) if there is one source; each
    as often as its weight says, evenly spread. Raises UserError for a weight below a thousandth of the sum."""
    shares = np.array(weights) / max(weights)  # by the largest first: the sum may overflow
    shares /= shares.sum()
    if shares.min() < 1 / CYCLE:
        raise UserError(f"--train-weights {' '.join(map(str, weights))}: the least is below a thousandth of the sum")
    turns = np.empty(CYCLE if len(weights) > 1 else 1, dtype=np.int64)
    had = np.zeros(len(weights))  # turns of each source so far
    for place in range(len(turns)):
        turns[place] = np.argmax(shares * (place + 1) - had)  # the source that is furthest behind its share
        had[turns[place]] += 1
    return turns


def permute(index, n, key):
    """Apply a pseudorandom permutation of range(n) to the array `index` in O(1) memory: a Feistel network over the next
    power of four (Luby & Rackoff 1988), with cycle walking until the value is below n (Black & Rogaway 2002)."""
    half = np.uint64((max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    out = np.array(index, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix(right, key * 4 + round_) & mask)
        out[outside] = left << half | right
        outside = out >= n
    return out.astype(np.int64)


def _mix(x, key):
    """splitmix64's finalizer (Steele et al. 2014) on a uint64 array x, keyed by `key`."""
    x = x + np.uint64((key + 1) * GOLDEN % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
