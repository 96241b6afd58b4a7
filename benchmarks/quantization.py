"""The training step and the forward pass of quantized networks against the same network in full precision.

    python -W ignore::FutureWarning -m benchmarks.quantization            # ratios
    python -W ignore::FutureWarning -m benchmarks.quantization profile    # where the steps spend their time

All convolutions of ResNet32's blocks are quantized, the most that can be. Codes are convolved as floating-point
numbers, so few bits save no time here. The networks take turns, round by round, in one process and the same
floating-point mode; the median of the rounds' ratios is shown.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from networks.backbones.resnet import cifar_resnet
from networks.edge import quantizable, quantized
from networks.quantization import clip_latent_weights
from running.hardware import keep_freed_memory

BITS = (1, 2, 4, 8)
BATCH, WARM_UP, ROUNDS = 128, 3, 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = {"fp32": False, "bf16": True}


def networks() -> dict[str, nn.Module]:
    """The network in full precision, then with each number of bits."""
    chain = cifar_resnet(32, 10)
    found: dict[str, nn.Module] = {"fp32": chain}
    for bits in BITS:
        chain = cifar_resnet(32, 10)
        found[f"w{bits}a{bits}"] = quantized(chain, bits, bits, sum(quantizable(chain)))
    return {name: network.to(DEVICE, memory_format=torch.channels_last) for name, network in found.items()}


def step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, bf16: bool) -> None:
    """One training step."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    clip_latent_weights(network)


@torch.inference_mode()
def forward(network: nn.Module, images: Tensor, bf16: bool) -> None:
    """One pass in evaluation."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        network(images)


def ratios(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Time of each side as a multiple of the first's."""
    rounds = []
    for _ in range(WARM_UP + ROUNDS):
        seconds = {}
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - started
        rounds.append(seconds)
    first = next(iter(sides))
    return {name: statistics.median(r[name] / r[first] for r in rounds[WARM_UP:]) for name in sides}


def steps(bf16: bool) -> dict[str, Callable[[], None]]:
    """A training step of each network, as a function."""
    images = torch.randn(BATCH, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), device=DEVICE)
    found = {}
    for name, network in networks().items():
        optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)
        found[name] = partial(step, network.train(), optimizer, images, labels, bf16)
    return found


def passes(size: int, bf16: bool) -> dict[str, Callable[[], None]]:
    """A pass of each network in evaluation, as a function."""
    images = torch.randn(size, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    return {name: partial(forward, network.eval(), images, bf16) for name, network in networks().items()}


def show_profile() -> None:
    """The operators that a step in bf16 spends most time in, in full precision and binary."""
    for name, side in steps(bf16=True).items():
        if name in ("fp32", "w1a1"):
            for _ in range(WARM_UP):
                side()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                side()
            print(name, seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12), sep="\n")


def main() -> None:
    """Prints the table."""
    keep_freed_memory()
    if sys.argv[1:] == ["profile"]:
        show_profile()
        return
    table = Table(title=f"ResNet32, all blocks quantized, {DEVICE}; time, fp32 network = 1", title_justify="left")
    for column in ("network", "mode", f"training step, batch {BATCH}", "forward, batch 1", f"forward, batch {BATCH}"):
        table.add_column(column, justify="right")
    for mode, bf16 in MODES.items():
        columns = [ratios(steps(bf16)), ratios(passes(1, bf16)), ratios(passes(BATCH, bf16))]
        for name in columns[0]:
            cells = (f"{column[name]:.2f}" for column in columns)
            table.add_row(name, mode, *cells, end_section=name == f"w{BITS[-1]}a{BITS[-1]}")
    Console().print(table)


if __name__ == "__main__":
    main()
