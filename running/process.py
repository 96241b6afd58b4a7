"""One more process of a run that another process has begun: ``python -m running.process <run directory>``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from running.command_line import Refused, stop
from train import train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    try:
        train(config, folder)
    except Refused as error:
        stop(str(error))
