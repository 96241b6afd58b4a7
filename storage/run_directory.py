"""The files every run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from storage.checkpoints import unsealed
from storage.files import written_aside
from storage.weights import NAME, write_weights

# may differ when a run is gone on with: they change where and how it is shown, not what it computes
EXEMPT = (
    "run_dir",
    "job.",
    "logger",
    "callbacks.progress_bar",
    "callbacks.cost_table",
    "trainer.accelerator",
    "trainer.strategy",
    "dataset.num_workers",
    "dataset.cache_dir",
)


# came later than the first runs; a run that has none of them is as it would be with any
LATER = (
    "energy.",
    "co_inference.",
    "callbacks.exit_metrics.chip",
    "callbacks.exit_metrics.co_inference",
)

POINT = "operating_point.json"


class RunDirectory:
    """Holds a run's files, each of which is whole or not there.

    ``config.yaml``, ``metrics.json``, ``network.safetensors``, ``metrics.csv``, ``checkpoints/<phase>.ckpt``, and
    ``operating_point.json`` where the method chooses one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For one process at a time; the hold ends with the process, however that ends.

        Raises:
            ValueError: another process is at work here.
            OSError: the folder cannot be written to.
        """
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is at work in {self.path}; wait for its end, or choose another hydra.run.dir."
            ) from None
        except OSError as error:
            raise OSError(f"Cannot write to {self.path}: {error.strerror}; choose another hydra.run.dir.") from error
        try:
            yield
        finally:
            lock.release()
            if [file.name for file in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()

    @property
    def checkpoints(self) -> list[Path]:
        """Those to go on from."""
        return sorted(path for path in self.path.glob("checkpoints/*.ckpt") if ".previous" not in path.suffixes)

    def take_up(self, config: DictConfig) -> dict[str, float] | None:
        """Goes on with the run that is here: what is ``auto`` in the config is set to what that run picked.

        Returns:
            Its metrics where it is finished.

        Raises:
            ValueError: naming the first keys that differ, where it is a run of another config; a damaged checkpoint.
        """
        config.run_dir = str(self.path)  # the stored one may have been moved
        finished = self.path / "metrics.json"
        if not (self.checkpoints or finished.exists()):
            (self.path / POINT).unlink(missing_ok=True)  # of weights that are not there
            return None  # nothing to lose
        stored = self.stored_config()
        for key, value in _flat(OmegaConf.to_container(config, resolve=True)):
            picked = OmegaConf.select(stored, key)
            if value == "auto" and picked is not None and not key.startswith(EXEMPT):
                OmegaConf.update(config, key, picked, force_add=True)
        if differing := _differing(stored, config):
            raise ValueError(
                f"{self.path} holds a run of another config ({', '.join(differing[:4])}); choose another hydra.run.dir "
                "(hydra.sweep.dir of a sweep)."
            )
        if finished.exists():
            return self._metrics(finished)
        for checkpoint in self.checkpoints:
            unsealed(checkpoint)
        return None

    def stored_config(self) -> DictConfig:
        """The config of the run that is here.

        Raises:
            ValueError: it is missing or damaged.
        """
        target = self.path / "config.yaml"
        try:
            stored = OmegaConf.create(target.read_text())
            if isinstance(stored, DictConfig) and "images" in stored:
                return stored
        except (OSError, ValueError, YAMLError, OmegaConfBaseException):
            pass
        raise ValueError(
            f"Expected {target} to say what run {self.path} holds, but it is missing or damaged; "
            "put it back, or choose another hydra.run.dir."
        )

    def _metrics(self, target: Path) -> dict[str, float]:
        try:
            metrics = json.loads(target.read_text())
            if isinstance(metrics, dict) and "test/acc" in metrics:
                return metrics
        except ValueError:
            pass
        raise ValueError(f"{target} is damaged; delete it, and the same command tests the network again.")

    def write_config(self, config: DictConfig) -> None:
        """The resolved config."""
        self._write("config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Flat, sorted by name. Written last: it is what marks a run as finished."""
        self._write("metrics.json", json.dumps(dict(sorted(metrics.items())), indent=2) + "\n")

    def operating_point(self, phase: str | None = None) -> dict[str, Any] | None:
        """The policy that a phase chose, in plain numbers; by default the last, the run's own. None for none.

        Raises:
            ValueError: the file is damaged.
        """
        target = self.path / POINT
        try:
            noted: dict[str, Any] = json.loads(target.read_text())
            return noted.get(phase) if phase is not None else list(noted.values())[-1]
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{target} is damaged; put it back, or run the method again elsewhere.") from error

    def note_operating_point(self, phase: str, content: Mapping[str, Any]) -> None:
        """Adds what a phase chose, which then is the run's own."""
        target = self.path / POINT
        try:
            noted = dict(json.loads(target.read_text()))
        except (OSError, ValueError, TypeError):
            noted = {}
        noted.pop(phase, None)
        self._write(POINT, json.dumps({**noted, phase: content}, indent=2) + "\n")

    def write_network(self, state: Mapping[str, Tensor]) -> None:
        """The weights."""
        write_weights(self.path / NAME, state)

    def _write(self, name: str, content: str) -> None:
        with written_aside(self.path / name) as file:
            file.write(content.encode())


def _differing(stored: Any, config: DictConfig) -> list[str]:
    old, new = (dict(_flat(OmegaConf.to_container(node, resolve=True))) for node in (stored, config))
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(EXEMPT)
        and old.get(key) != new.get(key)
        and not (key.startswith(LATER) and key not in old)
    ]


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
