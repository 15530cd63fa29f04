"""A file that is written whole or not at all, and verified when read: what torch.save writes, an archive of tensors and
plain values that `torch.load(path, weights_only=True)` reads, with its SHA-256 in the archive's own comment field.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

import hardware
from config import UserError

COMMENT = b"sha256:"


class DamagedCheckpoint(Exception):
    pass


def load(path):
    """A verified checkpoint, its tensors on the CPU. Raises DamagedCheckpoint, naming the file and what is wrong, and
    UserError where that may be whole, but cannot be read now: another must not be taken for the newest then."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, a device read without end
            raise DamagedCheckpoint(f"{path} is not a file")
        stated, actual = read_digest(path), file_digest(path)
        if stated != actual:
            raise DamagedCheckpoint(f"{path} is damaged (its SHA-256 is not the one it was written with)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except DamagedCheckpoint:
        raise
    except Exception as error:  # torch.load raises many types, from pickle's to zip's
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        if isinstance(error, OSError) and error.errno != errno.ELOOP or hardware.out_of_memory(error):
            raise UserError(f"{path} cannot be read now ({why}); try again when it can be, or move it away to go on "
                            f"from the one before") from None
        raise DamagedCheckpoint(f"{path} is not readable as a checkpoint ({why})") from None


def peek(path):
    """The plain values of a checkpoint, unverified, its tensors left in the file; {} where it cannot be read."""
    with contextlib.suppress(Exception):  # torch.load raises many types, from pickle's to zip's
        if os.path.isfile(path):  # a pipe would be waited for
            return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    return {}


def save(path, payload, keep=None):
    """Write `payload`, tensors and plain values, as `path`: to a temporary file, to the disk, under its name. A kill at
    any moment leaves the old file or the new one. The old one stays as `keep`, once the new one is whole."""
    path, payload = Path(path), tree_map_only(torch.Tensor, torch.Tensor.cpu, payload)  # any machine can read it so
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            writer = _HashingFile(file)
            try:
                torch.save(payload, writer)
            except RuntimeError as error:  # torch's own, where its writer was refused a write
                raise writer.error or error from None
            file.seek(-2, os.SEEK_END)
            comment = COMMENT + writer.hash.hexdigest().encode()
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def link(source, target):
    """Give a file a second name, in place of what has it now."""
    draft = target.with_name(target.name + ".tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), draft)  # of a symbolic link, what it leads to
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(source, draft)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    os.replace(draft, target)
    draft.unlink(missing_ok=True)  # renaming a file onto another name of itself does nothing


def _sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


class _HashingFile:
    """A file opened for writing that hashes what passes, but for the last two bytes, which the digest replaces."""

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


def read_digest(path):
    """The SHA-256 that a checkpoint states, or None."""
    length = len(COMMENT) + 64
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - length))
        tail = file.read()
    return tail[len(COMMENT):].decode("ascii", "replace") if tail.startswith(COMMENT) else None


def file_digest(path):
    """The SHA-256 of a checkpoint up to the length of its comment."""
    digest, left = hashlib.sha256(), os.path.getsize(path) - len(COMMENT) - 64 - 2
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
