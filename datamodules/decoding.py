"""Decodes image files once, on all cores, into one array kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from joblib import Parallel, delayed
from PIL import Image, ImageOps
from rich.progress import track
from torchvision.transforms.v2 import functional as F

from storage.files import written_aside


class UnreadableImage(ValueError):
    """A file that is no image, or not a whole one."""

    @classmethod
    def named(cls, file: str, more: str = "") -> UnreadableImage:
        return cls(f"Unreadable image {file}{more}; replace it, or set dataset.skip_unreadable=true.")

    def reason(self) -> str:
        """One line, also when a DataLoader's worker raised it, which puts its traceback before."""
        return str(self).splitlines()[-1].removeprefix(f"{__name__}.UnreadableImage: ")


log = logging.getLogger(__name__)
CHUNK = 500
Fit = partial[Image.Image]  # of ``fitted``


def decoded(files: Sequence[str], fit: Fit, cache: Path, skip_unreadable: bool) -> tuple[np.ndarray, ...]:
    """All files as one array, from the cache where the same files were decoded before.

    Processes that want the same array at once wait for the first of them.

    Args:
        files: paths of images.
        fit: ``fitted`` with the size (height, width) they are scaled and cropped to.
        cache: folder of the cache.
        skip_unreadable: leave unreadable files out instead of refusing them.

    Returns:
        Images (n, height, width, 3) uint8, and the positions (n,) in ``files`` of those that could be read.

    Raises:
        UnreadableImage: naming the first.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{_fingerprint(files, fit)}.npz"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            images, positions = _decode_all(files, fit)
            with written_aside(target) as file:
                np.savez(file, images=images, positions=positions)
    with np.load(target) as stored:
        images, positions = stored["images"], stored["positions"]
    unreadable = sorted(set(range(len(files))) - set(positions.tolist()))
    if unreadable and not skip_unreadable:
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise UnreadableImage.named(files[unreadable[0]], more)
    if unreadable:
        log.warning("Skipped %d unreadable images, %s first.", len(unreadable), files[unreadable[0]])
    return images, positions


def _decode_all(files: Sequence[str], fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(files), *fit.keywords["size"], 3), dtype=np.uint8)
    readable = np.zeros(len(files), dtype=bool)
    starts = range(0, len(files), CHUNK)
    # threads for a few files: processes would take longer to start than to decode
    workers = Parallel(-1, backend="loky" if len(files) > 10 * CHUNK else "threading", return_as="generator")
    chunks = workers(delayed(decode)(files[start : start + CHUNK], fit) for start in starts)
    for start, chunk in track(zip(starts, chunks, strict=True), "Decoding images", len(starts), transient=True):
        for i, image in enumerate(chunk, start):
            readable[i] = image is not None
            images[i] = 0 if image is None else image
    return images[readable], np.flatnonzero(readable)


def decode(files: Sequence[str], fit: Fit) -> list[np.ndarray | None]:
    """Each file as (height, width, 3) uint8, None where it cannot be read."""
    return [_decode(file, fit) for file in files]


def _decode(file: str, fit: Fit) -> np.ndarray | None:
    try:
        with Image.open(file) as image:
            return np.asarray(fit(as_rgb(image)))
    except Exception:  # Pillow's decoders raise all sorts of errors for a broken file
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; of 16 bits the upper ones are kept, where Pillow would saturate."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int], resize: int | None = None) -> Image.Image:
    """Scaled to a shorter side of ``resize``, or just large enough, and centre-cropped to ``size`` (height, width)."""
    if resize is not None:
        return F.center_crop(F.resize(image, [resize]), list(size))
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height))


def _fingerprint(files: Sequence[str], fit: Fit) -> str:
    stats = [(file, (stat := Path(file).stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([fit.keywords, stats]).encode()).hexdigest()[:24]
