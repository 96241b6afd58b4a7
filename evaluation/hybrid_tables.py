"""The designs of hybrid networks as tables, in the layout of the hybrid-network paper with its values beside ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pandas as pd

from costs.energy import EnergyModel
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
                "run": design.label,
                "backbone": design.backbone,
                "design": design.name,
                "weight_bits": design.bits[0],
                "act_bits": design.bits[1],
                "early_exits": design.exits,
                "optimization": _optimization(design),
                "epochs": design.epochs,
                "seeds": design.seeds,
                "test/acc": design.accuracy,
                "test/last_exit/acc": design.last_accuracy,
                **{f"test/exit_{k}/fraction": share for k, share in enumerate(design.shares, 1)},
                "edge_energy_uj": design.edge_uj,
                "cloud_energy_uj": design.cloud_uj,
                "energy_uj": design.energy_uj,
                "energy_reduction": design.reduction,
                "energy_reduction_against_fp32_with_exit": against_exit(design, designs),
                "edge_bytes": design.edge_bytes,
            }
            for design in designs
        ]
    )


def _optimization(design: Design) -> str:
    return "" if not design.exits else "separate" if design.separate else "joint"


def published(design: Design) -> int:
    """Classes of the CIFAR data set that the paper has values of this design's network for, 0 for none."""
    found = re.match(r"cifar(10|100)(?!\d)", design.dataset)
    return int(found[1]) if found and design.backbone == "resnet32" else 0


def markdown(designs: Sequence[Design], title: str, chip: EnergyModel) -> str:
    """``hybrid.md``: all designs, then tables II, III and IV of the paper as far as there are designs for them."""
    energies = ", ".join(f"{name} {value:g}" for name, value in vars(chip).items() if name != "name")
    text = f"Energies are mJ for 10,000 images. Chip {chip.name}, pJ: {energies}."
    parts = [f"# {title}\n\n{text}\n", _section("Designs", rows(designs))]
    for name, content in (
        ("Table II: separate and joint optimization", table_ii(designs)),
        ("Table III: energy at edge and cloud", table_iii(designs)),
        ("Table IV: the number of early exits", table_iv(designs)),
    ):
        parts += [_section(name, content)] if content else []
    note = (
        "Published: with the full schedule, table II on CIFAR-10 or CIFAR-100, table III on CIFAR-100, table IV on "
        "CIFAR-10. Reduction: against the backbone in full precision without early exits.\n"
    )
    return "\n".join([*parts, note])


def _section(title: str, content: Sequence[dict[str, str]]) -> str:
    table = pd.DataFrame(content).fillna("").to_markdown(index=False, disable_numparse=True)
    return f"## {title}\n\n{table}\n"


def rows(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Every design in words."""
    return [
        {
            "backbone": design.backbone,
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
            "edge holds": f"{design.edge_bytes / 1e3:,.1f} kB",
            "seeds": str(design.seeds),
        }
        for design in designs
    ]


def table_ii(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Designs that were trained both ways; those of the paper's, binary 16E + 14C, have its values beside them."""
    found = []
    for _, group in _grouped([d for d in designs if d.exits], lambda d: (d.backbone, d.bits, d.edge, d.exits)):
        for separate, joint in product((d for d in group if d.separate), (d for d in group if not d.separate)):
            row = {"design": _words(separate)}
            known = (separate.bits, separate.edge, separate.exits) == ((1, 1), 16, 1) and published(separate)
            for i, (way, design) in enumerate({"separate": separate, "joint": joint}.items()):
                leaving, accuracy = (values[i] for values in TABLE_II[known]) if known else (None, None)
                row[f"{way}: epochs"] = str(design.epochs)
                row[f"{way}: leaving"] = _leaving(design)
                row[f"{way}: published leaving"] = f"{leaving} %" if known else ""
                row[f"{way}: accuracy"] = _percent(design.accuracy)
                row[f"{way}: published accuracy"] = f"{accuracy:.2f} %" if known else ""
            found.append(row)
    return found


def table_iii(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Energy at edge and cloud by edge and bits, one early exit trained jointly."""
    one = [d for d in designs if d.exits == 1 and not d.separate and d.bits[0] == d.bits[1] and d.precision != "fp32"]
    found = []
    for (backbone, epochs, edge), group in _grouped(one, lambda design: (design.backbone, design.epochs, design.edge)):
        row = {"design": f"{backbone}, {group[0].name}, {epochs} epochs"}
        for design in group:
            bits = design.bits[0]
            theirs = TABLE_III.get(edge, {}).get(bits) if published(design) else None
            for i, (part, ours) in enumerate({"edge": design.edge_uj, "cloud": design.cloud_uj}.items()):
                row[f"{bits} bit: {part}"] = _energy(ours)
                row[f"{bits} bit: published {part}"] = str(theirs[i]) if theirs else ""
        found.append(row)
    return found


def table_iv(designs: Sequence[Design]) -> list[dict[str, str]]:
    """Designs that differ in the number of their early exits alone."""
    found = []
    joint = [design for design in designs if design.exits and not design.separate]
    for (_, bits, edge, _), group in _grouped(joint, lambda d: (d.backbone, d.bits, d.edge, d.epochs)):
        if len({design.exits for design in group}) < 2:
            continue
        for design in group:
            known = (bits, edge) == ((1, 1), 20) and design.exits in TABLE_IV and published(design) == 10
            leaving, accuracy, energy = TABLE_IV[design.exits] if known else ("", "", "")
            found.append(
                {
                    "design": _words(design),
                    "epochs": str(design.epochs),
                    "early exits": str(design.exits),
                    "leaving": _leaving(design),
                    "published leaving, %": leaving,
                    "accuracy": _percent(design.accuracy),
                    "published accuracy, %": accuracy,
                    "energy": _energy(design.energy_uj),
                    "published energy": energy,
                }
            )
    return found


def _words(design: Design) -> str:
    return f"{design.backbone}, {design.name}, {design.precision}"


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


def write(designs: Sequence[Design], title: str, chip: EnergyModel, folder: Path) -> list[Path]:
    """``hybrid.csv`` and ``hybrid.md``; gives the files."""
    report.write(folder, "hybrid.csv", frame(designs).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "hybrid.md", markdown(designs, title, chip))
    return [folder / "hybrid.csv", folder / "hybrid.md"]
