"""How long it takes to find the best thresholds at 500 bandwidths, exactly, and the regression models between them.

    python -m benchmarks.bandwidths

VGG16-BN with its two exits, predictor and codec on a Raspberry Pi 3; 10,000 samples with random logits and scores.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

from costs.latency import CoInference, network_latency
from costs.network import network_counts
from costs.transmission import sent_bytes
from inference.adaptive import fitted
from inference.latency_bound import Link, Seen, grid, optima
from inference.predicted import Predicted
from inference.replay import curve
from inference.trace import Trace, assembled
from networks.backbones.vgg import vgg
from networks.early_exit_network import with_exits
from networks.exit_predictor import separable
from networks.exits import StageFractions
from networks.feature_codec import bottlenet
from networks.heads import exit_predictor

SAMPLES, CLASSES, POINTS, BANDWIDTHS = 10_000, 100, 100_000, 500
TARGET = 60  # seconds


def random_trace(setting: CoInference) -> Trace:
    """Later exits are surer and more often right."""
    chain = vgg(16, CLASSES)
    taps = StageFractions([0], [1, 2])(chain.stage_lengths, [])
    network = with_exits(chain, taps, exit_predictor, separable, codec=bottlenet(chain, taps))
    labels = torch.randint(CLASSES, (SAMPLES,))
    truth = torch.nn.functional.one_hot(labels, CLASSES)
    logits = torch.stack([3 * torch.randn(SAMPLES, CLASSES) + sure * truth for sure in (6.0, 8.0, 10.0)])
    scores = logits[:-1].softmax(-1).amax(-1) * torch.rand(len(taps), SAMPLES)
    trace = assembled(logits, labels, network_counts(network), scores)
    return trace.priced(sent_bytes(network), network_latency(network, setting))


def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    setting = CoInference()
    trace, family = random_trace(setting), Predicted()
    link, sending = Link(trace.costs["sent_bytes"].link), trace.costs["latency_ms"].link
    bandwidths = torch.logspace(-1, 2, BANDWIDTHS, dtype=torch.float64).tolist()
    started = time.perf_counter()
    seen = Seen.of(curve(family, grid(family, trace, POINTS), trace), sending)
    replayed = time.perf_counter()
    optima(seen, link, setting.bound_ms, bandwidths)
    solved = time.perf_counter()
    fitted(family, seen, lambda values: Seen.of(curve(family, values, trace), sending), link, setting.bound_ms)
    done = time.perf_counter()
    title = f"{len(bandwidths)} bandwidths, {len(seen.accuracy):,} points of λ and γ, {SAMPLES:,} samples, 3 exits"
    table = Table(title=title, title_justify="left")
    for column in ("", "seconds", "target"):
        table.add_column(column, justify="right")
    table.add_row("replay of all points", f"{replayed - started:.1f}", "")
    table.add_row("the best of them at every bandwidth", f"{solved - replayed:.2f}", "")
    table.add_row("together", f"{solved - started:.1f}", f"<= {TARGET}", end_section=True)
    table.add_row("regression models of three intervals", f"{done - solved:.1f}", "")
    Console().print(table, f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
