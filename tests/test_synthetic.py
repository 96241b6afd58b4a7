"""Generated images: what they depend on, what difficulty does to them, measured on the pixels, and that it is felt."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn

from datamodules import synthetic
from datamodules.shapes import SHAPES
from datamodules.synthetic import Synthetic, generate
from running.assembly import build_data
from tests.conftest import composed
from tests.test_shapes import AREAS

SIDE = 32


def at(difficulty: float, count: int = 200, side: int = SIDE) -> Tensor:
    """Images (N, 3, H, W) of that difficulty, in levels."""
    return generate(count, (side, side), "test", 1, (difficulty, difficulty)).images.float()


def objects(clean: Tensor) -> tuple[Tensor, Tensor]:
    """Of images of difficulty 0: the share of each pixel (N, H, W) that is object, and how far off two colours it is.

    The background is a corner's colour, which no object reaches, the object the pixel that differs most from it.
    """
    background = clean[:, :, :1, :1]
    colours = (clean - background).flatten(2)
    furthest = colours.square().sum(1).argmax(1)
    hue = colours.gather(2, furthest[:, None, None].expand(-1, 3, 1))
    share = (colours * hue).sum(1) / hue.square().sum(1)
    off = (colours - share[:, None] * hue).abs().amax(1)
    return share.reshape(-1, *clean.shape[2:]), off


def test_an_image_depends_on_seed_split_and_index_alone(monkeypatch) -> None:
    first = generate(40, (SIDE, SIDE), "train", 0, (0, 1))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    monkeypatch.setattr(synthetic, "CHUNK_PIXELS", 7 * SIDE * SIDE)
    second = generate(17, (SIDE, SIDE), "train", 0, (0, 1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    torch.manual_seed(5)
    np.random.seed(5)
    third = generate(17, (SIDE, SIDE), "train", 0, (0, 1))
    for once, again, anew in zip(first, second, third, strict=True):
        assert torch.equal(once[:17], again)
        assert torch.equal(again, anew)
    others = [first, generate(40, (SIDE, SIDE), "test", 0, (0, 1)), generate(40, (SIDE, SIDE), "train", 1, (0, 1))]
    assert len({image.numpy().tobytes() for part in others for image in part.images}) == 120


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(8, 48), st.integers(8, 48)),
    count=st.integers(1, 45),
    fewer=st.integers(1, 45),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_any_number_of_images_of_any_size(size, count, fewer, chunk, seed, bounds) -> None:
    images, labels, difficulty = generate(count, size, "train", seed, bounds)
    assert (images.dtype, images.shape) == (torch.uint8, (count, 3, *size))
    assert images.is_contiguous(memory_format=torch.channels_last)
    counts = torch.bincount(labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    low, high = torch.tensor(bounds)
    assert bool(((low <= difficulty) & (difficulty <= high)).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "CHUNK_PIXELS", chunk * size[0] * size[1])
        part = generate(min(fewer, count), size, "train", seed, bounds)
    assert torch.equal(part.images, images[: len(part.images)])
    assert torch.equal(part.difficulty, difficulty[: len(part.difficulty)])


def test_difficulty_is_uniform_in_its_range() -> None:
    difficulty = generate(1000, (8, 8), "train", 0, (0.25, 0.75)).difficulty
    assert difficulty.dtype == torch.float32
    assert kstest(difficulty.numpy(), "uniform", (0.25, 0.5)).pvalue > 0.01


def test_images_of_difficulty_0_show_an_object_on_a_background_and_nothing_else() -> None:
    share, off = objects(at(0))
    # each of three channels rounded, in pixel, background and object
    assert off.max() <= 1.5
    assert bool(((share > -0.02) & (share <= 1.02)).all())
    # an object of 0.26 to 0.36 of the side, wherever it lies and however it is turned
    radii = (share.sum((1, 2)) / torch.tensor([AREAS[name] for name in SHAPES]).repeat(20)).sqrt() / SIDE
    assert radii.min() > 0.25
    assert radii.max() < 0.37
    contrast = (at(0).amax((2, 3)) - at(0).amin((2, 3))).min()
    assert contrast >= 105 - 2 * 35 - 1


@pytest.mark.parametrize("difficulty", [0.1, 0.25, 0.4])
def test_noise_is_gaussian_and_independent_with_a_deviation_of_48_levels_times_the_difficulty(
    monkeypatch, difficulty: float
) -> None:
    noisy = at(difficulty)
    monkeypatch.setattr(synthetic, "NOISE", 0)
    clean = at(difficulty)
    noise, deviation = noisy - clean, 48 * difficulty
    # where clipping changes nothing
    free = (clean - 127.5).abs() < 127.5 - 3.5 * deviation
    assert free.sum() > 10_000
    kept = noise[free]
    # where an area is of one colour, all its pixels are rounded alike
    assert kept.mean().abs() < 0.1
    # 5 deviations of a deviation's estimate; rounding adds a twelfth
    expected = (deviation**2 + 1 / 12) ** 0.5
    assert kept.std() == pytest.approx(expected, rel=5 / (2 * len(kept)) ** 0.5)
    # levels are whole
    for limit in (int(deviation) + 0.5, int(2 * deviation) + 0.5):
        within = math.erf(limit / deviation / math.sqrt(2))
        assert (kept.abs() < limit).float().mean() == pytest.approx(within, abs=0.007)
    for one, other, both in (
        (noise[..., 1:], noise[..., :-1], free[..., 1:] & free[..., :-1]),
        (noise[:, 0], noise[:, 1], free[:, 0] & free[:, 1]),
    ):
        assert torch.corrcoef(torch.stack([one[both], other[both]]))[0, 1].abs() < 5 / both.sum() ** 0.5


def test_the_occluder_hides_half_the_difficulty_of_the_objects_pixels(monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "NOISE", 0)
    monkeypatch.setattr(synthetic, "CLUTTER", 0)
    clean = at(0)
    shown = objects(clean)[0] >= 0.5
    pixels = shown.sum((1, 2))
    for difficulty in (0.01, 0.25, 0.5, 0.75, 1):
        changed = (at(difficulty) != clean).any(1)
        hidden = (changed & shown).sum((1, 2))
        # some pixels at the object's edge are half object, give or take the rounding of their colour
        assert (hidden - (0.5 * difficulty * pixels).floor()).abs().max() <= 3
        assert (hidden / pixels).max() < 0.53
        # what lies outside is no more than a rectangle of 2.2 radii each way
        assert changed.sum((1, 2)).max() <= (2.2 * 0.36 * SIDE) ** 2 * 1.1


def test_every_eighth_of_difficulty_adds_one_small_distractor_behind_the_object(monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "NOISE", 0)
    monkeypatch.setattr(synthetic, "OCCLUSION", 0)
    before = at(0)
    whole = objects(before)[0] > 0.99  # a hundredth of another colour changes them by two levels
    for number in range(8):
        after = at((number + 1) / 8)
        assert torch.equal(after, at(number / 8 + 0.01))
        changed = (after != before).any(1)
        assert ((after - before).abs().amax(1) * whole).max() <= 2
        rows, columns = changed.any(2), changed.any(1)
        for along in (rows, columns):
            first, last = along.float().argmax(1), SIDE - 1 - along.flip(1).float().argmax(1)
            extent = (last - first + 1)[along.any(1)]
            assert extent.max() <= 2 * 0.12 * SIDE + 3
        # it may lie behind the object
        assert rows.any(1).float().mean() > 0.8
        before = after


def test_batches_hold_images_labels_and_difficulty_of_disjoint_splits() -> None:
    data = build_data(composed("dataset=synthetic", "dataset.train_images=200", "dataset.test_images=35"))
    data.setup()
    assert (data.extras, data.input_shape, data.num_classes) == (("difficulty",), (3, 32, 32), 10)
    splits = [data.splits.train.tensors, data.splits.val.tensors, data.splits.test.tensors]
    assert [len(images) for images, _, _ in splits] == [180, 20, 35]
    for images, _, _ in splits:
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.bincount(splits[0][1]).tolist() == [18] * 10
    assert torch.bincount(splits[1][1]).tolist() == [2] * 10
    splits.append(generate(200, (32, 32), "train", 0, (0, 1)))
    found = [
        {image.numpy().tobytes(): (int(y), float(d)) for image, y, d in zip(*split, strict=True)} for split in splits
    ]
    assert found[0] | found[1] == found[3]
    assert not set(found[3]) & set(found[2])
    wide = Synthetic(image_size=[8, 20], train_images=40, test_images=3, val_fraction=0.25)
    assert wide.input_shape == (3, 8, 20)
    images, _, difficulty = next(iter(wide.test_dataloader()))
    assert (images.shape, difficulty.shape) == ((3, 3, 8, 20), (3,))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": 7}, "dataset.image_size of at least 8 pixels a side, got 7"),
        ({"image_size": [32, 4]}, r"dataset.image_size of at least 8 pixels a side, got \[32, 4\]"),
        ({"image_size": "auto"}, "dataset.image_size to be a number of pixels or .* got auto"),
        ({"image_size": [32]}, "dataset.image_size to be a number of pixels or .* got"),
        ({"train_images": 19}, "dataset.train_images to be a whole number of at least 20, two of each class, got 19"),
        ({"train_images": 50}, "50 training images cannot be split with dataset.val_fraction=0.1"),
        ({"test_images": 0}, "dataset.test_images to be a whole number of at least 1, got 0"),
        ({"test_images": 2.5}, "dataset.test_images to be .* got 2.5"),
        ({"generation_seed": -1}, "dataset.generation_seed to be a whole number of at least 0, got -1"),
        ({"difficulty": [0.5, 0.2]}, r"dataset.difficulty to be \[lowest, highest\] from 0 to 1, got \[0.5, 0.2\]"),
        ({"difficulty": [0, 1.5]}, "dataset.difficulty to be"),
        ({"difficulty": [float("nan"), 1]}, "dataset.difficulty to be"),
        ({"difficulty": 0.5}, "dataset.difficulty to be .* got 0.5"),
        ({"difficulty": "hard"}, "dataset.difficulty to be .* got hard"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        Synthetic(**options)
    assert "\n" not in str(error.value)


def test_a_small_network_finds_easy_images_easier_than_hard_ones() -> None:
    """Trained here in plain PyTorch, in seconds; chance is 0.1."""
    size = (24, 24)
    train, test = generate(4000, size, "train", 0, (0, 1)), generate(1500, size, "test", 0, (0, 1))
    layers: list[nn.Module] = []
    for channels, wider in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(channels, wider, 3, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=240)
    x = train.images.float().sub(128).div(64)
    for _ in range(6):
        for rows in torch.randperm(4000).split(100):
            # an object turned over is of the same class
            turned = x[rows].flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
            loss = nn.functional.cross_entropy(network(turned), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        predicted = network.eval()(test.images.float().sub(128).div(64)).argmax(1)
    right = (predicted == test.labels)[test.difficulty.argsort()].float()
    easy, medium, hard = (third.mean() for third in right.split(500))
    assert right.mean() > 0.55, right.mean()
    assert easy > medium > hard
    assert easy - hard > 0.2, (easy, hard)
