"""What is shown of networks with gates: pictures and tables of runs and of their evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import evaluate
import train
from evaluation.assembly import build_plan, check
from evaluation.labels import labels
from evaluation.pictures import pictures
from evaluation.results import Plan, Result
from evaluation.results import evaluate as evaluated_run
from evaluation.runs import load_runs
from evaluation.skipping import (
    Skipping,
    anytime,
    easy_and_hard,
    features,
    hard_budget,
    skipping_block,
    skippings,
)
from evaluation.skipping_tables import known_data_set, table_i, table_ii
from evaluation.tables import table_rows
from evaluation.tracing import Images
from figures.skipping import Ratios, anytime_figure, resource_figure, skips_figure, strategies_figure
from inference.budget import Budget
from inference.executor import Executor
from inference.policies import FixedExit
from inference.replay import replay
from inference.skips import gated_channels
from inference.trace import Trace, assembled, read_trace
from networks.gates import Decisions
from storage.weights import read_weights, write_weights
from tests.cases import SMALL
from tests.conftest import composed
from tests.test_evaluate import evaluated

COMMON = (*SMALL, "backbone=resnet8")


def stir(folder: Path) -> None:
    """Gives a run gates of noise that open and close each of its blocks, and decide differently for some images."""
    [run] = load_runs([folder])
    images = Images(run.config).spread(64, torch.device("cpu"))
    weights, noise = read_weights(folder), torch.Generator().manual_seed(1)
    for _ in range(100):
        for name, value in weights.items():
            if name.startswith("gating.layer") or (name.endswith(("5.weight", "5.bias")) and "gating" in name):
                weights[name] = 3 * torch.randn(value.shape, generator=noise)
        run.network.load_state_dict(weights)
        runs = run.network.gated(images).decisions.runs.mean(1)
        if 0.2 < runs.mean() < 0.8 and ((runs > 0.1) & (runs < 0.9)).any() and runs[-1] > 0.1:
            write_weights(folder / "network.safetensors", weights)
            return
    raise AssertionError("Expected noise to skip some blocks for some images.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Trained for two batches a phase: plain, with gates, with gates and exits; the gates' weights are noise."""
    folder = tmp_path_factory.mktemp("skipping")
    train.train(composed(*COMMON, "method=plain"), folder / "plain")
    start = f"method.from_run={folder / 'plain'}"
    train.train(composed(*COMMON, "method=ddi", start), folder / "ddi")
    gates = ("method/gates=layer_rnn", "method.resource=energy")
    train.train(composed(*COMMON, "method=iadi", start, *gates), folder / "iadi")
    stir(folder / "ddi")
    stir(folder / "iadi")
    return folder


@pytest.fixture(scope="module")
def left(runs: Path) -> Path:
    """The evaluation of all of them."""
    names = ",".join(str(runs / name) for name in ("ddi", "iadi", "plain"))
    return evaluated(f"runs=[{names}]", f"folder={runs / 'evaluation'}", "points=20")


@pytest.fixture(scope="module")
def plan() -> Plan:
    with initialize_config_dir(str(evaluate.CONF), version_base="1.3"):
        return build_plan(compose("evaluate", overrides=["points=20"]))


@pytest.fixture(scope="module")
def results(runs: Path, left: Path, plan: Plan) -> list[Result]:
    """The same as objects, without energies."""
    found = []
    for run in load_runs([runs / name for name in ("ddi", "iadi", "plain")]):
        val, test = (read_trace(run.path / f"traces/{split}.safetensors") for split in ("val", "test"))
        found.append(evaluated_run(run, val, test, plan))
    return found


def test_a_run_leaves_what_its_gates_save(runs: Path) -> None:
    for name in ("ddi", "iadi"):
        drawn = {path.stem for path in (runs / name / "figures").glob("*.png")}
        assert drawn == {"curves", "exits", "saving", "skips"}
    assert not (runs / "plain/figures/skips.png").exists()


def test_the_csv_is_what_executing_the_networks_gives(left: Path, results: Sequence[Result]) -> None:
    table = pd.read_csv(left / "skipping.csv", keep_default_na=False).set_index("run")
    assert sorted(table.gates) == ["", "layer_rnn", "mgl2s"]
    for result in results:
        row, test = table.loc[result.run.label], result.test
        run = result.run
        images = [images for images, *_ in Images(run.config).batches("test", torch.device("cpu"))]
        said = [Executor(run.network, FixedExit(test.num_exits))(batch) for batch in images]
        label, macs = (torch.cat([getattr(part, name) for part in said]) for name in ("label", "macs"))
        assert row["test/macs"] == pytest.approx(macs.double().mean().item())
        assert row["test/last_exit/acc"] == pytest.approx((label == test.labels).double().mean().item())
        static = test.costs["macs"]
        whole = static.stem + sum(static.blocks) + static.heads[-1]
        assert row["test/saving"] == pytest.approx(1 - macs.double().mean().item() / whole)
        skipped, closed, ran = 0, 0, 0
        if test.decisions is not None:
            for block, channels in enumerate(gated_channels(static)):
                for runs, open in zip(*(part[block].tolist() for part in test.decisions), strict=True):
                    skipped += not runs
                    closed += runs * (channels - open)
                    ran += runs * channels
            assert 0 < skipped < test.decisions.runs.numel()  # or this would test nothing
        assert row["test/skip_ratio"] == pytest.approx(skipped / (len(static.blocks) * len(test)))
        assert row["test/closed_ratio"] == pytest.approx(closed / max(1, ran))
        assert (closed > 0) == (run.config.method.name == "ddi")


def test_the_energy_saved_is_that_of_the_runs_chip(left: Path, runs: Path) -> None:
    table = pd.read_csv(left / "skipping.csv", keep_default_na=False).set_index("method")
    curve = pd.read_csv(left / "curve.csv").set_index(["run", "point"])
    label = table.loc["iadi", "run"]
    energy = [curve.loc[(name, "exit 1"), "test/energy_uj"] for name in (label, table.loc["plain", "run"])]
    assert float(table.loc["iadi", "test/energy_saving"]) == pytest.approx(1 - energy[0] / energy[1])


def test_hard_budgets_are_those_of_a_plain_loop(results: Sequence[Result]) -> None:
    test, plain = results[0].test, results[2].test
    costs = test.costs["macs"]
    segments, heads = (part["macs"].T.tolist() for part in (test.segments, test.heads))

    def halts(image: int, budget: float) -> int:
        spent, answer = 0, 0
        for k in range(test.num_exits):
            spent += segments[image][k]
            answer = k
            left = [sum(costs.segments[k + 1 : j + 1]) + costs.heads[j] for j in range(k + 1, test.num_exits)]
            if not left or spent + min(left) > budget:
                assert spent + heads[image][k] <= budget
                break
        return answer

    for budget in (*costs.alone, plain.costs["macs"].plain):
        right = [bool(test.correct[halts(i, budget), i]) for i in range(len(test))]
        assert hard_budget(test, budget) == pytest.approx(np.mean(right))
    assert hard_budget(test, min(costs.alone) - 1) is None


def test_plain_networks_are_the_budgets_of_table_ii(results: Sequence[Result]) -> None:
    [row] = table_ii(results)
    test, plain = results[0].test, results[2].test
    base, ours = plain.correct[-1].double().mean().item(), hard_budget(test, plain.costs["macs"].plain)
    assert row["budget, 2·MACs"] == f"{2 * plain.costs['macs'].backbone / 1e6:.2f} M"
    assert (row["DDI accuracy"], row["base accuracy"]) == (f"{100 * ours:.2f} %", f"{100 * base:.2f} %")
    assert row["Δ"] == f"{100 * (ours - base):+.2f}"
    dear = replace(test, costs={name: replace(cost, stem=cost.stem + 10**9) for name, cost in test.costs.items()})
    [row] = table_ii([replace(results[0], test=dear), results[2]])
    assert (row["DDI accuracy"], row["Δ"]) == ("-", "-")


@pytest.mark.parametrize(
    ("backbone", "dataset", "published"),
    [("resnet74", "cifar10-jpeg", ["91.00 %", "92.82 %", "93.81 %", "93.88 %"]), ("resnet74", "cifar100", []),
     ("densenet100", "cifar10", ["93.83 %", "94.44 %", "94.68 %"]), ("resnet74", "digits", []),
     ("densenet201", "imagenet", ["60.26 %", "70.80 %", "74.80 %"])],
)  # fmt: skip
def test_published_values_stand_beside_runs_of_the_paper(
    backbone: str, dataset: str, published: list[str], results: Sequence[Result]
) -> None:
    config = OmegaConf.merge(results[0].run.config, {"backbone": {"name": backbone}, "dataset": {"name": dataset}})
    ddi = replace(results[0], run=replace(results[0].run, config=config))
    rows = table_ii([ddi, results[2]])
    assert [row["DDI accuracy"] for row in rows if "published" in row["model"]] == published
    run = Skipping("a", backbone, "iadi", "mgl2s", "macs", 0.5, None, 9, 0.9, 1e7, 0.456, 0.3, 0.5, 0.2)
    [content] = table_i([run], dataset).values()
    assert [row["a"] for row in content] == ["45.60", "30.00", "90.00"]
    theirs = [row.get("published, CIFAR-10 (1)") for row in content]
    assert theirs == (["40.00", "36.08", "93.65"] if backbone == "resnet74" and published else [None] * 3)


def test_data_sets_of_the_paper_are_known_by_their_names() -> None:
    names = ("cifar10", "cifar10-jpeg", "cifar100", "imagenet", "imagenet100", "digits")
    assert [known_data_set(name) for name in names] == ["cifar10", "cifar10", "", "imagenet", "", ""]


def test_a_guaranteed_budget_takes_every_image_to_its_exit(results: Sequence[Result]) -> None:
    test = results[0].test
    costs = test.costs["macs"]
    assert test.decisions is not None
    channels = torch.tensor(gated_channels(costs))[:, None].expand_as(test.decisions.channels)
    everything = Decisions(torch.ones_like(test.decisions.runs), channels)
    unskipped = assembled(test.logits, test.labels, {"macs": costs}, decisions=everything)
    for row in anytime(test):
        k = row.exit
        assert replay(Budget(row.guaranteed), test).prediction.exit.min() >= k
        if k > 1:  # nothing cheaper would do for an image that skips nothing
            assert replay(Budget(row.guaranteed - 1), unskipped).prediction.exit.max() < k
        alone = replay(FixedExit(k), test)
        assert row.macs == pytest.approx(alone.prediction.macs.double().mean().item())
        assert row.accuracy == pytest.approx((alone.prediction.label == test.labels).double().mean().item())
        assert row.static < row.guaranteed  # gates


def savings_of(macs: Sequence[int], results: Sequence[Result]) -> Trace:
    """A trace of one exit whose images cost so much."""
    test = results[1].test.rows(torch.arange(len(macs)))
    segments = {"macs": torch.tensor([macs])}
    return replace(test, segments=segments, heads={"macs": torch.zeros(1, len(macs), dtype=torch.int64)})


def test_easy_and_hard_images_are_those_with_the_most_and_the_least_saved(results: Sequence[Result]) -> None:
    macs = [500, 300, 500, 300, 400, 100, 300, 200]
    most, least = easy_and_hard(savings_of(macs, results), 3)
    assert most == sorted(range(8), key=lambda row: (macs[row], row))[:3] == [5, 7, 1]
    assert least == sorted(range(8), key=lambda row: (-macs[row], row))[:3] == [0, 2, 4]
    most, least = easy_and_hard(savings_of([7] * 5, results), 3)
    assert (most, least) == ([0, 1], [2, 3])


def test_features_with_gates_on_and_off_are_those_of_the_network(results: Sequence[Result]) -> None:
    run, test = results[0].run, results[0].test
    images = Images(run.config)
    batch = images.normalized(images.pixels([3, 100, 200]), torch.device("cpu"))
    last = len(run.network.chain.blocks)
    off, on, decisions = features(run.network, batch, last)
    assert test.decisions is not None
    torch.testing.assert_close(run.network.chain.head(off), run.network.ungated(batch)[-1])
    torch.testing.assert_close(run.network.chain.head(on), test.logits[-1, [3, 100, 200]], atol=1e-4, rtol=1e-4)
    assert torch.equal(decisions.runs.long(), test.decisions.runs[:, [3, 100, 200]])
    assert not torch.allclose(on, off)


def test_the_block_nearest_to_the_sixth_that_skips_is_shown() -> None:
    runs, channels = torch.ones(9, 3), torch.full((9, 3), 16)
    assert skipping_block(Decisions(runs, channels), [16] * 9) is None
    runs[8, 0] = 0
    channels[2, 1:] = 15
    block, rows = skipping_block(Decisions(runs, channels), [16] * 9) or (0, torch.empty(0))
    assert (block, rows.tolist()) == (3, [1, 2])
    runs[6, 2] = 0
    assert (skipping_block(Decisions(runs, channels), [16] * 9) or (0,))[0] == 7


def test_runs_with_gates_are_evaluated_and_drawn_beside_plain_ones(left: Path, results: Sequence[Result]) -> None:
    assert {path.stem for path in left.glob("*.png")} == {"tradeoff", "gates", "resource"}
    drawn = {path.parent.name: {p.stem for p in path.parent.glob("*.png")} for path in left.glob("*/skips.png")}
    common = {"skips", "easy_hard", "features"}
    [ddi] = [result for result in results if result.adaptive]
    shares = {"shares"} if len(ddi.front) > 1 else set()  # of one point there is nothing to draw
    assert drawn == {
        "resnet8_iadi": common,
        "resnet8_ddi": common | {"anytime", "confidence", "overthinking"} | shares,
    }
    text = (left / "skipping.md").read_text()
    for title in ("Runs", "Table I: computational and energy savings, resnet8", "Tables II and III", "At any time"):
        assert f"## {title}" in text
    summary = json.loads((left / "summary.json").read_text())
    assert len(summary["skipping"]) == 3
    assert {"skipping.md", "skipping.csv", "resnet8_iadi/features.png"} <= set(summary["files"])
    table = (left / "table.md").read_text()
    assert table.count("last exit, gated") == 2
    assert table.count("full network alone") == 1
    share = next(line for line in table.splitlines() if "iadi" in line and "gated" in line).split("|")[8].strip()
    spent = replay(FixedExit(1), results[1].test).prediction.macs.double().mean().item()
    assert share == f"{100 * spent / results[2].test.costs['macs'].backbone:.1f} %"


def test_a_run_with_gates_alone_is_evaluated(results: Sequence[Result], plan: Plan) -> None:
    _, iadi, plain = results
    check([iadi.run], plan)
    with pytest.raises(ValueError, match=r"Expected a run with early exits, or with gates, .* has none"):
        check([plain.run], plan)
    names = [name for name, _ in pictures([iadi], None, plan, {}, images=[Images(iadi.run.config)])]
    assert names == ["tradeoff", "skips", "easy_hard", "features"]
    assert [row["point"] for row in table_rows(iadi, plan)] == ["last exit, gated"]


def test_without_the_data_set_all_but_images_is_drawn(results: Sequence[Result], plan: Plan, capsys) -> None:
    class Gone(Images):
        def __init__(self) -> None:
            pass

        @property
        def tests(self) -> int:
            raise ValueError("there is no such folder")

    names = [name for name, _ in pictures([results[1]], None, plan, {}, images=[Gone()])]
    assert names == ["tradeoff", "skips"]
    assert "No images of resnet8 iadi are drawn: there is no such folder" in capsys.readouterr().out


def test_runs_are_told_apart_by_their_gates_and_what_they_save() -> None:
    options = (("method/gates=layer_rnn",), (), ("method.resource=energy",), ("method.target_saving=0.7",),
               ("method.target_saving=null", "method.alpha=1e-3"))  # fmt: skip
    configs = [composed("method=iadi", *more) for more in options]
    paths = [Path(f"/runs/{i}") for i in range(len(configs))]
    found = labels(paths, configs, [True] * len(configs))
    assert len(set(found)) == len(found)
    for name, part in zip(found, ("layer_rnn", "mgl2s", "energy", "to save 0.7", "α 0.001"), strict=True):
        assert part in name
        assert "/" not in name
    assert labels(paths[:2], [configs[1], configs[2]], [True, True])[0] == "resnet20 iadi for macs"


def test_bars_are_the_ratios_of_the_blocks() -> None:
    figure = skips_figure(Ratios([0.2, 0.4, 1.0], 0.5333), Ratios([0.1, 0.0, float("nan")], 0.06), (2, 1), "a run")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == pytest.approx([20, 40, 100])
    assert [bar.get_height() for bar in lower.patches][:2] == pytest.approx([10, 0])
    assert "53.3 %" in [text.get_text() for text in upper.texts]
    first = upper.collections[0].get_offsets()
    assert first[:, 0].tolist() == [1, 3]  # the first block of each stage
    assert len(skips_figure(Ratios([0.2], 0.2), None, (1,), "layers alone").axes) == 1


def test_points_are_joined_by_cost_and_scaled(results: Sequence[Result]) -> None:
    line = {"layers": [(3e7, 0.9), (1e7, 0.8), (2e7, 0.7)]}
    figure = strategies_figure(line, {"resnet14": (2.6e7, 0.84)}, "MACs", "runs")
    [axes] = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[10, 80], [20, 70], [30, 90]])
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[26, 84]])
    assert axes.get_xlabel() == "MACs per image, M"
    assert "resnet14" in [text.get_text() for text in axes.texts]
    [axes] = resource_figure({"for MACs": [(0.4, 0.9)], "for energy": [(0.5, 0.91)]}, "runs").axes
    np.testing.assert_allclose([line.get_xydata()[0] for line in axes.lines], [[40, 90], [50, 91]])
    [axes] = anytime_figure([(1e6, 0.5)], [(2e6, 0.6)], [(3e6, 0.6)], {}, "MACs", "a run").axes
    assert sorted(line.get_xydata().tolist()[0] for line in axes.lines) == [[1, 50], [2, 60], [3, 60]]


def test_nothing_is_tabled_where_no_run_has_gates(results: Sequence[Result]) -> None:
    assert skippings(results[2:]) == []
    assert [run.gates for run in skippings(results)].count("") == 1
