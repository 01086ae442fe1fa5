"""What to install where an adapter's library is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say of an import that fails which extra brings what is missing.

    Raises:
        ModuleNotFoundError: in one line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error}; pip install "detseg_losses[{extra}]"'
        raise ModuleNotFoundError(message, name=error.name) from None
