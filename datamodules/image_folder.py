"""Any folder of class folders as a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from datamodules.decoding import UnreadableImage, as_rgb, decoded, fitted
from datamodules.image_data import ImageData, Splits

Samples = list[tuple[str, int]]


class ImageFolder(ImageData):
    """``root`` with ``train/<class>/`` and ``test/<class>/`` or ``val/<class>/``, any depth of files below.

    A root with all three has its own validation split. With two, the one beside ``train/`` is the test split, and
    validation is split off the training images. Images that fit in memory are decoded once into a cached array;
    others are decoded by workers as they are needed, with a random resized crop in place of the padded one.

    Args:
        root: the folder.
        image_size: pixels of a side, or (height, width), that images are scaled and cropped to; ``auto`` is the size
            of the first training image.
        in_memory: ``auto`` when the decoded images take no more than ``memory_limit`` bytes.
        eval_resize: pixels the shorter side is scaled to before the centre crop to ``image_size`` where images are not
            augmented (256 for a crop of 224 is ImageNet's custom); None crops as little as the shape allows.
        cache_dir: folder of the decoded arrays.
        skip_unreadable: leave unreadable files out instead of refusing them.

    Raises:
        ValueError: a missing or empty folder, or class folders that differ between splits.
    """

    def __init__(
        self,
        root: str,
        image_size: int | Sequence[int] | Literal["auto"] = "auto",
        eval_resize: int | None = None,
        in_memory: bool | Literal["auto"] = "auto",
        memory_limit: float = 4e9,
        cache_dir: str = "~/.cache/offramp",
        skip_unreadable: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.cache, self.skip_unreadable = Path(cache_dir).expanduser(), skip_unreadable
        names = _splits_of(self.root)
        self.class_names = _common_classes(self.root, list(names.values()))
        if len(self.class_names) < 2:
            raise ValueError(f"Expected at least two class folders in {self.root / 'train'}, found one.")
        self.samples = {split: _samples(self.root / name, self.class_names) for split, name in names.items()}
        self.size = _size(self.samples["train"], image_size)
        if eval_resize is not None and eval_resize < max(self.size):
            raise ValueError(f"Expected dataset.eval_resize of at least {max(self.size)}, got {eval_resize}.")
        self.fit = partial(fitted, size=self.size, resize=eval_resize)
        self.input_shape = (3, *self.size)
        memory = sum(map(len, self.samples.values())) * 3 * self.size[0] * self.size[1]
        self.in_memory = memory <= memory_limit if in_memory == "auto" else in_memory

    def fingerprint(self) -> str:
        """Of the files' names."""
        names = [
            [Path(file).relative_to(self.root).as_posix(), label] for s in self.samples.values() for file, label in s
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def load(self) -> Splits:
        if not self.in_memory:
            return self._streamed()
        read = {split: self._decoded(samples) for split, samples in self.samples.items()}
        if "val" in read:
            return Splits(*(TensorDataset(*read[split]) for split in ("train", "val", "test")))
        return self.split_in_memory(read["train"], read["test"])

    def _decoded(self, samples: Samples) -> tuple[Tensor, Tensor]:
        images, positions = decoded([file for file, _ in samples], self.fit, self.cache, self.skip_unreadable)
        labels = torch.tensor([label for _, label in samples])[torch.from_numpy(positions)]
        return torch.from_numpy(images).permute(0, 3, 1, 2), labels

    def _streamed(self) -> Splits:
        train, test = self.samples["train"], self.samples["test"]
        mirror = [v2.RandomHorizontalFlip()] if self.flip else []
        augmenting = v2.Compose([v2.RandomResizedCrop(self.size), *mirror, v2.PILToTensor()])
        plain = v2.Compose([self.fit, v2.PILToTensor()])
        if "val" in self.samples:
            parts: list[Dataset] = [self._files(train, augmenting), self._files(self.samples["val"], plain)]
        else:
            rows, val_rows = self.stratified([label for _, label in train])
            train, val = ([train[row] for row in chosen] for chosen in (rows, val_rows))
            parts = [self._files(train, augmenting), self._files(val, plain)]
        return Splits(parts[0], parts[1], self._files(test, plain))

    def _files(self, samples: Samples, transform: v2.Transform) -> Dataset:
        return ImageFiles(samples, transform, self.skip_unreadable)


class ImageFiles(Dataset):
    """Images decoded when they are asked for, by row, or by (row, seed of the random transforms).

    None for one that cannot be read and may be skipped.
    """

    def __init__(self, samples: Samples, transform: v2.Transform, skip_unreadable: bool):
        self.samples, self.transform, self.skip_unreadable = samples, transform, skip_unreadable

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int] | None:
        row, seed = key if isinstance(key, tuple) else (key, None)
        file, label = self.samples[row]
        try:
            with Image.open(file) as image, torch.random.fork_rng(devices=[]):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                return self.transform(as_rgb(image)), label
        except Exception as error:
            if self.skip_unreadable:
                return None
            raise UnreadableImage.named(file) from error


def _splits_of(root: Path) -> dict[str, str]:
    folders = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    if "train" not in folders or not folders & {"val", "test"}:
        found = f"it holds {', '.join(sorted(folders)) or 'no folders'}" if root.is_dir() else "there is no such folder"
        raise ValueError(f"Expected dataset.root={root} to hold train/ and test/ or val/; {found}.")
    if {"val", "test"} <= folders:
        return {"train": "train", "val": "val", "test": "test"}
    return {"train": "train", "test": "test" if "test" in folders else "val"}


def _common_classes(root: Path, splits: list[str]) -> list[str]:
    classes = {split: {path.name for path in (root / split).iterdir() if path.is_dir()} for split in splits}
    for split in splits:
        if not classes[split]:
            raise ValueError(f"Expected a folder for each class in {root / split}, found none.")
        if differing := classes[split] ^ classes["train"]:
            raise ValueError(
                f"Expected the same class folders in {root}/train and {root / split}; "
                f"only one of them has {', '.join(sorted(differing)[:5])}."
            )
    return sorted(classes["train"])


def _samples(folder: Path, class_names: list[str]) -> Samples:
    labels = {name: label for label, name in enumerate(class_names)}
    samples = make_dataset(folder, labels, IMG_EXTENSIONS, allow_empty=True)
    if empty := set(range(len(class_names))) - {label for _, label in samples}:
        raise ValueError(f"Found no image in {folder / class_names[min(empty)]}; add some, or remove the folder.")
    return samples


def _size(samples: Samples, image_size: int | Sequence[int] | Literal["auto"]) -> tuple[int, int]:
    if image_size == "auto":
        return _first_size(samples)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return int(height), int(width)


def _first_size(samples: Samples) -> tuple[int, int]:
    for file, _ in samples:
        with suppress(Exception), Image.open(file) as image:
            return image.height, image.width
    raise UnreadableImage.named(samples[0][0], " and all others")
