"""Which text is held out for validation, if there is no --val-data: whole documents, chosen by what is in them, so that
each stays on its side of the split whatever is added, in whatever order and with whatever seed."""

import hashlib
import os

from tokenizer import END_OF_TEXT


def place(text):
    """A document's place in [0, 1), a hash of its first piece without the blanks around it, which depend on the kind of
    file: it validates if that is below --val-ratio, as does every copy of it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=6, person=b"validation").digest()) / 2**48


def spread(index):
    """The same of a file of the built-in corpus, to which nobody adds: multiples of the golden ratio are evenly spread,
    so that even a few hundred files are split in the right proportion."""
    return (index + 1337) * 0.6180339887498949 % 1.0


def takes_tails(sources, ratio):
    """Whether the tail of each source is held out: they are text files, too few to hold out whole ones. A tenth of 50,
    by their hash, is none once in two hundred times."""
    return len(sources) * ratio < 5 and all(source.kind == "text" for source in sources)


def tail_start(file, ratio):
    """The byte where the last `ratio` of a text file begins, moved on to the next end of a document (unless that leaves
    less than half of it), else of a line."""
    size, mark = os.path.getsize(file), END_OF_TEXT.encode()
    start = int(size * (1 - ratio))
    first = max(0, start - len(mark) + 1)  # a mark that begins here or later ends after `start`
    with open(file, "rb") as stream:
        stream.seek(first)
        window = stream.read(1 << 20)
    if (last := window.find(mark)) >= 0:
        end, follows = first + last + len(mark), window[last + len(mark):].strip() or first + len(window) < size
        if follows and size - end >= (size - start) / 2:
            return end
        start = min(start, first + last)  # not inside the file's last mark, nor in what is blank after it
    window = window[start - first:last if last >= 0 else None]
    if (found := window.find(b"\n")) >= 0 and start + found + 1 < size:
        return start + found + 1
    while window and window[0] & 0xC0 == 0x80:  # not inside a UTF-8 character
        start, window = start + 1, window[1:]
    return start
