"""evaluate.py: what it leaves, that it is true, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import evaluate
import train
from evaluation import tracing
from evaluation.analysis import disagreements
from evaluation.runs import load_runs
from evaluation.tracing import Images
from inference.executor import Executor
from inference.thresholds import Confidence
from inference.trace import read_trace
from running.command_line import Refused
from tests.cases import SMALL
from tests.conftest import ROOT, composed
from tests.offline_runs import offline_runs, without_account


def evaluated(*overrides: str) -> Path:
    """The folder that ``python evaluate.py <overrides>`` leaves."""
    with initialize_config_dir(str(evaluate.CONF), version_base="1.3"):
        return evaluate.evaluate(compose("evaluate", overrides=list(overrides)))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Trained for two batches: with two early exits and a W&B run, and without any."""
    folder = tmp_path_factory.mktemp("sweep")
    with without_account(tmp_path_factory.mktemp("home")):
        common = [*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100"]
        train.train(composed(*common, "logger=wandb", "logger.wandb.mode=offline"), folder / "0")
        train.train(composed(*common, "method=plain"), folder / "1")
    return folder


@pytest.fixture
def run(sweep: Path, tmp_path: Path) -> Path:
    """The former, to be spoilt, without its W&B run."""
    copy = tmp_path / "run"
    shutil.copytree(sweep / "0", copy)
    shutil.rmtree(copy / "wandb")
    return copy


def test_every_row_of_the_curve_is_what_executing_it_gives(run: Path) -> None:
    folder = evaluated(f"run={run}", "points=49")
    table = pd.read_csv(folder / "curve.csv")
    rows = table[table.threshold_1.notna() & table["test/acc"].notna()]
    assert (table.point == "candidate").sum() > 49
    assert {"highest accuracy", "budgeted batch, q = 0.05", "full network alone"} & set(table.point) != set()
    [trained] = load_runs([run])
    images, *_ = zip(*Images(trained.config).batches("test", torch.device("cpu")), strict=True)
    labels = read_trace(run / "traces/test.safetensors").labels
    for row in rows.sample(6, random_state=0).to_dict("records"):
        policy = Confidence([row["threshold_1"], row["threshold_2"]])
        parts = [Executor(trained.network, policy)(batch) for batch in images]
        label, exit, macs = (torch.cat([getattr(part, name) for part in parts]) for name in ("label", "exit", "macs"))
        # a score that lies on a threshold is taken from it, in a batch of another size it may differ in its last digit
        assert (label == labels).double().mean().item() == pytest.approx(row["test/acc"], abs=1.01 / len(labels))
        assert macs.double().mean().item() == pytest.approx(row["test/macs"], rel=3e-3)
        for k in (1, 2, 3):
            assert (exit == k).double().mean().item() == pytest.approx(row[f"test/exit_{k}/fraction"], abs=3e-3)


def test_it_leaves_tables_and_legible_figures(run: Path, capsys) -> None:
    folder = evaluated(f"run={run}", "points=49")
    assert folder == run / "evaluation"
    names = {"tradeoff", "shares", "confidence", "overthinking"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == files | {"curve.csv", "table.md", "summary.json"}
    assert all("MACs per image" in (folder / f"{name}.svg").read_text() for name in ("tradeoff", "shares"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["chosen_on"] == "val"
    [found] = summary["runs"].values()
    metrics = json.loads((run / "metrics.json").read_text())
    assert found["points"]["exit 1"]["test/macs"] == metrics["test/exit_1/macs"]
    assert found["points"]["exit 3"]["test/macs"] < metrics["test/exit_3/macs"]  # no early head is computed
    note = found["points"]["risk control, ε 0.01, δ 0.05"]["note"]
    assert note.startswith("not certifiable with 144 samples; the smallest ε is 0.0206")
    printed = capsys.readouterr().out
    assert "validation split (144 images)" in printed
    assert note in " ".join(printed.split())


def test_images_pass_through_the_network_once(run: Path, monkeypatch) -> None:
    evaluated(f"run={run}", "points=9")
    first = (run / "evaluation/curve.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "record", None)
        patch.setattr(Images, "batches", None)
        evaluated(f"run={run}", "points=9")
        assert (run / "evaluation/curve.csv").read_text() == first
        evaluated(f"run={run}", "points=9", "policy=entropy", "cost=2macs", f"folder={run}/other")
        with pytest.raises(Refused):
            evaluated(f"run={run}", "retrace=true")
    weights = {name: value + 1 if name == "chain.head.2.bias" else value for name, value in weights_of(run).items()}
    weights["chain.head.2.bias"][0] += 100
    save_file(weights, run / "network.safetensors")
    evaluated(f"run={run}", "points=9")
    labels = read_trace(run / "traces/test.safetensors").logits[-1].argmax(1)
    assert (labels == 0).all()


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "network.safetensors")


def test_runs_of_a_sweep_are_laid_over_each_other(sweep: Path, tmp_path: Path) -> None:
    folder = evaluated(f"run={sweep}", f"folder={tmp_path}", "points=49", "cost=ptflops", "latency=true")
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["runs"]) == ["resnet8 early_exit", "resnet8 plain"]
    assert summary["cost"] == "ptflops"
    table = pd.read_csv(folder / "curve.csv")
    timed = table[table["test/ms_batch_1"].notna()]
    assert set(timed.front) == {True}
    assert (timed["test/ms_batch_128"] > 0).all()
    assert (tmp_path / "resnet8_early_exit/shares.png").exists()
    assert not (tmp_path / "resnet8_plain").exists()
    tradeoff = (tmp_path / "tradeoff.svg").read_text()
    assert "ptflops per image" in tradeoff
    assert "resnet8 plain" in tradeoff


def test_the_results_go_to_the_run_s_own_wandb_run(sweep: Path, tmp_path: Path) -> None:
    with without_account(tmp_path / "home"):
        folder = evaluated(f"run={sweep / '0'}", f"folder={tmp_path}", "points=49")
    first, *_, again = offline_runs(sweep / "0")
    assert again.run.run_id == first.run.run_id
    pictures = {path.read_bytes() for path in again.files("media/images/evaluation/*.png")}
    assert pictures == {path.read_bytes() for path in folder.glob("*.png")}
    points = json.loads((folder / "summary.json").read_text())["runs"]["resnet8 early_exit"]["points"]
    assert again.summary["evaluation/highest_accuracy/acc"] == points["highest accuracy"]["test/acc"]


def test_choosing_on_the_test_split_is_said_with_every_result(run: Path, capsys) -> None:
    folder = evaluated(f"run={run}", "calibration=highest_accuracy", "calibration.split=test", "points=49")
    said = "CHOSEN ON THE TEST SPLIT"
    assert said in capsys.readouterr().out
    assert said in (folder / "table.md").read_text()
    assert said in (folder / "tradeoff.svg").read_text()
    assert json.loads((folder / "summary.json").read_text())["chosen_on"] == "test"
    table = pd.read_csv(folder / "curve.csv")
    best = table[table.point == "highest accuracy"]["test/acc"].item()
    assert best == table[table.point == "candidate"]["test/acc"].max()


def test_temperatures_are_fitted_on_other_images_than_thresholds(run: Path) -> None:
    folder = evaluated(f"run={run}", "calibration.temperature=true", "points=9")
    [found] = json.loads((folder / "summary.json").read_text())["runs"].values()
    assert found["calibration_images"] == 72
    assert found["test/ece"] != found["test/ece_before_temperature"]
    assert all(temperature != 1 for temperature in found["temperatures"])


def test_a_known_difficulty_is_set_against_the_exit(tmp_path: Path) -> None:
    options = ["dataset=synthetic", "dataset.train_images=100", "dataset.test_images=60", "backbone=resnet8"]
    train.train(composed(*SMALL, *options), tmp_path)
    folder = evaluated(f"run={tmp_path}", "policy=entropy", "policy.thresholds=2.2", "points=9")
    [found] = json.loads((folder / "summary.json").read_text())["runs"].values()
    assert "difficulty" in found["spearman_of_exit_and"]
    assert (folder / "difficulty.png").exists()


def test_disagreements_are_those_of_a_plain_loop(run: Path) -> None:
    evaluated(f"run={run}", "points=9")
    test = read_trace(run / "traces/test.safetensors")
    overthought, needed = disagreements(test)
    for k in range(2):
        for label in range(10):
            members = [i for i in range(len(test)) if test.labels[i] == label]
            early = [test.logits[k, i].argmax() == label for i in members]
            last = [test.logits[2, i].argmax() == label for i in members]
            expected = sum(a and not b for a, b in zip(early, last, strict=True)) / len(members)
            assert overthought[k, label] == pytest.approx(expected)
            expected = sum(b and not a for a, b in zip(early, last, strict=True)) / len(members)
            assert needed[k, label] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.thresholds=[0.5]"], "Expected 2 thresholds, one for each early exit of 3 exits, as policy.thr"),
        (["policy.thresholds=1.5"], "Expected thresholds of confidence from 0 to 1 .or inf.*got 1.5"),
        (["policy=entropy", "policy.thresholds=-1"], "Expected thresholds of entropy from 0 to inf, got -1"),
        (["policy=patience", "policy.patience=3"], "Expected policy.patience from 1 to 2, got 3"),
        (["policy=fixed", "policy.exit=4"], "from 1 to 3, got 4"),
        (["budget=1000"], "Expected a budget of at least .* MACs, what one exit costs, got 1000"),
        (["cost=joules"], "Expected cost to be macs, 2macs, .*got joules"),
        (["calibration.split=train"], "Expected calibration.split to be val or test, got train"),
        (["calibration.risk_control.epsilon=0"], "Expected calibration.risk_control.epsilon between 0 and 1, got 0"),
        (["points=0"], "Expected points from 1"),
        (["precision=int8"], "Expected precision to be fp32 or bf16, got int8"),
        (["accelerator=tpu"], "Expected accelerator to be auto, cpu, cuda or mps, got tpu"),
        (["root=/nowhere"], "root=/nowhere is for a data set in a folder; digits is none"),
    ],
)
def test_what_cannot_be_is_refused_before_data_is_read(overrides: list[str], said: str, run: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    with pytest.raises(Refused, match=said):
        evaluated(f"run={run}", *overrides)


def test_runs_that_cannot_be_evaluated_are_refused(run: Path, sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Expected run=<run directory or multirun folder>"):
        evaluated()
    with pytest.raises(Refused, match="there is no config"):
        evaluated(f"run={tmp_path / 'nowhere'}")
    with pytest.raises(Refused, match=r"Expected a run with early exits, .*1 has none \(method=plain\)"):
        evaluated(f"run={sweep / '1'}")
    shutil.copy(sweep / "1/network.safetensors", run)
    with pytest.raises(Refused, match=r"do not fit its config.yaml: .* heads\.0"):
        evaluated(f"run={run}")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("networks.heads.exit_predictor", "os.system"))
    with pytest.raises(Refused, match=r"names os\.system, which is no part of this project"):
        evaluated(f"run={run}")
    (run / "metrics.json").unlink()
    with pytest.raises(Refused, match="is not finished"):
        evaluated(f"run={run}")


def test_weights_that_are_no_numbers_are_refused(run: Path) -> None:
    weights = weights_of(run)
    weights["heads.1.0.branch.0.weight"][0] = float("nan")
    save_file(weights, run / "network.safetensors")
    with pytest.raises(Refused, match="Expected numbers from exit 2, got NaN or infinity for 144 of 144 images"):
        evaluated(f"run={run}")


def test_the_command_line_answers_in_one_line(tmp_path: Path) -> None:
    for arguments, said in ((["run=nowhere"], "Expected nowhere"), (["policy=hope"], "policy is one of budget, conf")):
        done = subprocess.run(
            [sys.executable, ROOT / "evaluate.py", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
