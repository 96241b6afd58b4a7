"""Checkpoints that are known to be whole before anything is read from them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from storage.files import written_aside

SEAL = b"offramp checkpoint, sha256 "


class DamagedCheckpoint(ValueError):
    """A checkpoint of which something is missing or changed, or that is none."""


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, each ending in the SHA-256 of its content; the one before is kept beside it.

    ``torch.load(path, weights_only=True)`` reads them too: it passes over what follows a zip archive.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        with written_aside(path) as file:
            file.write(content)
            file.write(SEAL + hashlib.sha256(content).digest())
            keep(Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content = io.BytesIO(unsealed(Path(path)))
        return torch.load(content, map_location or (lambda storage, _: storage), weights_only=True)


def keep(path: Path) -> None:
    """Gives the checkpoint at ``path``, if there is one, the second name of ``previous``."""
    if path.exists():
        aside = path.with_suffix(".tmp")
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # a file system without second names
            shutil.copyfile(path, aside)
        aside.replace(previous(path))


def previous(path: Path) -> Path:
    """Where the checkpoint taken before ``path`` is."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def unsealed(path: Path) -> bytes:
    """The content of a whole checkpoint; nothing in it has been unpickled.

    Raises:
        DamagedCheckpoint: naming it, and the one before it where that is whole.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}); {_way_out(path)}") from error
    body, seal = content[: -len(SEAL) - 32], content[-len(SEAL) - 32 :]
    if seal == SEAL + hashlib.sha256(body).digest():
        return body
    raise DamagedCheckpoint(f"{path} is damaged, or no checkpoint of Offramp; {_way_out(path)}")


def _way_out(path: Path) -> str:
    earlier = previous(path)
    if earlier != path and earlier.exists():
        try:
            unsealed(earlier)
        except DamagedCheckpoint:
            return f"so is {earlier.name}. Delete both to begin that phase again."
        return f"the one before it is whole, go on from it with: mv {earlier} {path}"
    return "delete it to begin that phase again."
