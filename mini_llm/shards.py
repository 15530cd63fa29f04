"""Token shards: files of token ids with a header, and a meta.json beside them, checked when read. The token files of
llm.c (and modded-nanogpt) and of nanoGPT are read, too."""

import contextlib
import copy
import errno
import hashlib
import os
import shlex
import struct
from pathlib import Path

import numpy as np

from mini_llm.errors import UserError
from mini_llm.files import read_json, sync
from mini_llm.tokenizer import OWN

HEADER = struct.Struct("<8sIIQIi32s")
MAGIC, FORMAT = b"MINILLM\0", 1
DTYPES = {2: np.uint16, 4: np.uint32}  # by bytes per id
LLM_C_HEADER = 1024  # bytes, as 256 int32, of which the first three are magic number, version and count
LLM_C_DTYPES = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # GPT-2's tokens, Llama 3's


class ShardWriter:
    """Writes a header (magic, version, bytes per id, count, vocabulary size, end-of-text id, tokenizer hash), then the
    ids, as uint16 if the vocabulary fits, else as uint32. Every id is checked against the vocabulary. With a `count`,
    continues after the first `count` ids of an incomplete file; raises UserError if it has fewer."""

    def __init__(self, path, vocab_size, eos, tokenizer_hash, limit=0, count=0):
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.vocab_size, self.hash, self.limit = vocab_size, tokenizer_hash, limit
        self.eos = -1 if eos is None else eos
        self.count, self.digest = count, hashlib.blake2b(digest_size=16)
        size = HEADER.size + count * self.dtype.itemsize
        if count and not (os.path.exists(path) and os.path.getsize(path) >= size):
            raise UserError(f"{path} has lost tokens since it was written; start again, from the first one")
        self.file = open(path, "r+b" if count else "wb")
        if count:
            self.file.truncate(size)
            self.file.seek(HEADER.size)
            hashlib.file_digest(self.file, lambda: self.digest)  # leaves the file at its end
        else:
            self.file.write(bytes(HEADER.size))

    @property
    def full(self):
        return bool(self.limit) and self.count >= self.limit

    def write(self, ids):
        """Returns how many ids were written, up to the limit. Raises UserError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        ids = ids[:self.limit - self.count] if self.limit else ids
        if not len(ids):
            return 0
        if ids.max() >= self.vocab_size:
            raise UserError(f"none of the tokenizer's {self.vocab_size:,} tokens has the id {ids.max():,}; give the "
                            f"tokenizer that made these tokens, or their text")
        block = ids.astype(self.dtype).tobytes()
        self.digest.update(block)
        self.file.write(block)
        self.count += len(ids)
        return len(ids)

    def flush(self):
        """To the disk: what was written so far survives a power cut."""
        self.file.flush()
        sync(self.file.fileno())

    def close(self):
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, FORMAT, self.dtype.itemsize, self.count, self.vocab_size, self.eos,
                                    self.hash))
        self.flush()
        self.file.close()


class Descriptor(int):
    """The descriptor of a file open for reading. Unpickled in another process, such as a DataLoader's worker, where the
    number would mean another file, it opens its file again."""

    def __new__(cls, path):
        opened = super().__new__(cls, os.open(path, os.O_RDONLY))
        opened.path = os.path.abspath(path)
        return opened

    def __reduce__(self):
        return Descriptor, (self.path,)


class Shard:
    """A token file, or a part of it, read by `pread`: a memory map's pages would count as this process's memory."""

    def __init__(self, path):
        self.path, self.start = path, 0
        try:
            if not os.path.isfile(path):  # opening a named pipe would block until someone writes to it
                raise FileNotFoundError(errno.ENOENT, "no such file")
            self.fd = Descriptor(path)
        except OSError as error:
            advice = "a folder of token shards holds train.bin and val.bin"
            if error.errno == errno.EMFILE:
                advice = "allow more: ulimit -n"
            raise UserError(f"{path}: {error.strerror}; {advice}") from None
        header = self._bytes(HEADER.size, 0)
        if len(header) < HEADER.size or header[:8] != MAGIC:
            raise UserError(f"{path}: not a token shard of mini-llm; prepare it again from the text")
        _, version, itemsize, self.count, self.vocab_size, eos, self.tokenizer_hash = HEADER.unpack(header)
        if (version != FORMAT or itemsize not in DTYPES or not eos < self.vocab_size <= 1 << 8 * itemsize
                or os.fstat(self.fd).st_size != HEADER.size + self.count * itemsize):
            raise UserError(f"{path}: not of format {FORMAT}, or not as long as its header says; prepare it again")
        self.eos = None if eos < 0 else eos
        self.dtype = np.dtype(DTYPES[itemsize])

    def part(self, start, count):
        """`count` tokens of it, from `start` on. All parts share one descriptor: a corpus may have a thousand."""
        if start + count > self.count:
            raise UserError(f"{self.path}: holds fewer tokens than the meta.json beside it says; prepare it again")
        part = copy.copy(self)
        part.start, part.count = start, count
        return part

    def windows(self, seq_len):
        """The number of windows of seq_len + 1 tokens that share no targets."""
        return max(0, self.count - 1) // seq_len

    def read(self, first, n):
        """Tokens first to first + n - 1, (n,). Raises UserError if any are missing or outside the vocabulary."""
        at, size = HEADER.size + (self.start + first) * self.dtype.itemsize, n * self.dtype.itemsize
        block = self._bytes(size, at)
        ids = np.frombuffer(block, self.dtype) if len(block) == size else ()
        if len(ids) != n or n and ids.max() >= self.vocab_size:  # else an obscure error on the GPU
            raise UserError(f"{self.path} is damaged at token {first}; remove its folder and prepare it again")
        return ids

    def _bytes(self, size, at):
        try:
            return os.pread(self.fd, size, at)
        except OSError as error:  # of a disk or a network; what is there may be intact
            raise UserError(f"{self.path} cannot be read now ({error.strerror}); try again when it can be") from None

    def expect(self, first, n):
        """Tell the operating system to read these tokens ahead, from a disk that may be slow."""
        with contextlib.suppress(AttributeError, OSError):  # not on macOS, nor on every file system
            at = HEADER.size + (self.start + first) * self.dtype.itemsize
            os.posix_fadvise(self.fd, at, n * self.dtype.itemsize, os.POSIX_FADV_WILLNEED)

    def verify(self, meta, split):
        """Raises UserError if these are not the tokens that were written. The content of a file above 1 GiB is not
        hashed: its header and length are checked here, and each id when it is read."""
        stated = [meta["tokens"][split], meta["vocab_size"], meta["eos"], meta["tokenizer_hash"]]
        intact = stated == [self.count, self.vocab_size, self.eos, self.tokenizer_hash.hex()]
        size = self.count * self.dtype.itemsize
        if intact and size <= 1 << 30:
            digest = hashlib.blake2b(digest_size=16)
            for at in range(0, size, 1 << 22):
                digest.update(self._bytes(min(1 << 22, size - at), HEADER.size + at))
            intact = digest.hexdigest() == meta["fingerprint"][split]
        if not intact:
            raise UserError(f"{self.path} is damaged: its tokens are not those of the meta.json beside it; remove its "
                            f"folder and prepare it again")


def part_shards(path, spans, seq_len):
    """{name: Shard} of the parts of a token file, for each [first token, number of tokens] in `spans`; if any has less
    than a window, the whole file as a single one: {"": Shard}."""
    whole = Shard(path)
    parts = {name: whole.part(*span) for name, span in spans.items()}
    return parts if all(shard.windows(seq_len) for shard in parts.values()) else {"": whole}


def spread_windows(shards, seq_len, max_tokens):
    """Indices of evenly spread windows, `max_tokens` tokens in total (0: all): {name: shard} → {name: indices}."""
    counts = {name: shard.windows(seq_len) for name, shard in shards.items()}
    every = sum(counts.values())
    total = min(every, max(1, max_tokens // seq_len)) if max_tokens else every
    wanted = {name: max(1, round(total * count / every)) for name, count in counts.items()}
    return {name: [i * counts[name] // n for i in range(n)] for name, n in wanted.items()}


def read_windows(shard, firsts, seq_len):
    """The windows that begin at the tokens `firsts` → inputs and targets, shifted by one: (B, T) int64 each."""
    windows = np.stack([shard.read(int(first), seq_len + 1) for first in firsts])  # (B, T + 1)
    # Two separate arrays, so that masking a target does not change an input.
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


def token_file_format(path):
    """(bytes of its header, dtype, hash of the tokenizer or None) of a token file: ours, llm.c's or, without a header,
    nanoGPT's. Raises UserError."""
    with open(path, "rb") as file:
        head = file.read(LLM_C_HEADER)
    size = os.path.getsize(path)
    if head.startswith(MAGIC):
        shard = Shard(path)  # checks its header
        os.close(shard.fd)
        return HEADER.size, shard.dtype, shard.tokenizer_hash
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), np.int32).tolist()
    if dtype := LLM_C_DTYPES.get((magic, version)):
        if size != LLM_C_HEADER + count * np.dtype(dtype).itemsize:
            raise UserError(f"{path}: {size:,} bytes are not the {count:,} tokens that its header says; copy it again")
        return LLM_C_HEADER, dtype, None
    if size % 2:
        raise UserError(f"{path}: {size:,} bytes cannot be 16-bit token ids; give a token file of llm.c or nanoGPT, or "
                        f"text")
    ids = np.frombuffer(head, np.uint16)
    if len(ids) >= 256 and ids[1::2].max() < 4 <= ids[::2].max():  # Megatron's, for one
        raise UserError(f"{path}: its ids seem to have 32 bits each, and a token file without a header has 16; give "
                        f"the text itself")
    return 0, np.uint16, None


def read_token_file(path):
    """Yields the ids of such a file, in arrays of up to 65,536."""
    header, dtype, _ = token_file_format(path)
    with open(path, "rb") as file:
        file.seek(header)
        while len(ids := np.fromfile(file, dtype, 1 << 16)):
            yield ids


def require_whole(path):
    """Raises UserError if a token file in a folder of shards is damaged, unless it is above 1 GiB (Shard.verify)."""
    ours = token_file_format(path)[2] and path.name in ("train.bin", "val.bin")
    if ours and (path.parent / "meta.json").exists():
        shard = Shard(path)
        shard.verify(read_meta(path.parent), path.stem)
        os.close(shard.fd)


def require_own_tokenizer(sources, tokenizer_name, tokenizer_hash=None):
    """Raises UserError if another tokenizer made any of the token files. `tokenizer_hash`: as in `foreign_tokens`."""
    if foreign := foreign_tokens(sources, tokenizer_name, tokenizer_hash):
        if is_by_character(foreign):
            raise UserError(f"--tokenizer-name {tokenizer_name}: the tokens of {foreign} are characters (meta.pkl); "
                            f"give their text with --tokenizer-name char, or the .tokenizer folder of a run on it")
        own = Path(foreign).with_name("tokenizer")
        raise UserError(f"--tokenizer-name {tokenizer_name}: name the tokenizer that made the tokens of {foreign}, "
                        f"such as {own if own.is_dir() else 'gpt2'}")


def require_val_data(sources, val_sources):
    """Raises UserError if token files are to be trained on, and there is no --val-data."""
    if not val_sources and (files := [source.path for source in sources if source.kind == "tokens"]):
        # Where documents end, and so where to split, is not known.
        both = "the folders as --val-data" if Path(files[0]).with_name("meta.json").exists() else "--val-data"
        raise UserError(f"--train-data {files[0]}: a token file is trained on as a whole; give {both}, too")


def foreign_tokens(sources, tokenizer_name, tokenizer_hash=None):
    """The first token file among the sources that the tokenizer of that name cannot have made, or None. Our own files
    state their tokenizer's hash. `tokenizer_hash`, hexadecimal: what that must begin with; None if the tokenizer is not
    loaded yet, "" if it is yet to be trained and so fits none."""
    made_by = {source.path: token_file_format(source.path)[2] for source in sources if source.kind == "tokens"}
    # The tokenizer beside shards made them, even if this version of `tokenizers` gives it another hash.
    named = os.path.realpath(tokenizer_name)
    fitting = {made for path, made in made_by.items() if os.path.realpath(Path(path).with_name("tokenizer")) == named}
    for path, made in made_by.items():
        if made is None:
            fits = os.path.isdir(tokenizer_name) or tokenizer_name not in OWN and not is_by_character(path)
        else:
            fits = (tokenizer_hash is None or made in fitting
                    or tokenizer_hash != "" and made.hex().startswith(tokenizer_hash))
        if not fits:
            return path
    return None


def is_by_character(token_file):
    """Whether nanoGPT made it by characters: it then leaves their list beside it."""
    return Path(token_file).with_name("meta.pkl").exists()


def read_meta(folder):
    """The meta.json beside the shards. Raises UserError if it is unreadable or malformed."""
    try:
        meta = read_json(folder / "meta.json")
        numbers, texts = [], [meta["tokenizer"], meta["tokenizer_hash"]]
        for split in ("train", "val"):
            count, name = meta["tokens"][split], f"{split}_sources"
            meta[name] = meta.get(name) or {"": [0, count]}  # a single source has no name
            numbers += [count, meta["bytes"][split]]
            for start, length in meta[name].values():
                numbers += [start, length]
            texts.append(meta["fingerprint"][split])
        if not (all(type(number) is int and number >= 0 for number in numbers)
                and meta["tokens"]["val"] and all(isinstance(text, str) for text in texts)
                and isinstance(meta["entropy_rate"], float | None) and meta.keys() >= {"vocab_size", "eos"}):
            raise TypeError("a value of it is of another type")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: no readable meta.json beside the shards ({error}); prepare them again, or give "
                        f"nanoGPT's files by their names: {shlex.quote(str(folder / 'train.bin'))} and "
                        f"{shlex.quote(str(folder / 'val.bin'))}") from None
    return meta
