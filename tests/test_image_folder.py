"""Folders of images: read, cached, scaled, streamed, and what is said of those that cannot be read."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import train
from datamodules.decoding import UnreadableImage, as_rgb
from datamodules.digits import Digits
from datamodules.image_folder import ImageFolder
from running.assembly import build_data
from running.command_line import Refused
from tests.cases import SMALL
from tests.conftest import composed


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
    transforms = {data.flip: str(data.splits.train.transform) for data in (streamed, unmirrored)}
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


def test_imagenet_is_streamed_at_224_with_its_customary_crops(make_folder, tmp_path) -> None:
    root = make_folder(("train", "val"), per_class=8, side=300)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (260, 400, 3), np.uint8)).save(root / "val/a/000.png")
    options = [f"dataset.root={root}", "dataset.num_workers=1", "dataset.val_fraction=0.25"]
    cfg = composed("dataset=imagenet", *options, "dataset.batch_size=4")
    data = build_data(cfg)
    data.setup()
    sizes = [len(split) for split in (data.splits.train, data.splits.val, data.splits.test)]
    assert sizes == [18, 6, 24]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape) == ((4, 3, 224, 224), torch.uint8, (4,))
    protocol = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    tested = torch.cat([images for images, _ in data.test_dataloader()])
    for file, image in zip(sorted((root / "val").glob("*/*.png")), tested, strict=True):
        assert torch.equal(image, protocol(Image.open(file)))
    assert data.mean == [0.485, 0.456, 0.406]
    command = ["dataset=imagenet", "backbone=resnet18", "method=plain", *options, "dataset.eval_batch_size=8"]
    assert train.train(composed(*SMALL, *command), tmp_path / "run")["test/macs"] > 1.8e9
    with pytest.raises(Refused, match=r"dataset.eval_resize of at least 224, got 200"):
        train.train(composed(*command, "dataset.eval_resize=200"), tmp_path / "other")
