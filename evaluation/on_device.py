"""What is computed on the device: early exits alone, with an Exit Predictor, pruned, and with foresight.

The comparisons of section V-B of the Exit Predictor paper: figures 7 to 9 and table II.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.cost_axes import Cost
from evaluation.results import Plan, Result
from inference.choices import PredictionThresholds
from inference.policies import Policy
from inference.predicted import Predicted
from inference.replay import Outcome, oracle, replay
from inference.thresholds import Confidence, Thresholds
from inference.trace import Trace

Kind = Literal["EE", "EE+EP", "EE+oracle", "pruned"]
Lambdas = tuple[float, ...]  # of each early exit


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Args:
        lambdas: λ that all early exits share, one after another (figures 7 and 9).
        at: λ that all early exits share in the tables and in figure 8.
        more: share of the samples that γ may send to the last exit beyond those that get there anyway.

    Raises:
        ValueError: a value that is no threshold or no share.
    """

    lambdas: Sequence[float]
    at: float = 0.95
    more: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.lambdas, str) or not isinstance(self.lambdas, Sequence):
            raise ValueError(f"Expected on_device.lambdas to be a list of confidence thresholds, got {self.lambdas}.")
        for value in (*self.lambdas, self.at):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"Expected on_device.lambdas and on_device.at to be confidence thresholds from 0 to 1, got {value}."
                )
        PredictionThresholds(more=self.more)


@dataclass(frozen=True)
class Place:
    """One network under one policy on the test split.

    Attributes:
        accuracy: from 0 to 1.
        right: (samples,) bool.
        device, total: average cost of an image on the device, and with the server.
        last: share of the images that reach the last exit.
        computed: share of the images that each early head is computed for.
        gammas: prediction thresholds, where there are any.
    """

    accuracy: float
    right: Tensor
    device: float
    total: float
    last: float
    computed: Sequence[float]
    gammas: Sequence[float] = ()


@dataclass(frozen=True)
class Contender:
    """A curve of the comparison.

    Attributes:
        kind: how images are guided.
        label: names it.
        run: label of its run.
        ratio: of the filters removed.
        tuned: whether it was trained after that.
        predictor: cost of the Exit Predictor.
        places: by the λ of each early exit.
    """

    kind: Kind
    label: str
    run: str
    ratio: float = 0.0
    tuned: bool = False
    predictor: float = 0.0
    places: Mapping[Lambdas, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The contenders, and the λ they are compared at.

    Attributes:
        swept: the λ of figures 7 and 9, rising.
        at: the shared λ of tables and figure 8.
        own: the λ that the runs chose themselves.
        cost: axis, on the device.
        plain: label and accuracy of networks without early exits.
        more: see ``Settings``.
        chosen_on: the split that γ was chosen on.
        times: where they are measured, of a contender by its label and λ: by batch size, the time of the on-device
            network as a share of that of the early exits alone.
    """

    contenders: Sequence[Contender]
    swept: Sequence[Lambdas]
    at: Lambdas
    own: Sequence[Lambdas]
    cost: Cost
    plain: Mapping[str, float]
    more: float
    chosen_on: str = "val"
    times: Mapping[tuple[str, Lambdas], Mapping[int, float]] = field(default_factory=dict)

    @property
    def tabled(self) -> list[Lambdas]:
        """The λ that have a table: the shared one, and the runs' own."""
        return list(dict.fromkeys([self.at, *self.own]))

    @property
    def alone(self) -> Contender | None:
        """The early-exit network that the others are measured against."""
        return next((contender for contender in self.contenders if contender.kind == "EE"), None)


def compare(results: Sequence[Result], settings: Settings, plan: Plan) -> Comparison | None:
    """The comparison of the runs of one early-exit network: that of the first with an Exit Predictor, or else pruned.

    None where there is neither; runs of other networks are named and left out. γ is chosen for each λ on the
    calibration split, by the rule of figure 7.
    """
    cost = plan.cost
    first = [result for result in results if result.test.predictions is not None or _ratio(result)]
    if not first or cost.kind == "sent_bytes":  # of which the device has none
        return None
    first.sort(key=lambda result: result.test.predictions is None)
    early = first[0].test.num_exits - 1
    compared = [result for result in results if _same_network(result, first[0])]
    for other in results:
        if other.adaptive and not any(other is result for result in compared):
            print(f"{other.run.label} is of another early-exit network and left out of the comparison on the device.")
    # scaled by temperatures, confidences are not those that a run chose its λ for
    points = [result.run.point for result in compared if set(result.temperatures) == {1.0}]
    own = {tuple(point.each(early + 1)) for point in points if isinstance(point, Thresholds)}
    shared = [(value,) * early for value in sorted({*settings.lambdas, settings.at})]
    lambdas = list(dict.fromkeys([*shared, *sorted(own)]))
    contenders: list[Contender] = []
    seen: list[Trace] = []
    several = sum(result.test.predictions is not None for result in compared) > 1
    for result in compared:
        known = any(torch.equal(result.test.logits, other.logits) for other in seen)
        contenders += _contenders(result, lambdas, settings.more, cost, known, several)
        seen.append(result.test)
    names = [contender.label for contender in contenders]
    contenders = [
        replace(one, label=f"{one.label} ({one.run})") if names.count(one.label) > 1 else one for one in contenders
    ]
    plain = {result.run.label: result.exits[-1].accuracy for result in results if not result.adaptive}
    at = (float(settings.at),) * early
    return Comparison(contenders, shared, at, sorted(own), cost.on_device, plain, settings.more, plan.split)


def _same_network(result: Result, first: Result) -> bool:
    """Whether two runs have or began from the same trained early-exit network."""
    if result.test.num_exits != first.test.num_exits or len(result.test) != len(first.test):
        return False
    if result.gated or first.gated:  # what the device computes is not known of them
        return False
    return _origin(result) == _origin(first) or torch.equal(result.test.logits, first.test.logits)


def _origin(result: Result) -> Path:
    earlier = OmegaConf.select(result.run.config, "method.from_run")
    return (result.run.path if earlier is None else Path(str(earlier)).expanduser()).resolve()


def _ratio(result: Result) -> float:
    return float(OmegaConf.select(result.run.config, "method.pruning.ratio") or 0)


def _contenders(
    result: Result, lambdas: Sequence[Lambdas], more: float, cost: Cost, known: bool, several: bool
) -> list[Contender]:
    """The curves of one run; of an early-exit network that is ``known`` already only what it adds."""
    run, test, ratio = result.run.label, result.test, _ratio(result)

    def swept(policy: Policy, foresight: bool = False) -> dict[Lambdas, Place]:
        found = {}
        for each in lambdas:
            guided = _guided(policy, each, result, more)
            found[each] = _place(oracle(guided, test) if foresight else replay(guided, test), test, cost, guided)
        return found

    if ratio:
        tuned = OmegaConf.select(result.run.config, "method.phases.fine_tune.epochs") != 0
        label = f"EE, {100 * ratio:.3g} % pruned{', tuned' if tuned else ''}"
        return [Contender("pruned", label, run, ratio, tuned, places=swept(Confidence()))]
    found = []
    if not known:
        found.append(Contender("EE", "EE", run, places=swept(Confidence())))
        found.append(Contender("EE+oracle", "EE + oracle", run, places=swept(Confidence(), foresight=True)))
    if test.predictions is not None:
        name = OmegaConf.select(result.run.config, "method.predictor.name")
        predictor = float(cost.factor * test.costs[cost.whole.kind].predictor)
        label = f"EE + EP, {name}" if several else "EE + EP"
        found.append(Contender("EE+EP", label, run, predictor=predictor, places=swept(Predicted())))
    return found


def _guided(policy: Policy, lambdas: Lambdas, result: Result, more: float) -> Policy:
    confident = Confidence(list(lambdas))
    if not isinstance(policy, Predicted):
        return confident
    return PredictionThresholds(more=more)(confident, result.calibration)


def _place(outcome: Outcome, test: Trace, cost: Cost, policy: Policy) -> Place:
    right = outcome.prediction.label == test.labels
    return Place(
        accuracy=right.double().mean().item(),
        right=right,
        device=cost.on_device.of(outcome, test),
        total=cost.whole.of(outcome, test),
        last=(outcome.prediction.exit == test.num_exits).double().mean().item(),
        computed=outcome.heads[:-1].double().mean(1).tolist(),
        gammas=policy.gammas(test.num_exits) if isinstance(policy, Predicted) else (),
    )
