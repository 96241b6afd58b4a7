"""Prints, before training, what each block and exit of the network costs."""

from __future__ import annotations

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from costs.network import NetworkCosts, network_costs
from networks.exits import EarlyExitNetwork


class CostTable(pl.Callback):
    """A table of the blocks: output shape, MACs, MACs up to there along the backbone, and the exit that taps it.

    Args:
        max_rows: networks with more blocks show only those that an exit follows.
    """

    def __init__(self, max_rows: int = 60):
        self.max_rows = max_rows

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module.network, EarlyExitNetwork)
            Console().print(cost_table(pl_module.network, self.max_rows))


def cost_table(network: EarlyExitNetwork, max_rows: int = 60) -> Table:
    """The table of a network, in MACs per image; ptflops stand beside the exits."""
    costs, ptflops = network_costs(network, "macs"), network_costs(network, "ptflops")
    table = Table(title="Cost per image: MACs of convolutions and linear layers", title_justify="left")
    for name in ("block", "shape", "MACs", "cumulative", "exit", "head MACs", "leaving there", "ptflops"):
        table.add_column(name, justify="left" if name in ("block", "shape") else "right")
    shapes = network.chain.tap_shapes()
    exits = {tap: k for k, tap in enumerate(network.taps)}
    table.add_row("stem", _shape(shapes[0]), *_millions(costs.stem, costs.stem))
    for i, macs in enumerate(costs.blocks):
        tap = i + 1
        if len(costs.blocks) > max_rows and tap not in exits:
            continue
        exit_cells = _exit_cells(exits[tap], costs, ptflops) if tap in exits else []
        name = f"{tap} (stage {network.chain.info[i].stage + 1})"
        table.add_row(name, _shape(shapes[tap]), *_millions(macs, costs.until_tap[tap]), *exit_cells)
    last = len(costs.heads) - 1
    table.add_row("head", str(network.chain.num_classes), *_millions(costs.heads[-1], costs.backbone),
                  *_exit_cells(last, costs, ptflops))  # fmt: skip
    return table


def _exit_cells(k: int, costs: NetworkCosts, ptflops: NetworkCosts) -> list[str]:
    return [str(k + 1), *_millions(costs.heads[k], costs.leaving[k], ptflops.leaving[k])]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _millions(*counts: int) -> list[str]:
    return [f"{count / 1e6:,.3f} M" for count in counts]
