"""A run of three phases, ended by SIGKILL at random moments and started again, against one left alone.

python -m benchmarks.kills 10 docs/kills.png
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file

from figures.look import save

ROOT = Path(__file__).parents[1]
RUN = [
    *("backbone=resnet8", "method=early_exit", "method/phases=separate", "method/heads=light", "epochs=10"),
    *("method.phases.exit.epochs=5", "trainer.accelerator=cpu", "trainer.precision=32-true"),
]
TIMINGS = "train/images_per_s"


@dataclass(frozen=True)
class Start:
    """One start of the run: seconds from the first, how long it lived, epochs in metrics.csv at its end."""

    begun: float
    lived: float
    epochs: int
    killed: bool


def command(folder: Path) -> list[str]:
    """The run, in ``folder``."""
    return [sys.executable, "train.py", *RUN, f"hydra.run.dir={folder}"]


def rows(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without its timings."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key != TIMINGS} for row in csv.DictReader(file)]


def left_alone(folder: Path) -> int:
    """Runs it uninterrupted; gives its number of epochs."""
    subprocess.run(command(folder), cwd=ROOT, check=True, capture_output=True)
    return epochs_in(folder)


def epochs_in(folder: Path) -> int:
    """Epochs in ``metrics.csv``, of all phases."""
    return sum(row.get("train/loss", "") != "" for row in rows(folder))


def killed(folder: Path, kills: int, epochs: int, seed: int = 0) -> list[Start]:
    """Starts the run until it has been killed ``kills`` times, then lets it end.

    Each start is killed a random time, up to 2 seconds, after an epoch that was drawn from the first seven tenths of
    the run's ``epochs``, or, where that epoch is there already, up to 6 seconds after its own beginning.

    Raises:
        RuntimeError: a start ended by itself with an error, or the run ended before it was killed that often.
    """
    random, starts, origin = np.random.default_rng(seed), [], time.perf_counter()
    moments = sorted(random.integers(0, 7 * epochs // 10, kills))
    while True:
        begun = time.perf_counter() - origin
        with (folder.parent / "errors.txt").open("w+") as errors:
            process = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
            if len(starts) < kills:
                _kill(process, folder, moments[len(starts)], random.uniform(0, 1), epochs - 1)
            status = process.wait()
            starts.append(Start(begun, time.perf_counter() - origin - begun, epochs_in(folder), status == -9))
            if status != -9:
                if status or len(starts) <= kills:
                    errors.seek(0)
                    raise RuntimeError(f"Start {len(starts)} ended with status {status}: {errors.read()}")
                return starts


def _kill(process: subprocess.Popen[bytes], folder: Path, epochs: int, share: float, latest: int) -> None:
    """Kills it ``share`` of the delay after so many ``epochs``, but not later than after the ``latest``."""
    delay = share * (6 if epochs_in(folder) >= epochs else 2)
    while epochs_in(folder) < epochs and process.poll() is None:
        time.sleep(0.02)
    deadline = time.perf_counter() + delay
    while time.perf_counter() < deadline and epochs_in(folder) < latest and process.poll() is None:
        time.sleep(0.02)
    process.kill()


def same_results(a: Path, b: Path) -> bool:
    """Whether two runs have the same weights bit for bit, the same metrics.json and, timings aside, metrics.csv."""
    weights = [load_file(folder / "network.safetensors") for folder in (a, b)]
    equal = weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (a, b)]
    return equal and metrics[0] == metrics[1] and rows(a) == rows(b)


def figure(starts: list[Start]) -> Figure:
    """Epochs finished over time, a line a start."""
    picture = Figure(figsize=(8, 3.2), layout="constrained")
    axes = picture.subplots()
    before = 0
    for i, start in enumerate(starts):
        end = start.begun + start.lived
        axes.plot([start.begun, end], [before, start.epochs], color="#0072B2", linewidth=2)
        if start.killed:
            axes.plot(end, start.epochs, "x", color="#D55E00", markersize=8, label=None if i else "SIGKILL")
        before = start.epochs
    axes.plot(end, before, "o", color="#0072B2", label="finished")
    axes.set(xlabel="seconds since the first start", ylabel="epochs in metrics.csv")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    kills, target = int(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = killed(folder / "killed", kills, left_alone(folder / "alone"))
        verdict = "the same" if same_results(folder / "alone", folder / "killed") else "DIFFERENT"
    save(figure(starts), target)
    print(f"{kills} times killed, {len(starts)} starts: weights, metrics.json and metrics.csv are {verdict}.")


if __name__ == "__main__":
    main()
