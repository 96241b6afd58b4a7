"""What a trained run can do: its operating points, chosen on one split and measured on the test split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evaluation.cost_axes import Cost
from evaluation.runs import TrainedRun
from inference.calibration import Calibration, OperatingPoint
from inference.policies import FixedExit, Policy
from inference.replay import Curve, Outcome, curve, label_oracle, oracle, pareto, replay
from inference.temperature import calibration_errors, temperatures
from inference.trace import Trace


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Args:
        policy: a family, or a point where it has its thresholds.
        calibrations: choose points of the family.
        split: they choose on, ``val`` or ``test``.
        temperature: whether each exit's logits are scaled by a temperature first.
        points: candidates of the curve.
        cost: axis.

    Raises:
        ValueError: a value outside its range.
    """

    policy: Policy
    calibrations: Mapping[str, Calibration]
    split: str
    temperature: bool
    points: int
    cost: Cost

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise ValueError(f"Expected calibration.split to be val or test, got {self.split}.")
        if not isinstance(self.temperature, bool):
            raise ValueError(f"Expected calibration.temperature to be true or false, got {self.temperature}.")
        if type(self.points) is not int or not 1 <= self.points <= 1_000_000:
            raise ValueError(f"Expected points from 1 to 1000000, got {self.points}.")

    @property
    def is_point(self) -> bool:
        """Whether the policy has its thresholds."""
        return None not in self.policy.describe().values()


@dataclass(frozen=True)
class Point:
    """An operating point measured on the test split; ``outcome`` is None where there was none to choose.

    Attributes:
        chosen: how it was.
        outcome: on the test split.
        accuracy, error: on the test split, and its standard error.
        gain, gain_error: accuracy beyond the full network's, and its standard error on the same images.
        cost: average of an image, on the plan's axis.
        device, server: the same before and behind the cut.
        shares: of the images, leaving at each exit.
        seen: accuracy on the calibration split, of a point that was chosen there.
    """

    chosen: OperatingPoint
    outcome: Outcome | None
    accuracy: float = math.nan
    error: float = math.nan
    gain: float = math.nan
    gain_error: float = math.nan
    cost: float = math.nan
    device: float = math.nan
    server: float = math.nan
    shares: Sequence[float] = ()
    seen: float = math.nan


@dataclass(frozen=True)
class Result:
    """A run's evaluation.

    Attributes:
        run: what was evaluated.
        calibration, test: traces, with temperatures applied.
        exits: every sample at one exit, no other head computed; the last is the plain backbone, or that with its
            gates.
        temperatures: of each exit.
        ece: of each exit on the test split, before and after the temperatures.
        seen, curve: the family's candidates on the calibration and on the test split; None with one exit.
        front: rows of the curve that are Pareto-optimal on the calibration split, by cost.
        points: chosen by the calibrations, or given.
        oracles: with foresight, and with the label.
    """

    run: TrainedRun
    calibration: Trace
    test: Trace
    exits: Sequence[Point]
    temperatures: Sequence[float]
    ece: tuple[Sequence[float], Sequence[float]]
    seen: Curve | None = None
    curve: Curve | None = None
    front: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    points: Sequence[Point] = ()
    oracles: Sequence[Point] = ()

    @property
    def adaptive(self) -> bool:
        """Whether there is an early exit."""
        return self.test.num_exits > 1

    @property
    def gated(self) -> bool:
        """Whether gates skip blocks or channels."""
        return self.test.decisions is not None

    @property
    def named(self) -> list[Point]:
        """The points for a table: those chosen one by one, not as a series."""
        return [point for point in self.points if not point.chosen.series]

    @property
    def series(self) -> list[Point]:
        """The points of the budgeted-batch protocol."""
        return [point for point in self.points if point.chosen.series and point.outcome is not None]

    @property
    def shown(self) -> Point:
        """The point to look at more closely: the first that was chosen, otherwise the full network."""
        return next((point for point in self.named if point.outcome is not None), self.exits[-1])


def evaluate(run: TrainedRun, val: Trace, test: Trace, plan: Plan) -> Result:
    """Chooses operating points on one split and measures them on the test split.

    Raises:
        ValueError: a policy that does not fit the network.
    """
    choosing = val if plan.split == "val" else test
    scales = [1.0] * test.num_exits
    ece = calibration_errors(test)
    if plan.temperature:  # fitted on other samples than the thresholds are chosen on, or no guarantee would hold
        halves = torch.randperm(len(choosing), generator=torch.Generator().manual_seed(0)).tensor_split(2)
        scales = temperatures(choosing.rows(halves[0]))
        choosing, test = choosing.rows(halves[1]).tempered(scales), test.tempered(scales)
    fixed = [OperatingPoint(f"exit {k}", FixedExit(k)) for k in range(1, test.num_exits + 1)]
    result = Result(
        run=run,
        calibration=choosing,
        test=test,
        exits=[_measured(point, test, plan.cost, choosing) for point in fixed],
        temperatures=scales,
        ece=(ece, calibration_errors(test) if plan.temperature else ece),
    )
    return _with_early_exits(result, plan) if test.num_exits > 1 else result


def _with_early_exits(result: Result, plan: Plan) -> Result:
    policy, choosing, test = plan.policy, result.calibration, result.test
    values = policy.candidates(choosing, plan.points)
    seen = curve(policy, values, choosing)
    chosen: list[OperatingPoint] = []
    if plan.is_point:
        chosen.append(OperatingPoint("as given", policy))
    if result.run.point is not None and not plan.temperature:  # it is of confidences as they are
        chosen.append(OperatingPoint("the run's own", result.run.point, "chosen by its method, in validation"))
    elif result.run.fixed is not None and not plan.temperature:
        chosen.append(OperatingPoint("the run's own", result.run.fixed, "fixed by its method"))
    for calibration in plan.calibrations.values():
        chosen += calibration(policy, choosing, seen)
    result = replace(
        result,
        seen=seen,
        curve=curve(policy, values, test),
        front=pareto(seen.accuracy, seen.costs[plan.cost.kind]),
        points=[_measured(point, test, plan.cost, choosing) for point in chosen],
    )
    return replace(result, oracles=_oracles(result, plan.cost))


def _measured(point: OperatingPoint, test: Trace, cost: Cost, choosing: Trace) -> Point:
    if point.policy is None:
        return Point(point, None)
    measured = _point(point, replay(point.policy, test), test, cost)
    labels = replay(point.policy, choosing).prediction.label
    return replace(measured, seen=(labels == choosing.labels).double().mean().item())


def _point(chosen: OperatingPoint, outcome: Outcome, test: Trace, cost: Cost) -> Point:
    right = (outcome.prediction.label == test.labels).double()
    gain = right - test.correct[-1].double()
    root = math.sqrt(len(test))
    counts = torch.bincount(outcome.prediction.exit - 1, minlength=test.num_exits)
    device = cost.on_device.of(outcome, test)
    return Point(
        chosen,
        outcome,
        accuracy=right.mean().item(),
        error=right.std(correction=0).item() / root,
        gain=gain.mean().item(),
        gain_error=gain.std(correction=0).item() / root,
        cost=cost.of(outcome, test),
        device=device,
        server=cost.whole.of(outcome, test) - device,
        shares=(counts.double() / len(test)).tolist(),
    )


def _oracles(result: Result, cost: Cost) -> list[Point]:
    policy = result.shown.chosen.policy
    assert policy is not None
    foreseen = OperatingPoint("oracle of the policy", None, f"“{result.shown.chosen.name}”, one head paid")
    label = OperatingPoint("oracle of the label", None, "leaves at the cheapest exit that is right")
    outcomes = [(foreseen, oracle(policy, result.test)), (label, label_oracle(result.test))]
    return [_point(chosen, outcome, result.test, cost) for chosen, outcome in outcomes]
