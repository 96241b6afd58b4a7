"""Sends an evaluation to W&B, into the runs that it evaluated."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from callbacks.wandb_logger import WandbLogger
from evaluation.pictures import room_of
from evaluation.results import Plan, Result
from evaluation.tables import table_rows
from running.assembly import built


def upload(results: Sequence[Result], plan: Plan, figures: Sequence[Path], folder: Path) -> None:
    """Adds table, numbers and figures to the W&B run of each evaluated run that has one; see ``WandbLogger``."""
    for result in results:
        node = OmegaConf.select(result.run.config, "logger.wandb")
        if node is not None and (result.run.path / "wandb").is_dir():
            logger: WandbLogger = built(node, run_dir=str(result.run.path))
            logger.begin_run(OmegaConf.to_container(result.run.config, resolve=True))  # type: ignore[arg-type]
            try:
                _log(logger, result, plan, [path for path in figures if _is_of(path, result, folder)], folder)
            finally:
                logger.end_run(None, result.run.network, result.run.path, "finished")


def _is_of(figure: Path, result: Result, folder: Path) -> bool:
    room = figure.relative_to(folder).parent.name
    return room in ("", room_of(result))


def _log(logger: WandbLogger, result: Result, plan: Plan, figures: Sequence[Path], folder: Path) -> None:
    phase, step = _end_of_run(result.run.path / "metrics.csv")
    logger.begin_phase(phase)
    for figure in figures:
        logger.log_image(f"evaluation/{figure.stem}", [str(figure)], step=step)
    rows = table_rows(result, plan)
    logger.log_table("evaluation/points", list(rows[0]), [list(row.values()) for row in rows], step=step)
    numbers: dict[str, Any] = {"evaluation/chosen_on": plan.split}
    for point in result.named:
        if point.outcome is not None:  # W&B takes a dot in a name for a level
            name = re.sub(r"\W+", "_", point.chosen.name.partition(",")[0])
            numbers[f"evaluation/{name}/acc"] = point.accuracy
            numbers[f"evaluation/{name}/{plan.cost.kind}"] = point.cost / plan.cost.factor
    logger.experiment.summary.update(numbers)


def _end_of_run(metrics: Path) -> tuple[str, int | None]:
    try:
        with metrics.open(newline="") as file:
            *_, last = csv.DictReader(file)
        return last["phase"], int(last["step"])
    except (OSError, ValueError, KeyError):
        return "", None
