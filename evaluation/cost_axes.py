"""The costs that tables and figures of an evaluation can have as their axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

from inference.replay import Outcome
from inference.trace import Trace


@dataclass(frozen=True)
class Cost:
    """An axis of tables and figures: a kind of cost (``inference.replay.kinds``), a factor, and what it is called.

    Attributes:
        unit: of its amounts; none for counts, which are shown in millions.
    """

    kind: str
    factor: int
    title: str
    unit: str = ""

    def of(self, outcome: Outcome, trace: Trace) -> float:
        """Average of an image."""
        return self.factor * outcome.cost(trace, self.kind).double().mean().item()

    def plain(self, trace: Trace) -> float:
        """Of the backbone with its own head, no gate asked and nothing skipped; on the device, up to the cut.

        Without the codec, but what is sent, and how long that takes, is through it.
        """
        costs = trace.costs[self.whole.kind].ungated
        end = None if self.kind == self.whole.kind else costs.device_ends
        if end is not None:
            return self.factor * costs.until_tap[end]
        return self.factor * (costs.backbone if costs.link else costs.plain)

    @property
    def whole(self) -> Cost:
        """The same on device and server together."""
        title = self.title.removesuffix(" on the device")
        return replace(self, kind=self.kind.removeprefix("device_"), title=title)

    @property
    def on_device(self) -> Cost:
        """The same on the device alone."""
        return replace(self, kind=f"device_{self.whole.kind}", title=f"{self.whole.title} on the device")

    def amount(self, number: float) -> str:
        """A number on this axis with its unit, or with G or M."""
        if self.unit:
            return f"{number:.2f} {self.unit}"
        return f"{number / 1e9:.3f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


_WHOLE = {"macs": Cost("macs", 1, "MACs"), "2macs": Cost("macs", 2, "2·MACs"), "2·macs": Cost("macs", 2, "2·MACs"),
          "ptflops": Cost("ptflops", 1, "ptflops"),
          "energy_uj": Cost("energy_uj", 1, "energy in µJ", "µJ"),
          "sent_bytes": Cost("sent_bytes", 1, "bytes sent", "B"),
          "latency_ms": Cost("latency_ms", 1, "latency in ms", "ms")}  # fmt: skip
COSTS = _WHOLE | {f"device_{name}": cost.on_device for name, cost in _WHOLE.items() if name != "sent_bytes"}
