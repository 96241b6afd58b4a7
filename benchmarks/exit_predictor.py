"""What the Exit Predictor takes, against the backbone up to exit 1 and the head that it may spare.

    python -W ignore::FutureWarning -m benchmarks.exit_predictor

Ratios of times in one process, in fp32 on one thread of the CPU: the parts take turns, round by round, and the median
of the rounds' ratios is shown, beside the ratio of the MACs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from costs.network import network_costs
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exit_predictor import fcs_only, lenet, separable
from networks.exits import StageFractions
from networks.heads import exit_predictor

ROUNDS = {1: 200, 128: 15}  # by batch size
WARM_UP = 5
PREDICTORS = {"proposed": separable, "w/o Cat & SE": partial(separable, enriched=False), "FCs only": fcs_only,
              "LeNet": lenet}  # fmt: skip


def network(predictor: Callable[..., torch.nn.Module]) -> EarlyExitNetwork:
    """ResNet44 with the paper's two exits."""
    chain = cifar_resnet(44, 10, shortcut="B")
    taps = StageFractions([0], [1, 2])(chain.stage_lengths, [])
    return with_exits(chain, taps, exit_predictor, predictor).eval().to(memory_format=torch.channels_last)


def ratios(net: EarlyExitNetwork, size: int) -> tuple[float, float]:
    """Time of the predictor as a share of the backbone's up to exit 1, and of head 1's."""
    images = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
    feature = net.chain.run(images, stop=net.taps[0])
    assert net.predictor is not None
    sides: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "predictor": (net.predictor.scores, images),
        "backbone": (partial(net.chain.run, stop=net.taps[0]), images),
        "head": (net.heads[0], feature),
    }
    rounds = []
    for _ in range(WARM_UP + ROUNDS[size]):
        seconds = {}
        for name, (part, x) in sides.items():
            started = time.perf_counter()
            part(x)
            seconds[name] = time.perf_counter() - started
        rounds.append(seconds)
    kept = rounds[WARM_UP:]
    backbone, head = (statistics.median(r["predictor"] / r[name] for r in kept) for name in ("backbone", "head"))
    return backbone, head


@torch.inference_mode()
def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table(title="Exit Predictor, ResNet44, fp32, one thread: its time as a share of …", title_justify="left")
    for column in ("predictor", "batch", "backbone to exit 1", "(MACs)", "head 1", "(MACs)"):
        table.add_column(column, justify="right")
    for name, make in PREDICTORS.items():
        net = network(make)
        costs = network_costs(net)
        for size in ROUNDS:
            backbone, head = ratios(net, size)
            shares = (costs.predictor / costs.segments[0], costs.predictor / costs.heads[0])
            cells = (f"{backbone:.2f}", f"{shares[0]:.2f}", f"{head:.2f}", f"{shares[1]:.2f}")
            table.add_row(name, str(size), *cells, end_section=size == max(ROUNDS))
    Console().print(table)


if __name__ == "__main__":
    main()
