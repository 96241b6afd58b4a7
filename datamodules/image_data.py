"""What every data set shares: splits, loaders, and the preparation of a batch on the device that trains."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from datamodules.augmentation import crop_and_flip
from datamodules.sampling import EvaluationBatches, TrainingBatches, epoch_seed

# images, labels, and what a data set knows of each image besides
Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Splits:
    """Data sets of (uint8 image (C, H, W), label, …); a TensorDataset is indexed a batch at a time.

    Images that are not in memory are training images under keys (row, seed of the augmentation), others under rows.
    """

    train: Dataset
    val: Dataset
    test: Dataset


class ImageData(pl.LightningDataModule):
    """Images of one size in classes. A subclass sets ``input_shape`` and ``class_names`` and defines ``load``.

    Args:
        batch_size, eval_batch_size: images a step in training, and in validation and test.
        val_fraction: share of the training images kept for validation, stratified; where the data set has no
            validation split of its own.
        split_seed: of that split; apart from the run's seed, so that runs with other seeds validate on the same images.
        pad, flip: random crop after padding with that many black pixels, and random mirroring, of images in memory.
        mean, std: per channel, of pixels from 0 to 1; ``auto`` measures them on the training images.
        num_workers: processes that decode images which are not in memory.

    Attributes:
        extras: names of the tensors that follow the labels in a batch.

    Raises:
        ValueError: a value outside its range.
    """

    input_shape: tuple[int, int, int]
    class_names: list[str]
    extras: tuple[str, ...] = ()

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        pad: int = 4,
        flip: bool = True,
        mean: Sequence[float] | Literal["auto"] = "auto",
        std: Sequence[float] | Literal["auto"] = "auto",
        num_workers: int = 0,
    ):
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"Expected dataset.val_fraction between 0 and 1, got {val_fraction}.")
        if not isinstance(pad, int) or pad < 0:
            raise ValueError(f"Expected dataset.pad to be a whole number of at least 0, got {pad}.")
        for key, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Expected dataset.{key} to be a whole number of at least 1, got {size}.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.pad, self.flip = pad, flip
        self.mean, self.std = mean, std
        self.num_workers = num_workers
        self.splits: Splits | None = None
        self.stream: tuple[int, int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def load(self) -> Splits:
        """Reads the data set."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of the files, without their being read; empty where the config alone says what the images are."""
        return ""

    def setup(self, stage: str | None = None) -> None:
        """Reads the data set once, and measures what is ``auto``."""
        if self.splits is None:
            self.splits = self.load()
            self.mean, self.std = self._moments(self.splits.train)
            scale = [torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std)]
            self._mean, self._std = scale

    def _moments(self, train: Dataset) -> tuple[Sequence[float], Sequence[float]]:
        if self.mean != "auto" and self.std != "auto":
            return self.mean, self.std
        mean, std = channel_moments(train.tensors[0]) if isinstance(train, TensorDataset) else IMAGENET_MOMENTS
        return mean if self.mean == "auto" else self.mean, std if self.std == "auto" else self.std

    def stratified(self, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the images to train on and to validate on, every class in both by its share.

        Raises:
            ValueError: too few images of a class.
        """
        try:
            train, val = train_test_split(
                np.arange(len(labels)), test_size=self.val_fraction, random_state=self.split_seed, stratify=labels
            )
        except ValueError as error:
            raise ValueError(
                f"The {len(labels)} training images cannot be split with dataset.val_fraction={self.val_fraction}: "
                f"{error} Add images or change the fraction."
            ) from error
        return np.sort(train), np.sort(val)

    def split_in_memory(self, train: Batch, test: Batch) -> Splits:
        """Splits for images (N, C, H, W) and labels (N,) in memory, validation taken from the training images."""
        rows, val_rows = (torch.from_numpy(rows) for rows in self.stratified(train[1].tolist()))
        images, labels = train
        parts = [(images[rows], labels[rows]), (images[val_rows], labels[val_rows]), test]
        return Splits(*(TensorDataset(in_channels_last(images), labels) for images, labels in parts))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 images (N, C, H, W) on the training device to normalized float ones, augmented while training."""
        images, *rest = batch
        in_memory = self.splits is not None and isinstance(self.splits.train, TensorDataset)
        if self.trainer is not None and self.trainer.training and in_memory:
            images = crop_and_flip(images, self.pad, self.flip)
        return self.normalize(images), *rest

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to float of mean 0 and deviation 1 a channel."""
        self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return images.float().sub_(self._mean).div_(self._std)

    @property
    def augments(self) -> bool:
        """Whether a training image differs from epoch to epoch."""
        in_memory = isinstance(self._loaded.train, TensorDataset)
        return not in_memory or self.pad > 0 or self.flip

    def annotate(self, column: Tensor | None) -> None:
        """Lets one more tensor end every training batch, of images in memory; None takes it away again.

        Args:
            column: (images, …), what is known of each training image.
        """
        train = self._loaded.train
        assert isinstance(train, TensorDataset)
        # in place: a loader may hold the data set already
        train.tensors = (*train.tensors[: 2 + len(self.extras)], *([] if column is None else [column]))

    def begin_phase(self, seed: int, phase: int) -> None:
        """The order of the epochs that follow is that of phase number ``phase`` of a run with this seed."""
        self.stream = (seed, phase)

    def train_dataloader(self) -> DataLoader:
        images: Any = self._loaded.train
        keyed = not isinstance(images, TensorDataset)
        return self._loader(
            images, TrainingBatches(len(images), self.batch_size, self._epoch_seed, *self._process, keyed=keyed)
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self._loaded.val)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation(self._loaded.test)

    def _evaluation(self, images: Any) -> DataLoader:
        return self._loader(images, EvaluationBatches(len(images), self.eval_batch_size, *self._process))

    @property
    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _epoch_seed(self) -> int:
        if self.stream is None or self.trainer is None:
            return int(torch.randint(2**31, ()))
        return epoch_seed(*self.stream, self.trainer.current_epoch)

    @property
    def _loaded(self) -> Splits:
        self.setup()
        assert self.splits is not None
        return self.splits

    def _loader(self, images: Any, batches: Sampler[Any]) -> DataLoader:
        # its own generator, since starting a loader would else take one of the epoch's random numbers
        generator = torch.Generator()
        if isinstance(images, TensorDataset):
            return DataLoader(images, sampler=batches, batch_size=None, generator=generator)
        return DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=collate_present,
            generator=generator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
        )


def _begin_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the process that trains ends its workers


# of torchvision's pretrained models; for images too many to be measured first
IMAGENET_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def collate_present(samples: list[tuple[Tensor, int] | None]) -> list[Tensor]:
    """A batch of those samples that could be read."""
    return default_collate([sample for sample in samples if sample is not None])


def in_channels_last(images: Tensor) -> Tensor:
    """The same images (N, C, H, W) with the channels of a pixel side by side in memory."""
    return images.contiguous(memory_format=torch.channels_last)


def channel_moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation of each channel of uint8 images (N, C, H, W), of pixels from 0 to 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (shares * levels).sum()
        means.append(round(mean.item(), 6))
        # a channel of one colour has no deviation to divide by
        deviations.append(round((shares * (levels - mean) ** 2).sum().sqrt().item(), 6) or 1.0)
    return means, deviations
