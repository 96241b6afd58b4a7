"""Ctrl-C and SIGTERM end a run in good order and say how to go on with it. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FIRST_RANK = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
# the signal that asked this process to end
received: int | None = None


class Stopped(BaseException):
    """A signal asked the run to end. Not an Exception: nothing on the way takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopping() -> Iterator[None]:
    """Raises ``Stopped`` where the first signal finds the program; a second one ends it at once.

    What fails after a signal, such as a data set's worker that it reached too, fails because of it: also ``Stopped``.
    A handler that is there already, such as a job queue's, is left in place.
    """
    global received
    received = None
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                earlier[number] = signal.signal(number, _stop)
    try:
        yield
    except Exception as error:
        if received is None:
            raise
        raise Stopped(received) from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    global received
    received = number
    for every in SIGNALS:
        signal.signal(every, signal.SIG_DFL)
    raise Stopped(number)


def stop(reason: str) -> NoReturn:
    """Says why, in one line, and exits with status 1."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(1)


def leave_signals_to_parent() -> None:
    """For a process that another one ends: a signal to the whole group reaches both."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process, at once and silently, soon after its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of several that train one network."""
    return all(os.environ.get(name, "0") == "0" for name in FIRST_RANK)


def again(key: str, folder: str | Path) -> str:
    """The command line of this process with its output folder given by ``key``."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(f"{key}=")]
    value = str(folder)
    if not re.fullmatch(r"[\w./~@+:-]+", value):  # Hydra reads it otherwise as a list, a choice, another key
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return shlex.join(["python", sys.argv[0], *arguments, f"{key}={value}"])


def end_stopped(stopped: Stopped, key: str = "", folder: str | Path | None = None, said: str = "") -> NoReturn:
    """Says how to go on, and exits as a program ended by that signal does."""
    way_on = said or (f"To go on: {again(key, folder)}" if folder is not None else "")
    print(f"Stopped by {stopped}{f'. {way_on}' if way_on else ' before a run began.'}", file=sys.stderr)
    sys.exit(128 + stopped.number)
