"""Text sources: files, folders, tables and datasets → documents, in pieces small enough to stream. Token files, too."""

import codecs
import contextlib
import functools
import glob
import hashlib
import io
import json
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mini_llm.errors import UserError, first_line
from mini_llm.holdout import place, spread, tail_start, takes_tails
from mini_llm.shards import read_token_file, token_file_format
from mini_llm.tokenizer import END_OF_TEXT, hub_problem

log = logging.getLogger("mini_llm")

PIECE = 1 << 15  # characters passed to the tokenizer at once
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".bin": "tokens"}
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # read as they are, if JSON: .jsonl.zst, .json.gz
# All else is plain text, but:
UNREADABLE = dict.fromkeys((".csv", ".tsv", ".arrow"), "convert it to .jsonl or .parquet") | dict.fromkeys(
    (*PACKED, ".xz", ".zip", ".tar"), "unpack it")
IN_FOLDERS = {".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet"}  # taken from folders, where .json is metadata


class HubFailed(UserError):
    """A dataset of the Hub cannot be read (further) now; perhaps it can be later."""


@dataclass(frozen=True)
class Source:
    """`kind`: text, json, parquet or tokens, of which `path` is a file; or hub, where it is NAME[:CONFIG][@SPLIT]."""

    kind: str
    path: str
    argument: int = 0  # index of the given path that it comes from
    column: str = "text"

    @property
    def size(self):
        """The file's size in bytes; 0 for a Hub dataset."""
        return 0 if self.kind == "hub" else os.path.getsize(self.path)

    @property
    def real_path(self):
        """The file's path, without links and the suffix of compressed JSON; a Hub dataset's name."""
        path = self.path if self.kind == "hub" else os.path.realpath(self.path)
        return os.path.splitext(path)[0] if _packed(path) else path

    def digest(self, whole):
        """A digest of the file's bytes (`whole`) or, for a large corpus, of its size, its modification time and 16
        samples; a Hub dataset's name."""
        if self.kind == "hub":
            return self.path.encode()
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        with open(self.path, "rb") as file:
            if whole or self.size <= 1 << 16:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{self.size} {os.stat(self.path).st_mtime_ns}".encode())
                for part in range(16):
                    file.seek(self.size // 16 * part)
                    digest.update(file.read(1 << 12))
        return digest.digest()


def find_sources(paths, label="--train-data", column="text"):
    """Paths, globs, folders and dataset names → Sources. Raises UserError for anything that is missing or not text."""
    sources, known, again = [], set(), 0
    for argument, path in enumerate(paths):
        try:
            files = _files(path, label)
        except OSError as error:  # such as of a folder that may not be listed, whose text would be missing
            raise UserError(f"{label} {error.filename}: {error.strerror}; make it readable, or name others") from None
        found = [Source(KINDS.get(_suffix(file), "text"), file, argument, column) for file in files]
        for source in found or [Source("hub", path.removesuffix("@train"), argument, column)]:
            # A file read twice could end up on both sides of the validation split.
            if label == "--train-data" and source.real_path in known:
                again += 1
                continue
            known.add(source.real_path)
            if source.kind != "hub":
                _check_readable(source.path, source.kind, label)
            sources.append(source)
    if again:
        log.warning("%s names files more than once, or compressed and not (%d times in all): each is read once", label,
                    again)
    return sources


def _files(path, label):
    """The files that a path, glob or folder stands for; none for a dataset on the Hub. Raises UserError."""
    if is_pattern(path):
        files = _existing(sorted(expand(path)), path)
        if not files:
            raise UserError(f"{label} {path}: no file matches; quote the pattern and check it with ls")
    elif os.path.isdir(path):
        folder, shard = Path(path), "train.bin" if label == "--train-data" else "val.bin"
        if (folder / "meta.json").exists() and ((folder / "train.bin").exists() or (folder / "val.bin").exists()):
            if not (folder / shard).exists():
                raise UserError(f"{label} {path}: a folder of token shards without {shard}")
            return [str(folder / shard)]
        files = list(map(str, _texts_and_tables(folder)))
        if not files:
            raise UserError(f"{label} {path}: no {', '.join(sorted(IN_FOLDERS))} file in this folder")
    elif os.path.exists(path):
        files = [path]
    elif _is_hub_name(path):
        return []
    else:
        raise UserError(f"{label} {path}: no such file or folder")
    return [file for file in files if not _is_empty(file)] or files  # skip empty files, unless all are


def _suffix(file):
    """The suffix that says how to read a file: `.jsonl` if it is compressed JSON, else its last one."""
    return ".jsonl" if _packed(file) else os.path.splitext(file)[1].lower()  # Path.suffix is slow for many files


def _packed(file):
    """How a file of JSON is compressed; None if it is not one."""
    name, suffix = os.path.splitext(os.fspath(file).lower())
    return PACKED.get(suffix) if KINDS.get(os.path.splitext(name)[1]) == "json" else None


def _open(file):
    """The bytes of a file, unpacked as they are read if it is compressed JSON."""
    stream = open(file, "rb")
    if packed := _packed(file):
        from pyarrow import input_stream

        return input_stream(stream, compression=packed, buffer_size=1 << 20)
    return stream


def _is_empty(file):
    if 0 < os.path.getsize(file) < 1024 and _packed(file):  # an empty file has a few bytes if compressed
        with contextlib.suppress(OSError), _open(file) as stream:  # a damaged file is reported later
            return not stream.read(1)
    return not os.path.getsize(file)


def _is_hub_name(path):
    """Whether `path` may be the name of a Hub dataset, rather than a missing file."""
    return (re.fullmatch(r"\w[\w-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w.-]+)?", path)
            and _suffix(path) not in IN_FOLDERS | KINDS.keys() | UNREADABLE.keys()
            and not os.path.isdir(Path(path).parts[0]))


def _texts_and_tables(folder):
    """Text and table files in a folder, recursively, without hidden files and those of runs, W&B and exported models
    (checkpoints and token caches contain none)."""
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):  # Path.rglob would ignore errors
        folders[:] = [name for name in folders if name[0] != "." and name != "lost+found"]  # a disk's own, of root
        found += [Path(root, name) for name in names if name[0] != "."]
    found.sort()
    if unread := [file for file in found if _suffix(file) in UNREADABLE and os.path.isfile(file)]:
        log.warning("%s: files are left out (%d in all), such as %s: %s", folder, len(unread), unread[0],
                    UNREADABLE[_suffix(unread[0])])
    ours = {file.parent for file in found if re.fullmatch(r"run-.+\.wandb|.+\.safetensors", file.name)}
    return _existing([file for file in found if _suffix(file) in IN_FOLDERS and ours.isdisjoint(file.parents)
                      and not re.search(r"\.metrics\.jsonl|\.stacks\.txt$", file.name)], folder)


def _raise(error):
    raise error


def _existing(found, path):
    """The files among what was found, with a warning of links that lead nowhere."""
    if gone := [file for file in found if not os.path.exists(file)]:
        log.warning("%s: links that lead to no readable file are left out (%d in all), such as %s", path, len(gone),
                    gone[0])
    return [file for file in found if os.path.isfile(file)]


def is_pattern(path):
    return any(char in path for char in "*?[") and not os.path.exists(path)


def expand(pattern):
    """The files and folders that match. `**` follows no links to folders, which may form cycles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    fixed, deep = parts[:parts.index("**")], parts[parts.index("**"):]
    # Before Python 3.13, Path.glob finds only folders for a `**` at the end, and refuses one within a name.
    if deep[-1] == "**":
        deep = *deep, "*"
    deep = [part if part == "**" else re.sub(r"\*+", "*", part) for part in deep]
    found = ((root, file) for root in (glob.glob(os.path.join(*fixed)) if fixed else [""])
             for file in Path(root).glob(os.path.join(*deep)))
    return {str(file) for root, file in found if not any(part[0] == "." for part in file.relative_to(root).parts)}


def source_names(paths):
    """Unique names, usable in those of metrics, for two or more of the paths that `find_sources` takes; [] for one.
    They are a file's stem, the last part of a folder's or dataset's name, or that of a pattern without its wildcards
    (its folder's, if nothing is left)."""
    names, taken = {}, Counter()  # an ordered set; name → how many of its numbers are taken
    for path in paths if len(paths) > 1 else []:
        whole = Path(os.path.abspath(path))
        stem = Path(whole.stem).stem if _packed(path) else whole.stem
        parts = [stem if os.path.isfile(path) or is_pattern(path) else whole.name, *reversed(whole.parts[:-1])]
        name = next(filter(None, (re.sub(r"[^\w.-]", "-", part).strip("-") for part in parts)), "val")
        free = name
        while free in names:
            taken[name] += 1
            free = f"{name}-{taken[name] + 1}"
        names[free] = None
    return list(names)


def builtin_sources():
    """The source files of Python's standard library, without its tests: about 10 MB of text on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not skipped & set(file.relative_to(root).parts)]
    return [Source("text", str(file)) for file in files]


def _check_readable(file, kind, label):
    if not os.path.isfile(file):  # a pipe cannot be read twice, a device may be endless
        raise UserError(f"{label} {file}: not a file; write the text to one")
    if advice := UNREADABLE.get(_suffix(file)):
        raise UserError(f"{label} {file}: not text, JSONL or Parquet; {advice}")
    try:
        with _open(file) as stream:
            head = stream.read(PIECE)
    except OSError as error:
        raise UserError(f"{label} {file}: {error.strerror or f'{first_line(error)}; fetch it again'}") from None
    if not head:
        raise UserError(f"{label} {file}: the file is empty")
    if kind == "tokens":
        try:
            token_file_format(file)
        except UserError as error:
            raise UserError(f"{label} {error}") from None
    if kind in ("parquet", "tokens"):
        return
    if kind == "json" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] not in (b"{", b"["):
        raise UserError(f"{label} {file}: not JSON rows, which begin with {{; give .txt, .jsonl or .parquet")
    undecodable = codecs.getincrementaldecoder("utf-8")("replace").decode(head).count("\ufffd")
    if b"\0" in head or undecodable > len(head) / 10:
        wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in head and not wide:
            raise UserError(f"{label} {file}: it has NUL bytes, so it is not text; give .txt, .jsonl or .parquet")
        raise UserError(f"{label} {file}: not UTF-8 text; convert it, as by iconv -f "
                        f"{'UTF-16' if wide else 'LATIN1'} -t UTF-8")


def require_hub(sources, label="--train-data"):
    """Raises UserError within seconds if any source is a Hub dataset and the Hub is unreachable."""
    for path in [source.path for source in sources if source.kind == "hub"]:
        name = re.split("[:@]", path)[0]  # without configuration and split
        if problem := hub_problem(f"api/datasets/{name}", f"datasets/{name}/resolve/main/README.md"):
            raise UserError(f"{label} {path}: no such file, and it cannot be fetched as a dataset: {problem}")


@dataclass(frozen=True)
class Piece:
    content: str | np.ndarray  # text, or the ids of a token file
    split: str  # train or val
    ends_document: bool
    argument: int = 0  # its source's


def pieces(sources, split, val_ratio=0.0, builtin=False) -> Iterator[Piece]:
    """The documents of the sources in order, in pieces of about PIECE characters; token files in blocks of ids. With a
    `val_ratio`, part of them is held out for validation, by the rules of holdout.py; `builtin`: by those for
    `builtin_sources()`."""
    tails = val_ratio and takes_tails(sources, val_ratio)
    index = 0  # of the document
    for source in sources:
        if source.kind == "tokens":  # their end-of-text tokens are among the ids
            yield from (Piece(ids, split, False, source.argument) for ids in read_token_file(source.path))
        elif tails:
            cut = tail_start(source.path, val_ratio)
            # The tail comes first: with --max-tokens, the rest need not be read to the end.
            for part, stream in ("val", text_pieces(source.path, cut)), ("train", text_pieces(source.path, 0, cut)):
                yield from (Piece(text, part, ends, source.argument) for text, ends in stream)
        else:
            part = None
            for text, ends in text_pieces(source.path) if source.kind == "text" else table_pieces(source):
                if part is None:  # the first piece decides for the whole document
                    part = "val" if (spread(index) if builtin else place(text)) < val_ratio else split
                yield Piece(text, part, ends, source.argument)
                if ends:
                    part = None
                    index += 1


def take(stream, characters):
    """The next pieces of the stream, up to about that many characters or ids in total; [] at the end."""
    batch = []
    while characters > 0 and (piece := next(stream, None)):
        batch.append(piece)
        characters -= len(piece.content)
    return batch


def text_pieces(file, start=0, stop=None):
    """Yields (text, ends_document) for bytes start..stop of a text file. `<|endoftext|>` ends a document, as does the
    end of the range. Streams: a file of any size takes a few MB of memory. Undecodable bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")("replace")
    left = (os.path.getsize(file) if stop is None else stop) - start
    buffer = ""
    with open(file, "rb") as stream:
        stream.seek(start)
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            left -= len(block)
            buffer += decoder.decode(block, final=left <= 0)
            *documents, buffer = buffer.split(END_OF_TEXT)
            for document in documents:
                yield from document_pieces(document)
            *ready, buffer = cut_text(buffer, len(END_OF_TEXT))
            yield from ((text, False) for text in ready)
    yield from document_pieces(buffer)


def document_pieces(document):
    *ready, last = cut_text(document)
    yield from ((text, False) for text in ready)
    if last:
        yield last, True


def cut_text(text, unsure=0):
    """Split a text into one or more pieces of about PIECE characters where GPT-2's pre-tokenizer splits it anyway:
    before a newline or space that precedes a word. So the pieces have the tokens of the whole text (with a tokenizer
    that puts a space before each text, as Llama's does, each may have one more). The last `unsure` characters, which
    may be the beginning of a mark, do not decide where to split."""
    found, start = [], 0
    while len(text) - start > 2 * PIECE + unsure:
        end = start + PIECE
        cut = _last_break(text, "\n", start, end) or _last_break(text, " ", start, end) or end
        found.append(text[start:cut])
        start = cut
    return [*found, text[start:]]


def _last_break(text, mark, start, end):
    """The last `mark` in (start, end) that is followed by a word and, if a space, also preceded by one; else None."""
    while (end := text.rfind(mark, start + 1, end)) > 0:
        if not text[end + 1].isspace() and (mark == "\n" or not text[end - 1].isspace()):
            return end
    return None


def table_pieces(source):
    """Yields (text, ends_document) for the rows of a JSONL or Parquet file or of a Hugging Face Hub dataset.
    `<|endoftext|>` ends a document, as does the end of a row."""
    rows = {"json": _json_rows, "parquet": _parquet_rows, "hub": _hub_rows}[source.kind]
    number = 0
    try:
        for number, text in enumerate(_texts(source, rows(source)), 1):  # noqa: B007 - the error below has the number
            for document in text.split(END_OF_TEXT):
                yield from document_pieces(document)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # the readers raise many types
        reason = first_line(error.__cause__ or error)
        if source.kind == "hub":
            name = source.path.partition("@")[0]
            raise HubFailed(f"{source.path}: {reason}; name a configuration as {name.partition(':')[0]}:NAME, a split "
                            f"other than train as {name}@SPLIT") from None
        raise UserError(f"{source.path}: not readable as {source.kind}, from row {number + 1:,} on: {reason}") from None


def _texts(source, rows):
    """The text of each row, or "": the column `source.column` or, if no row has that, the only one with strings."""
    column, left_out = None, 0
    for number, row in enumerate(rows, 1):
        if source.column in row:
            if column not in (None, source.column):
                raise UserError(f"{source.path}: row {number:,} has a column {source.column}, the rows before it have "
                                f"none, only {column}; name one for all of them: --text-column")
            column = source.column
        elif column != source.column:
            strings = {key for key, value in row.items() if isinstance(value, str)}
            column = column or next(iter(strings), None)  # the same one in every row
            if strings - {column} or row and not strings and all(value is not None for value in row.values()):
                raise UserError(f"{source.path}: no column named {source.column} (found {', '.join(row)}); name that "
                                f"with the text: --text-column")
        left_out += column not in row and any(isinstance(value, str) for value in row.values())
        text = row.get(column)
        if not isinstance(text, str | None):
            raise UserError(f"{source.path}: the column {column} has {type(text).__name__}, not text; convert it")
        # JSON can hold half of a surrogate pair, which is no character; it becomes U+FFFD.
        yield (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if left_out:
        _warn(f"{source.path}: {left_out:,} of {number:,} rows have no column {column} and are left out")


@functools.cache
def _warn(message):
    """Logs a warning once, though a file may be read twice: a bpe tokenizer is trained on it first."""
    log.warning(message)


def _json_rows(source):
    """The objects in a file: one per line, or an array. Not by `datasets`, which infers the columns' types from the
    beginning of a file, and fails at a later row that has other columns or an invalid date."""
    with io.TextIOWrapper(_open(source.path), encoding="utf-8-sig", errors="replace") as file:
        lines = filter(str.strip, file)
        first = next(lines, "{}")
        is_array = first.lstrip().startswith("[")
        for row in json.loads(first + file.read()) if is_array else map(json.loads, chain([first], lines)):
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}, not an object with a text")
            yield row


def _parquet_rows(source):
    from pyarrow.parquet import ParquetFile

    # Opened here, because pyarrow takes only names in UTF-8, and read page by page: by default it reads whole row
    # groups, and ahead until it has the whole file.
    with (open(source.path, "rb") as stream,
          ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20) as file):
        columns = [source.column] if source.column in file.schema_arrow.names else None
        for batch in file.iter_batches(256, columns=columns):
            yield from batch.to_pylist()


def _hub_rows(source):
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the error raised from here reports what it would log
    name, _, split = source.path.partition("@")
    name, _, config = name.partition(":")
    return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
