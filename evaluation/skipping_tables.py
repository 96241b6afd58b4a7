"""Runs with gates as tables, in the layout of Dual Dynamic Inference with its values beside ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd

from evaluation import report
from evaluation.cost_axes import COSTS
from evaluation.results import Result
from evaluation.skipping import Skipping, anytime, hard_budget, is_plain, skippings

FLOPS = COSTS["2macs"]  # the paper's convention: 2 a MAC, of convolutions and fully connected layers
# published, ResNet74-IADI on CIFAR-10: MACs saved, energy saved and accuracy, %
TABLE_I = ((40.0, 36.08, 93.65), (50.0, 47.10, 93.33), (60.0, 57.30, 93.06), (70.0, 66.79, 92.54), (80.0, 78.20, 91.90))
# published, by backbone and data set: budget in the paper's FLOPs, accuracy of DDI and of the base network, %
TABLES_II_III = {
    ("resnet74", "cifar10"): ((58e6, 91.00, 90.70), (74e6, 92.82, 91.25), (117e6, 93.81, 92.30), (144e6, 93.88, 92.50)),
    ("densenet100", "cifar10"): ((372e6, 93.83, 94.35), (392e6, 94.44, 94.45), (408e6, 94.68, 94.16)),
    ("densenet201", "imagenet"): ((0.837e9, 60.26, 58.10), (1.9e9, 70.8, 69.76), (2e9, 74.8, 65.8)),
}


def known_data_set(name: str) -> str:
    """The data set of the paper that this one is, or is made of; empty for another."""
    found = re.match(r"(cifar10|imagenet)(?!\d)", name)
    return found[1] if found else ""


def frame(runs: Sequence[Skipping]) -> pd.DataFrame:
    """A row for each run, in numbers: ``skipping.csv``."""
    return pd.DataFrame(
        [
            {
                "run": run.label,
                "backbone": run.backbone,
                "method": run.method,
                "gates": run.gates,
                "resource": run.resource,
                "target_saving": run.target,
                "alpha": run.alpha,
                "epochs": " + ".join(map(str, run.epochs)),
                "test/last_exit/acc": run.accuracy,
                "test/macs": run.macs,
                "test/saving": run.saving,
                "test/energy_saving": run.energy_saving,
                "test/skip_ratio": run.skipped,
                "test/closed_ratio": run.closed,
            }
            for run in runs
        ]
    )


def rows(runs: Sequence[Skipping]) -> list[dict[str, str]]:
    """Every run in words."""
    return [
        {
            "run": run.label,
            "backbone": run.backbone,
            "gates": run.gates or "none",
            "trained to save": _aim(run),
            "epochs": " + ".join(map(str, run.epochs)),
            "accuracy": _percent(run.accuracy),
            "MACs": COSTS["macs"].amount(run.macs),
            "2·MACs": FLOPS.amount(2 * run.macs),
            "MACs saved": _percent(run.saving) if run.gates else "",
            "energy saved": _percent(run.energy_saving) if run.gates else "",
            "blocks skipped": _percent(run.skipped) if run.gates else "",
            "channels closed": _percent(run.closed) if run.gates else "",
        }
        for run in runs
    ]


def _aim(run: Skipping) -> str:
    if not run.gates:
        return ""
    resource = "MACs" if run.resource == "macs" else run.resource
    return f"{run.target:.0%} of the {resource}" if run.target is not None else f"{resource}, α = {run.alpha:g}"


def table_i(runs: Sequence[Skipping], dataset: str) -> dict[str, list[dict[str, str]]]:
    """By backbone, what is saved and the accuracy that this leaves, a column a run by what it saves."""
    found = {}
    for backbone, group in groupby([run for run in runs if run.gates], lambda run: run.backbone):
        columns = {}
        for run in sorted(group, key=lambda run: run.saving):
            columns[run.label] = [_number(100 * x) for x in (run.saving, run.energy_saving, run.accuracy)]
        if (backbone, known_data_set(dataset)) == ("resnet74", "cifar10"):
            columns |= {
                f"published, CIFAR-10 ({i})": [f"{x:.2f}" for x in values] for i, values in enumerate(TABLE_I, start=1)
            }
        names = ("computational savings, %", "energy savings, %", "accuracy, %")
        found[backbone] = [
            {"": name, **{label: values[i] for label, values in columns.items()}} for i, name in enumerate(names)
        ]
    return found


def table_ii(results: Sequence[Result]) -> list[dict[str, str]]:
    """Runs with gates and exits under the budgets that plain networks take (tables II and III)."""
    found = []
    plain = sorted(filter(is_plain, results), key=lambda base: base.test.costs["macs"].plain)
    for result in (result for result in results if result.gated and result.adaptive):
        config = result.run.config
        for base in plain:
            budget = base.test.costs["macs"].plain
            right = base.test.correct[-1].double().mean().item()
            row = _against(result.run.label, 2 * budget, hard_budget(result.test, budget), right)
            found.append({**row, "base": base.run.label})
        published = TABLES_II_III.get((config.backbone.name, known_data_set(config.dataset.name)), ())
        for flops, ours, theirs in published if plain else ():
            found.append(_against(f"{config.backbone.name}, published", flops, ours / 100, theirs / 100))
    return found


def _against(model: str, flops: float, accuracy: float | None, base: float) -> dict[str, str]:
    return {
        "model": model,
        "budget, 2·MACs": FLOPS.amount(flops),
        "DDI accuracy": "-" if accuracy is None else _percent(accuracy),
        "base accuracy": _percent(base),
        "Δ": "-" if accuracy is None else f"{100 * (accuracy - base):+.2f}",
        "base": "",
    }


def table_anytime(result: Result) -> list[dict[str, str]]:
    """Every exit of a run with gates."""
    return [
        {
            "exit": str(exit.exit),
            "accuracy": _percent(exit.accuracy),
            "MACs, average": COSTS["macs"].amount(exit.macs),
            "MACs, plain backbone": COSTS["macs"].amount(exit.static),
            "guaranteed within, MACs": COSTS["macs"].amount(exit.guaranteed),
            "2·MACs": FLOPS.amount(2 * exit.guaranteed),
        }
        for exit in anytime(result.test)
    ]


def markdown(results: Sequence[Result], title: str) -> str:
    """``skipping.md``: all runs, then tables I to III of the paper and what every exit gives, as far as there is."""
    runs = skippings(results)
    text = (
        "All images at the last exit, no early head computed. Saved: of the plain backbone's cost, gates counted. "
        "Channels closed: in blocks that run."
    )
    parts = [f"# {title}\n\n{text}\n", _section("Runs", rows(runs))]
    for backbone, content in table_i(runs, results[0].run.config.dataset.name).items():
        parts.append(_section(f"Table I: computational and energy savings, {backbone}", content))
    if content := table_ii(results):
        text = "Every image halts at the last exit that fits the budget, which is what the plain network takes."
        parts.append(_section("Tables II and III: hard budgets", content, text))
    for result in results:
        if result.gated and result.adaptive:
            text = (
                "All images leave at one exit, its head alone computed. Within the budget each gets there or farther."
            )
            parts.append(_section(f"At any time: {result.run.label}", table_anytime(result), text))
    return "\n".join(parts)


def _section(title: str, content: Sequence[dict[str, str]], text: str = "") -> str:
    table = pd.DataFrame(content).fillna("").to_markdown(index=False, disable_numparse=True)
    return f"## {title}\n\n{text}{chr(10) * 2 if text else ''}{table}\n"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{_number(100 * share)} %" if not math.isnan(share) else ""


def write(results: Sequence[Result], title: str, folder: Path) -> list[Path]:
    """``skipping.csv`` and ``skipping.md``; gives the files."""
    report.write(folder, "skipping.csv", frame(skippings(results)).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "skipping.md", markdown(results, title))
    return [folder / "skipping.csv", folder / "skipping.md"]
