"""Evaluations of hybrid networks: their designs, the paper's tables and figures, energies of other chips."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from evaluation.hybrid import Design, against_exit
from evaluation.hybrid_tables import table_ii, table_iii, table_iv
from running.command_line import Refused
from tests.test_evaluate import evaluated
from tests.test_hybrid import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Designs of two batches each, in the folder of a multirun."""
    folder = tmp_path_factory.mktemp("designs")
    hybrid = ("method=hybrid", "precision.edge_convs=4", "trainer.limit_test_batches=1.0")
    for i, more in enumerate((
        (), ("optimization=separate",), ("precision=w2a2",), ("method/exits=none",), ("method.exits.exits=2",),
        ("precision=fp32",), ("seed=1",), ("method=plain", "precision=fp32", "precision.edge_convs=null"),
        ("method=plain", "precision=fp32"),
    )):  # fmt: skip
        run(folder / str(i), *hybrid, *more)
    return folder


def test_designs_are_tabled_and_drawn(folder: Path, tmp_path) -> None:
    left = evaluated(f"run={folder}", f"folder={tmp_path}", "points=20")
    table = pd.read_csv(left / "hybrid.csv")
    # two seeds are one design, and so is a network in full precision with different edges where nothing ends
    assert len(table) == 7
    assert sorted(table.seeds) == [1, 1, 1, 1, 1, 1, 2]
    metrics = [json.loads((folder / str(i) / "metrics.json").read_text()) for i in range(9)]
    for i, rows in ((1, table.optimization == "separate"), (4, table.early_exits == 2)):
        [row] = table[rows].to_dict("records")
        for name in ("acc", "exit_1/fraction"):
            assert row[f"test/{name}"] == pytest.approx(metrics[i][f"test/{name}"])
        for ours, theirs in (("edge_energy_uj", "device_energy_uj"), ("edge_bytes", "device_bytes")):
            assert row[ours] == pytest.approx(metrics[i][f"test/{theirs}"])
    [twice] = table[table.seeds == 2].to_dict("records")
    assert twice["energy_uj"] == pytest.approx((metrics[0]["test/energy_uj"] + metrics[6]["test/energy_uj"]) / 2)
    [plain] = table[table.design == "0E + 6C"].to_dict("records")
    assert plain["energy_reduction"] == pytest.approx(1)
    [bare] = table[(table.early_exits == 0) & (table.weight_bits == 1)].to_dict("records")
    assert bare["energy_uj"] == pytest.approx(metrics[3]["test/energy_uj"])
    assert bare["edge_energy_uj"] < twice["edge_energy_uj"]  # the exit
    text = (left / "hybrid.md").read_text()
    assert all(f"## Table {number}" in text for number in ("II", "III", "IV"))
    for name in ("hybrid_energy", "hybrid_edge"):
        assert (left / f"{name}.png").exists() == (name == "hybrid_energy")  # all have one edge


def design(
    bits: int, edge: int, shares: tuple[float, ...] = (0.5,), separate: bool = False, dataset: str = "cifar100"
) -> Design:
    way = (len(shares), separate, 6, "run", 1)
    return Design("resnet32", dataset, (bits, bits), edge, 30, *way, 0.8, 0.7, shares, 20, 50, 400, 1000)


def test_published_values_stand_beside_designs_of_the_paper() -> None:
    ways = [design(1, edge, separate=separate) for edge in (16, 20) for separate in (True, False)]
    published = ("separate: published leaving", "joint: published leaving", "joint: published accuracy")
    paper, other = table_ii(ways)
    assert [paper[name] for name in published] == ["17.3 %", "24.6 %", "62.50 %"]
    assert [other[name] for name in published] == [""] * 3
    names = ("cifar10-jpeg", "digits", "cifar1000")
    ways = [[replace(design, dataset=name) for design in ways] for name in names]
    assert [table_ii(both)[0]["separate: published accuracy"] for both in ways] == ["88.72 %", "", ""]
    [row] = table_iii([design(1, 24), design(2, 24), design(32, 24), design(1, 24, separate=True)])
    assert (row["1 bit: published edge"], row["2 bit: published cloud"]) == ("203", "478")
    assert (row["1 bit: edge"], row["2 bit: cloud"]) == ("200.0", "500.0")
    several = [design(1, 20), design(1, 20, (0.3, 0.2)), design(1, 16)]
    assert [row["published energy"] for row in table_iv(several)] == ["", ""]
    rows = table_iv([replace(design, dataset="cifar10") for design in several])
    assert [row["published energy"] for row in rows] == ["729", "724"]
    assert [row["leaving"] for row in rows] == ["50.0 %", "30.0, 20.0 %"]


def test_energy_is_compared_with_full_precision_and_an_exit_at_the_same_place() -> None:
    ours, full = design(1, 20), replace(design(32, 20), edge_uj=300, cloud_uj=50)
    assert ours.reduction == pytest.approx(400 / 70)
    assert against_exit(ours, [ours, full, replace(full, edge=16)]) == pytest.approx(5)
    assert math.isnan(against_exit(full, [ours, full]))


def test_another_chip_for_an_evaluation(folder: Path, tmp_path) -> None:
    energies = []
    for name, options in (("own", ()), ("dear", ("energy.memory_bit=5",))):
        left = evaluated(f"run={folder / '0'}", f"folder={tmp_path / name}", "cost=energy_uj", "points=20", *options)
        energies.append(pd.read_csv(left / "curve.csv").set_index("point").loc["the run's own", "test/energy_uj"])
    stored = OmegaConf.load(folder / "0/config.yaml").energy
    assert stored.memory_bit == 2.5
    assert energies[0] < energies[1] < 2 * energies[0]


def test_a_run_from_before_energies_stands_beside_another(folder: Path, tmp_path) -> None:
    shutil.copytree(folder / "0", tmp_path / "old")
    config = OmegaConf.load(tmp_path / "old/config.yaml")
    del config.energy, config.callbacks.exit_metrics.chip, config.callbacks.cost_table.chip
    OmegaConf.save(config, tmp_path / "old/config.yaml")
    assert run(tmp_path / "old", "method=hybrid", "precision.edge_convs=4", "trainer.limit_test_batches=1.0")
    left = evaluated(f"runs=[{tmp_path / 'old'},{folder / '1'}]", f"folder={tmp_path}/both", "points=20")
    assert (left / "hybrid.md").exists()
    alone = f"run={tmp_path / 'old'}"
    assert not (evaluated(alone, "points=20", f"folder={tmp_path}/alone") / "hybrid.md").exists()
    with pytest.raises(Refused, match=r"Expected one chip for all runs, got none; give energy\.addition"):
        evaluated(alone, "cost=energy_uj")
