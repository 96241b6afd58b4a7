"""Traces: what every exit said of every sample of a split, and what each segment and head cost it, recorded once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from costs.gates import BlockGates
from costs.network import NetworkCosts, network_counts
from networks.early_exit_network import EarlyExitNetwork, Gated
from networks.gates import Decisions
from storage.files import written_aside

FORMAT = "offramp trace 1"


@dataclass(frozen=True)
class Trace:
    """A split seen by a network with N exits.

    Attributes:
        logits: (N, samples, C) float32.
        labels: (samples,) int64.
        segments: by convention (``macs``, ``ptflops``, ``sent_bytes``, int64; ``energy_uj``, ``latency_ms``, float64),
            (N, samples): the backbone from the exit before to each, and what lies at the cut.
        heads: by convention, (N, samples): each exit's own classifier.
        costs: by convention, the same of the network as it stands, nothing skipped.
        predictions: (N - 1, samples) float32, the Exit Predictor's scores; None without one.
        decisions: of the gates, (blocks, samples) int64; None without gates.
        extras: what the data set knows of each sample besides, (samples,) by name.
        about: where it comes from.
    """

    logits: Tensor
    labels: Tensor
    segments: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    costs: Mapping[str, NetworkCosts]
    predictions: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    decisions: Decisions | None = None

    @property
    def num_exits(self) -> int:
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        return self.logits.shape[2]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def correct(self) -> Tensor:
        """(N, samples) bool: whether each exit is right."""
        return torch.stack([logits.argmax(-1) for logits in self.logits]) == self.labels

    def paid(self, convention: str = "macs") -> Tensor:
        """(N, samples): what leaving at each exit costs with every head on the way computed."""
        return (self.segments[convention] + self.heads[convention]).cumsum(0)

    def tempered(self, temperatures: Sequence[float]) -> Trace:
        """The same with each exit's logits divided by its temperature.

        Raises:
            ValueError: another number of temperatures.
        """
        if len(temperatures) != self.num_exits:
            raise ValueError(f"Expected {self.num_exits} temperatures, one an exit, got {list(temperatures)}.")
        divisors = torch.tensor(list(temperatures), dtype=self.logits.dtype)[:, None, None]
        return replace(self, logits=self.logits / divisors)

    def priced(self, *costs: NetworkCosts) -> Trace:
        """The same with more conventions."""
        named: dict[str, NetworkCosts] = {cost.convention: cost for cost in costs}
        segments = {name: _segments(cost, self.decisions, len(self)) for name, cost in named.items()}
        heads = {name: _each(cost.heads, len(self)) for name, cost in named.items()}
        return replace(
            self,
            segments={**self.segments, **segments},
            heads={**self.heads, **heads},
            costs={**self.costs, **named},
        )

    def rows(self, index: Tensor) -> Trace:
        """Some of the samples."""
        segments, heads = ({n: v[:, index] for n, v in part.items()} for part in (self.segments, self.heads))
        extras = {name: value[index] for name, value in self.extras.items()}
        predictions = None if self.predictions is None else self.predictions[:, index]
        logits, labels = self.logits[:, index], self.labels[index]
        decisions = self.decisions and Decisions(*(part[:, index] for part in self.decisions))
        return Trace(logits, labels, segments, heads, self.costs, predictions, extras, self.about, decisions)


@torch.inference_mode()
def record(
    network: EarlyExitNetwork,
    batches: Iterable[Sequence[Tensor]],
    extras: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Trace:
    """One pass of a network over a split.

    Args:
        network: put into eval mode; runs where it is, in the precision of the surrounding ``torch.autocast``.
        batches: of normalized images (n, C, H, W) where the network is, labels (n,), and one tensor (n,) an extra.
        extras: names of the latter.

    Raises:
        ValueError: no sample at all, or logits that are not numbers.
    """
    network.eval()
    costs = network_counts(network)
    logits, predictions, decided, rest = [], [], [], []
    for images, *known in batches:
        said = network(images) if network.gating is None else network.gated(images)
        if isinstance(said, Gated):
            decided.append(as_decided(said.decisions))
            said = said.logits
        logits.append(torch.stack([z.float() for z in said]).cpu())
        if network.predictor is not None:
            predictions.append(network.predictor.scores(images).T.cpu())
        rest.append([value.cpu() for value in known])
    if not logits or not sum(z.shape[1] for z in logits):
        raise ValueError("Expected at least one image to evaluate on, the split is empty.")
    stacked = torch.cat(logits, 1)
    _require_numbers(stacked)
    labels, *more = (torch.cat(column) for column in zip(*rest, strict=True))
    scores = torch.cat(predictions, 1) if predictions else None
    if scores is not None and not torch.isfinite(scores).all():
        raise ValueError("Expected numbers from the Exit Predictor, got NaN; were these weights trained to their end?")
    known_of_each = dict(zip(extras, more, strict=True))
    return assembled(stacked, labels, costs, scores, known_of_each, about or {}, joined(decided))


def as_decided(decisions: Decisions) -> Decisions:
    """As a trace keeps them: whole numbers, on the processor."""
    return Decisions(*(part.detach().round().to("cpu", torch.int64) for part in decisions))


def joined(parts: Sequence[Decisions]) -> Decisions | None:
    """Decisions of batches, one after another; None where there are none."""
    return Decisions(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))) if parts else None


def assembled(
    logits: Tensor,
    labels: Tensor,
    costs: Mapping[str, NetworkCosts],
    predictions: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    decisions: Decisions | None = None,
) -> Trace:
    """A trace from what a network said, its segments costing what the gates decided; see ``Trace``.

    Without decisions every block has run, and no gate was asked.
    """
    if decisions is None:
        costs = {name: cost.ungated for name, cost in costs.items()}
    segments = {name: _segments(cost, decisions, len(labels)) for name, cost in costs.items()}
    heads = {name: _each(cost.heads, len(labels)) for name, cost in costs.items()}
    return Trace(logits, labels, segments, heads, costs, predictions, extras or {}, about or {}, decisions)


def _segments(cost: NetworkCosts, decisions: Decisions | None, samples: int) -> Tensor:
    # what gates do not change, such as bytes sent, has none
    return _each(cost.segments, samples) if decisions is None or not cost.gates else cost.of_segments(decisions)


def _each(costs: Sequence[float], samples: int) -> Tensor:
    whole = all(isinstance(cost, int) for cost in costs)
    return torch.tensor(costs, dtype=torch.int64 if whole else torch.float64)[:, None].expand(-1, samples)


def _require_numbers(logits: Tensor) -> None:
    bad = ~torch.isfinite(logits).all(-1)
    if bad.any():
        exit = int(bad.any(1).int().argmax())
        raise ValueError(
            f"Expected numbers from exit {exit + 1}, got NaN or infinity for {int(bad[exit].sum())} of {bad.shape[1]} "
            "images; were these weights trained to their end? bf16 and fp32 overflow alike, so train again with a "
            "smaller optimizer.lr."
        )


def write_trace(path: str | Path, trace: Trace) -> None:
    """Writes safetensors whose header holds, as JSON, the format, the static costs and where the trace comes from."""
    tensors = {"logits": trace.logits, "labels": trace.labels}
    tensors |= {} if trace.predictions is None else {"predictions": trace.predictions}
    if trace.decisions is not None:
        tensors |= {f"decisions/{name}": part.to(torch.int16) for name, part in trace.decisions._asdict().items()}
    tensors |= {f"segments/{name}": value for name, value in trace.segments.items()}
    tensors |= {f"heads/{name}": value for name, value in trace.heads.items()}
    tensors |= {f"extras/{name}": value for name, value in trace.extras.items()}
    costs = {name: asdict(cost) for name, cost in trace.costs.items()}
    header = json.dumps({"format": FORMAT, "costs": costs, "about": dict(trace.about)})
    with written_aside(path) as file:
        # each a copy: safetensors takes no two names for one tensor
        file.write(save({name: value.clone().contiguous() for name, value in tensors.items()}, {"offramp": header}))


def read_trace(path: str | Path) -> Trace:
    """The trace in a file.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["offramp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError(header["format"])
        costs = {name: _costs(cost) for name, cost in header["costs"].items()}
        parts = {room: _under(room, tensors) for room in ("segments", "heads", "extras")}
        predictions, about = tensors.get("predictions"), header["about"]
        if predictions is None and costs["macs"].predictor:
            raise KeyError("predictions")
        decided = {name: part.long() for name, part in _under("decisions", tensors).items()}
        decisions = Decisions(**decided) if costs["macs"].gates else None
        return Trace(
            tensors["logits"],
            tensors["labels"],
            **parts,
            costs=costs,
            predictions=predictions,
            about=about,
            decisions=decisions,
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a trace ({FORMAT}) in {path}, got another file or a damaged one: {error}."
        ) from error


def _costs(stored: dict[str, Any]) -> NetworkCosts:
    gates = tuple(BlockGates(**gate) for gate in stored.pop("gates", ()))
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    return NetworkCosts(**plain, gates=gates)


def _under(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{room}/"): value for name, value in tensors.items() if name.startswith(f"{room}/")}
