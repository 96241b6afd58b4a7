"""Several processes that train one network on one machine, each on its share of every batch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from running.command_line import Refused

ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds for this process to meet, and to say, what the other one failed of


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

    When one of them fails, this process ends too.

    Raises:
        Refused: in place of this process's own error, where another process failed.
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
    before, threads_before = {name: os.environ.get(name) for name in (*world, "LOCAL_RANK")}, torch.get_num_threads()
    threads = max(1, threads_before // count)
    others = _start(count, folder, world, threads)
    os.environ.update(world, LOCAL_RANK="0")
    torch.set_num_threads(threads)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
    try:
        yield
        for other in others:
            other.wait(timeout=60)
    except RuntimeError as error:
        ended.wait(1)  # a lost connection may be known before the end of the process it led to
        if reason := _failure(others):
            raise Refused(reason) from error
        raise
    finally:
        ended.set()
        for other in others:
            other.kill()
            other.wait()
        _forget(before)
        torch.set_num_threads(threads_before)


def _start(count: int, folder: Path, world: dict[str, str], threads: int) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "running.process", "train", str(folder)],
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **world, "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(1, count)
    ]


def _watch(others: list[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """Ends this process when another one failed: it would wait for it in a collective, where no signal reaches it."""
    while not ended.wait(0.5):
        if reason := _failure(others):
            if not ended.wait(GRACE):
                print(f"error: {reason}", file=sys.stderr, flush=True)
                for other in others:
                    other.kill()
                os._exit(1)
            return


def _failure(others: list[subprocess.Popen[bytes]]) -> str | None:
    for rank, other in enumerate(others, 1):
        if other.poll():
            return f"Process {rank} of the run ended with status {other.returncode}."
    return None


def _forget(environment: dict[str, str | None]) -> None:
    """So that the next run of a sweep in this process starts its own group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class Agreement(pl.Callback):
    """Gives every process the first one's BatchNorm statistics at the end of a phase; their weights agree anyway."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, src=0)
