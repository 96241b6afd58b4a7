"""Shared by the tests: composing configs as the command line does, small networks, small image folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, settings
from omegaconf import DictConfig
from PIL import Image

ROOT = Path(__file__).parents[1]

settings.register_profile("offramp", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("offramp")


def composed(*overrides: str) -> DictConfig:
    """The config of ``python train.py <overrides>``."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    pl.seed_everything(0, verbose=False)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """The module in eval mode, its BatchNorms with statistics and scales of their own, so that none is an identity."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.uniform_(part.bias, -0.5, 0.5)
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder of class folders of PNG images, coloured noise with a brightness of its class."""

    def make(
        splits: tuple[str, ...] = ("train", "test"), per_class: int = 20, side: int = 12, classes: str = "abc"
    ) -> Path:
        noise = np.random.default_rng(0)
        for split in splits:
            for label, name in enumerate(classes):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    pixels = noise.integers(0, 60, (side, side, 3)) + 60 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
        return tmp_path / "images"

    return make
