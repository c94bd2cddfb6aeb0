"""Errors that people read: their classes, how they end a process, and the words of their messages.

Nothing here imports torch: a wrong flag is answered within half a second.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake that the user can put right; the message names the flag or file, what was found and what to do."""


class DataError(ValueError):
    """A mistake in the user's data: what was found in which file or flag, and what to do about it.

    str() gives problem and advice. A list of many mistakes shows every problem, and each advice once.

    Args:
        problem: sentences that begin with the flag or file; after a list of lines, the advice stands on its own line.
        advice: sentences that also fit several mistakes of the same kind.
    """

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(problem, advice)
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        separator = "\n" if "\n" in self.problem else " "
        return f"{self.problem}{separator}{self.advice}" if self.advice else self.problem


class RankError(UserError):
    """An error that only this rank sees; this rank prints it. Errors common to all ranks are printed by rank 0."""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def errors_for_people(debug):
    """Context manager: a UserError or DataError becomes one message and exit status 2, Ctrl-C status 130.

    Args:
        debug: let every exception through, with its traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (UserError, DataError) as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, RankError):
            print(f"error: {error}\n", end="", file=sys.stderr)  # one write: other ranks may print at the same time
        else:
            time.sleep(1)  # the launcher ends all ranks when one ends: let rank 0 print first
        sys.exit(2)
    except OSError as error:
        if debug or error.errno is None:
            raise
        advice = {
            errno.EACCES: "give one that you may use", errno.EPERM: "give one that you may use",
            errno.ENOSPC: "free some space, or name another folder", errno.EDQUOT: "free some space",
            errno.EFBIG: "files may not be that large here: name another folder",
            errno.EROFS: "that disk is read-only: name another folder",
        }.get(error.errno, "--debug shows where that was")  # fmt: skip
        print(f"error: {error.filename or 'a file'}: {error.strerror}; {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def quiet_libraries(debug):
    """Show only errors of the libraries that are imported from here on; Ctrl-C ends the process without a word."""
    if debug:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the next `errors_for_people`
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging  # the light part of transformers

    transformers_logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# Words of messages

FIRST_NAMES = 5  # names of a long list that a message shows


def shown(name: str) -> str:
    """A name in printable form: line breaks and bytes that are not UTF-8 are escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def brief(value: Any) -> str:
    """A value as Python writes it, cut after 57 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def because(error: Exception) -> str:
    """The text of an error, without its number and file."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def counted(number: int, unit: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {unit}{'s' * (number != 1)}"


def is_or_are(number: int) -> str:
    """ "is" for 1, else "are"."""
    return "is" if number == 1 else "are"


def first_names(names: Sequence[str], total: int | None = None) -> str:
    """The first names of a list, printable. total: the number of names where `names` is not the whole list."""
    names, total = list(names[:FIRST_NAMES]), len(names) if total is None else total
    return ", ".join(map(shown, names)) + (", …" if total > len(names) else "")
