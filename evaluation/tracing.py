"""Traces of trained runs, recorded once and kept with the run."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.image_data import ImageData
from evaluation.runs import TrainedRun
from inference.trace import Trace, read_trace, record, write_trace
from running.assembly import built

Split = Literal["val", "test"]
SPLITS: tuple[Split, ...] = ("val", "test")


@dataclass
class Machine:
    """Where networks run, and in which precision.

    Raises:
        ValueError: an accelerator that is not there, or another precision.
    """

    accelerator: str = "auto"
    precision: str = "fp32"
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if self.accelerator not in ("auto", *there):
            raise ValueError(f"Expected accelerator to be auto, cpu, cuda or mps, got {self.accelerator}.")
        if not there.get(self.accelerator, True):
            raise ValueError(f"accelerator={self.accelerator} is not there on this machine; choose auto or cpu.")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"Expected precision to be fp32 or bf16, got {self.precision}.")
        best = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
        self.device = torch.device(best if self.accelerator == "auto" else self.accelerator)

    def autocast(self) -> torch.autocast:
        """The precision, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Images:
    """The data set of a run, read when it is first asked for images.

    Args:
        config: of the run.
        root: where it is now, None for where it was.
        batch_size: images a pass, None for the run's.

    Raises:
        ValueError: what the data set refuses; a root for one that has none.
    """

    def __init__(self, config: DictConfig, root: str | None = None, batch_size: int | None = None):
        node = config.dataset.copy()
        if root is not None:
            if "root" not in node:
                raise ValueError(f"root={root} is for a data set in a folder; {node.name} is none.")
            node.root = root
        if batch_size is not None:
            node.eval_batch_size = batch_size
        self.classes, self.shape = list(config.images.classes), list(config.images.shape)
        self.data: ImageData = built(node)

    def loader(self, split: Split) -> DataLoader:
        """Batches of a split, not normalized.

        Raises:
            ValueError: the data set has changed since the run.
        """
        self.data.setup()
        if list(self.data.class_names) != self.classes or list(self.data.input_shape) != self.shape:
            raise ValueError(
                f"The data set has changed since the run: it had {len(self.classes)} classes and images of "
                f"{self.shape}, now {len(self.data.class_names)} and {list(self.data.input_shape)}."
            )
        return self.data.val_dataloader() if split == "val" else self.data.test_dataloader()

    def batches(self, split: Split, device: torch.device, title: str = "") -> Iterator[list[Tensor]]:
        """Normalized images (n, C, H, W), labels and extras on the device, with a progress bar in a terminal."""
        loader = self.loader(split)
        for batch in track(
            loader, title, total=len(loader), transient=True, disable=not (title and sys.stdout.isatty())
        ):
            yield list(self.data.on_after_batch_transfer([part.to(device) for part in batch], 0))


def images_of(runs: Sequence[TrainedRun], root: str | None, batch_size: int | None) -> list[Images]:
    """The data set of each run; runs that split and prepare it alike share one."""
    shared: dict[str, Images] = {}
    return [
        shared.setdefault(OmegaConf.to_yaml(run.config.dataset), Images(run.config, root, batch_size)) for run in runs
    ]


def trace(run: TrainedRun, split: Split, images: Images, machine: Machine, again: bool = False) -> Trace:
    """The trace of a run's split, from its file where one is there that fits.

    Args:
        again: record it anew.
    """
    file = run.path / "traces" / f"{split}.safetensors"
    key = _key(run, machine)
    if file.exists() and not again and (kept := _kept(file, key)) is not None:
        return kept
    title = f"{run.label}, {split} split"
    started = time.perf_counter()
    network = run.network.to(machine.device)
    about = {"key": key, "run": run.label, "split": split, "precision": machine.precision}
    with machine.autocast():
        recorded = record(network, images.batches(split, machine.device, title), images.data.extras, about)
    print(f"Traced {title}: {len(recorded)} images, {time.perf_counter() - started:.1f} s", flush=True)
    try:
        write_trace(file, recorded)
    except OSError as error:
        print(f"The trace is not kept: {file} cannot be written ({error.strerror}).", flush=True)
    return recorded


def _kept(file: Path, key: str) -> Trace | None:
    try:
        kept = read_trace(file)
    except ValueError:
        return None  # recorded anew, in its place
    return kept if kept.about.get("key") == key else None


def _key(run: TrainedRun, machine: Machine) -> str:
    """Of all that a trace depends on but the files of the data set itself."""
    dataset: Any = OmegaConf.to_container(run.config.dataset)
    apart: Sequence[str] = ("root", "cache_dir", "num_workers", "batch_size", "eval_batch_size")
    parts = [run.weights, machine.precision, {k: v for k, v in dataset.items() if k not in apart}]
    parts.append({name: OmegaConf.to_container(run.config[name]) for name in ("backbone", "method", "precision")})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
