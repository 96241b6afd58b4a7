"""Data sets, their splits, and the preparation of a batch against a loop over its images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from datamodules.augmentation import crop_and_flip
from datamodules.digits import Digits
from datamodules.image_data import channel_moments
from datamodules.image_folder import ImageFolder


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.contiguous().numpy().tobytes() for image in images}


def test_digits_are_scikit_learns_scans_enlarged_four_times() -> None:
    data = Digits()
    data.setup()
    splits = [getattr(data.splits, name).tensors for name in ("train", "val", "test")]
    images, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.uint8
    scans = load_digits()
    small = images[:, 0, ::4, ::4].double() * 16 / 255
    expected = sorted(
        (scan.round().tobytes(), int(label)) for scan, label in zip(scans.images, scans.target, strict=True)
    )
    assert sorted((s.round().numpy().tobytes(), int(y)) for s, y in zip(small, labels, strict=True)) == expected
    assert torch.equal(images, images[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert torch.equal(images[:, 0], images[:, 2])


def test_splits_are_stratified_and_the_runs_seed_does_not_move_them() -> None:
    first, second = Digits(), Digits(val_fraction=0.1)
    first.setup()
    torch.manual_seed(7)
    np.random.seed(7)
    second.setup()
    for name, share in (("train", 0.72), ("val", 0.08), ("test", 0.2)):
        images, labels = getattr(first.splits, name).tensors
        assert torch.equal(images, getattr(second.splits, name).tensors[0])
        assert torch.bincount(labels) / torch.bincount(torch.from_numpy(load_digits().target)) == pytest.approx(
            torch.full((10,), share), abs=0.012
        )
    # every scan lies in exactly one split: the scans are all different, and together they are all of them
    parts = [rows(getattr(first.splits, name).tensors[0]) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_moments_are_those_of_the_training_pixels() -> None:
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8)
    mean, std = channel_moments(images)
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(mean, pixels.mean(1), atol=1e-6)
    np.testing.assert_allclose(std, pixels.std(1), atol=1e-6)
    assert channel_moments(torch.full((4, 3, 2, 2), 9, dtype=torch.uint8))[1] == [1.0] * 3


def test_a_normalized_training_split_has_mean_0_and_deviation_1() -> None:
    data = Digits()
    data.setup()
    x = data.normalize(data.splits.train.tensors[0])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@given(pad=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 9))
def test_every_augmented_image_is_a_shift_or_mirror_of_its_own(pad: int, flip: bool, seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.randint(1, 256, (6, 3, 5, 7), dtype=torch.uint8)
    augmented = crop_and_flip(images, pad, flip)
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    for image, result in zip(images.numpy(), augmented.numpy(), strict=True):
        bordered = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        sources = [bordered, bordered[:, :, ::-1]] if flip else [bordered]
        views = [b[:, y : y + 5, x : x + 7] for b in sources for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        assert any(np.array_equal(view, result) for view in views)


def test_shifts_and_mirrors_are_uniform() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).repeat(9000, 1, 1, 1)
    augmented = crop_and_flip(image, 1, True)
    _, counts = augmented.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    # each expected 500 times; 5 deviations of a binomial
    assert (counts - 500).abs().max() < 5 * (9000 / 18 * 17 / 18) ** 0.5


def test_a_training_batch_is_augmented_and_a_validation_batch_is_not(make_folder, tmp_path) -> None:
    class Trainer:
        training, global_rank, world_size = True, 0, 1

    data = ImageFolder(str(make_folder()), cache_dir=str(tmp_path / "cache"))
    data.setup()
    data.trainer = Trainer()
    batch = next(iter(data.val_dataloader()))
    changed, _ = data.on_after_batch_transfer(batch, 0)
    Trainer.training = False
    plain, labels = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(labels, batch[1])
    assert torch.equal(plain, data.normalize(batch[0]))
    assert not torch.equal(changed, plain)


def test_an_epoch_has_every_image_once_in_a_new_order() -> None:
    data = Digits(batch_size=64)
    data.setup()
    epochs = [torch.cat([images for images, _ in data.train_dataloader()]) for _ in range(2)]
    assert len(epochs[0]) == len(data.splits.train) // 64 * 64
    assert not torch.equal(*epochs)
    assert sum(len(images) for images, _ in data.test_dataloader()) == 360
