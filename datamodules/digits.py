"""scikit-learn's bundled scans of handwritten digits: real images that need no download."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datamodules.image_data import ImageData, Splits


class Digits(ImageData):
    """1,797 scans of 8x8 pixels in 10 classes, enlarged to ``8 * scale`` and repeated into three channels.

    A fixed stratified fifth of them is the test split.
    """

    def __init__(self, scale: int = 4, **options: Any):
        super().__init__(**options)
        if scale < 1:
            raise ValueError(f"Expected dataset.scale of at least 1, got {scale}.")
        self.scale = scale
        self.input_shape = (3, 8 * scale, 8 * scale)
        self.class_names = [str(digit) for digit in range(10)]

    def load(self) -> Splits:
        digits = load_digits()
        scans = torch.from_numpy(digits.images)[:, None].mul(255 / 16).round().to(torch.uint8)
        images = scans.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3).repeat(1, 3, 1, 1)
        labels = torch.from_numpy(digits.target)
        train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        return self.split_in_memory((images[train], labels[train]), (images[test], labels[test]))
