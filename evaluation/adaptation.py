"""Thresholds that follow the bandwidth, and what does not: figure 10 of the Exit Predictor paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from costs.latency import CoInference
from evaluation.adaptation_settings import Settings
from evaluation.along_bandwidth import (
    BACKBONE,
    EE,
    EE_ADAPTIVE,
    EE_EP,
    EE_EP_ADAPTIVE,
    EE_PRUNED,
    EXACT,
    ORACLE,
    Adaptation,
    Along,
    Method,
)
from evaluation.runs import TrainedRun
from evaluation.traced import Traced
from inference.adaptive import fitted
from inference.choices import PredictionThresholds
from inference.latency_bound import Seen, grid, optima
from inference.policies import Never, Policy
from inference.predicted import Predicted
from inference.replay import curve
from inference.thresholds import Confidence, Thresholds, one_each
from inference.trace import Trace

Pruning = Callable[["Contest", Sequence[float]], Method]


class Contest:
    """What is compared, on the validation and test traces of one run, priced with ``latency_ms`` and ``sent_bytes``."""

    def __init__(self, val: Trace, test: Trace, setting: CoInference, settings: Settings):
        self.val, self.test, self.setting, self.settings = val, test, setting, settings
        self.bandwidths = settings.compared
        self.link = setting.link(val.costs["sent_bytes"].link)
        self._candidates: dict[str, Seen] = {}

    def seen(self, family: Policy, values: Tensor, trace: Trace, foresight: bool = False) -> Seen:
        """Points (P, D) of a family on a trace; with foresight each image pays the head it leaves at alone."""
        costs, points = trace.costs["latency_ms"], curve(family, values, trace)
        seen = Seen.of(points, costs.link)
        if not foresight:
            return seen
        alone = torch.tensor([*costs.alone[:-1], costs.alone[-1] - costs.link], dtype=torch.float64)
        return replace(seen, computing=points.shares @ alone)

    def candidates(self, family: Confidence) -> Seen:
        """All thresholds that are tried, on the validation split."""
        if family.name not in self._candidates:
            values = grid(family, self.val, self.settings.points)
            self._candidates[family.name] = self.seen(family, values, self.val)
        return self._candidates[family.name]

    def along(self, seen: Seen) -> Along:
        """B points at the B bandwidths, or one at all of them."""
        latency = seen.latency(self.link, self.bandwidths)
        return Along(seen.accuracy.expand(len(latency)), latency)

    def static(self, name: str, family: Policy, values: Sequence[float] = ()) -> Method:
        """One point of a family at every bandwidth."""
        row = torch.tensor([list(values)], dtype=torch.float64)
        val, test = (self.along(self.seen(family, row, trace)) for trace in (self.val, self.test))
        return Method(name, val, test, static=True, policy_of=lambda mbps: family.at(values))

    def regressed(self, name: str, family: Confidence) -> Method:
        """Thresholds that regression models choose."""

        def replayed(values: Tensor) -> Seen:
            return self.seen(family, values, self.val)

        s, bound, seen = self.settings, self.setting.bound_ms, self.candidates(family)
        models = fitted(family, seen, replayed, self.link, bound, s.intervals, s.margin_ms, s.outside)
        values = models.values(self.bandwidths)
        val, test = (self.along(self.seen(family, values, trace)) for trace in (self.val, self.test))
        return Method(name, val, test, thresholds=values, regressed=models, policy_of=models.at)

    def foreseen(self, name: str, family: Confidence) -> Method:
        """The best of all candidates at each bandwidth, with foresight."""
        values = self.candidates(family).values
        seen = self.seen(family, values, self.val, foresight=True)
        seen = seen.rows(optima(seen, self.link, self.setting.bound_ms, self.bandwidths))
        test = self.seen(family, seen.values, self.test, foresight=True)
        return Method(name, self.along(seen), self.along(test), thresholds=seen.values)

    def exact(self, name: str, regressed: Sequence[tuple[Confidence, Method]]) -> Method:
        """The best at each bandwidth of all candidates, and of what the models choose at any, of some families."""
        found = []
        for family, method in regressed:
            assert method.thresholds is not None
            seen = self.candidates(family).joined(self.seen(family, method.thresholds, self.val))
            seen = seen.rows(optima(seen, self.link, self.setting.bound_ms, self.bandwidths))
            test = self.seen(family, seen.values, self.test)
            found.append(Method(name, self.along(seen), self.along(test), thresholds=seen.values))
        best = found[0]
        for other in found[1:]:
            best = _better(best, other)
        return best


def _better(one: Method, other: Method) -> Method:
    """Of two that keep the bound, the more accurate in validation, bandwidth by bandwidth, or else the faster."""
    equal = other.val.accuracy == one.val.accuracy
    takes = (other.val.accuracy > one.val.accuracy) | equal & (other.val.latency < one.val.latency)
    val, test = (
        Along(*(torch.where(takes, b, a) for a, b in zip(x, y, strict=True)))
        for x, y in ((one.val, other.val), (one.test, other.test))
    )
    assert one.thresholds is not None
    assert other.thresholds is not None
    width = max(one.thresholds.shape[1], other.thresholds.shape[1])
    rows = [_widened(method.thresholds, width) for method in (one, other)]
    return replace(one, val=val, test=test, thresholds=torch.where(takes[:, None], rows[1], rows[0]))


def _widened(values: Tensor | None, width: int) -> Tensor:
    """Thresholds (B, width): NaN where a family has fewer."""
    assert values is not None
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=math.nan)


def adapted(
    run: Traced, backbone: Traced | None, settings: Settings, setting: CoInference, pruning: Pruning | None = None
) -> Adaptation:
    """Figure 10 of a run with early exits.

    Args:
        backbone: None for the run's own last exit in its place.
        pruning: makes the method whose encoder loses channels; None to leave it out.

    Raises:
        ValueError: a bound that no thresholds keep to.
    """
    val, test = run.val, run.test
    these = Contest(val, test, setting, settings)
    lambdas = static_thresholds(run.run, settings)
    own = these if backbone is None else Contest(backbone.val, backbone.test, setting, settings)
    methods = [own.static(BACKBONE, Never()), these.static(EE, Confidence(), lambdas)]
    if test.predictions is not None:
        guided = PredictionThresholds(more=settings.more)(Confidence(lambdas), val)
        methods.append(these.static(EE_EP, Predicted(), [*lambdas, *guided.gammas(test.num_exits)]))
    follows: list[tuple[Confidence, Method]] = [(Confidence(), these.regressed(EE_ADAPTIVE, Confidence()))]
    methods.append(follows[0][1])
    if pruning is not None:
        methods.append(pruning(these, lambdas))
    methods.append(these.foreseen(ORACLE, Confidence()))
    if test.predictions is not None:
        follows.append((Predicted(), these.regressed(EE_EP_ADAPTIVE, Predicted())))
        methods.append(follows[1][1])
    methods.append(these.exact(EXACT, follows))
    source = "the last exit of the same network, no early head computed" if backbone is None else backbone.run.label
    notes = [
        f"{BACKBONE}: {source}.",
        f"{EXACT}: at every bandwidth the best in validation of {settings.points:,} λ, of as many λ and γ where there "
        "is a predictor, and of what the regression models choose.",
    ]
    if pruning is None:
        notes.append(f"{EE_PRUNED} is left out: there is no codec, or adaptation.pruned=false.")
    return Adaptation(run.run.label, these.bandwidths, setting, these.link, methods, notes)


def static_thresholds(run: TrainedRun, settings: Settings) -> list[float]:
    """λ of the static methods, one for each early exit.

    Raises:
        ValueError: another number of them.
    """
    exits = run.network.num_exits
    if settings.static is not None:
        return one_each(settings.static, exits, "adaptation.static")
    return run.point.each(exits) if isinstance(run.point, Thresholds) else [0.95] * (exits - 1)
