"""Data sets, their splits, and the preparation of a batch against a loop over its images."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from datamodules.augmentation import crop_and_flip
from datamodules.cifar import Cifar
from datamodules.decoding import UnreadableImage, as_rgb
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
        training = True

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


def test_an_image_folder_is_read_as_it_lies_there(make_folder, tmp_path) -> None:
    root = make_folder(side=12)
    data = ImageFolder(str(root), cache_dir=str(tmp_path / "cache"), val_fraction=0.25)
    assert (data.input_shape, data.class_names, data.num_classes) == ((3, 12, 12), ["a", "b", "c"], 3)
    data.setup()
    assert [len(split) for split in (data.splits.train, data.splits.val, data.splits.test)] == [45, 15, 60]
    images, labels = data.splits.test.tensors
    files = sorted((root / "test").glob("*/*.png"))
    for file, image, label in zip(files, images, labels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image.permute(1, 2, 0))
        assert data.class_names[label] == file.parent.name


def test_decoded_images_come_from_the_cache_until_a_file_changes(make_folder, tmp_path) -> None:
    root, cache = make_folder(), tmp_path / "cache"

    def test_images() -> torch.Tensor:
        data = ImageFolder(str(root), cache_dir=str(cache))
        data.setup()
        return data.splits.test.tensors[0]

    before = test_images()
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert torch.equal(test_images(), before)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written
    Image.new("RGB", (12, 12), (1, 2, 3)).save(root / "test/a/000.png")
    assert test_images()[0, :, 0, 0].tolist() == [1, 2, 3]


def test_other_sizes_are_scaled_and_cropped(make_folder, tmp_path) -> None:
    root = make_folder(side=12)
    Image.new("RGB", (40, 20), (9, 9, 9)).save(root / "train/a/wide.png")
    Image.new("L", (5, 5), 7).save(root / "train/a/grey.png")
    for size, shape in ((8, (3, 8, 8)), ([8, 10], (3, 8, 10)), ("auto", (3, 12, 12))):
        data = ImageFolder(str(root), image_size=size, cache_dir=str(tmp_path / "cache"))
        data.setup()
        assert data.input_shape == shape
        assert data.splits.train.tensors[0].shape[1:] == shape


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "val", "test")])
def test_val_is_the_test_split_only_where_there_is_no_other(make_folder, tmp_path, splits) -> None:
    data = ImageFolder(str(make_folder(splits)), cache_dir=str(tmp_path / "cache"))
    data.setup()
    sizes = [len(split) for split in (data.splits.train, data.splits.val, data.splits.test)]
    assert sizes == ([60, 60, 60] if "test" in splits else [54, 6, 60])


@pytest.mark.parametrize("workers", [0, 1])
def test_images_too_many_for_memory_are_streamed(make_folder, workers: int) -> None:
    data = ImageFolder(str(make_folder(side=30)), image_size=24, memory_limit=100, num_workers=workers, batch_size=10)
    data.setup()
    assert not isinstance(data.splits.train, TensorDataset)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.dtype, images.shape, labels.shape) == (torch.uint8, (10, 3, 24, 24), (10,))
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 60
    assert data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_image_is_named_and_skipped_when_asked(make_folder, tmp_path, in_memory: bool) -> None:
    root = make_folder()
    (root / "test/b/003.png").write_bytes(b"no image")
    truncated = (root / "test/b/004.png").read_bytes()[:60]
    (root / "test/b/004.png").write_bytes(truncated)
    options = {"cache_dir": str(tmp_path / "cache"), "in_memory": in_memory}

    def labels(**more: bool) -> torch.Tensor:
        data = ImageFolder(str(root), **options, **more)
        data.setup()
        return torch.cat([labels for _, labels in data.test_dataloader()])

    with pytest.raises(ValueError, match=r"Unreadable image .*/test/b/003.png.*; replace it, or set dataset"):
        labels()
    assert torch.bincount(labels(skip_unreadable=True)).tolist() == [20, 18, 20]


def test_a_workers_unreadable_image_is_named_in_one_line(make_folder) -> None:
    root = make_folder()
    for file in (root / "train/a").iterdir():
        file.write_bytes(b"no image")
    data = ImageFolder(str(root), in_memory=False, num_workers=1)
    assert data.input_shape == (3, 12, 12)
    with pytest.raises(UnreadableImage) as error:
        list(data.train_dataloader())
    assert re.fullmatch(r"Unreadable image .*/train/a/0\d\d.png; replace it, or .*=true\.", error.value.reason())


def test_streamed_images_are_fitted_and_mirrored_as_those_in_memory(make_folder, tmp_path) -> None:
    root = make_folder(side=20)
    options = {"image_size": [8, 12], "cache_dir": str(tmp_path / "cache")}
    memory, streamed = (ImageFolder(str(root), in_memory=where, **options) for where in (True, False))
    memory.setup()
    streamed.setup()
    images = torch.cat([images for images, _ in streamed.test_dataloader()])
    assert torch.equal(images, memory.splits.test.tensors[0])
    unmirrored = ImageFolder(str(root), in_memory=False, flip=False, **options)
    unmirrored.setup()
    transforms = {data.flip: str(data.splits.train.dataset.transform) for data in (streamed, unmirrored)}
    assert "Flip" in transforms[True]
    assert "Flip" not in transforms[False]


def test_sixteen_bits_keep_their_upper_eight() -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert np.asarray(as_rgb(deep))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_folders_that_cannot_be_are_refused(make_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"to hold train/ and test/ or val/; it holds no folders"):
        ImageFolder(str(tmp_path / "empty"))
    root = make_folder()
    (root / "test/d").mkdir()
    with pytest.raises(ValueError, match=r"the same class folders in .*; only one of them has d"):
        ImageFolder(str(root))
    (root / "train/d").mkdir()
    with pytest.raises(ValueError, match=r"Found no image in .*/train/d"):
        ImageFolder(str(root))
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "one/test/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least two class folders"):
        ImageFolder(str(tmp_path / "one"))


def test_too_few_images_to_split(make_folder) -> None:
    data = ImageFolder(str(make_folder(per_class=1)), in_memory=False)
    with pytest.raises(ValueError, match=r"3 training images cannot be split with dataset.val_fraction=0.1"):
        data.setup()
    with pytest.raises(ValueError, match="val_fraction between 0 and 1, got 1"):
        Digits(val_fraction=1)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_files_of_its_format(tmp_path, monkeypatch, classes: int) -> None:
    data = Cifar(str(tmp_path), classes)
    monkeypatch.setattr(data.kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(data.kind, "_load_meta", lambda self: setattr(self, "classes", list("abcdefghij")))
    folder = tmp_path / data.kind.base_folder
    folder.mkdir()
    noise = np.random.default_rng(0)
    written = {}
    for name, _ in data.kind.train_list + data.kind.test_list:
        pixels = noise.integers(0, 256, (100, 3072), dtype=np.uint8)
        key = "labels" if classes == 10 else "fine_labels"
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [i % 10 for i in range(100)]}))
        written[name] = pixels
    data.setup()
    images, labels = data.splits.test.tensors
    test = written[data.kind.test_list[0][0]]
    np.testing.assert_array_equal(images.reshape(100, -1), test)
    assert labels.tolist() == [i % 10 for i in range(100)]
    assert len(data.splits.train) + len(data.splits.val) == 100 * len(data.kind.train_list)


def test_cifar_without_network_says_what_to_do(tmp_path, monkeypatch) -> None:
    data = Cifar(str(tmp_path))

    def unreachable(self) -> None:
        raise OSError("no route")

    monkeypatch.setattr(data.kind, "download", unreachable)
    with pytest.raises(OSError, match=r"put cifar-10-python.tar.gz into .* or use dataset=digits"):
        data.setup()
    with pytest.raises(ValueError, match="of 10 or 100, got 20"):
        Cifar(str(tmp_path), 20)
