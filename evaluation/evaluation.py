"""What an evaluation has found, before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costs.energy import EnergyModel
from evaluation.along_bandwidth import Adaptation
from evaluation.hybrid import Design
from evaluation.on_device import Comparison
from evaluation.results import Plan, Result
from evaluation.tracing import Images, Machine


@dataclass(frozen=True)
class Evaluation:
    """Results of some runs.

    Attributes:
        results: of each run.
        comparison: on the device, where runs can be compared there.
        designs: of hybrid networks.
        chip: that energies are of, where one is known.
        adaptation: thresholds that follow the bandwidth, where they are asked for.
        plan: what was evaluated.
        images: of each run.
        machine: where.
    """

    results: list[Result]
    comparison: Comparison | None
    designs: Sequence[Design]
    chip: EnergyModel | None
    adaptation: Adaptation | None
    plan: Plan
    images: list[Images]
    machine: Machine
