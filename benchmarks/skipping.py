"""What skipping saves in time, and what gates cost.

    python -W ignore::FutureWarning -m benchmarks.skipping

Ratios of times in one process, in fp32 on the CPU, against the plain backbone: the sides take turns, round by round,
over the same images, and the median of the rounds' ratios is shown. The gates compute whatever they compute, then a
drawn decision takes the place of theirs: half of the blocks, other ones for each image, or all of them. ``multiplied``
computes everything and multiplies by the gates, as SkipNet's published code does.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.early_exits import BATCH, ROUNDS, Side, random_images, turns
from inference.executor import Executor
from inference.policies import Never
from lightning_modules.skipping import IADI
from networks.backbones.resnet import cifar_resnet
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork
from networks.gates import GatePass, Gating
from running.hardware import keep_freed_memory

DEPTH, CLASSES = 74, 10
GATES: dict[str, tuple[str | None, str | None]] = {"layer_rnn": ("rnn", None), "mgl2s": ("rnn", "cnn")}
# by gates, share of the blocks that run, and batch size
TARGETS = {("layer_rnn", 0.5, 1): 0.85, ("layer_rnn", 0.5, BATCH): 0.70,
           ("layer_rnn", 1.0, 1): 1.40, ("layer_rnn", 1.0, BATCH): 1.10}  # fmt: skip
STEP_TARGET = 1.35
STEPS = 9  # rounds of the training step


class Drawn(Gating):
    """Gates that are asked, and then overruled.

    Args:
        share: of the blocks that run.
    """

    def __init__(self, chain: Chain, design: str, share: float):
        super().__init__(chain, *GATES[design])
        generator = torch.Generator().manual_seed(0)
        blocks = len(chain.blocks)
        order = torch.rand(BATCH, blocks, generator=generator).argsort(1)
        self.drawn = torch.where(order < share * blocks, 1.0, -1.0).T.contiguous()
        self.at = 0

    def begin(self, count: int, like: Tensor) -> GatePass:
        columns = (torch.arange(count) + self.at) % BATCH
        self.at += count
        return DrawnPass(self, columns, like)


class DrawnPass(GatePass):
    """Its layer gate computes what it computes, and answers with what was drawn."""

    def __init__(self, gating: Drawn, columns: Tensor, like: Tensor):
        super().__init__(gating, len(columns), like)
        self.scores, self.block = gating.drawn[:, columns], -1

    def layer(self, entered: Tensor) -> Tensor | None:
        super().layer(entered)
        self.block += 1
        return self.scores[self.block]

    def part(self, rows: slice) -> GatePass:
        part = super().part(rows)
        assert isinstance(part, DrawnPass)
        part.scores = self.scores[:, rows]
        return part


def backbone() -> Chain:
    """ResNet74, random weights, with the statistics of random images."""
    chain = cifar_resnet(DEPTH, CLASSES).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(5):
            chain(random_images())
    return chain.eval()


def gated(chain: Chain, design: str, share: float) -> EarlyExitNetwork:
    gating = Drawn(chain, design, share).to(memory_format=torch.channels_last)
    return EarlyExitNetwork(chain, gating=gating).eval()


def times_table(chain: Chain, size: int) -> Table:
    """The executor with gates, and everything multiplied, against the plain backbone."""
    sides: dict[str, Side] = {"plain": chain}
    named: dict[str, tuple[str, float]] = {}
    for design in GATES:
        for share in (0.5, 1.0):
            network = gated(chain, design, share)
            name = f"{design}, {share:.0%} of the blocks run"
            sides[name], named[name] = Executor(network, Never()), (design, share)
    network = gated(chain, "layer_rnn", 0.5)
    sides["layer_rnn, 50%, multiplied"] = lambda images: network.gated(images).logits[-1].argmax(1)
    stream = random_images().split(size)
    rounds = turns(sides, stream)
    table = Table(title=f"ResNet{DEPTH}, batch {size}, fp32: time against the plain backbone", min_width=78)
    for column in ("", "ratio", "quartiles", "target"):
        table.add_column(column, justify="right" if column else "left")
    for name in list(sides)[1:]:
        low, middle, high = statistics.quantiles([each[name] / each["plain"] for each in rounds], n=4)
        design, share = named.get(name, ("", 0.0))
        target = TARGETS.get((design, share, size))
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"<= {target:.2f}" if target else "")
    return table


def training_table(bf16: bool) -> Table:
    """A step of IADI with each design of gates against a step of the plain backbone, batch 128."""
    images, labels = random_images(), torch.randint(CLASSES, (BATCH,))
    chain = cifar_resnet(DEPTH, CLASSES).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], Any]] = {"plain": _step(chain, lambda: F.cross_entropy(chain(images), labels), bf16)}
    for design, (layer, channel) in GATES.items():
        own = copy.deepcopy(chain)
        network = EarlyExitNetwork(own, gating=Gating(own, layer, channel).to(memory_format=torch.channels_last))
        objective = IADI(network, make_optimizer=torch.optim.SGD)
        objective.log = lambda *args, **options: None  # type: ignore[method-assign]
        sides[design] = _step(network, lambda o=objective: o.loss(o.logits(images), labels), bf16)
    rounds = [{name: _seconds(side) for name, side in sides.items()} for _ in range(STEPS + 1)][1:]
    mode = "bf16" if bf16 else "fp32"
    table = Table(title=f"ResNet{DEPTH}, training step, batch {BATCH}, {mode}: against the plain one", min_width=78)
    for column in ("", "ratio", "quartiles", "target"):
        table.add_column(column, justify="right" if column else "left")
    for name in GATES:
        low, middle, high = statistics.quantiles([each[name] / each["plain"] for each in rounds], n=4)
        target = f"<= {STEP_TARGET}" if name == "layer_rnn" else ""
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", target)
    return table


def _step(module: torch.nn.Module, loss: Callable[[], Tensor], bf16: bool) -> Callable[[], Any]:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def _seconds(side: Callable[[], Any]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def main() -> None:
    console = Console()
    torch.manual_seed(0)
    keep_freed_memory()
    chain = backbone()
    for size in ROUNDS:
        console.print(times_table(chain, size))
    for bf16 in (False, True):
        console.print(training_table(bf16))
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
