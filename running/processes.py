"""Several processes that train one network on one machine, each on its share of every batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

ROOT = Path(__file__).parents[1]


def is_first() -> bool:
    """Whether this process writes the run's files: the only one, or the first of several."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def to_start(trainer: pl.Trainer) -> int:
    """How many processes this one has to make of itself; 1 where torchrun or SLURM start them.

    Raises:
        ValueError: a strategy other than one device or DDP in processes of its own.
    """
    strategy = trainer.strategy
    started_here = getattr(strategy, "_start_method", "popen") == "popen"
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or not started_here:
        raise ValueError(
            "Expected trainer.strategy to be auto, ddp or ddp_find_unused_parameters_true, "
            f"got {type(strategy).__name__}."
        )
    environment = getattr(strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally:
        return 1
    if trainer.num_nodes > 1:
        raise ValueError(f"Expected trainer.num_nodes=1, got {trainer.num_nodes}; torchrun or SLURM start more nodes.")
    return trainer.num_devices


@contextmanager
def processes(count: int, folder: Path) -> Iterator[None]:
    """Starts ``count - 1`` more processes that run the config in ``folder``, and ends them at the end of the block.

    Raises:
        RuntimeError: in place of this process's own error, when another process ended first.
    """
    if count == 1:
        yield
        return
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "WORLD_SIZE": str(count),
        "NODE_RANK": "0",
    }
    threads = max(1, torch.get_num_threads() // count)
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "running.process", str(folder)],
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **world, "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(1, count)
    ]
    before, threads_before = {name: os.environ.get(name) for name in (*world, "LOCAL_RANK")}, torch.get_num_threads()
    os.environ.update(world, LOCAL_RANK="0")
    torch.set_num_threads(threads)
    try:
        yield
        for other in others:
            other.wait(timeout=60)
    except RuntimeError as error:
        if failed := [rank for rank, other in enumerate(others, 1) if other.poll()]:
            raise RuntimeError(f"Process {failed[0]} of {count} failed; its reason is above.") from error
        raise
    finally:
        for other in others:
            other.kill()
            other.wait()
        _forget(before)
        torch.set_num_threads(threads_before)


def _forget(environment: dict[str, str | None]) -> None:
    """So that the next run of a sweep in this process starts its own group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def agree(network: nn.Module) -> None:
    """Gives every process the first one's weights and BatchNorm statistics."""
    if torch.distributed.is_initialized():
        for tensor in network.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
