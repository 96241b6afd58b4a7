"""Augmentation of a whole batch at once, on the device it lies on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, pad: int, flip: bool) -> Tensor:
    """Shifts every image by its own random offset within a black border, and mirrors half of them.

    Args:
        images: (N, C, H, W), any dtype.
        pad: largest shift in pixels, each way.
        flip: whether to mirror left and right with probability one half.

    Returns:
        Images of the same shape, in channels_last memory.
    """
    if not pad and not flip:
        return images
    n, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(n, -1)
    columns = torch.arange(width, device=device).expand(n, -1)
    if flip:
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if pad:
        rows = rows + torch.randint(2 * pad + 1, (n, 1), device=device)
        columns = columns + torch.randint(2 * pad + 1, (n, 1), device=device)
        images = F.pad(images, (pad,) * 4)
    pixels = images.permute(0, 2, 3, 1)
    chosen = pixels[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return chosen.permute(0, 3, 1, 2)
