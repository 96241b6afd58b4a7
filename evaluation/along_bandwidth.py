"""The methods of figure 10 of the Exit Predictor paper: accuracy and latency along the bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from costs.latency import CoInference, Link
from evaluation.adaptation_settings import Streaming
from inference.adaptive import AdaptiveThresholds
from inference.policies import Policy
from inference.simulation import Stream

BACKBONE, EE, EE_EP = "Backbone", "EE (static)", "EE+EP (static)"
EE_ADAPTIVE, EE_PRUNED, ORACLE = "EE (adaptive)", "EE (adaptive, pruning)", "EE+oracle (adaptive)"
EE_EP_ADAPTIVE, EXACT = "EE+EP (adaptive)", "exact optimum"


class Along(NamedTuple):
    """A method along B bandwidths, on one split: accuracy (B,) from 0 to 1, latency (B,) in average ms an image."""

    accuracy: Tensor
    latency: Tensor


@dataclass(frozen=True)
class Method:
    """A curve of figure 10.

    Attributes:
        name: of the method.
        val, test: along the bandwidths.
        static: whether it does the same at every bandwidth.
        thresholds: (B, D) of those that choose; None of others.
        channels: (B,) of the code, of the one that prunes.
        regressed: the models, of those that have them.
        policy_of: from Mbit/s to the policy, of those that can be executed.
    """

    name: str
    val: Along
    test: Along
    static: bool = False
    thresholds: Tensor | None = None
    channels: Tensor | None = None
    regressed: AdaptiveThresholds | None = None
    policy_of: Callable[[float], Policy] | None = None


@dataclass(frozen=True)
class Adaptation:
    """Figure 10 of one run.

    Attributes:
        label: of the run.
        bandwidths: (B,) Mbit/s.
        setting: device, link and server.
        link: what crosses it.
        methods: in the order of the paper, the exact optimum last.
        notes: what there is to say of them.
        stream: how images arrive while the bandwidth changes, where they do, and ...
        streams: ... what becomes of them, by method.
    """

    label: str
    bandwidths: Sequence[float]
    setting: CoInference
    link: Link
    methods: Sequence[Method]
    notes: Sequence[str] = ()
    stream: Streaming | None = None
    streams: Mapping[str, Stream] = field(default_factory=dict)

    @property
    def exits(self) -> int:
        """N, of the run."""
        thresholds = self.method(EE_ADAPTIVE).thresholds
        assert thresholds is not None
        return thresholds.shape[1] + 1

    def method(self, *names: str) -> Method:
        """The method of that name, the first of several that is there."""
        known = {method.name: method for method in self.methods}
        return next(known[name] for name in names if name in known)

    def excess(self, method: Method) -> tuple[float, float]:
        """By how much the bound is exceeded at worst, in ms, in validation and test; below 0 where it never is."""
        worst = [float(along.latency.max()) - self.setting.bound_ms for along in (method.val, method.test)]
        return worst[0], worst[1]
