"""Ctrl-C and SIGTERM end a run in good order and say how to go on with it. Imports nothing heavy."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the run to end. Not an Exception: nothing on the way takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopping() -> Iterator[None]:
    """Raises ``Stopped`` where the first signal finds the program; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for every in SIGNALS:
        signal.signal(every, signal.SIG_DFL)
    raise Stopped(number)


def again(key: str, folder: str | Path) -> str:
    """The command line of this process with its output folder given by ``key``."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(f"{key}=")]
    return shlex.join(["python", sys.argv[0], *arguments, f"{key}={folder}"])


def end_stopped(stopped: Stopped, key: str, folder: str | Path) -> NoReturn:
    """Says how to go on, and exits as a program ended by that signal does."""
    print(f"Stopped by {stopped}. To go on: {again(key, folder)}", file=sys.stderr)
    sys.exit(128 + stopped.number)
