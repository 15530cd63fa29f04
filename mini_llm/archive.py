"""Files that are written whole or not at all, and verified when read: what torch.save writes, a zip archive of tensors
and plain values that `torch.load(path, weights_only=True)` reads, with its SHA-256 in the zip comment."""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from mini_llm import hardware
from mini_llm.errors import UserError, first_line
from mini_llm.files import make_folder, replacing, sync, sync_path

COMMENT = b"sha256:"


class DamagedCheckpoint(Exception):
    pass


def load(path, mapped=False):
    """A verified checkpoint with its tensors on the CPU. Raises DamagedCheckpoint, naming file and problem, or
    UserError if it may be intact but cannot be read now, so that the caller does not fall back to an older one.
    `mapped`: only tensors that are used take memory, and the file has to stay until then (Linux only)."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block, a device may be endless
            raise DamagedCheckpoint(f"{path} is not a file")
        with open(path, "rb") as file:  # once: a run that still trains may replace it meanwhile
            stated, actual = read_digest(file), file_digest(file)
            if stated is None:
                what = "not" if zipfile.is_zipfile(file) else "cut short, or not"
                raise DamagedCheckpoint(f"{path} is {what} a checkpoint of mini-llm (it has no SHA-256 of its content)")
            if stated != actual:
                raise DamagedCheckpoint(f"{path} is damaged (its SHA-256 is not the one it was written with)")
            file.seek(0)
            opened = f"/proc/self/fd/{file.fileno()}"  # torch.load maps by name only; `path` may be another file now
            mapped = mapped and os.path.exists(opened)
            return torch.load(opened if mapped else file, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except DamagedCheckpoint:
        raise
    except Exception as error:  # torch.load raises many types, from pickle's to zip's
        why = first_line(error)
        if isinstance(error, OSError) and error.errno != errno.ELOOP or hardware.out_of_memory(error):
            raise UserError(f"{path} cannot be read now ({why}); try again when it can be, or move it away to go on "
                            f"from the one before") from None
        raise DamagedCheckpoint(f"{path} is not readable as a checkpoint ({why})") from None


def peek(path):
    """The plain values of a checkpoint, unverified, with its tensors left in the file; {} if it cannot be read."""
    with contextlib.suppress(Exception):  # torch.load raises many types, from pickle's to zip's
        if os.path.isfile(path):  # a pipe would block
            return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    return {}


def save(path, payload, keep=None, names=()):
    """Write `payload`, tensors and plain values, to a temporary file, sync it, and rename it to `path`: a kill leaves
    the old file or the new one. Once complete, the new one also gets the other `names`, and the old one that `keep`."""
    path = Path(path)
    payload = tree_map_only(torch.Tensor, torch.Tensor.cpu, payload)  # so any machine can read it
    make_folder(path.parent)
    link_error = None
    with replacing(path) as draft:
        with open(draft, "wb") as file:
            writer = _HashingFile(file)
            try:
                torch.save(payload, writer)
            except RuntimeError as error:  # torch's own error when its writer fails to write
                raise writer.error or error from None
            file.seek(-2, os.SEEK_END)
            comment = COMMENT + writer.hash.hexdigest().encode()
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            sync(file.fileno())
        for name in names:
            try:
                link(draft, name)
            except OSError as error:  # no room for a copy, on a disk without links: `path` itself can still be written
                link_error = error
        if keep and path.exists():
            link(path, keep)
    sync_path(path.parent)
    if link_error:
        raise link_error


def link(source, target):
    """Give a file a second name, replacing any file that has that name."""
    with replacing(target) as draft:
        try:
            os.link(os.path.realpath(source), draft)  # resolves a symbolic link
        except OSError:  # a file system without hard links
            shutil.copyfile(source, draft)
            sync_path(draft)


class _HashingFile:
    """A file open for writing that hashes what is written, except the last two bytes, which `save` replaces."""

    def __init__(self, file):
        self.file, self.hash, self.tail, self.error = file, hashlib.sha256(), b"", None

    def write(self, block):
        view = memoryview(block).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.error = error
            raise
        if len(view) < 2:
            view = memoryview(self.tail + bytes(view))
        else:
            self.hash.update(self.tail)
        self.hash.update(view[:-2])
        self.tail = bytes(view[-2:])
        return len(block)

    def flush(self):
        self.file.flush()


def read_digest(file):
    """The SHA-256 stored in a checkpoint's comment, or None. `file` is open for reading."""
    length = len(COMMENT) + 64
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - length))
    tail = file.read()
    return tail[len(COMMENT):].decode("ascii", "replace") if tail.startswith(COMMENT) else None


def file_digest(file):
    """The SHA-256 of a checkpoint's bytes before the comment's length field."""
    left = file.seek(0, os.SEEK_END) - len(COMMENT) - 64 - 2
    digest = hashlib.sha256()
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()
