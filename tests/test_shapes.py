"""The shapes of the synthetic data set against closed forms of their areas."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.shapes import SHAPES

# closed forms, in units of the squared radius; a lens is what two circles share
LENS = (
    0.9025 * math.acos((0.25 + 0.9025 - 0.5625) / 0.95)
    + 0.5625 * math.acos((0.25 + 0.5625 - 0.9025) / 0.75)
    - 0.5 * math.sqrt((-0.5 + 0.95 + 0.75) * (0.5 + 0.95 - 0.75) * (0.5 - 0.95 + 0.75) * (0.5 + 0.95 + 0.75))
)
# the bar of a dumbbell that lies outside its discs: a rectangle without two pieces of disc
PIECE = 0.13 * math.sqrt(0.38**2 - 0.13**2) + 0.38**2 * math.asin(0.13 / 0.38)
AREAS = {
    "disc": 0.81 * math.pi,
    "ring": (0.92**2 - 0.48**2) * math.pi,
    "triangle": 0.75 * math.sqrt(3),
    "square": 1.4**2,
    "cross": 2 * 1.9 * 0.54 - 0.54**2,
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    "crescent": 0.9025 * math.pi - LENS,
    "bars": 3 * 1.3 * 0.32,
    "dumbbell": 2 * 0.38**2 * math.pi + 1.2 * 0.26 - 2 * PIECE,
    "dots": 4 * 0.33**2 * math.pi,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_area_and_its_mirror_image_and_lies_in_the_unit_circle(name: str) -> None:
    axis = (torch.arange(1200) + 0.5) / 500 - 1.2
    u, v = axis.expand(1, 1200, 1200), axis[:, None].expand(1, 1200, 1200)
    inside = SHAPES[name](u, v) < 0
    assert inside.sum() / 500**2 == pytest.approx(AREAS[name], rel=2e-3)
    assert (u * u + v * v)[inside].max() <= 1.002
    assert torch.equal(inside, inside.flip(1)) or torch.equal(inside, inside.flip(2))
