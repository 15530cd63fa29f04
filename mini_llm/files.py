"""Files of a run: written whole or not at all, found beside its checkpoint, read although a kill cut them short."""

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import re
import shlex
from pathlib import Path

# What the names of a run's other checkpoints have between its stem and `.pt`, as a regex.
OTHER_CHECKPOINT = r"\.(best(-of-\d+)?|prev|nonfinite|(step|kept)-\d+)"
# How a record of metrics.jsonl begins, for readers that do not parse it all: histograms take megabytes.
RECORD_HEAD = re.compile(rb'\{"step": (?P<step>\d+), "time": (?P<time>[^,]+), ("event": "(?P<event>\w+)")?')
# Errors of file systems that cannot sync, or not folders: network file systems, FUSE. A failing disk gives EIO.
NO_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY,
           errno.EPERM)
# A tokenizer's own files → a key that tells each of them from other JSON files.
TOKENIZER_KEYS = {"tokenizer.json": "added_tokens", "tokenizer_config.json": "tokenizer_class"}
# Kind of event in metrics.jsonl → the fields that its record must have, with their types.
EVENTS = dict(config=dict(config=dict), sample=dict(text=str), alert=dict(title=str, text=str), exit=dict(code=int))


def command(script, *arguments):
    """The command line of one of our scripts, as it is typed in the working folder."""
    path = Path(__file__).parent.parent / script
    with contextlib.suppress(OSError):  # the working folder may be gone
        path = os.path.relpath(path)
    return shlex.join(["python", *map(str, (path, *arguments))])


def exists(path):
    """Whether there is such a file or folder. Raises OSError if that cannot be known, as on a network file system that
    does not answer; Path.exists does not, from Python 3.14 on."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    return True


def same_file(a, b):
    """Whether both paths name one file, such as hard links do. False if either is missing."""
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False


@contextlib.contextmanager
def replacing(path):
    """Yields the path of a draft that replaces `path` at the end: a kill at any moment leaves either the old file or
    the new one, an error the old one and no draft."""
    draft = path.with_name(path.name + ".tmp")
    draft.unlink(missing_ok=True)  # left by a kill, it may be a checkpoint's second name: not to be written into
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)  # renaming onto another hard link of the same file does nothing


def sync(fd):
    """Flush an open file to the disk, to survive a power cut. After an OSError a second call may wrongly succeed."""
    with contextlib.suppress(AttributeError), _where_supported():  # on macOS, where fsync stops at the disk's own cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        return
    os.fsync(fd)


def sync_path(path):
    """Flush a file, or the names in a folder, where the file system can."""
    with _where_supported():
        fd = os.open(path, os.O_RDONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _where_supported():
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def make_folder(path):
    """Create a folder, with those above it, that survives a power cut."""
    if not exists(path):
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def write_whole(path, content):
    """Replace a file's content, flushed before the rename: else a power cut may leave an empty file."""
    with replacing(path) as draft, open(draft, "wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def read_json(path):
    """The JSON object in a file. Raises ValueError with the reason if the file holds anything else."""
    try:
        if not os.path.isfile(path):  # a named pipe would block, a device might never end
            raise ValueError("no such file")
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def tokenizer_files(folder):
    """The files of a tokenizer's folder to copy along with its model: none that are hidden, which macOS leaves, nor
    devices, which may be endless. A link may lead to what is not to be published: only those to a tokenizer's own files
    are taken, as in a snapshot of the Hub."""

    def is_own(file):
        with contextlib.suppress(ValueError):
            return file.name in TOKENIZER_KEYS and TOKENIZER_KEYS[file.name] in read_json(file)
        return False

    found = sorted(folder.glob("[!.]*"))
    return [file for file in found if (is_own(file) if file.is_symlink() else file.is_file())]


def without_infinity(record):
    """`record` with None (JSON's null) in place of every infinite or NaN float, at any depth."""
    if isinstance(record, dict):
        return {name: without_infinity(value) for name, value in record.items()}
    if isinstance(record, list):
        return [without_infinity(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def beside_run(path, suffix):
    """checkpoints/minigpt.best.pt, `.tokenizer` → checkpoints/minigpt.tokenizer, which all checkpoints of a run share.
    `path`: one of those checkpoints, or the run's metrics.jsonl."""
    path = Path(path)
    stem = path.name.removesuffix(".metrics.jsonl") if path.name.endswith(".metrics.jsonl") else path.stem
    return path.with_name(re.sub(rf"{OTHER_CHECKPOINT}$", "", stem) + suffix)


def matching_files(prefix, pattern):
    """The files whose paths are `prefix` plus a match of the regex `pattern`, sorted."""
    return sorted(file for file in prefix.parent.glob(glob.escape(prefix.name) + "*")
                  if re.fullmatch(pattern, file.name.removeprefix(prefix.name)))


def read_records(path):
    """The records of a metrics.jsonl, in order, without torn lines and those that no run writes."""
    if not os.path.isfile(path):  # a named pipe would block
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with open(path, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if _is_record(record := json.loads(line)):
                    yield record


def _is_record(record):
    if not isinstance(record, dict):
        return False
    step, seconds, event = (record.get(name) for name in ("step", "time", "event"))
    if event is None:
        complete = all(value is None or isinstance(value, (int, float, dict)) for value in record.values())
    else:
        complete = isinstance(event, str) and all(isinstance(record.get(name), kind)
                                                  for name, kind in EVENTS.get(event, {}).items())
    return (complete and type(step) is int and 0 <= step < 1 << 63
            and isinstance(seconds, (int, float)) and 0 <= seconds < 1 << 37)  # the year 6325
