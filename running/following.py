"""Tells those who follow a run, such as its loggers, that it begins and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from torch import nn

from running.interruption import Stopped


@dataclass
class Outcome:
    """Of a run; its metrics are there once it is finished."""

    metrics: Mapping[str, float] | None = None
    status: Literal["finished", "failed", "interrupted"] = "failed"


@contextmanager
def following(parts: Sequence[Any], cfg: DictConfig, network: nn.Module, folder: Path) -> Iterator[Outcome]:
    """Calls ``begin_run(config)`` and ``end_run(metrics, network, folder, status)`` of the parts that have them.

    The status is ``finished``, ``failed`` or ``interrupted``; metrics are None unless it is finished.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    outcome = Outcome()
    with ExitStack() as ends:  # each is told, whatever another one raises
        for part in parts:
            if hasattr(part, "end_run"):
                ends.callback(_end, part, outcome, network, folder)
            if hasattr(part, "begin_run"):
                part.begin_run(config)
        try:
            yield outcome
            outcome.status = "finished"
        except Stopped:
            outcome.status = "interrupted"
            raise


def _end(part: Any, outcome: Outcome, network: nn.Module, folder: Path) -> None:
    metrics = outcome.metrics if outcome.status == "finished" else None
    part.end_run(metrics, network, folder, outcome.status)
