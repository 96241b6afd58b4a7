"""The files every run leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor

# may differ when a run is gone on with: they change where and how it is shown, not what it computes
EXEMPT = (
    "run_dir",
    "logger",
    "callbacks.progress_bar",
    "callbacks.cost_table",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy",
    "dataset.num_workers",
    "dataset.cache_dir",
)


class RunDirectory:
    """Writes ``config.yaml``, ``metrics.json`` and ``network.safetensors``, each aside and then renamed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def take_up(self, config: DictConfig) -> None:
        """Goes on with the run that is here: what is ``auto`` in the config is set to what that run picked.

        Raises:
            ValueError: naming the first keys that differ, where it is a run of another config.
        """
        target = self.path / "config.yaml"
        if not target.exists() or not any(self.path.glob("checkpoints/*.ckpt")):
            return  # nothing to lose
        stored = OmegaConf.create(target.read_text())
        for key, value in _flat(OmegaConf.to_container(config, resolve=True)):
            picked = OmegaConf.select(stored, key)
            if value == "auto" and picked is not None:
                OmegaConf.update(config, key, picked, force_add=True)
        old, new = (dict(_flat(OmegaConf.to_container(node, resolve=True))) for node in (stored, config))
        differing = [
            key
            for key in sorted(old.keys() | new.keys())
            if not key.startswith(EXEMPT) and old.get(key) != new.get(key)
        ]
        if differing:
            shown = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in differing[:4])
            raise ValueError(f"{self.path} holds a run of another config ({shown}); choose another hydra.run.dir.")

    def write_config(self, config: DictConfig) -> None:
        """The resolved config."""
        self._write("config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())

    def write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Flat, sorted by name."""
        self._write("metrics.json", (json.dumps(dict(sorted(metrics.items())), indent=2) + "\n").encode())

    def write_network(self, state: Mapping[str, Tensor]) -> None:
        """The weights."""
        self._write("network.safetensors", save({name: value.contiguous().cpu() for name, value in state.items()}))

    def _write(self, name: str, content: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / f".{name}.tmp"
        aside.write_bytes(content)
        os.replace(aside, self.path / name)


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
