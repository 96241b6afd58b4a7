"""CIFAR-10 and CIFAR-100, downloaded by torchvision."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torchvision.datasets import CIFAR10, CIFAR100

from datamodules.image_data import Batch, ImageData, Splits


class Cifar(ImageData):
    """50,000 training and 10,000 test images of 32x32 pixels in ``num_classes`` 10 or 100 classes.

    Args:
        root: folder the archive is downloaded to, or lies in already.
        num_classes: 10 or 100.

    Raises:
        ValueError: another number of classes.
        OSError: from ``load``, the archive is neither there nor can it be downloaded.
    """

    def __init__(self, root: str, num_classes: int = 10, **options: Any):
        super().__init__(**options)
        kinds: dict[int, type[CIFAR10]] = {10: CIFAR10, 100: CIFAR100}
        if num_classes not in kinds:
            raise ValueError(f"Expected dataset.num_classes of 10 or 100, got {num_classes}.")
        self.kind, self.root = kinds[num_classes], root
        self.input_shape = (3, 32, 32)
        self.class_names = [str(label) for label in range(num_classes)]

    def load(self) -> Splits:
        return self.split_in_memory(self._read(train=True), self._read(train=False))

    def _read(self, train: bool) -> Batch:
        try:
            data: torchvision.datasets.CIFAR10 = self.kind(self.root, train, download=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{self.kind.__name__} could not be downloaded ({error}); put {self.kind.filename} into {self.root} "
                "by hand, or use dataset=digits, which needs no download."
            ) from error
        self.class_names = list(data.classes)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
