"""Finds trained runs, and loads their networks from what they left."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from evaluation.labels import labels
from inference.points import from_plain
from inference.policies import Policy
from networks.early_exit_network import EarlyExitNetwork
from networks.packing import unpacked_state
from running.assembly import build_network, build_policy, shaped
from storage.run_directory import RunDirectory
from storage.weights import NAME, read_weights

NEEDED = (
    "images.shape",
    "images.classes",
    "backbone.name",
    "dataset.name",
    "method.exits",
    "method.heads",
)
BUILT = [
    "backbone",
    "dataset",
    "method",
    "logger",
    "energy",
]  # what is built of a stored config, from parts in these rooms
ROOMS = ("networks", "datamodules", "inference", "lightning_modules", "callbacks", "costs")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        path: its directory.
        config: as it left it.
        network: with its weights, in eval mode.
        weights: SHA-256 of their file.
        label: short, unlike that of any other run evaluated with it.
        point: the policy that its method chose, if it chooses one.
        fixed: the policy that its method fixes beforehand, if it does.
    """

    path: Path
    config: DictConfig
    network: EarlyExitNetwork
    weights: str
    label: str
    point: Policy | None = None
    fixed: Policy | None = None


def is_adaptive(network: EarlyExitNetwork) -> bool:
    """Whether it spends more on one image than on another: with early exits, or with gates."""
    return network.num_exits > 1 or network.gating is not None


def find_runs(run: Any, runs: Any) -> list[Path]:
    """The run directories that are asked for; of a multirun folder those of its jobs that are finished.

    Raises:
        ValueError: none is asked for, or a folder holds no finished run.
    """
    named = [*_names(run), *_names(runs)]
    if not named:
        raise ValueError("Expected run=<run directory or multirun folder>, or 'runs=[a,b]'.")
    found = [path for name in named for path in _expanded(Path(name).expanduser())]
    return list(dict.fromkeys(path.resolve() for path in found))


def _names(given: Any) -> list[str]:
    return [] if given is None else [str(name) for name in ([given] if isinstance(given, str | int) else given)]


def _expanded(folder: Path) -> list[Path]:
    if (folder / "config.yaml").exists():
        if not _is_finished(folder):
            raise ValueError(
                f"The run in {folder} is not finished: run its command again, it goes on where it stopped."
            )
        return [folder]
    if folder.is_file():
        raise ValueError(f"Expected the folder of a run, got the file {folder}.")
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


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def load_runs(paths: Sequence[Path]) -> list[TrainedRun]:
    """The runs with their networks.

    Raises:
        ValueError: a damaged config, weights that do not fit it, or runs of different data sets.
    """
    configs = [stored_config(path) for path in paths]
    _require_one_data_set(paths, configs)
    networks = [load_network(path, config) for path, config in zip(paths, configs, strict=True)]
    names = labels(paths, configs, [is_adaptive(network) for network in networks])
    return [
        TrainedRun(path, config, network, _digest(path / NAME), name, stored_point(path), fixed_point(config))
        for path, config, network, name in zip(paths, configs, networks, names, strict=True)
    ]


def stored_point(path: Path) -> Policy | None:
    """The policy that the method of a run chose, None where it chooses none.

    Raises:
        ValueError: the file is damaged.
    """
    content = RunDirectory(path).operating_point()
    return None if content is None else from_plain(content)


def fixed_point(config: DictConfig) -> Policy | None:
    """The policy that the method of a run fixes beforehand, None where it does not."""
    named = OmegaConf.select(config, "method.policy") is not None
    return build_policy(config, len(config.images.classes)) if named else None


def stored_config(path: Path) -> DictConfig:
    """The resolved config of a run.

    Raises:
        ValueError: it is damaged, or names anything to call but parts of this project: it may come from somebody else.
    """
    stored = RunDirectory(path).stored_config()
    if missing := [key for key in NEEDED if not OmegaConf.select(stored, key)]:
        raise ValueError(f"Expected {path / 'config.yaml'} to be that of a run, but it has no {missing[0]}.")
    config = OmegaConf.create(OmegaConf.to_container(stored, resolve=True))
    assert isinstance(config, DictConfig)
    for target in _targets(OmegaConf.to_container(OmegaConf.masked_copy(config, BUILT))):
        if target.partition(".")[0] not in ROOMS or get_object(target).__module__.partition(".")[0] not in ROOMS:
            raise ValueError(f"{path / 'config.yaml'} names {target}, which is no part of this project; not loaded.")
    if "weights" in config.backbone:
        config.backbone.weights = None  # those of the run are loaded in their place
    return config


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from [str(value) for key, value in node.items() if key == "_target_"]
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)


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
    network = shaped(config, build_network(config, len(config.images.classes), tuple(config.images.shape)))
    own, stored = network.state_dict(), unpacked_state(network, read_weights(path))
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
