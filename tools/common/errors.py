"""Errors that the user can mend are one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from detseg_losses.integrations.samples import DataError


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


def fail(message: object) -> NoReturn:
    """Print the message in one line and exit."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report errors of these kinds, by default those that are only raised for the user to read."""
    reported = kinds or (UsageError, DataError)
    try:
        yield
    except reported as error:
        fail(error)
