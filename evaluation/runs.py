"""Finds trained runs, and loads their networks from what they left."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from networks.exits import EarlyExitNetwork
from running.assembly import build_network
from storage.run_directory import RunDirectory
from storage.weights import NAME, read_weights

ROOT = Path(__file__).parents[1]
# what tells runs apart, the first that does; their folder does in any case
TELLING = ("method.heads._target_", "method.exits", "dataset.name", "epochs", "optimizer.lr", "seed")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        path: its directory.
        config: as it left it.
        network: with its weights, in eval mode.
        weights: SHA-256 of their file.
        label: short, unlike that of any other run evaluated with it.
    """

    path: Path
    config: DictConfig
    network: EarlyExitNetwork
    weights: str
    label: str


def find_runs(run: Any, runs: Any) -> list[Path]:
    """The run directories that are asked for; of a multirun folder those of its jobs that are finished.

    Raises:
        ValueError: none is asked for, or a folder holds no finished run.
    """
    named = ([] if run is None else [run]) + list(runs or [])
    if not named or not all(isinstance(name, str) for name in named):
        raise ValueError("Expected run=<run directory or multirun folder>, or 'runs=[a,b]'.")
    found = [path for name in named for path in _expanded(Path(name).expanduser())]
    return list(dict.fromkeys(path.resolve() for path in found))


def _expanded(folder: Path) -> list[Path]:
    if (folder / "config.yaml").exists():
        _require_finished(folder)
        return [folder]
    inner = sorted((path.parent for path in folder.glob("*/config.yaml")), key=_natural)
    done = [path for path in inner if _is_finished(path)]
    if not done:
        state = "none of its runs is finished" if inner else "there is no config.yaml in it or in its folders"
        raise ValueError(f"Expected {folder} to be a run directory or the folder of a multirun, but {state}.")
    for path in sorted(set(inner) - set(done)):
        print(f"{path} is not finished and left out.")
    return done


def _is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists() and (folder / NAME).exists()


def _require_finished(folder: Path) -> None:
    if not _is_finished(folder):
        raise ValueError(f"The run in {folder} is not finished: run its command again, it goes on where it stopped.")


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def load_runs(paths: Sequence[Path]) -> list[TrainedRun]:
    """The runs with their networks.

    Raises:
        ValueError: a damaged config, weights that do not fit it, or runs of different data sets.
    """
    configs = [RunDirectory(path).stored_config() for path in paths]
    for path, config in zip(paths, configs, strict=True):
        _require_own_parts(path, config)
    _require_one_data_set(paths, configs)
    return [
        TrainedRun(path, config, load_network(path, config), _digest(path / NAME), label)
        for path, config, label in zip(paths, configs, labels(paths, configs), strict=True)
    ]


def _require_own_parts(path: Path, config: DictConfig) -> None:
    """Refuses a config that names anything to call but parts of this project: it may come from somebody else."""
    parts = OmegaConf.masked_copy(config, ["backbone", "dataset", "method"])
    for target in re.findall(r"_target_: *['\"]?([\w.]+)", OmegaConf.to_yaml(parts)):
        spec = find_spec(target.partition(".")[0])
        places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
        if not any(Path(place).is_relative_to(ROOT) for place in places):
            raise ValueError(f"{path / 'config.yaml'} names {target}, which is no part of this project; not loaded.")


def _require_one_data_set(paths: Sequence[Path], configs: Sequence[DictConfig]) -> None:
    for path, config in zip(paths, configs, strict=True):
        for key in ("dataset.name", "images.classes"):
            if OmegaConf.select(config, key) != OmegaConf.select(configs[0], key):
                raise ValueError(f"Expected runs of one data set, but {paths[0]} and {path} differ in {key}.")


def load_network(path: Path, config: DictConfig) -> EarlyExitNetwork:
    """The trained network of a run, in eval mode and its memory format.

    Raises:
        ValueError: weights that do not fit the config.
    """
    network = build_network(config, len(config.images.classes), tuple(config.images.shape))
    own, stored = network.state_dict(), read_weights(path)
    wrong = sorted(own.keys() ^ stored.keys()) or [n for n in own if own[n].shape != stored[n].shape]
    if wrong:
        raise ValueError(
            f"The weights in {path} do not fit its config.yaml: {len(wrong)} tensors are missing, left over or of "
            f"another shape, {wrong[0]} first. One of the two files is of another run."
        )
    network.load_state_dict(stored)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def labels(paths: Sequence[Path], configs: Sequence[DictConfig]) -> list[str]:
    """Backbone and method of each run, and as much more as tells them apart."""
    parts = [[config.backbone.name, config.method.name] for config in configs]
    for key in TELLING:
        values = [_short(OmegaConf.select(config, key)) for config in configs]
        if len({tuple(part) for part in parts}) < len(parts) and len(set(values)) > 1:
            name = "" if key.startswith("method") else f"{key.removeprefix('optimizer.').removesuffix('.name')} "
            parts = [[*part, f"{name}{value}"] for part, value in zip(parts, values, strict=True)]
    texts = [" ".join(map(str, part)) for part in parts]
    return [text if texts.count(text) == 1 else f"{text} {path.name}" for text, path in zip(texts, paths, strict=True)]


def _short(value: Any) -> str:
    if isinstance(value, DictConfig):
        own = [f"{v}" for name, v in value.items() if name != "_target_" and v is not None]
        return " ".join([value._target_.rpartition(".")[2], *own])
    return str(value).rpartition(".")[2] if "." in str(value) and not str(value)[0].isdigit() else str(value)
