"""The ten shapes of the synthetic data set, as functions of a grid of coordinates.

A shape takes (u, v), (n, H, W) each, in units of its radius, and gives (n, H, W): negative inside, outside about the
distance to it. All are their own mirror images, since images may be flipped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# only exactly rounded operations: of sin or exp the last bit may differ with a pixel's place in a chunk


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _circle(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return (u * u + v * v).sqrt() - radius


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(0.75**0.5 * u.abs() - 0.5 * v, v) - 0.5


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.95, 0.27), _box(u, v, 0.27, 0.95))


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points, folded onto half of one by reflections; there the shape ends at a line from tip to notch."""
    cos, sin = 0.8090169943749475, 0.5877852522924731  # of a tenth of a turn
    u = u.abs()
    for sign in (1, -1):
        beyond = (sign * cos * u - sin * v).clamp(min=0) * 2
        u, v = u - sign * cos * beyond, v + sin * beyond
    tip, notch = (0.0, 1.0), (0.45 * sin, 0.45 * cos)
    du, dv = notch[0] - tip[0], notch[1] - tip[1]
    return (dv * (tip[0] - u.abs()) - du * (tip[1] - v)) / (du * du + dv * dv) ** 0.5


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_circle(u, v, 0.95), -_circle(u - 0.5, v, 0.75))


def _dumbbell(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_circle(u.abs() - 0.6, v, 0.38), _box(u, v, 0.6, 0.13))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda u, v: _circle(u, v, 0.9),
    "ring": lambda u, v: _circle(u, v, 0.7).abs() - 0.22,
    "triangle": _triangle,
    "square": lambda u, v: _box(u, v, 0.7, 0.7),
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
    "bars": lambda u, v: _box(u, (v.abs() - 0.29).abs() - 0.29, 0.65, 0.16),
    "dumbbell": _dumbbell,
    "dots": lambda u, v: _circle(u.abs() - 0.45, v.abs() - 0.45, 0.33),
}
