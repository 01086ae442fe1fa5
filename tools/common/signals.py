"""SIGINT (Ctrl-C) and SIGTERM end a run between two steps, where its state is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from common.errors import Interrupted

LEAST_GAP = 1.0
"""Seconds after which another Ctrl-C is a second one: launchers pass on what a terminal sent."""


class Signals:
    """While it is entered, a signal raises Interrupted: at once, or when :meth:`check` is called.

    Attributes:
        received: number of the signal that waits to be raised, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Interrupted(number)
        if not self.received:
            self.received, self._time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._time >= LEAST_GAP:
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish: only a second Ctrl-C is raised within it."""
        with self._set(True):
            yield
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a deferred block, raise signals at once again."""
        self.check()
        with self._set(False):
            yield

    @contextmanager
    def _set(self, deferred: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def check(self) -> None:
        """Raise the signal that was received."""
        if self.received:
            number, self.received = self.received, 0
            raise Interrupted(number)


def outlive_signals(worker: int) -> None:
    """Let a worker of a DataLoader leave signals to the process that it loads for.

    A terminal or a cluster sends them to the whole group of processes, and without its workers
    the training process could not finish its step. It ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
