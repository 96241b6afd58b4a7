"""What may go wrong in the middle of a run through no fault of the program, said in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from callbacks.finite_loss import NonFiniteLoss
from datamodules.decoding import UnreadableImage
from running.command_line import SHOW_ALL, Refused

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DISK |= {errno.EEXIST, errno.EISDIR, errno.ENOTDIR}


@contextmanager
def refusing_failures(folder: Path) -> Iterator[None]:
    """Turns a broken image, a loss that is no number, a full disk or a full GPU into one line.

    Raises:
        Refused: for those. Anything else passes as it is.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder)
        if SHOW_ALL or reason is None:
            raise
        raise Refused(reason) from error


def _reason(error: Exception, folder: Path) -> str | None:
    if isinstance(error, UnreadableImage):
        return error.reason()
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU's memory is full; lower dataset.batch_size or dataset.eval_batch_size."
    if isinstance(error, OSError) and error.errno in DISK:
        return (
            f"Cannot write {error.filename or folder}: {error.strerror}. Nothing before it is lost: mend that, and the "
            "same command with the same hydra.run.dir goes on from the last checkpoint."
        )
    return str(error) if isinstance(error, NonFiniteLoss) else None
