"""Prints, before training, what each block and exit of the network costs."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from rich import box
from rich.console import Console
from rich.table import Table

from costs.energy import EnergyModel, network_energy
from costs.network import NetworkCosts, network_costs
from networks.early_exit_network import EarlyExitNetwork

COLUMNS = ("block", "stage", "shape", "MACs", "cumulative", "exit", "head", "leaving", "ptflops")


class CostTable(pl.Callback):
    """A table of the blocks, once a run: output shape, MACs, MACs up to there, and the exit that taps it.

    Args:
        max_rows: networks with more blocks show only those that an exit follows.
        chip: for the energy of leaving at each exit; None for none.
    """

    def __init__(self, max_rows: int = 60, chip: EnergyModel | None = None):
        self.max_rows, self.chip = max_rows, chip
        self.shown = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not self.shown:
            assert isinstance(pl_module.network, EarlyExitNetwork)
            Console().print(cost_table(pl_module.network, self.max_rows, self.chip))
            self.shown = True


def cost_table(network: EarlyExitNetwork, max_rows: int = 60, chip: EnergyModel | None = None) -> Table:
    """The table of a network.

    Of a block: its MACs, those of its gates if it has any, and the backbone's up to there, nothing skipped. Of an exit:
    the MACs of its head, those of an image that leaves there, all heads on its way included, the latter in ptflops and,
    with a chip and without gates, in µJ. A line marks the cut: what is above it runs on the device.
    """
    costs, ptflops = network_costs(network, "macs"), network_costs(network, "ptflops")
    narrow = chip is None or bool(costs.gates)  # both columns would not fit a terminal
    energy = [] if chip is None or narrow else [f"{uj:.1f}" for uj in network_energy(network, chip).leaving]
    table = Table(
        title="Cost per image, in millions",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    gated = ["gates"] * bool(costs.gates)
    for name in (*COLUMNS[:4], *gated, *COLUMNS[4:], *["µJ"] * bool(energy)):
        table.add_column(name, justify="left" if name in ("block", "shape") else "right", no_wrap=True)
    shapes = network.chain.tap_shapes()
    exits = {tap: k for k, tap in enumerate(network.taps)}
    empty = [""] * len(gated)
    first = _millions(costs.stem)[0]
    table.add_row("stem", "", _shape(shapes[0]), first, *empty, first)
    if network.predictor is not None:
        scores, cost = str(network.num_exits - 1), _millions(costs.predictor, ptflops.predictor)
        table.add_row("predictor", "", scores, cost[0], *empty, "", "", "", "", cost[1])
    codec = []
    if network.codec is not None:
        codec = [("encoder", network.codec.code_shape, costs.encoder, True),
                 ("decoder", network.codec.shape, costs.decoder, False)]  # fmt: skip
    for i, macs in enumerate(costs.blocks):
        tap = i + 1
        if len(costs.blocks) > max_rows and tap not in exits and tap != network.cut:
            continue
        stage = str(network.chain.info[i].stage + 1)
        exit_cells = _exit_cells(exits[tap], costs, ptflops, energy) if tap in exits else []
        gates = _millions(*[gate.layer + gate.channel for gate in costs.gates[i : i + 1]])
        cells = [*_millions(macs), *gates, *_millions(costs.until_tap[tap]), *exit_cells]
        table.add_row(str(tap), stage, _shape(shapes[tap]), *cells, end_section=tap == network.cut and not codec)
        for name, shape, own, ends in codec if tap == network.cut else ():
            table.add_row(name, "", _shape(shape), *_millions(own), end_section=ends)
    last = _exit_cells(len(network.taps), costs, ptflops, energy)
    whole = _millions(costs.heads[-1], costs.backbone)
    table.add_row("head", "", str(network.chain.num_classes), whole[0], *empty, whole[1], *last)
    return table


def _exit_cells(k: int, costs: NetworkCosts, ptflops: NetworkCosts, energy: Sequence[str]) -> list[str]:
    return [str(k + 1), *_millions(costs.heads[k], costs.leaving[k], ptflops.leaving[k]), *energy[k : k + 1]]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _millions(*counts: float) -> list[str]:
    return [f"{count / 1e6:,.2f}" for count in counts]
