"""Errors that the user can mend are one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from detseg_losses.integrations.samples import DataError


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


class ReportedError(UsageError):
    """An error that another process of the same run reports."""


class Interrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM ends the run; the message says what is kept."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number


def fail(message: object) -> NoReturn:
    """Print the message in one line and exit."""
    _print_line(f"error: {message}")
    sys.exit(2)


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report errors of these kinds in one line.

    By default those that are only raised for the user to read, a lack of memory, the death of a
    process that loads images, and an interruption.
    """
    try:
        yield
    except ReportedError:
        sys.exit(2)
    except Exception as error:
        if isinstance(error, kinds or (UsageError, DataError)):
            fail(original_message(error))
        if kinds or (reason := _lack(error)) is None:
            raise
        fail(reason)
    except KeyboardInterrupt as error:
        if kinds:
            raise
        _print_line(str(error) or "interrupted")
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))


def _print_line(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise a UsageError where the system refuses to write a file, as on a full disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{error.filename or place} cannot be written: {reason}") from error


def original_message(error: BaseException) -> str:
    """The message of an error, also where torch made it of a traceback in a worker process."""
    message = str(error)
    wrapped = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal ", message)
    if wrapped is None:
        return message
    return re.split(rf"^(?:\w+\.)*{wrapped[1]}: ", message, flags=re.MULTILINE)[-1]


def death_of_worker(error: BaseException) -> str | None:
    """How a process that loads images ended, in torch's words; None for any other error."""
    death = re.match(
        r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (exited unexpectedly|is killed by signal: \w+)",
        str(error),
    )
    return death and death[1]


def _lack(error: Exception) -> str | None:
    """What the user can do about a lack of memory; None for an error of any other kind."""
    if death := death_of_worker(error):
        return (
            f"a process that loads images {death}, most often for lack of memory: lower "
            "data.workers, train.batch_size or data.size (a bus error: enlarge /dev/shm); "
            "a training run goes on with --resume"
        )
    message = str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", message):
        return (
            f"the memory is not enough ({message.splitlines()[0] if message else 'MemoryError'}): "
            "lower the batch size or data.size, or raise train.accumulate"
        )
    return None
