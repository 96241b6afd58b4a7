"""``evaluate.py adaptation=…``: figure 10, thresholds that follow the bandwidth, and a stream of images."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import train
from costs.latency import CoInference, network_latency
from costs.transmission import sent_bytes
from evaluation import tracing
from evaluation.adaptation_settings import Streaming
from evaluation.runs import load_runs
from evaluation.tracing import Images
from figures.bandwidth import Series, bandwidth_figure
from inference.adaptive import AdaptiveThresholds
from inference.executor import Executor
from inference.predicted import Predicted
from inference.replay import oracle
from inference.thresholds import Confidence
from inference.trace import Trace, read_trace
from networks.early_exit_network import EarlyExitNetwork
from running.command_line import Refused
from tests.cases import SMALL
from tests.conftest import composed
from tests.test_evaluate import evaluated

BOUND = 8.0  # ms: to exit 2 of ResNet8 a Raspberry Pi takes 6.4, to exit 1 it takes 4.1
STATIC = [0.9999, 0.9999]
METHODS = ["Backbone", "EE (static)", "EE+EP (static)", "EE (adaptive)", "EE (adaptive, pruning)",
           "EE+oracle (adaptive)", "EE+EP (adaptive)", "exact optimum"]  # fmt: skip
SMALLER = ["adaptation=published", f"co_inference.bound_ms={BOUND}", "adaptation.points=600", "adaptation.bandwidths=7",
           "points=49", f"adaptation.static={STATIC}"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """With exits, codec and predictor, and a backbone with a codec; and what was found of the first."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, "backbone=resnet8", "method=feature_codec", "dataset.eval_batch_size=100"]
    train.train(composed(*common, "method/predictor=proposed"), folder / "a")
    train.train(composed(*common, "method/exits=none", "method.codec.cut=2"), folder / "b")
    stream = ["adaptation.stream.trace=generated", "adaptation.stream.seconds=20"]
    evaluated(f"runs=[{folder / 'a'},{folder / 'b'}]", *SMALLER, *stream, f"folder={folder / 'found'}")
    return folder


def table_of(runs: Path) -> pd.DataFrame:
    return pd.read_csv(runs / "found/bandwidth.csv")


def priced(run: Any, split: str) -> Trace:
    trace = read_trace(run.path / f"traces/{split}.safetensors")
    return trace.priced(sent_bytes(run.network), network_latency(run.network, CoInference()))


def test_every_method_is_there_and_keeps_the_bound_in_validation(runs: Path) -> None:
    table = table_of(runs)
    assert list(dict.fromkeys(table.method)) == METHODS
    assert (table.groupby("method").size() == 7).all()
    assert table.mbps.min() == 0.1
    assert table.mbps.max() == 100
    adaptive = table[table.method.isin(METHODS[3:4] + METHODS[5:])]
    assert (adaptive["val/latency_ms"] <= BOUND + 1e-6).all()
    exact = table[table.method == "exact optimum"]["val/acc"].to_numpy()
    static = table[table.method == "EE+EP (static)"]
    assert static["val/acc"].nunique() == 1
    assert (exact[1:] >= exact[:-1]).all()  # more bandwidth, more points within the bound
    for method in ("EE (adaptive)", "EE+EP (adaptive)"):
        assert (exact >= table[table.method == method]["val/acc"].to_numpy()).all()
    files = {"bandwidth.png", "bandwidth.svg", "bandwidth.md", "stream.png", "stream.csv", "stream.md"}
    assert files <= {path.name for path in (runs / "found").iterdir()}
    assert all(name in (runs / "found/bandwidth.svg").read_text() for name in METHODS)


def test_rows_are_what_executing_their_thresholds_and_equation_11_give(runs: Path) -> None:
    [run] = load_runs([runs / "a"])
    images, labels, *_ = zip(*Images(run.config).batches("test", torch.device("cpu")), strict=True)
    ms = network_latency(run.network, CoInference())
    table = table_of(runs)
    for method, row in ((m, r) for m in METHODS[3:] for r in table[table.method == m].iloc[[0, 3]].to_dict("records")):
        if method in ("EE (adaptive, pruning)", "EE+oracle (adaptive)"):
            continue
        values = [row[f"threshold_{k}"] for k in range(1, 5) if not math.isnan(row[f"threshold_{k}"])]
        policy = Confidence(values) if len(values) == 2 else Predicted(values[:2], values[2:])
        parts = [Executor(run.network, policy)(batch) for batch in images]
        exit, label = (torch.cat([getattr(part, name) for part in parts]) for name in ("exit", "label"))
        assert (label == torch.cat(labels)).double().mean().item() == pytest.approx(row["test/acc"], abs=1.01 / 144)
        sending = 8 * 512 / (row["mbps"] * 1000)
        if len(values) == 2:  # every head on the way is paid
            spent = {k: ms.leaving[k - 1] for k in (1, 2)} | {3: ms.leaving[2] - ms.link + sending}
            expected = sum(spent[k] for k in exit.tolist()) / len(exit)
            assert row["test/latency_ms"] == pytest.approx(expected, rel=5e-3)


def test_the_backbone_is_its_own_run_at_its_own_codec(runs: Path) -> None:
    [run] = load_runs([runs / "b"])
    trace = priced(run, "test")
    row = table_of(runs).query("method == 'Backbone'").iloc[0]
    assert row["test/acc"] == pytest.approx(trace.correct[0].double().mean().item())
    device = network_latency(run.network, CoInference()).to_cut
    assert row["test/latency_ms"] == pytest.approx(device + 8 * 512 / 100)  # at 0.1 Mbit/s


def test_the_oracle_pays_one_head(runs: Path) -> None:
    [run] = load_runs([runs / "a"])
    trace = priced(run, "test")
    for row in table_of(runs).query("method == 'EE+oracle (adaptive)'").iloc[[0, 6]].to_dict("records"):
        outcome = oracle(Confidence([row["threshold_1"], row["threshold_2"]]), trace)
        crossing = (outcome.prediction.exit == 3).double().mean().item()
        computing = outcome.cost(trace, "latency_ms").mean().item() - crossing * trace.costs["latency_ms"].link
        expected = computing + crossing * 8 * 512 / (1000 * row["mbps"])
        assert row["test/latency_ms"] == pytest.approx(expected)


def test_pruned_channels_are_gone_from_the_network(runs: Path) -> None:
    [run] = load_runs([runs / "a"])
    batches = [batch[:2] for batch in Images(run.config).batches("test", torch.device("cpu"))]
    rows = table_of(runs).query("method == 'EE (adaptive, pruning)'")
    assert rows.channels.is_monotonic_increasing
    assert rows.channels.iloc[0] < 8
    for row in rows.drop_duplicates("channels").to_dict("records"):
        lean, kept = run.network.codec.narrowed(int(row["channels"]))
        assert lean.payload_bytes == 64 * row["channels"]
        assert [lean.encoder[1].out_channels, lean.decoder[0].in_channels] == [len(kept)] * 2
        network = EarlyExitNetwork(run.network.chain, run.network.taps, list(run.network.heads), codec=lean).eval()
        executor = Executor(network, Confidence(STATIC))
        found = [(executor(images), labels) for images, labels in batches]
        right = torch.cat([prediction.label == labels for prediction, labels in found]).double().mean().item()
        assert row["test/acc"] == pytest.approx(right, abs=1.01 / 144)
        ms = network_latency(network, CoInference(bandwidth_mbps=row["mbps"]))
        exits = torch.cat([prediction.exit for prediction, _ in found])
        expected = sum(ms.leaving[k - 1] for k in exits.tolist()) / len(exits)
        assert row["test/latency_ms"] == pytest.approx(expected, rel=5e-3)


def test_a_narrowed_code_is_a_part_of_the_whole_one(runs: Path) -> None:
    [run] = load_runs([runs / "a"])
    codec = run.network.codec
    feature = torch.rand(3, *codec.shape)
    with torch.no_grad():
        whole = codec.encode(feature)
        for channels in (1, 5, 8):
            lean, kept = codec.narrowed(channels)
            assert torch.equal(lean.encode(feature), whole[:, kept])
            norms = codec.encoder[1].weight.flatten(1).norm(dim=1)
            assert set(kept.tolist()) == set(norms.topk(channels).indices.tolist())
    for channels in (0, 9):
        with pytest.raises(ValueError, match="Expected from 1 to 8 channels"):
            codec.narrowed(channels)


def test_the_thresholds_it_leaves_can_be_deployed(runs: Path) -> None:
    content = json.loads((runs / "found/adaptive_thresholds.json").read_text())
    table = table_of(runs)
    for name, models in content.items():
        thresholds = AdaptiveThresholds.from_plain(models)
        for row in table[table.method == name].to_dict("records"):
            policy = thresholds.at(row["mbps"])
            values = [*policy.each(3), *(policy.gammas(3) if isinstance(policy, Predicted) else [])]
            assert values == pytest.approx([row[f"threshold_{k}"] for k in range(1, len(values) + 1)], abs=1e-12)


def test_the_stream_is_of_two_methods_along_one_bandwidth(runs: Path) -> None:
    stream = pd.read_csv(runs / "found/stream.csv")
    assert dict(stream.groupby("method").size()) == {"EE+EP (adaptive)": 200, "EE+EP (static)": 200}
    first, other = (group.reset_index() for _, group in stream.groupby("method"))
    assert first.mbps.equals(other.mbps)
    early = other[other.exit == 1]
    assert (early.latency_ms < 6).all()


def test_a_recorded_bandwidth_drives_the_stream(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "walk.csv").write_text("seconds,mbps\n0,1\n2,0.5\n3,20\n")
    stream = [f"adaptation.stream.trace={tmp_path / 'walk.csv'}", "adaptation.pruned=false"]
    folder = evaluated(f"run={runs / 'a'}", *SMALLER, *stream, f"folder={tmp_path / 'out'}")
    table = pd.read_csv(folder / "stream.csv").query("method == 'EE+EP (static)'")
    assert table.mbps.tolist() == [1.0] * 20 + [0.5] * 10 + [20.0] * 10  # the last holds as long as the one before
    assert "EE (adaptive, pruning)" not in set(pd.read_csv(folder / "bandwidth.csv").method)
    (tmp_path / "walk.csv").write_text("seconds,mbps\n0,1\n2,400\n")
    Streaming(str(tmp_path / "walk.csv")).check(0.1, 100, "nearest")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["co_inference.bound_ms=2"], r"got 2 ms: the smallest latency possible at any bandwidth is 2\.52 ms"),
        (["co_inference.bound_ms=0"], "Expected co_inference.bound_ms to be a number above 0, got 0"),
        (["co_inference.device_gflops=fast"], "Expected co_inference.device_gflops to be a number above 0, got fast"),
        (
            ["adaptation.static=[0.9]"],
            "Expected 2 thresholds, one for each early exit of 3 exits, as adaptation.static",
        ),
        (["adaptation.intervals=[[1,0.5]]"], "two or more rising bandwidths"),
        (["adaptation.intervals=[[0,1]]"], "bandwidths above 0 Mbit/s"),
        (["adaptation.intervals=[[0.1,1],[2,3]]"], r"begin where the one before ends, at 1 Mbit/s, got 2"),
        (["adaptation.outside=guess"], "Expected adaptation.outside to be refuse or nearest, got guess"),
        (["adaptation.points=0"], "Expected adaptation.points from 1"),
        (["adaptation.margin_ms=-1"], "Expected adaptation.margin_ms to be at least 0"),
        (
            ["adaptation.stream.images_per_s=0", "adaptation.stream.trace=generated"],
            "images_per_s to be a number above 0",
        ),
        (["adaptation.stream.trace=nowhere.csv"], "Expected a CSV file of bandwidths"),
        (["+adaptation.tau=3"], "adaptation does not take these options"),
    ],
)
def test_what_cannot_be_is_refused_before_data_is_read(
    overrides: list[str], said: str, runs: Path, monkeypatch
) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    with pytest.raises(Refused, match=said):
        evaluated(f"run={runs / 'a'}", *SMALLER, *overrides)


def test_bandwidths_without_thresholds_and_other_files_are_refused(runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    for content, said in (
        ("seconds,mbps\n0,1\n1,400\n", r"Expected bandwidths from 0\.1 to 100 Mbit/s, .* has 400 at second 1,"),
        ("seconds,mbps\n0,1\n1,0\n", "line 3"),
        ("time,rate\n0,1\n1,2\n", "header seconds,mbps"),
    ):
        (tmp_path / "walk.csv").write_text(content)
        with pytest.raises(Refused, match=said):
            evaluated(f"run={runs / 'a'}", *SMALLER, f"adaptation.stream.trace={tmp_path / 'walk.csv'}")
    with pytest.raises(Refused, match="Expected a run with early exits"):
        evaluated(f"run={runs / 'b'}", *SMALLER)


def test_a_bound_that_no_thresholds_keep_to_is_refused_with_the_smallest_latency(runs: Path, tmp_path: Path) -> None:
    """There is a cheaper way, to exit 2 without head 1, but not without the Exit Predictor: λ alone comes first."""
    shutil.copytree(runs / "a", tmp_path / "a")
    with pytest.raises(Refused, match=r"got 3\.8 ms: at 0\.1 Mbit/s the smallest average latency possible is 4\.13 ms"):
        evaluated(f"run={tmp_path / 'a'}", *SMALLER, "co_inference.bound_ms=3.8")


def test_bytes_and_latency_are_axes_of_the_other_tables(runs: Path, tmp_path: Path) -> None:
    for cost, unit in (("latency_ms", r"\d ms +\|"), ("sent_bytes", r"\d B +\|")):
        folder = evaluated(f"run={runs / 'a'}", f"cost={cost}", "points=49", f"folder={tmp_path / cost}")
        assert re.search(unit, (folder / "table.md").read_text())
    table = pd.read_csv(folder / "curve.csv").dropna(subset=["test/sent_bytes"])
    assert (table["test/sent_bytes"] - 512 * table["test/exit_3/fraction"]).abs().max() < 1e-9


def test_the_figure_ends_where_most_methods_do() -> None:
    mbps = [0.1, 1.0, 10.0]
    alike = [Series(name, [0.8, 0.82, 0.83], [9.0, 8.0, 7.0], False, False) for name in ("a", "b", "c")]
    fallen = Series("fallen", [0.3, 0.6, 0.83], [9.0, 8.0, 7.0], False, False)
    upper, lower = bandwidth_figure(mbps, [*alike, fallen], 8.5, "").axes
    assert lower.get_ylim()[0] > 75
    assert [text.get_text() for text in lower.texts] == ["fallen: down to 30.0 % at 0.1 Mbit/s"]
    assert SimpleNamespace(lines=upper.lines).lines[0].get_ydata()[0] == 8.5
    _, lower = bandwidth_figure(mbps, alike, 8.5, "").axes
    assert not lower.texts
