"""The designs of hybrid networks as tables, in the layout of the hybrid-network paper with its values beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import report
from evaluation.hybrid import Design, against_exit

PER_10K = 10  # mJ for 10,000 images, the paper's unit, from µJ an image

# published; of CIFAR-10 and CIFAR-100 by the number of classes: share leaving early and accuracy, separate and joint, %
TABLE_II = {10: ((24.1, 52.8), (88.72, 89.16)), 100: ((17.3, 24.6), (61.80, 62.50))}
# mJ for 10,000 images of CIFAR-100, by convolutions at the edge and bits: edge and cloud
TABLE_III = {
    10: {1: (261, 2269), 2: (295, 2108), 4: (363, 2059)},
    16: {1: (213, 1440), 2: (264, 1168), 4: (365, 1089)},
    20: {1: (236, 991), 2: (299, 805), 4: (424, 726)},
    24: {1: (203, 645), 2: (278, 478), 4: (429, 406)},
}
# of CIFAR-10, 20E + 10C, by the number of early exits: shares leaving, accuracy, mJ for 10,000 images
TABLE_IV = {1: ("59.3", "88.61", "729"), 2: ("38.6, 19.7", "85.98", "724")}


def frame(designs: Sequence[Design]) -> pd.DataFrame:
    """A row for each design, in numbers: ``hybrid.csv``."""
    return pd.DataFrame(
        [
            {
                "design": design.name,
                "weight_bits": design.bits[0],
                "act_bits": design.bits[1],
                "early_exits": design.exits,
                "optimization": _optimization(design),
                "epochs": design.epochs,
                "runs": design.runs,
                "test/acc": design.accuracy,
                "test/last_exit/acc": design.last_accuracy,
                **{f"test/exit_{k}/fraction": share for k, share in enumerate(design.shares, 1)},
                "test/device_energy_uj": design.edge_uj,
                "test/server_energy_uj": design.cloud_uj,
                "test/energy_uj": design.energy_uj,
                "energy_reduction": design.reduction,
                "energy_reduction_against_fp32_with_exit": against_exit(design, designs),
                "test/device_bytes": design.device_bytes,
            }
            for design in designs
        ]
    )


def _optimization(design: Design) -> str:
    return "" if not design.exits else "separate" if design.separate else "joint"


def markdown(designs: Sequence[Design], title: str, classes: int) -> str:
    """``hybrid.md``: all designs, then tables II, III and IV of the paper as far as there are designs for them."""
    parts = [f"# {title}\n\nEnergies are mJ for 10,000 images.\n", _section("Designs", rows(designs))]
    for name, content in (
        ("Table II: separate and joint optimization", table_ii(designs, classes)),
        ("Table III: energy at edge and cloud", table_iii(designs)),
        ("Table IV: the number of early exits", table_iv(designs)),
    ):
        parts += [_section(name, content)] if content else []
    note = (
        "Published: ResNet32 with the full schedule, table II on CIFAR-10 and CIFAR-100, table III on CIFAR-100, table "
        "IV on CIFAR-10. Reduction: against the backbone in full precision without early exits.\n"
    )
    return "\n".join([*parts, note])


def _section(title: str, content: Sequence[dict[str, str]]) -> str:
    table = pd.DataFrame(content).fillna("").to_markdown(index=False, disable_numparse=True)
    return f"## {title}\n\n{table}\n"


def rows(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Every design in words."""
    return [
        {
            "design": design.name,
            "precision at the edge": design.precision,
            "early exits": str(design.exits),
            "optimization": _optimization(design),
            "epochs": str(design.epochs),
            "accuracy": _percent(design.accuracy),
            "of the last exit alone": _percent(design.last_accuracy),
            "leaving at the edge": _leaving(design),
            "energy at the edge": _energy(design.edge_uj),
            "in the cloud": _energy(design.cloud_uj),
            "in all": _energy(design.energy_uj),
            "reduction": f"{design.reduction:.2f} ×",
            "against fp32 with exit": _times(against_exit(design, designs)),
            "edge holds": f"{design.device_bytes / 1e3:,.1f} kB",
        }
        for design in designs
    ]


def table_ii(designs: Sequence[Design], classes: int) -> list[dict[str, str]]:
    """Designs that were trained both ways; those of the paper's, binary 16E + 14C, have its values beside them."""
    found = []
    for (bits, edge, exits), group in _grouped(designs, lambda d: (d.bits, d.edge, d.exits)):
        ways = {design.separate: design for design in group if design.exits}
        if len(ways) < 2:
            continue
        row = {"design": f"{ways[True].name}, {ways[True].precision}" + (f", {exits} exits" if exits > 1 else "")}
        known = classes in TABLE_II and (bits, edge, exits, ways[True].convs) == ((1, 1), 16, 1, 30)
        for i, separate in enumerate((True, False)):
            way = "separate" if separate else "joint"
            share, accuracy = (values[i] for values in TABLE_II[classes]) if known else (math.nan, math.nan)
            row[f"{way}: leaving"] = _leaving(ways[separate])
            row[f"{way}: published leaving"] = "" if math.isnan(share) else f"{share} %"
            row[f"{way}: accuracy"] = _percent(ways[separate].accuracy)
            row[f"{way}: published accuracy"] = "" if math.isnan(accuracy) else f"{accuracy:.2f} %"
        found.append(row)
    return found


def table_iii(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Energy at edge and cloud by edge and bits, one early exit trained jointly."""
    one = [d for d in designs if d.exits == 1 and not d.separate and d.bits[0] == d.bits[1] and d.precision != "fp32"]
    found = []
    for edge, group in _grouped(one, lambda design: design.edge):
        row = {"design": group[0].name}
        for design in group:
            bits = design.bits[0]
            published = TABLE_III.get(edge, {}).get(bits, ("", "")) if design.convs == 30 else ("", "")
            for part, ours, theirs in zip(("edge", "cloud"), (design.edge_uj, design.cloud_uj), published, strict=True):
                row[f"{bits} bit: {part}"] = _energy(ours)
                row[f"published {part}, {bits} bit"] = str(theirs)
        found.append(row)
    return found


def table_iv(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Designs that differ in the number of their early exits alone."""
    found = []
    joint = [design for design in designs if design.exits and not design.separate]
    for (bits, edge), group in _grouped(joint, lambda design: (design.bits, design.edge)):
        if len({design.exits for design in group}) < 2:
            continue
        for design in group:
            known = (bits, edge, design.convs) == ((1, 1), 20, 30) and design.exits in TABLE_IV
            published = TABLE_IV[design.exits] if known else ("", "", "")
            found.append(
                {
                    "design": f"{design.name}, {design.precision}",
                    "early exits": str(design.exits),
                    "leaving": _leaving(design),
                    "published leaving, %": published[0],
                    "accuracy": _percent(design.accuracy),
                    "published accuracy, %": published[1],
                    "energy": _energy(design.energy_uj),
                    "published energy": published[2],
                }
            )
    return found


def _grouped(designs: Sequence[Design], key: Any) -> list[tuple[Any, list[Design]]]:
    return [(value, list(group)) for value, group in groupby(sorted(designs, key=key), key)]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _leaving(design: Design) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in design.shares) + " %" if design.shares else ""


def _energy(uj: float) -> str:
    return f"{PER_10K * uj:,.1f}"


def _times(factor: float) -> str:
    return "" if math.isnan(factor) else f"{factor:.2f} ×"


def write(designs: Sequence[Design], title: str, classes: int, folder: Path) -> list[Path]:
    """``hybrid.csv`` and ``hybrid.md``; gives the files."""
    report.write(folder, "hybrid.csv", frame(designs).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "hybrid.md", markdown(designs, title, classes))
    return [folder / "hybrid.csv", folder / "hybrid.md"]
