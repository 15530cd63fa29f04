"""Which text is held out for validation without --val-data: whole documents, chosen by their content, so that each
stays on its side of the split whatever is added, in any order and with any seed."""

import hashlib
import os

from mini_llm.tokenizer import END_OF_TEXT


def place(text):
    """A document's place in [0, 1), the same for every copy of it: a hash of its first piece, without the blanks around
    it, which depend on the kind of file. Places below --val-ratio are held out."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=6, person=b"validation").digest()) / 2**48


def spread(index):
    """The same for the file number `index` of the built-in corpus, which never grows: multiples of the golden ratio
    are spread evenly enough to split even a few hundred files in the right proportion."""
    return (index + 1337) * 0.6180339887498949 % 1.0


def takes_tails(sources, ratio):
    """Whether the tail of each source is held out instead: they are text files, and too few to choose whole ones. Of 50
    files, hashes would hold out none at all once in two hundred times."""
    return len(sources) * ratio < 5 and all(source.kind == "text" for source in sources)


def tail_start(file, ratio):
    """The byte where the last `ratio` of a text file begins, moved on to the next end of a document (unless that leaves
    less than half of it), else of a line. Marks and blanks at the end of the file do not count."""
    mark = END_OF_TEXT.encode()
    with open(file, "rb") as stream:
        if not (size := _text_size(stream, mark)):
            return os.path.getsize(file)
        start = int(size * (1 - ratio))
        first = max(0, start - len(mark) + 1)  # a mark that begins here or later ends after `start`
        stream.seek(first)
        window = stream.read(min(1 << 20, size - first))
    found = window.find(mark)
    if found >= 0:
        end = first + found + len(mark)
        if size - end >= (size - start) / 2:
            return end
        start = min(start, first + found)  # not inside the mark
    window = window[start - first:found if found >= 0 else None]
    if (line_end := window.find(b"\n")) >= 0:
        return start + line_end + 1
    while window and window[0] & 0xC0 == 0x80:  # not inside a UTF-8 character
        start, window = start + 1, window[1:]
    return start


def _text_size(stream, mark):
    """Bytes of a text file up to its last one that belongs to neither a mark nor a blank."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - (1 << 20))
        stream.seek(begin)
        if text := stream.read(end - begin).replace(mark, b" " * len(mark)).rstrip():
            return begin + len(text)
        end = begin
    return 0
