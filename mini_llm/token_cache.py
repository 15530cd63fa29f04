"""Text → token shards, once: `train.bin` and `val.bin` in --cache-dir/HASH, a hash of all that determines them."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path

from mini_llm import text, toy
from mini_llm.errors import UserError
from mini_llm.files import make_folder, read_json, same_file, sync_path, write_whole
from mini_llm.holdout import takes_tails
from mini_llm.processes import try_lock
from mini_llm.progress import ProgressBar
from mini_llm.shards import FORMAT, ShardWriter, read_meta, require_own_tokenizer, require_val_data, require_whole
from mini_llm.tokenizer import (
    encode_pieces,
    end_of_text,
    gives_back,
    id_count,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

CODE_VERSION = 3  # bump it when the same text would give other tokens: old caches are then not used
BATCH = 1 << 21  # characters, or ids of token files, that are tokenized in parallel: bounds the memory that this takes
PROGRESS = "progress.json"  # in a draft: how far it has come
SAVE_SECONDS = 30  # between two writes of it: the most that a kill costs
BPE_SAMPLE = 1 << 25  # maximum number of characters that a bpe tokenizer is trained on
PREPARE_PATIENCE = 900  # seconds without progress after which a process stops waiting for another to tokenize

log = logging.getLogger("mini_llm")


def prepare(cfg, vocab_size=0, writes=True, scratch=None, earlier=None):
    """The folder of token shards that `cfg` describes, created if it does not exist. Safe against concurrent processes
    and kills: one process writes, under a lock that ends with it, into a draft folder that is renamed when complete; if
    it dies, the next one goes on from its last `Progress`. Without `writes`, waits for another process to write.
    `scratch`: a folder in which to create shards that are not in the cache. `earlier`: the folder that a resumed run
    had with these flags, kept if the text has changed. Raises UserError for unusable text, leaving nothing behind."""
    if cfg.is_shards:
        theirs = read_meta(Path(cfg.train_data[0]))["tokenizer"]
        if cfg.val_data or cfg.max_tokens or cfg.tokenizer_name not in ("bpe", theirs):
            raise UserError(f"--train-data {cfg.train_data[0]}: token shards are trained on as they are; leave out "
                            f"--val-data, --max-tokens and --tokenizer-name")
        return Path(cfg.train_data[0])
    try:
        sources, val_sources = _sources(cfg)
        require_own_tokenizer([*sources, *val_sources], cfg.tokenizer_name)  # before one of that name is looked for
        require_val_data(sources, val_sources)
        tokenizer = load_tokenizer(cfg.tokenizer_name)
        known = tokenizer_hash(tokenizer).hex() if tokenizer else ""
        require_own_tokenizer([*sources, *val_sources], cfg.tokenizer_name, known)
        folder = Path(cfg.cache_dir) / _key(cfg, vocab_size, tokenizer, sources, val_sources)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):  # a text file that vanishes meanwhile, or a disk that fails
            error = UserError(f"{error.filename or 'the text'}: {error.strerror}; put it back, or leave it out")
        if not earlier:
            raise error from None
        return _tokens_begun_with(earlier, error)
    if earlier and folder.name != Path(earlier).name:
        return _tokens_begun_with(earlier, "the text has changed, or what splits it or makes tokens of it")
    if scratch and not os.path.exists(folder):  # unlike Path.exists, no error if access is denied
        folder, writes = Path(scratch) / folder.name, True
    if not writes:
        _wait(lambda: not os.path.exists(folder), folder.with_name(folder.name + ".draft"))
    elif not os.path.exists(folder):  # before the draft of a killed writer is opened, which an error would remove
        text.require_hub(sources)
        text.require_hub(val_sources, "--val-data")
    while not os.path.exists(folder):
        with _locked_draft(folder, keeps=not scratch) as draft:
            if draft is not None:
                _write_shards(draft, cfg, vocab_size, tokenizer, sources, val_sources)
                os.replace(draft, folder)
                sync_path(folder.parent)
                (folder / PROGRESS).unlink(missing_ok=True)
                (folder / ".lock").unlink()  # after the rename: else another process could lock and empty the draft
    return folder


def _tokens_begun_with(earlier, change):
    """The folder of the tokens that a resumed run began with, after a `change`. Raises UserError if it is gone."""
    if not os.path.isdir(earlier):
        raise UserError(f"{change}, and the tokens that this run began with, {earlier}, are not on this machine; copy "
                        f"them there")
    log.warning("%s: this run goes on with the tokens that it began with, %s; for others, start a new run with "
                "--init-from", change, earlier)
    return Path(earlier)


def _sources(cfg):
    """The Sources to train on, and those of --val-data."""
    if cfg.use_toy_data:
        return [], []
    sources = text.find_sources(cfg.train_data, column=cfg.text_column) if cfg.train_data else text.builtin_sources()
    val_sources = text.find_sources(cfg.val_data, "--val-data", cfg.text_column)
    if both := sorted({source.real_path for source in sources} & {source.real_path for source in val_sources}):
        log.warning("%s (%d in all) is in --train-data and in --val-data, and so validates text that is trained on",
                    both[0], len(both))
    return sources, val_sources


def _key(cfg, vocab_size, tokenizer, sources, val_sources):
    """The name of the folder: a hash of everything that determines which tokens are in it."""
    settings = [CODE_VERSION, FORMAT, cfg.use_toy_data, cfg.max_tokens, cfg.text_column]
    if not val_sources:
        split = (cfg.data_seed if cfg.use_toy_data else "built in" if not cfg.train_data else
                 "tails of text" if takes_tails(sources, cfg.val_ratio) else "by the text")
        settings += [cfg.val_ratio, split]
    settings += [cfg.tokenizer_name if tokenizer is None else tokenizer.to_str(),
                 vocab_size if cfg.tokenizer_name == "bpe" else 0,
                 tokenizer and end_of_text(tokenizer, cfg.tokenizer_name),
                 *text.source_names(cfg.val_data), *(source.argument for source in val_sources if source.argument)]
    if cfg.train_weights:
        settings += [text.source_names(cfg.train_data), [source.argument for source in sources], "in both splits"]
    whole = sum(source.size for source in [*sources, *val_sources]) <= 1 << 30
    parts = [json.dumps(settings).encode(), *(source.digest(whole) for source in sources), b"|",
             *(source.digest(whole) for source in val_sources)]
    return hashlib.blake2b(b"".join(parts), digest_size=12).hexdigest()


@contextlib.contextmanager
def _locked_draft(folder, keeps=True):
    """Yields a folder that only this process writes to, to be renamed to `folder` when complete; None if another
    process has just completed it. It is empty, or holds the Progress and tokens of a killed writer. With `keeps`, it
    also survives a signal, a full disk and a lost connection. The lock, on a file in it, ends with the process."""
    draft = folder.with_name(folder.name + ".draft")
    if (fd := _lock(draft, folder)) is None:
        yield None
        return
    kept = {".lock", PROGRESS, "train.bin", "val.bin"} if (draft / PROGRESS).exists() else {".lock"}
    try:
        for leftover in draft.iterdir():
            if leftover.name not in kept:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        yield draft
    except BaseException as error:
        passing = isinstance(error, (KeyboardInterrupt, SystemExit, OSError, text.HubFailed))
        if keeps and passing and (draft / PROGRESS).exists():
            log.warning("the tokens up to the last %d s are kept in %s: start again to go on, or remove it",
                        SAVE_SECONDS, draft)
        else:
            shutil.rmtree(draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
        if isinstance(error, OSError):  # a full disk, or a text file that has vanished
            raise UserError(f"{error.filename or f'--cache-dir {folder.parent}'}: {error.strerror or error}; make "
                            f"room, or give another --cache-dir") from None
        raise
    finally:
        os.close(fd)


def _lock(draft, folder):
    """Creates the draft and waits for its lock → the descriptor of the locked file; None if another process has
    completed `folder` meanwhile, or begun another draft. Raises UserError."""
    fd = None
    try:
        make_folder(draft)
        if draft.is_symlink():  # its target is not ours to empty
            raise NotADirectoryError(errno.ENOTDIR, f"{draft.name} is a link")
        # Opened for writing, because network file systems grant no exclusive lock otherwise.
        fd = os.open(draft / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        _wait(lambda: not try_lock(fd), draft)
        # For half a minute NFS may still show a draft that another node has renamed, and emptying that would remove
        # the complete tokens. Opening the folder above makes it ask the server.
        os.scandir(folder.parent).close()
        if same_file(fd, draft / ".lock"):  # else its holder has renamed the draft, and another may have begun one
            if not folder.exists():
                return fd
            shutil.rmtree(draft, ignore_errors=True)  # on NFS, the open .lock keeps a name in it
        os.close(fd)
        return None
    except OSError as error:
        # On NFS, a lock file that another node has removed, as it does after the rename, is an error.
        removed = fd is not None and not same_file(fd, draft / ".lock")
        if fd is not None:
            os.close(fd)
        if removed or isinstance(error, FileNotFoundError) and draft.parent.exists():
            return None
        unlocked = error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
        advice = "on a file system with locks, such as a local disk" if unlocked else "that can be written"
        raise UserError(f"--cache-dir {draft.parent}: {error.strerror}; give a folder {advice}") from None


def _wait(blocked, draft):
    """Waits while `blocked()` is true. Raises UserError if nothing in `draft` changes for PREPARE_PATIENCE seconds."""
    begun = changed = time.monotonic()  # not compared with the files' times, which are of another clock
    told = False
    newest = None
    while blocked():
        now = time.monotonic()
        if not told and now - begun > 1:
            log.info("waiting for the process that prepares this data in %s", draft)
            told = True
        with contextlib.suppress(OSError):  # it may just have been renamed
            latest = max(file.stat().st_mtime for file in [draft, *draft.iterdir()])
            if latest != newest:
                changed, newest = now, latest
        if now - changed > PREPARE_PATIENCE:
            raise UserError(f"{draft}: the process that prepares this data has written nothing for "
                            f"{PREPARE_PATIENCE} s; kill it, remove the folder and start again")
        time.sleep(0.1)


@dataclass
class Progress:
    """How far the tokenization in a draft has come."""

    identity: list  # what the tokens and the batches depend on
    tokens: dict  # split → tokens written of each given path, a list
    bytes: dict = field(default_factory=lambda: dict(train=0, val=0))  # split → bytes of the text written
    batches: int = 0  # read and written
    left_out: int = 0  # characters that have no token
    gives_back: bool = True  # whether tokens of the first batch decode to their text
    seconds: float = 0.0

    @classmethod
    def of_draft(cls, draft, new):
        """The one in the draft, if it has the identity of `new`, else `new`."""
        with contextlib.suppress(ValueError, TypeError):
            found = cls(**read_json(draft / PROGRESS))
            if found.identity == new.identity:
                log.info("going on with the tokenization that stopped after %.1f MB", sum(found.bytes.values()) / 1e6)
                return found
        (draft / PROGRESS).unlink(missing_ok=True)  # its tokens will be overwritten
        return new

    def save(self, draft, writers):
        for writer in writers.values():
            writer.flush()
        write_whole(draft / PROGRESS, json.dumps(asdict(self)).encode())


def _write_shards(draft, cfg, vocab_size, tokenizer, sources, val_sources):
    """Write train.bin, val.bin, the folder of their tokenizer and meta.json into `draft`. Raises UserError."""
    for source in [*sources, *val_sources]:
        if source.kind == "tokens":  # else a copy of damaged tokens would pass for whole
            require_whole(Path(source.path))
    if cfg.use_toy_data:
        tokenizer = train_tokenizer("char", [toy.ALPHABET], 0)
    elif tokenizer is None:
        tokenizer = _trained_tokenizer(cfg.tokenizer_name, _stream(cfg, sources, val_sources), vocab_size)
    eos = save_tokenizer(tokenizer, draft / "tokenizer", cfg.tokenizer_name)
    if eos is None:
        log.warning("the tokenizer %s has no end-of-text token: documents are concatenated without a separator",
                    cfg.tokenizer_name)
    done, writers = _tokenize(draft, cfg, tokenizer, eos, sources, val_sources)
    if done.left_out:
        log.warning("%s characters are left out: the tokenizer %s has no token for them", f"{done.left_out:,}",
                    cfg.tokenizer_name)
    if not done.gives_back:
        log.warning("the tokenizer %s changes the text: its tokens do not decode to what they were made from",
                    cfg.tokenizer_name)
    # Without --val-data, each source of a mixture has its part of the validation text, and so a loss of its own.
    val_paths = cfg.val_data or (cfg.train_data if cfg.train_weights else [])
    meta = dict(tokens={split: writer.count for split, writer in writers.items()}, bytes=done.bytes,
                vocab_size=id_count(tokenizer), eos=eos, tokenizer="char" if cfg.use_toy_data else cfg.tokenizer_name,
                tokenizer_hash=tokenizer_hash(tokenizer).hex(),
                entropy_rate=toy.entropy_rate(cfg.data_seed) if cfg.use_toy_data else None,
                train_sources=_spans(cfg.train_data, done.tokens["train"]),
                val_sources=_spans(val_paths, done.tokens["val"]),
                fingerprint={split: writer.digest.hexdigest() for split, writer in writers.items()})
    require_sequences(cfg, meta)
    mb = sum(done.bytes.values()) / 1e6
    log.info("tokenized %.1f MB into %s tokens in %.1f s (%.1f MB/s)", mb, f"{sum(meta['tokens'].values()):,}",
             done.seconds, mb / max(done.seconds, 1e-9))
    write_whole(draft / "meta.json", json.dumps(meta, indent=1).encode())
    for path in (*(draft / "tokenizer").iterdir(), draft / "tokenizer", draft):
        sync_path(path)


def _trained_tokenizer(name, stream, vocab_size):
    """bpe: trained on up to BPE_SAMPLE characters of the training text; char: on all text, including validation."""
    began = time.perf_counter()
    if name == "bpe":
        stream = text.take((piece for piece in stream if piece.split == "train"), BPE_SAMPLE)
    tokenizer = train_tokenizer(name, (piece.content for piece in stream), vocab_size or 4096)
    log.info("trained a %s tokenizer of %s tokens in %.1f s", name, f"{tokenizer.get_vocab_size():,}",
             time.perf_counter() - began)
    return tokenizer


def _stream(cfg, sources, val_sources):
    """The Pieces of all text: first that of --val-data, which is read in full."""
    if cfg.use_toy_data:
        return iter([text.Piece(content, split, False) for split, content in toy.text(cfg.data_seed)])
    val_ratio = 0.0 if cfg.val_data else cfg.val_ratio
    return chain(text.pieces(val_sources, "val"), text.pieces(sources, "train", val_ratio, builtin=not cfg.train_data))


def _tokenize(draft, cfg, tokenizer, eos, sources, val_sources):
    """Write the tokens of the text to train.bin and val.bin, up to --max-tokens, going on from the Progress in `draft`,
    if any → the Progress at the end, and the closed writers by split."""
    every = [*sources, *val_sources]
    vocab_size = id_count(tokenizer)
    digest = tokenizer_hash(tokenizer)
    n_paths = max(1, len(cfg.train_data), len(cfg.val_data))
    identity = [digest.hex(), BATCH, text.PIECE, n_paths, [source.argument for source in every]]
    done = Progress.of_draft(draft, Progress(identity, dict(train=[0] * n_paths, val=[0] * n_paths)))
    limits = dict(train=cfg.max_tokens, val=0)
    if cfg.max_tokens and not cfg.val_data:
        limits["val"] = max(1, int(cfg.max_tokens * cfg.val_ratio))
    writers = {split: ShardWriter(draft / f"{split}.bin", vocab_size, eos, digest, limit, sum(done.tokens[split]))
               for split, limit in limits.items()}
    with ProgressBar(total=sum(source.size for source in every) or None, unit="B", unit_scale=True, desc="tokenizing",
                     leave=False, disable=None) as bar:
        unread = _batches(_stream(cfg, sources, val_sources), bar)
        for _ in islice(unread, done.batches):
            os.utime(draft)  # for those who wait: this process is alive
        saved = time.perf_counter()
        # With --val-data, validation comes first, and whole.
        while not (writers["train"].full and (cfg.val_data or writers["val"].full)) and (batch := next(unread, None)):
            if not done.batches:
                done.gives_back = gives_back(tokenizer, batch)
            wanted = [piece for piece in batch if not writers[piece.split].full]
            for piece, ids, n_bytes, lost in encode_pieces(tokenizer, wanted, eos):
                written = writers[piece.split].write(ids)
                done.bytes[piece.split] += round(n_bytes * written / max(1, len(ids)))  # it may be cut short
                done.tokens[piece.split][piece.argument] += written
                done.left_out += lost
            done.batches += 1
            if (now := time.perf_counter()) - saved > SAVE_SECONDS:
                done.seconds += now - saved
                saved = now
                done.save(draft, writers)
        done.seconds += time.perf_counter() - saved
    for writer in writers.values():
        writer.close()
    return done, writers


def _batches(stream, bar):
    """The stream's pieces, about BATCH characters or ids at a time; the bar moves on when the next are asked for."""
    while batch := text.take(stream, BATCH):
        yield batch
        bar.update(sum(getattr(piece.content, "nbytes", len(piece.content)) for piece in batch))  # bytes or characters


def _spans(paths, counts):
    """name → [first token, number of tokens] of each path, where there are several."""
    starts = accumulate(counts, initial=0)
    return {name: [start, count] for name, start, count in zip(text.source_names(paths), starts, counts, strict=False)}


def require_sequences(cfg, meta):
    """Raises UserError if there is less than one sequence to train on, to validate on, or in any source with a share of
    the samples or a loss of its own."""
    held_out = not (cfg.val_data or cfg.is_shards)  # validation is a part of --train-data
    val_flag = "--val-data" if cfg.val_data else "--train-data"
    for split, flag, given, apart in (("train", "--train-data", cfg.train_data, cfg.train_weights),
                                      ("val", val_flag, cfg.val_data or cfg.train_data, cfg.val_data)):
        sources = meta[f"{split}_sources"] if apart else {}  # none if there is only one, too
        spans = sources or {"": [0, meta["tokens"][split]]}
        paths = given if len(given) == len(spans) else spans  # of a folder of shards, only the names are known
        for path, (_, count) in zip(paths, spans.values(), strict=True):
            if count < cfg.seq_len + 1:
                advice = ", or a larger --max-tokens" if cfg.max_tokens and (split == "train" or held_out) else ""
                if held_out:
                    advice += (", or a larger --val-ratio, or --val-data" if split == "val" else
                               ", or --val-data, if validation has taken it" if apart else "")
                raise UserError(f"{flag}{path and f' {path}'}: {count:,} {split} tokens are fewer than one sequence of "
                                f"--seq-len {cfg.seq_len} + 1; give more text or a smaller --seq-len{advice}")
