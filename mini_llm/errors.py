"""Errors that people can act on: one line on stderr and an exit code, instead of a traceback."""

import contextlib
import errno
import os
import re
import signal
import sys


class UserError(Exception):
    """An error that the user can fix: shown as one line on stderr, exit code 2."""

    def __str__(self):
        """One line of readable length, whatever characters are in the names and values that it quotes."""
        text = super().__str__()
        text = text if len(text) < 2000 else f"{text[:1000]} ... {text[-500:]}"
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class RunFailed(Exception):
    """A failure that ends the run: shown as one line on stderr, exit code 1."""


def visible(text):
    """`text` with the characters escaped that act on a terminal: control characters other than newlines and tabs,
    overrides of the writing direction, and halves of surrogate pairs."""
    unseen = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unseen, lambda found: ascii(found[0])[1:-1], text)


def first_line(error):
    """The first line of an exception's message, or its type's name if there is none; 200 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def needed_packages(otherwise=""):
    """Turn a missing package into a UserError: not every training machine has all packages installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"the {error.name} package is missing: pip install {error.name}{otherwise}") from None


@contextlib.contextmanager
def one_line_errors():
    """Wraps a command's main: a UserError or a full disk becomes one line on stderr and exit code 2; a closed pipe ends
    it quietly, and SIGTERM after its temporary files are removed."""
    leave_on_sigterm()
    try:
        with needed_packages():
            yield
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's flush at exit fails again
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {error.filename or 'the output'}: {error.strerror}; make room there", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def print_any_character():
    """Make stdout replace the characters that its terminal cannot encode, instead of raising an error."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout, which is no file, takes any
        sys.stdout.reconfigure(errors="replace")


def leave_on_sigterm():
    """Make SIGTERM a normal exit, which removes temporary files and drafts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
