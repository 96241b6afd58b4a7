"""What runs are called where several are shown together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# what tells runs apart, the first that does; their folder does in any case
TELLING = (
    "precision.name",
    "precision.edge_convs",
    "method.exits.exits",
    "method.gates.name",
    "method.resource",
    "method.alpha",
    "method.target_saving",
    "method.budget",
    "optimization",
    "method.predictor.name",
    "method.codec.bits",
    "method.codec.channels",
    "method.codec.spatial",
    "method.codec.cut",
    "method.pruning.ratio",
    "method.phases.fine_tune.epochs",
    "method.heads._target_",
    "method.exits",
    "dataset.name",
    "epochs",
    "optimizer.lr",
    "seed",
)

# what a value is called
NAMED = {
    "method.phases.fine_tune.epochs": "tuned for ",
    "method.exits.exits": "early exits ",
    "method.codec.bits": "bits ",
    "method.codec.channels": "channels 1/",
    "method.codec.spatial": "sides 1/",
    "method.codec.cut": "cut ",
    "precision.name": "",
    "precision.edge_convs": "edge ",
    "optimization": "",
    "method.resource": "for ",
    "method.target_saving": "to save ",
    "method.alpha": "α ",
    "method.budget": "budget ",
}


def labels(paths: Sequence[Path], configs: Sequence[DictConfig], adaptive: Sequence[bool]) -> list[str]:
    """Backbone and method of each run, and as much more as tells it from others; heads and places where it has any."""
    texts = [f"{config.backbone.name} {config.method.name}" for config in configs]
    for key in TELLING:
        values = [_value(config, key) for config in configs]
        alike: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            alike.setdefault(text, []).append(i)
        for group in alike.values():
            if len({_short(values[i]) for i in group}) > 1:
                for i in group:
                    if values[i] is not None and (adaptive[i] or not key.startswith("method")):
                        texts[i] += f" {_named(key)}{_short(values[i])}"
    return [
        text if texts.count(text) == 1 else f"{text} {_own_part(path, paths)}"
        for text, path in zip(texts, paths, strict=True)
    ]


def _value(config: DictConfig, key: str) -> Any:
    if key == "method.alpha" and OmegaConf.select(config, "method.target_saving") is not None:
        return None  # only where it began
    return OmegaConf.select(config, key)


def _named(key: str) -> str:
    name = "" if key.startswith("method") else f"{key.removeprefix('optimizer.').removesuffix('.name')} "
    return NAMED.get(key, name)


def _own_part(path: Path, paths: Sequence[Path]) -> str:
    """The end of the path that no other path has."""
    for length in range(1, len(path.parts)):
        end = path.parts[-length:]
        if sum(other.parts[-length:] == end for other in paths) == 1:
            return "/".join(end)
    return str(path)


def _short(value: Any) -> str:
    if isinstance(value, DictConfig):
        own = [f"{v}" for name, v in value.items() if name != "_target_" and v is not None]
        return " ".join([value._target_.rpartition(".")[2], *own])
    return str(value).rpartition(".")[2] if "." in str(value) and not str(value)[0].isdigit() else str(value)
