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
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

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
        torch.backends.cudnn.allow_tf32 = False  # else fp32 convolutions on a GPU would be of 10 bits

    @property
    def name(self) -> str:
        """Of the GPU, or ``cpu``."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

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
        ValueError: a root for a data set that has none, a batch size below 1.
    """

    def __init__(self, config: DictConfig, root: str | None = None, batch_size: int | None = None):
        node = config.dataset.copy()
        if root is not None:
            if "root" not in node:
                raise ValueError(f"root={root} is for a data set in a folder; {node.name} is none.")
            node.root = root
        if batch_size is not None:
            if type(batch_size) is not int or batch_size < 1:
                raise ValueError(f"Expected batch_size to be a whole number of at least 1, got {batch_size}.")
            node.eval_batch_size = batch_size
        self.classes, self.shape = list(config.images.classes), list(config.images.shape)
        self.missing = ""
        self._data: ImageData | None = None
        try:
            self._data = built(node)
        except InstantiationException as error:  # no matter where the traces are there
            where = " root=<folder> says where it is now." if "root" in node else ""
            self.missing = f"{error.__cause__}{where}"

    @property
    def data(self) -> ImageData:
        """The data set, read.

        Raises:
            ValueError: it is not there, or has changed since the run.
        """
        if self._data is None:
            raise ValueError(self.missing)
        self._data.setup()
        if list(self._data.class_names) != self.classes or list(self._data.input_shape) != self.shape:
            raise ValueError(
                f"The data set has changed since the run: it had {len(self.classes)} classes and images of "
                f"{self.shape}, now {len(self._data.class_names)} and {list(self._data.input_shape)}."
            )
        return self._data

    @property
    def fingerprint(self) -> str | None:
        """Of its files, without their being read; None where they are not there."""
        return None if self._data is None else self._data.fingerprint()

    def batches(self, split: Split, device: torch.device, title: str = "") -> Iterator[list[Tensor]]:
        """Normalized images (n, C, H, W), labels and extras on the device, with a progress bar in a terminal."""
        data = self.data
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        shown = bool(title) and sys.stdout.isatty()
        for batch in track(loader, title, total=len(loader), transient=True, disable=not shown):
            yield list(data.on_after_batch_transfer([part.to(device) for part in batch], 0))

    @property
    def tests(self) -> int:
        """How many test images there are, those that cannot be read among them."""
        splits: Any = self.data.splits
        return len(splits.test)

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Test images (n, C, H, W) as they are, uint8, those that cannot be read left out."""
        splits: Any = self.data.splits
        return torch.stack([sample[0] for row in rows if (sample := splits.test[row]) is not None])

    def normalized(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Images (n, C, H, W) of uint8 as networks take them, on the device."""
        return self.data.normalize(pixels.contiguous(memory_format=torch.channels_last).to(device))

    def spread(self, count: int, device: torch.device) -> Tensor:
        """Normalized test images (count, C, H, W), evenly spread over the split."""
        rows = torch.linspace(0, self.tests - 1, count).round().long().tolist()
        return self.normalized(self.pixels(rows), device)


def images_of(runs: Sequence[TrainedRun], root: str | None, batch_size: int | None) -> list[Images]:
    """The data set of each run; runs that split and prepare it alike share one."""
    keys = [OmegaConf.to_yaml(run.config.dataset) for run in runs]
    apart = {key: run.config for key, run in zip(keys, runs, strict=True)}
    shared = {key: Images(config, root, batch_size) for key, config in apart.items()}
    return [shared[key] for key in keys]


def trace(run: TrainedRun, split: Split, images: Images, machine: Machine, again: bool = False) -> Trace:
    """The trace of a run's split, from its file where one is there that fits.

    Args:
        again: record it anew.
    """
    file = run.path / "traces" / f"{split}.safetensors"
    about = {"key": _key(run, machine), "images": images.fingerprint}
    if file.exists() and not again and (kept := _kept(file, about)) is not None:
        return kept
    title = f"{run.label}, {split} split"
    started = time.perf_counter()
    about |= {"run": run.label, "split": split, "precision": machine.precision, "device": machine.device.type}
    with machine.autocast():
        recorded = record(run.network, images.batches(split, machine.device, title), images.data.extras, about)
    print(f"Traced {title}: {len(recorded)} images, {time.perf_counter() - started:.1f} s", flush=True)
    try:
        write_trace(file, recorded)
    except OSError as error:
        print(f"The trace is not kept: {file} cannot be written ({error.strerror}).", flush=True)
    return recorded


def _kept(file: Path, about: dict[str, Any]) -> Trace | None:
    try:
        kept = read_trace(file)
    except ValueError:
        return None  # recorded anew, in its place
    if about["images"] is None and kept.about.get("key") == about["key"]:
        print(f"The data set is not there; its trace is: {file}.", flush=True)
        return kept
    return kept if all(kept.about.get(name) == value for name, value in about.items()) else None


def _key(run: TrainedRun, machine: Machine) -> str:
    """Of all that a trace depends on but the files of the data set itself."""
    dataset: Any = OmegaConf.to_container(run.config.dataset)
    apart: Sequence[str] = ("root", "cache_dir", "num_workers", "batch_size", "eval_batch_size")
    parts = [run.weights, machine.precision, machine.device.type, {k: v for k, v in dataset.items() if k not in apart}]
    parts.append({name: OmegaConf.to_container(run.config[name]) for name in ("backbone", "method", "precision")})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
