"""What the executor costs on top of the modules that it runs, what it saves, and how fast replay is.

    python -W ignore::FutureWarning -m benchmarks.early_exits

Ratios of times in one process, in fp32 on the CPU: the sides take turns, round by round, over the same images, and the
median of the rounds' ratios is shown, so that a machine whose speed drifts slows both. Where earlyon 0.3.0 is installed
it takes turns too, around copies of the same modules. Replay is timed in a process of its own, in seconds of this
machine.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from costs.network import NetworkCosts, tap_macs
from inference.executor import Executor
from inference.replay import curve
from inference.thresholds import Confidence
from inference.trace import Trace
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exits import MacFractions
from networks.heads import light
from running.hardware import keep_freed_memory

try:
    import earlyon
except ImportError:
    earlyon = None

CLASSES, BATCH = 10, 128
WARM_UP, LEAST = 4, 0.05  # rounds; seconds a round for the fastest side
ROUNDS = {1: 61, BATCH: 25}  # by batch size
POINTS, SAMPLES, EXITS = 100_000, 10_000, 3
MISSING = "earlyon not installed:\npip install '.[bench]'"

Side = Callable[[Tensor], Any]
Round = dict[str, float]


def small_network() -> EarlyExitNetwork:
    """ResNet-44 with a light exit at a third of its MACs, random weights.

    BatchNorm is given the statistics of random images, as without any a deep network's scores are all 0 or 1.
    """
    chain = cifar_resnet(44, CLASSES)
    network = with_exits(chain, MacFractions([1 / 3])(chain.stage_lengths, tap_macs(chain)), light)
    network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(10):
            network(random_images())
    return network.eval()


def random_images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def seconds_each(side: Side, stream: Sequence[Tensor]) -> float:
    """Seconds of a call. Calls of one side follow each other, as they do in use: what it runs stays in the caches."""
    start = time.perf_counter()
    for images in stream:
        side(images)
    return (time.perf_counter() - start) / len(stream)


@torch.inference_mode()
def turns(sides: dict[str, Side], stream: Sequence[Tensor]) -> list[Round]:
    """Seconds of a call of each side, round by round; every second round goes through the sides backwards."""
    fastest = min(seconds_each(side, stream[:8]) for side in sides.values() for _ in range(4))
    images = list(islice(cycle(stream), math.ceil(LEAST / fastest)))
    rounds = []
    for i in range(WARM_UP + ROUNDS[len(stream[0])]):
        order = list(sides)[:: -1 if i % 2 else 1]
        rounds.append({name: seconds_each(sides[name], images) for name in order})
    return rounds[WARM_UP:]


def table_of(title: str, rounds: list[Round], bare: str, targets: dict[str, float]) -> Table:
    """Each side's time against the side ``bare``, its target where it has one."""
    table = Table(title=title, min_width=78)
    table.add_column("")
    for column in ("ms a call", "ratio", "quartiles", "target"):
        table.add_column(column, justify="right")
    for name in rounds[0]:
        milliseconds = f"{1000 * statistics.median(each[name] for each in rounds):.2f}"
        if name == bare:
            table.add_row(name, milliseconds, "1", "", "")
            continue
        low, middle, high = statistics.quantiles([each[name] / each[bare] for each in rounds], n=4)
        target = f"<= {targets[name]:.2f}" if name in targets else ""
        table.add_row(name, milliseconds, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", target)
    if earlyon is None:
        table.add_row(MISSING)
    return table


def wrapped(network: EarlyExitNetwork, threshold: float) -> Any:
    """Copies of the network's modules in earlyon's wrapper: its hooks would slow the modules themselves."""
    network = copy.deepcopy(network)
    tap = network.taps[0]
    point = earlyon.ExitPoint("light", f"blocks.{tap - 1}", network.chain.blocks[tap - 1].out_channels)
    config = earlyon.EarlyExitConfig("chain", CLASSES, [point], confidence_thresholds=[threshold])
    shape = (1, *network.chain.input_shape)
    return earlyon.EarlyExitWrapper(network.chain, {"light": network.heads[0]}, lambda z: z, config, shape).eval()


def with_earlyon(title: str) -> str:
    return f"{title}; earlyon {earlyon.__version__} with the same light head" if earlyon else title


def one_by_one(network: EarlyExitNetwork, threshold: float, exit: int, bare: Side) -> dict[str, Side]:
    """Sides that answer a single image's label; all of them must leave at ``exit``."""
    executor = Executor(network, Confidence([threshold]))
    stream = random_images().split(1)
    assert all(int(executor(image).exit) == exit for image in stream)
    sides: dict[str, Side] = {"bare modules": bare, "offramp": executor}
    if earlyon:
        wrapper = wrapped(network, threshold)
        assert all(wrapper(image).exit_taken == (0 if exit == 1 else -1) for image in stream)
        sides["earlyon"] = lambda image: wrapper(image, mode="inference").prediction.argmax(1)
    return sides


def leaving_table(network: EarlyExitNetwork) -> Table:
    """Batch 1, every image leaves at exit 1, against the truncated chain and the head."""
    chain, tap, head = network.chain, network.taps[0], network.heads[0]
    sides = one_by_one(network, 0.0, 1, lambda image: head(chain.run(image, stop=tap)).argmax(1))
    rounds = turns(sides, random_images().split(1))
    title = with_earlyon(f"Batch 1, leaving at exit 1 (after block {tap} of {len(chain.blocks)})")
    return table_of(title, rounds, "bare modules", {"offramp": 1.08})


def staying_table(network: EarlyExitNetwork) -> Table:
    """Batch 1, no image leaves early but its head is computed, against the backbone and that head."""
    chain, tap, head = network.chain, network.taps[0], network.heads[0]

    def bare(image: Tensor) -> Tensor:
        feature = chain.run(image, stop=tap)
        head(feature)
        return chain.run(feature, tap).argmax(1)

    rounds = turns(one_by_one(network, 1.0, 2, bare), random_images().split(1))
    return table_of(with_earlyon("Batch 1, never leaving"), rounds, "bare modules", {"offramp": 1.05})


def half_table(network: EarlyExitNetwork, memory: str) -> Table:
    """A batch of which half leaves at exit 1, against the backbone alone.

    ``by hand`` is the same without an executor, the batch in one piece, each image's exit known before. earlyon lets a
    batch go only as a whole.
    """
    images, rule, chain, tap = random_images(), Confidence(), network.chain, network.taps[0]
    with torch.inference_mode():
        scores = rule.score(network(images)[0])
    threshold = rule.passed_by(scores, BATCH // 2)
    staying = (scores < threshold).nonzero()[:, 0]
    executor = Executor(network, Confidence([threshold]))
    left = int((executor(images).exit == 1).sum())
    assert abs(left - BATCH // 2) <= 1, left

    def by_hand(images: Tensor) -> Tensor:
        feature = chain.run(images, stop=tap)
        network.heads[0](feature)
        return chain.run(feature[staying], tap)

    sides: dict[str, Side] = {"plain backbone": chain, "by hand": by_hand, "offramp": executor}
    if earlyon:
        sides["earlyon"] = wrapped(network, threshold).forward_inference_batched
    title = with_earlyon(f"Batch {BATCH}, {left} of them leaving at exit 1, {memory}")
    return table_of(title, turns(sides, [images]), "plain backbone", {"offramp": 0.75})


def random_trace() -> Trace:
    """Random logits; the costs are made up."""
    macs = NetworkCosts("macs", 100, (100,) * EXITS, (10,) * EXITS, tuple(range(1, EXITS)))
    flops = NetworkCosts("ptflops", 220, (220,) * EXITS, (25,) * EXITS, macs.taps)
    costs: dict[str, NetworkCosts] = {"macs": macs, "ptflops": flops}
    segments, heads = (
        {name: torch.tensor(getattr(cost, part))[:, None].repeat(1, SAMPLES) for name, cost in costs.items()}
        for part in ("segments", "heads")
    )
    logits, labels = torch.randn(EXITS, SAMPLES, CLASSES) * 2, torch.randint(CLASSES, (SAMPLES,))
    return Trace(logits, labels, segments, heads, costs)


def replayed() -> tuple[int, float, float]:
    """Number of points, seconds to lay and replay them, and the most GB that this process ever held."""
    torch.manual_seed(0)
    trace, family = random_trace(), Confidence()
    start = time.perf_counter()
    points = len(curve(family, family.candidates(trace, POINTS), trace).accuracy)
    seconds = time.perf_counter() - start
    return points, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def replay_table() -> Table:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        points, seconds, memory = fresh.submit(replayed).result()
    table = Table(
        title=f"Replay of {points:,} points on {SAMPLES:,} samples and {EXITS} exits, on this machine", min_width=78
    )
    for column in ("", "measured", "target"):
        table.add_column(column, justify="right")
    table.add_row("seconds (absolute)", f"{seconds:.1f}", "<= 10")
    table.add_row("peak memory of the whole process, GB", f"{memory:.2f}", "<= 2")
    return table


def main() -> None:
    console = Console()
    console.print(replay_table())  # first: a process starts with the peak of the one that it comes from
    torch.manual_seed(0)
    network = small_network()
    console.print(leaving_table(network))
    console.print(staying_table(network))
    console.print(half_table(network, "freed memory handed back to Linux"))
    if keep_freed_memory():
        console.print(half_table(network, "freed memory kept, as evaluate.py does"))
    rounds = " and ".join(f"{count} rounds of batch {batch}" for batch, count in ROUNDS.items())
    console.print(f"{torch.get_num_threads()} threads, fp32, {rounds}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
