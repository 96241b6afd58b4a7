"""Generated images of ten shapes, each with a known difficulty: noise, an occluder and clutter that grow with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import TensorDataset

from datamodules.image_data import ImageData, Splits, in_channels_last
from datamodules.shapes import SHAPES

# what difficulty 1 does; see Synthetic
NOISE = 48.0
OCCLUSION = 0.5
CLUTTER = 8

OBJECT_RADIUS = (0.26, 0.36)
DISTRACTOR_RADIUS = (0.07, 0.12)
DARK, LIGHT, SPREAD = 75.0, 180.0, 35.0
SMALLEST_SIDE = 8
CHUNK_PIXELS = 2**18


class Synthetic(ImageData):
    """One large object of ten shapes on a plain background, at a random place, size, rotation and colour.

    Image i of a split has label i mod 10. Its difficulty d is uniform in ``difficulty`` and does three things; nothing
    else about an image depends on it:

    - clutter: ceil(8 d) distractors, shapes of any class a third of an object's size, of any colour, anywhere behind
      the object;
    - occlusion: a rectangle slid over the object from a random side until it hides the share 0.5 d of the object's
      pixels, rounded down to whole pixels;
    - noise: Gaussian, independent in every pixel and channel, of standard deviation 48 d levels of 0 to 255, added
      last; the sum is rounded and clipped to 0 to 255.

    An object's radius is 0.26 to 0.36 of the image's shorter side, a distractor's 0.07 to 0.12, and an object lies
    wholly in the image. Of object and background one is dark and one is light, 75 and 180 levels, every channel up to
    35 off; distractors and the occluder have any colour in between.
    An image depends on ``generation_seed``, its split, its index and ``image_size`` alone, apart from its difficulty;
    at another difficulty it shows the same object.

    Args:
        image_size: pixels of a side, or (height, width), at least 8.
        train_images, test_images: how many; those for validation are taken from the former.
        difficulty: lowest and highest.
        generation_seed: of the images.

    Raises:
        ValueError: a value outside its range.
    """

    # of the tensors after the labels: difficulty, float32 (N,)
    extras = ("difficulty",)

    def __init__(
        self,
        image_size: int | Sequence[int] = 32,
        train_images: int = 5000,
        test_images: int = 1000,
        difficulty: Sequence[float] = (0, 1),
        generation_seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        _check_whole("train_images", train_images, 2 * len(SHAPES), ", two of each class")
        _check_whole("test_images", test_images, 1)
        _check_whole("generation_seed", generation_seed, 0)
        self.size, self.difficulty = _size(image_size), _range(difficulty)
        self.train_images, self.test_images, self.generation_seed = train_images, test_images, generation_seed
        self.input_shape = (3, *self.size)
        self.class_names = list(SHAPES)
        # now, so that a split that cannot be made is refused before anything is generated
        self._rows = [torch.from_numpy(rows) for rows in self.stratified(_labels(range(train_images)).tolist())]

    def load(self) -> Splits:
        train = self._generate("train", self.train_images)
        parts = [[part[rows] for part in train] for rows in self._rows] + [self._generate("test", self.test_images)]
        return Splits(*(TensorDataset(in_channels_last(images), *others) for images, *others in parts))

    def _generate(self, split: Literal["train", "test"], count: int) -> list[Tensor]:
        return list(generate(count, self.size, split, self.generation_seed, self.difficulty))


def _check_whole(key: str, value: Any, least: int, why: str = "") -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"Expected dataset.{key} to be a whole number of at least {least}{why}, got {value}.")


def _size(image_size: Any) -> tuple[int, int]:
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or any(type(side) is not int for side in sides):
        raise ValueError(f"Expected dataset.image_size to be a number of pixels or [height, width], got {image_size}.")
    if min(sides) < SMALLEST_SIDE:
        raise ValueError(f"Expected dataset.image_size of at least {SMALLEST_SIDE} pixels a side, got {image_size}.")
    return sides[0], sides[1]


def _range(difficulty: Any) -> tuple[float, float]:
    try:
        low, high = map(float, difficulty)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"Expected dataset.difficulty to be [lowest, highest] from 0 to 1, got {difficulty}.")
    return low, high


class Generated(NamedTuple):
    """Images uint8 (N, 3, H, W) in channels_last memory, labels int64 (N,), difficulty float32 (N,)."""

    images: Tensor
    labels: Tensor
    difficulty: Tensor


def generate(
    count: int, size: tuple[int, int], split: Literal["train", "test"], seed: int, difficulty: tuple[float, float]
) -> Generated:
    """The first ``count`` images of a split, without any use of the global random number generators."""
    chunk = max(1, CHUNK_PIXELS // (size[0] * size[1]))
    images = torch.empty(count, *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    difficulties, (low, high) = torch.empty(count), difficulty
    starts = range(0, count, chunk)
    for start in track(starts, "Generating images", transient=True, disable=not sys.stdout.isatty()):
        part = slice(start, min(start + chunk, count))
        indices = range(part.start, part.stop)
        draws = _draw(split, seed, indices, size)
        difficulties[part] = (low + (high - low) * draws.difficulty).clamp_(low, high)
        images[part] = _render(draws, _labels(indices), difficulties[part]).round_().clamp_(0, 255)
    return Generated(images, _labels(range(count)), difficulties)


def _labels(indices: range) -> Tensor:
    return torch.tensor(indices) % len(SHAPES)


class Draws(NamedTuple):
    """What is random about n images: uniform from 0 to 1, turns as (cos, sin), and noise of deviation 1.

    They are drawn alike at any difficulty, so that an image keeps its object.
    """

    difficulty: Tensor  # (n,)
    light: Tensor  # (n,), whether the background is
    colours: Tensor  # (n, 3, 3), of background, object and occluder
    place: Tensor  # (n, 3)
    turns: Tensor  # (n, 2, 2), of object and occluder
    clutter: Tensor  # (n, CLUTTER, 7): class, place, colour
    clutter_turns: Tensor  # (n, CLUTTER, 2)
    noise: Tensor  # (n, 3, H, W)


def _draw(split: str, seed: int, indices: range, size: tuple[int, int]) -> Draws:
    streams = [np.random.default_rng((seed, int(split == "test"), index)) for index in indices]

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(np.stack([stream.random(shape, np.float32) for stream in streams]))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in streams]))

    def turns(*shape: int) -> Tensor:
        x, y = normal(*shape, 2).unbind(-1)
        return torch.stack([x, y], -1) / (x * x + y * y).sqrt()[..., None]

    return Draws(
        uniform(), uniform(), uniform(3, 3), uniform(3), turns(2), uniform(CLUTTER, 7), turns(CLUTTER), normal(3, *size)
    )


def _render(draws: Draws, labels: Tensor, difficulty: Tensor) -> Tensor:
    """Images float (n, 3, H, W), in levels, before they are rounded and clipped."""
    size = draws.noise.shape[2:]
    light = (draws.light < 0.5).float()[:, None]
    background, colour, occluder = draws.colours.unbind(1)
    canvas = _shade(background, light)[..., None, None].expand_as(draws.noise).clone()
    for j in range(CLUTTER):
        rows = difficulty * CLUTTER > j
        kind, place, hue = draws.clutter[rows, j].split([1, 3, 3], 1)
        u, v, radius = _local(place, draws.clutter_turns[rows, j], DISTRACTOR_RADIUS, size)
        kinds = (kind[:, 0] * len(SHAPES)).long().clamp_(max=len(SHAPES) - 1)
        canvas[rows] = _painted(canvas[rows], _coverage(kinds, u, v, radius), _any_colour(hue))
    u, v, radius = _local(draws.place, draws.turns[:, 0], OBJECT_RADIUS, size)
    shown = _coverage(labels, u, v, radius)
    canvas = _painted(canvas, shown, _shade(colour, 1 - light))
    u, v, _ = _local(draws.place, draws.turns[:, 1], OBJECT_RADIUS, size)
    canvas = _painted(canvas, _occluder(shown >= 0.5, u, v, OCCLUSION * difficulty), _any_colour(occluder))
    return canvas + (NOISE * difficulty)[:, None, None, None] * draws.noise


def _shade(uniform: Tensor, light: Tensor) -> Tensor:
    return DARK + (LIGHT - DARK) * light + SPREAD * (2 * uniform - 1)


def _any_colour(uniform: Tensor) -> Tensor:
    return DARK - SPREAD + (LIGHT - DARK + 2 * SPREAD) * uniform


def _painted(canvas: Tensor, coverage: Tensor, colour: Tensor) -> Tensor:
    return canvas + coverage[:, None] * (colour[..., None, None] - canvas)


def _local(
    place: Tensor, turn: Tensor, radii: tuple[float, float], size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels as (u, v) (n, H, W) about a shape's centre, in units of its radius, and that in pixels (n, 1, 1)."""
    height, width = size
    x, y, scale = place[..., None, None].unbind(1)
    cos, sin = turn[..., None, None].unbind(1)
    radius = (radii[0] + (radii[1] - radii[0]) * scale) * min(size)
    dx = torch.arange(width) + 0.5 - (radius + (width - 2 * radius) * x)
    dy = torch.arange(height)[:, None] + 0.5 - (radius + (height - 2 * radius) * y)
    return (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius, radius


def _coverage(labels: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """The share of each pixel (n, H, W) that its image's shape covers."""
    distance = torch.empty_like(u)
    for label, shape in enumerate(SHAPES.values()):
        rows = labels == label
        distance[rows] = shape(u[rows], v[rows])
    return (0.5 - distance * radius).clamp_(0, 1)


def _occluder(shown: Tensor, u: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """Where (n, H, W) a rectangle lies that comes from u = 1.1 and hides a share (n,) of the pixels ``shown``."""
    hidden = (share * shown.sum((1, 2))).long()
    along = torch.where(shown, u, -torch.inf).flatten(1).sort(descending=True).values
    edge = along.gather(1, hidden[:, None])[..., None]
    inside = (u > edge) & (u < 1.1) & (v.abs() < 1.1)
    return (inside & (hidden > 0)[:, None, None]).float()
