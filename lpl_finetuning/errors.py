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
from collections.abc import Iterable, Sequence
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


@contextlib.contextmanager
def during(what):
    """Context manager and decorator: an exception that passes gets an attribute `during`; the innermost stays.

    Args:
        what: what is being done, such as "encoding images".
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "during"):
            error.during = what
        raise


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


def near_name(word: str, names: Iterable[str]) -> str | None:
    """The name that a word is a slip of the finger or a short form of; None where no name is that near.

    A slip: one or two letters are missing, added, exchanged or swapped, also in single words between underscores. A
    short form: the beginning of one name only, or of its words. Names that differ in their digits are other names.
    """
    plain, names = word.replace("-", "_").lower(), list(names)

    def is_near(name: str) -> bool:
        same = [character for character in name if character.isdigit()] == [each for each in plain if each.isdigit()]
        return same and (_is_slip(plain.replace("_", ""), name.replace("_", "")) or _in_words(plain, name))

    forms = {name: name.replace("-", "_").lower() for name in names}
    near = [name for name, form in forms.items() if is_near(form)]
    longer = [name for name, form in forms.items() if form.startswith(plain)]
    if len(plain) >= 6 and not near and len(longer) == 1:
        return longer[0]
    return min(near, key=lambda name: _distance(plain, forms[name]), default=None)


def _is_slip(word: str, name: str) -> bool:
    """Whether two words differ by few letters for their length; short ones must have the same letters but one."""
    few = 1 if len(word) < 6 else 2
    if len(word) == len(name) <= 4:
        return sorted(word) == sorted(name) and _distance(word, name) <= few
    return _distance(word, name) <= few


def _in_words(word: str, name: str) -> bool:
    """Whether two names have the same words, but for slips and words cut short; some word must be the same."""
    pairs = list(zip(word.split("_"), name.split("_"), strict=False))
    if len(pairs) < 2 or len(word.split("_")) != len(name.split("_")):
        return False
    alike = [_is_cut(one, other) or _is_cut(other, one) or (len(one) > 4 and _is_slip(one, other))
             for one, other in pairs]  # fmt: skip
    return all(alike) and any(one == other for one, other in pairs)


def _is_cut(word: str, name: str) -> bool:
    """Whether a word is another, or at least three letters of its beginning."""
    return word == name or (len(word) >= 3 and name.startswith(word))


def _distance(word: str, name: str) -> int:
    """Letters to be added, removed, exchanged or swapped with the next to make one word of the other."""
    rows = [list(range(len(name) + 1))]
    for i, letter in enumerate(word, start=1):
        row = [i]
        for j, other in enumerate(name, start=1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == other:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def first_names(names: Sequence[str], total: int | None = None) -> str:
    """The first names of a list, printable. total: the number of names where `names` is not the whole list."""
    names, total = list(names[:FIRST_NAMES]), len(names) if total is None else total
    return ", ".join(map(shown, names)) + (", …" if total > len(names) else "")
