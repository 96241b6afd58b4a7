"""The files every run leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor

# may differ when a run is gone on with: they change where and how it is shown, not what it computes
EXEMPT = ("logger", "callbacks", "trainer.accelerator", "trainer.devices", "trainer.strategy",
          "dataset.num_workers", "dataset.cache_dir", "dataset.memory_limit")  # fmt: skip


class RunDirectory:
    """Writes ``config.yaml``, ``metrics.json`` and ``network.safetensors``, each aside and then renamed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check(self, config: DictConfig) -> None:
        """Refuses a directory that holds a run of another config; what is ``auto`` now may have been picked before.

        Raises:
            ValueError: naming the first keys that differ.
        """
        target = self.path / "config.yaml"
        if not target.exists() or not any(self.path.glob("checkpoints/*.ckpt")):
            return  # nothing to lose
        old = dict(_flat(yaml.safe_load(target.read_text())))
        new = dict(_flat(OmegaConf.to_container(config, resolve=True)))
        differing = [
            key
            for key in sorted(old.keys() | new.keys())
            if not key.startswith(EXEMPT) and new.get(key) != "auto" and old.get(key) != new.get(key)
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
