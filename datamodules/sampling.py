"""Which rows of a data set make up a batch: seeded by (run, phase, epoch), and shared out between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def epoch_seed(seed: int, phase: int, epoch: int, *more: int) -> int:
    """A number of 32 bits for the random numbers of one epoch, unlike that of any other epoch, phase or run."""
    return int(np.random.SeedSequence([seed, phase, epoch, *more]).generate_state(1)[0])


class TrainingBatches(Sampler[Any]):
    """An epoch's batches in a random order, which depends on the epoch's seed alone.

    Step j takes the next ``processes * batch_size`` rows of the order, and process r the r-th ``batch_size`` of them:
    together the processes see what one process with the whole batch would. The rows left at the end are dropped, since
    a batch of one image would leave BatchNorm without a variance; a data set smaller than one step is one step.

    Args:
        rows: number of rows of the data set.
        batch_size: rows a step of one process.
        seed: gives an epoch's seed, asked for when the epoch begins.
        rank, processes: which process this is, of how many.
        keyed: yield lists of (row, a seed of its own) in place of a tensor of rows, for workers that augment images
            one at a time: what they draw then depends neither on the worker nor on their number.

    Raises:
        ValueError: fewer rows than processes.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: Callable[[], int],
        rank: int = 0,
        processes: int = 1,
        keyed: bool = False,
    ):
        _require_rows(rows, processes)
        self.rows, self.seed, self.rank, self.processes, self.keyed = rows, seed, rank, processes, keyed
        self.batch_size = min(batch_size, rows // processes)

    def __len__(self) -> int:
        return self.rows // (self.processes * self.batch_size)

    def __iter__(self) -> Iterator[Tensor | list[tuple[int, int]]]:
        seed = self.seed()
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        for step in range(len(self)):
            start = (step * self.processes + self.rank) * self.batch_size
            batch = order[start : start + self.batch_size]
            # torch's generator takes 32 bits of a seed; the odd factor spreads neighbouring rows over them
            yield [(row, (seed + row * 2654435761) % 2**32) for row in batch.tolist()] if self.keyed else batch


class EvaluationBatches(Sampler[Tensor]):
    """Every row once, in order, in batches of nearly equal size.

    The processes take turns, a batch each, and have equally many without a row being repeated: what they compute
    together (a BatchNorm's buffers, a metric) needs all of them at every batch.

    Args:
        rows, batch_size, rank, processes: as for ``TrainingBatches``.

    Raises:
        ValueError: fewer rows than processes.
    """

    def __init__(self, rows: int, batch_size: int, rank: int = 0, processes: int = 1):
        _require_rows(rows, processes)
        rounds = min(-(-rows // (batch_size * processes)), rows // processes)
        self.batches = torch.arange(rows).tensor_split(rounds * processes)[rank::processes]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def _require_rows(rows: int, processes: int) -> None:
    if rows < processes:
        raise ValueError(f"Expected at least one image a process, got {rows} images for {processes} processes.")
