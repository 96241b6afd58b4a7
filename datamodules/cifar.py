"""CIFAR-10 and CIFAR-100, downloaded and checked once, read by torchvision."""

from __future__ import annotations

import shutil
import tarfile
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

from datamodules.image_data import Batch, ImageData, Splits

KINDS: dict[int, type[CIFAR10]] = {10: CIFAR10, 100: CIFAR100}
ARCHIVE_BYTES = {10: 170498071, 100: 169001437}


class Unavailable(OSError):
    """Data that cannot be had, said in one line."""


class Cifar(ImageData):
    """50,000 training and 10,000 test images of 32x32 pixels in ``num_classes`` 10 or 100 classes.

    Files are trusted by their checksums alone: those unpacked in ``root``, else an archive that lies there, else a
    download. Processes that start together wait for the first of them.

    Args:
        root: folder the archive is downloaded to, or lies in already. It need not be writable once it is unpacked.
        num_classes: 10 or 100.

    Raises:
        ValueError: another number of classes.
        Unavailable: from ``load``: the archive is damaged, or neither there nor to be downloaded, or ``root`` cannot be
            written to.
    """

    def __init__(self, root: str, num_classes: int = 10, **options: Any):
        super().__init__(**options)
        if num_classes not in KINDS:
            raise ValueError(f"Expected dataset.num_classes of 10 or 100, got {num_classes}.")
        self.kind, self.archive_bytes = KINDS[num_classes], ARCHIVE_BYTES[num_classes]
        self.root = Path(root).expanduser().absolute()
        self.archive = self.root / self.kind.filename
        self.input_shape = (3, 32, 32)
        self.class_names = [str(label) for label in range(num_classes)]

    def load(self) -> Splits:
        if self._damaged():
            self._provide()
        return self.split_in_memory(self._read(train=True), self._read(train=False))

    def _read(self, train: bool) -> Batch:
        with warnings.catch_warnings():
            # the files are from an old NumPy; 2.4.0 to 2.4.4 complain about that
            warnings.filterwarnings("ignore", r"dtype\(\): align should be passed as")
            data = self.kind(self.root, train)
        self.class_names = list(data.classes)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)

    def _damaged(self) -> list[Path]:
        """The unpacked files that are missing or not as they should be."""
        kind = self.kind
        files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        folder = self.root / kind.base_folder
        return [folder / name for name, md5 in files if not check_integrity(folder / name, md5)]

    def _provide(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.archive.name}.lock"):
                # another process may have provided them while this one waited
                if self._damaged():
                    self._find_archive()
                    self._unpack()
        except Unavailable:
            raise
        except OSError as error:
            raise Unavailable(
                f"{self.kind.__name__} is not in dataset.root={self.root}, which cannot be written to ({error}); make "
                "it writable, or give another dataset.root."
            ) from error

    def _find_archive(self) -> None:
        if not self.archive.exists():
            self._download()
        elif fault := self._fault(self.archive):
            raise Unavailable(f"{self.archive} {fault}; delete it to download it again, or put a whole one there.")

    def _fault(self, archive: Path) -> str | None:
        """What is wrong with an archive, if anything."""
        if (found := calculate_md5(archive)) == self.kind.tgz_md5:
            return None
        if (size := archive.stat().st_size) < self.archive_bytes:
            return f"is truncated, {size} of {self.archive_bytes} bytes"
        return f"has the wrong checksum, expected md5 {self.kind.tgz_md5}, got {found}"

    def _download(self) -> None:
        url, aside = self.kind.url, self.archive.with_name(f"{self.archive.name}.part")
        try:
            download_url(url, self.root, aside.name, self.kind.tgz_md5)
            aside.replace(self.archive)
        except (OSError, RuntimeError, HTTPException) as error:
            # torchvision's RuntimeError says no more than that the file is not the right one
            damaged = isinstance(error, RuntimeError) and aside.exists()
            reason = f"what came {self._fault(aside)}" if damaged else error
            raise Unavailable(
                f"{self.kind.__name__} could not be downloaded from {url} ({reason}); put that file at {self.archive}, "
                "or use dataset=digits, which needs no download."
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def _unpack(self) -> None:
        wanted = {f"{file.parent.name}/{file.name}": file for file in self._damaged()}
        (self.root / self.kind.base_folder).mkdir(exist_ok=True)
        # in the archive's own order, since going back would decompress it from its start
        with tarfile.open(self.archive) as archive:
            for member in archive:
                if member.name in wanted and (source := archive.extractfile(member)):
                    with source, wanted[member.name].open("wb") as target:
                        shutil.copyfileobj(source, target)
        if damaged := self._damaged():
            raise Unavailable(f"{damaged[0]} is damaged after unpacking {self.archive}; check the disk, and try again.")
