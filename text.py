"""Text sources: files, folders, tables and datasets → documents, in pieces small enough to stream."""

import codecs
import glob
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from config import UserError
from tokenizer import END_OF_TEXT, hub_reachable

log = logging.getLogger("mini_llm")

PIECE = 1 << 15  # characters passed to the tokenizer at once
TEXT_SUFFIXES = {".txt", ".text", ".md"}
TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """`kind`: text, json, parquet, or hub (NAME[:CONFIG][@SPLIT]). A text source is one file; tables may be several."""

    kind: str
    paths: tuple[str, ...]
    argument: int = 0  # index of the given path that it comes from

    def files(self):
        return () if self.kind == "hub" else self.paths


def files_of(sources):
    """The real paths of all files of the sources, and the names of their Hub datasets."""
    return {os.path.realpath(file) if source.files() else file for source in sources for file in source.paths}


def find_sources(paths, label="--train-data"):
    """Paths, globs, folders and dataset names → Sources. Raises UserError for anything that is missing or not text."""
    sources, known, again = [], set(), 0
    for argument, path in enumerate(paths):
        if is_pattern(path):
            files = [file for file in sorted(matching(path)) if os.path.isfile(file)]
            if not files:
                raise UserError(f"{label} {path}: no file matches; quote the pattern and check it with ls")
        elif os.path.isdir(path):
            suffixes = TEXT_SUFFIXES | TABLE_SUFFIXES.keys()
            files = [str(file) for file in _texts_and_tables(Path(path), suffixes)]
            if not files:
                raise UserError(f"{label} {path}: no {', '.join(sorted(suffixes))} file in this folder")
        elif os.path.exists(path):
            files = [path]
        elif _is_hub_name(path):
            sources.append(Source("hub", (path,), argument))
            continue
        else:
            raise UserError(f"{label} {path}: no such file or folder")
        files = [file for file in files if os.path.getsize(file)] or files  # skip empty files, unless all are
        if label == "--train-data":  # a file read twice could end up on both sides of the validation split
            new = {}
            for file in files:
                if (real := os.path.realpath(file)) not in known:
                    new.setdefault(real, file)
            known, again, files = known | new.keys(), again + len(files) - len(new), list(new.values())
        for file in files:
            _check_readable(file, label)
        sources += [Source("text", (file,), argument) for file in files if Path(file).suffix not in TABLE_SUFFIXES]
        for kind in ("json", "parquet"):
            tables = tuple(file for file in files if TABLE_SUFFIXES.get(Path(file).suffix) == kind)
            sources += [Source(kind, tables, argument)] if tables else []
    if again:
        log.warning("%s names files more than once (%d times in all): each is read once", label, again)
    return sources


def _is_hub_name(path):
    """Whether `path` may be the name of a Hub dataset, rather than a missing file."""
    return (re.fullmatch(r"\w[\w-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w.-]+)?", path)
            and Path(path).suffix not in TEXT_SUFFIXES | TABLE_SUFFIXES.keys()
            and not os.path.isdir(Path(path).parts[0]))


def _texts_and_tables(folder, suffixes):
    """Text and table files in a folder, recursively, but no hidden files, files of runs or W&B, or token caches."""
    found = sorted(file for file in folder.rglob("*")
                   if not any(part[0] == "." for part in file.relative_to(folder).parts))
    ours = {file.parent for file in found if file.name == "tokenizer.json" and file.parent.suffix == ".tokenizer"
            or file.name == "meta.json" and (file.parent / "train.bin").exists()
            or file.name == "tokenizer" and re.fullmatch(r"[0-9a-f]{24}\.draft", file.parent.name)
            or re.fullmatch(r"run-.+\.wandb", file.name)}
    return [file for file in found if file.suffix in suffixes and file.is_file() and ours.isdisjoint(file.parents)
            and not file.name.endswith((".metrics.jsonl", ".wandb.json", ".trace.json", ".stacks.txt"))]


def is_pattern(path):
    return any(char in path for char in "*?[") and not os.path.exists(path)


def matching(pattern):
    """The files and folders that match. `**` does not follow links to folders, which may form cycles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    fixed, deep = parts[:parts.index("**")], parts[parts.index("**"):]
    deep = [part if part == "**" else re.sub(r"\*+", "*", part) for part in (*deep, *["*"] * (deep[-1] == "**"))]
    found = ((root, file) for root in (glob.glob(os.path.join(*fixed)) if fixed else [""])
             for file in Path(root).glob(os.path.join(*deep)))
    return {str(file) for root, file in found if not any(part[0] == "." for part in file.relative_to(root).parts)}


def source_names(paths):
    """Names for two or more of the paths that `find_sources` takes, unique and usable in metric names: a file's stem,
    the last part of a folder or dataset name, a pattern's last part without its wildcards or, if nothing is left, its
    folder. A single path needs none: []."""
    names = []
    for path in paths if len(paths) > 1 else []:
        whole = Path(os.path.abspath(path))
        parts = [whole.stem if os.path.isfile(path) or is_pattern(path) else whole.name, *reversed(whole.parts[:-1])]
        name = next(filter(None, (re.sub(r"[^\w.-]", "-", part).strip("-") for part in parts)), "val")
        names.append(next(free for free in chain([name], (f"{name}-{n}" for n in count(2))) if free not in names))
    return names


def builtin_sources():
    """The source files of Python's standard library, without its tests: about 10 MB of text on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not skipped & set(file.relative_to(root).parts)]
    return [Source("text", (str(file),)) for file in files]


def _check_readable(file, label):
    if not os.path.isfile(file):  # a pipe cannot be read twice, a device may be endless
        raise UserError(f"{label} {file}: not a file; write the text to one")
    try:
        with open(file, "rb") as stream:
            head = stream.read(PIECE)
    except OSError as error:
        raise UserError(f"{label} {file}: {error.strerror}") from None
    if not head:
        raise UserError(f"{label} {file}: the file is empty")
    kind = TABLE_SUFFIXES.get(Path(file).suffix)
    if kind == "parquet":
        return
    if kind == "json" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] not in (b"{", b"["):
        # If the first row is null, pyarrow's reader crashes the process.
        raise UserError(f"{label} {file}: not JSON rows, which begin with {{; give .txt, .jsonl or .parquet")
    undecodable = codecs.getincrementaldecoder("utf-8")("replace").decode(head).count("\ufffd")
    if b"\0" in head or undecodable > len(head) / 10:
        raise UserError(f"{label} {file}: not UTF-8 text; convert it (iconv -t UTF-8) or give .txt, .jsonl or .parquet")


def require_hub(sources, label="--train-data"):
    """Raises UserError within seconds if any source is a Hub dataset and the Hub is unreachable."""
    names = [source.paths[0] for source in sources if source.kind == "hub"]
    if names and not hub_reachable():
        raise UserError(f"{label} {names[0]}: no such file, and as a Hugging Face dataset it cannot be reached")


@dataclass(frozen=True)
class Piece:
    text: str
    split: str  # train or val
    ends_document: bool
    argument: int = 0  # that of its source


def pieces(sources, split, val_ratio=0.0, seed=0) -> Iterator[Piece]:
    """The documents of the sources in order, in pieces of about PIECE characters.

    With a `val_ratio`, whole documents are held out for validation, spread evenly over the corpus. If the sources are
    too few text files for that, the tail of each is held out instead, cut at the end of a document or line.
    """
    texts = [source for source in sources if source.kind == "text"]
    tails = val_ratio and len(texts) == len(sources) and len(texts) * val_ratio < 2
    index = 0
    for source in sources:
        if tails:
            cut, size = tail_start(source.paths[0], val_ratio), os.path.getsize(source.paths[0])
            # The tail comes first: with --max-tokens, the rest need not be read to the end.
            parts = [(text_pieces(source.paths[0], cut, size), "val"), (text_pieces(source.paths[0], 0, cut), "train")]
        elif source.kind == "text":
            parts = [(text_pieces(source.paths[0]), None)]
        else:
            parts = [(table_pieces(source), None)]
        for stream, part in parts:
            for text, ends in stream:
                chosen = part or ("val" if is_validation(index, val_ratio, seed) else split)
                yield Piece(text, chosen, ends, source.argument)
                index += ends


def is_validation(index, ratio, seed):
    """Whether document `index` is in the fraction `ratio` held out for validation: a low-discrepancy sequence
    (multiples of the golden ratio), so that even a few dozen documents are split in the right proportion."""
    return (index + seed % (1 << 20)) * 0.6180339887498949 % 1.0 < ratio  # a large seed would cost float precision


def tail_start(file, ratio):
    """The byte where the last `ratio` of a text file begins, moved on to the next end of a document, else of a line."""
    size, mark = os.path.getsize(file), END_OF_TEXT.encode()
    start = int(size * (1 - ratio))
    first = max(0, start - len(mark) + 1)  # a mark that begins here or later ends after `start`
    with open(file, "rb") as stream:
        stream.seek(first)
        window = stream.read(1 << 20)
    if (last := window.find(mark)) >= 0:
        rest = window[last + len(mark):]
        if rest.strip() or first + len(window) < size:  # another document follows
            return first + last + len(mark)
        start = min(start, first + last)  # not inside the file's last mark, nor in what is blank after it
    window = window[start - first:last if last >= 0 else None]
    if (found := window.find(b"\n")) >= 0 and start + found + 1 < size:
        return start + found + 1
    while window and window[0] & 0xC0 == 0x80:  # not inside a UTF-8 character
        start, window = start + 1, window[1:]
    return start


def text_pieces(file, start=0, stop=None):
    """Yields (text, ends_document) for bytes start..stop of a text file. `<|endoftext|>` ends a document, as does the
    end of the range. Streams: a file of any size takes a few MB of memory. Undecodable bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")("replace")
    left, buffer = (os.path.getsize(file) if stop is None else stop) - start, ""
    with open(file, "rb") as stream:
        stream.seek(start)
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            left -= len(block)
            buffer += decoder.decode(block, final=left <= 0)
            *documents, buffer = buffer.split(END_OF_TEXT)
            for document in documents:
                yield from document_pieces(document)
            *ready, buffer = cut_text(buffer)
            yield from ((text, False) for text in ready)
    if buffer:
        yield buffer, True


def document_pieces(document):
    *ready, last = cut_text(document)
    yield from ((text, False) for text in ready)
    if last:
        yield last, True


def cut_text(text):
    """Split a text into pieces of about PIECE characters where GPT-2's pre-tokenizer splits it anyway: before a newline
    or space followed by a word. So the pieces have the same tokens as the whole text. Returns at least one piece."""
    found, start = [], 0
    while len(text) - start > 2 * PIECE:
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


def _has_rows(path):
    """Whether a Parquet file has any rows; True if it is damaged, so that the reader reports it."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows > 0
    except (OSError, pyarrow.ArrowException):
        return True


def table_pieces(source):
    """Yields (text, ends_document) for the rows of JSONL or Parquet files or of a Hugging Face Hub dataset."""
    import datasets

    name = " ".join(source.paths)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the error below reports what it would log
    try:
        if source.kind == "hub":
            name, _, split = source.paths[0].partition("@")
            repository, _, config = name.partition(":")
            rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        else:
            paths = [path for path in source.paths if source.kind != "parquet" or _has_rows(path)] or source.paths
            rows = datasets.load_dataset(source.kind, data_files=[glob.escape(path) for path in paths],
                                         split="train", streaming=True)
        column = None
        for row in rows:
            text = row.get("text")
            if "text" not in row:  # use the only string column, the same one in every row
                strings = {key for key, value in row.items() if isinstance(value, str)}
                column = column or next(iter(strings), None)
                if strings - {column} or not strings and all(value is not None for value in row.values()):
                    raise UserError(f"{name}: no column named text (found {', '.join(row)}); rename one of them")
                text = row[column] if strings else None
            if not isinstance(text, str | None):
                raise UserError(f"{name}: the column text has {type(text).__name__}, not text; convert it")
            if text:
                yield from document_pieces(text)
    except UserError:
        raise
    except Exception as error:  # datasets wraps its readers' errors in many types of its own
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if source.kind == "hub":
            raise UserError(f"{source.paths[0]}: {reason}; name a configuration as {repository}:NAME, a split other "
                            f"than train as {name}@SPLIT") from None
        raise UserError(f"{name}: not readable as {source.kind}: {reason}") from None
