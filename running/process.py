"""One more process of a run that another one has begun: ``python -m running.process <entry point> <run directory>``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

from running.interruption import end_with_parent, leave_signals_to_parent

if __name__ == "__main__":
    parent = os.getppid()
    leave_signals_to_parent()
    end_with_parent()

    from omegaconf import DictConfig, OmegaConf

    from running.command_line import Refused

    train, folder = import_module(sys.argv[1]).train, Path(sys.argv[2])
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    try:
        train(config, folder)
    except Refused:
        sys.exit(1)  # the first process has met the same, and says it
    except Exception:
        if os.getppid() != parent:  # the first process was killed, which is all there is to say
            os._exit(1)
        raise
