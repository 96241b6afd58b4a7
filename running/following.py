"""Tells those who follow a run, such as its loggers, that it begins and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from running.interruption import Stopped


@dataclass
class Outcome:
    """Of a run; its metrics are there once it is finished."""

    metrics: Mapping[str, float] | None = None


@contextmanager
def following(parts: Sequence[Any], cfg: DictConfig, network: nn.Module, folder: Path) -> Iterator[Outcome]:
    """Calls ``begin_run(config)`` and ``end_run(metrics, network, folder, status)`` of the parts that have them.

    The status is ``finished``, ``failed`` or ``interrupted``; metrics are None unless it is finished.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    for part in parts:
        if hasattr(part, "begin_run"):
            part.begin_run(config)
    outcome, status = Outcome(), "failed"
    try:
        yield outcome
        status = "finished"
    except Stopped:
        status = "interrupted"
        raise
    finally:
        for part in parts:
            if hasattr(part, "end_run"):
                part.end_run(outcome.metrics if status == "finished" else None, network, folder, status)
