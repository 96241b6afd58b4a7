"""Runs that are evaluated: their data set moved, changed or gone, their configs from somebody else, their names."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

import evaluate
import train
from evaluation.runs import find_runs, labels, load_runs
from running.command_line import Refused
from tests import test_evaluate
from tests.cases import SMALL
from tests.conftest import MakeFolder, composed

evaluated = partial(test_evaluate.evaluated, "points=9")


@pytest.fixture
def images(make_folder: MakeFolder) -> Path:
    return make_folder()


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Path:
    """On a folder of images."""
    options = ["dataset=image_folder", f"dataset.root={images}", f"dataset.cache_dir={tmp_path / 'cache'}"]
    train.train(composed(*SMALL, *options, "backbone=resnet8"), tmp_path / "run")
    return tmp_path / "run"


def test_images_that_moved_or_changed_are_traced_again_and_none_are_needed_for_what_is_traced(
    run: Path, images: Path, capsys
) -> None:
    evaluated(f"run={run}")
    assert "test split: 60 images" in capsys.readouterr().out
    moved = images.rename(images.with_name("moved"))
    evaluated(f"run={run}")
    assert "its trace is" in capsys.readouterr().out
    (run / "traces/test.safetensors").write_bytes(b"damaged")
    with pytest.raises(Refused, match=r"root=<folder> says where it is now"):
        evaluated(f"run={run}")
    evaluated(f"run={run}", f"root={moved}")
    assert "test split: 60 images" in capsys.readouterr().out
    for image in sorted((moved / "test/a").iterdir())[:10]:
        image.unlink()
    evaluated(f"run={run}", f"root={moved}")
    assert "test split: 50 images" in capsys.readouterr().out
    shutil.rmtree(moved / "train/c")
    shutil.rmtree(moved / "test/c")
    with pytest.raises(Refused, match=r"The data set has changed since the run: it had 3 classes"):
        evaluated(f"run={run}", f"root={moved}")


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("method.heads._target_", "os.system"),
        ("method.heads._target_", "storage.files.os.makedirs"),
        ("method.heads._target_", "networks.heads.Callable"),
        ("dataset._target_", "${target}"),
        ("backbone._target_", "torch.load"),
        ("logger.wandb", {"_target_": "callbacks.wandb_logger.WandbLogger", "mode": {"_target_": "tempfile.mkdtemp"}}),
    ],
)
def test_a_config_that_names_other_things_to_call_is_not_loaded(key: str, target, run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.target = "tempfile.mkdtemp"
    OmegaConf.update(config, key, target, force_add=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(Refused, match="which is no part of this project; not loaded"):
        evaluated(f"run={run}")


def test_a_config_that_is_none_of_a_run_is_refused(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.method = None
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(Refused, match=r"to be that of a run, but it has no method\.exits"):
        evaluated(f"run={run}")
    with pytest.raises(Refused, match=r"Expected the folder of a run, got the file"):
        evaluated(f"run={run / 'network.safetensors'}")


def test_a_second_evaluation_replaces_the_first_and_touches_nothing_else(run: Path) -> None:
    folder = evaluated(f"run={run}", "latency=true")
    (folder / "mine.png").write_text("")
    assert (folder / "latency.png").exists()
    evaluated(f"run={run}", "policy=never")
    left = {path.name for path in folder.iterdir()}
    assert "mine.png" in left
    assert not {"latency.png", "shares.png"} & left
    assert set(json.loads((folder / "summary.json").read_text())["files"]) <= left


def test_a_folder_that_cannot_be_written_to_is_refused_before_data_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"Cannot write to .*file/results: .*; choose another folder="):
        evaluated(f"run={run}", f"folder={tmp_path / 'file' / 'results'}")


def test_runs_are_told_apart(run: Path, tmp_path: Path) -> None:
    for name in ("a/0", "b/0", "b/1"):
        shutil.copytree(run, tmp_path / name)
    config = OmegaConf.load(run / "config.yaml")
    config.seed = 3
    (tmp_path / "b/1/config.yaml").write_text(OmegaConf.to_yaml(config))
    paths = find_runs(None, [str(tmp_path / "a/0"), str(tmp_path / "b")])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a/0", "b/0", "b/1"]
    named = [trained.label for trained in load_runs(paths)]
    assert named == ["resnet8 early_exit seed 0 a/0", "resnet8 early_exit seed 0 b/0", "resnet8 early_exit seed 3"]
    light = composed("method/heads=light")
    found = labels(paths, [composed(), light, composed("method=plain")], [True, True, False])
    assert found == ["resnet20 early_exit exit_predictor", "resnet20 early_exit light", "resnet20 plain"]


def test_every_policy_and_calibration_of_the_config_can_be_evaluated(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Expected a network with an Exit Predictor for policy=predicted, this one has"):
        evaluated(f"run={run}", "policy=predicted")
    options = ["dataset=image_folder", f"dataset.root={images}", f"dataset.cache_dir={tmp_path / 'cache'}"]
    method = ["method=exit_predictor", "method/predictor=fcs_only", "method.phases.choose.choice.points=100"]
    train.train(composed(*SMALL, *options, "backbone=resnet8", *method), tmp_path / "predicted")
    policies, calibrations = (sorted((evaluate.CONF / group).glob("*.yaml")) for group in ("policy", "calibration"))
    assert len(policies) > 6
    for policy in policies:
        folder = evaluated(f"run={tmp_path / 'predicted'}", f"policy={policy.stem}")
        table = pd.read_csv(folder / "curve.csv")
        assert set(table[table.point == "candidate"].policy) == {policy.stem}
    for calibration in calibrations:
        folder = evaluated(f"run={run}", f"calibration={calibration.stem}", "budget=3e6")
        points = pd.read_csv(folder / "curve.csv")
        assert points[points.point == "candidate"]["test/macs"].max() <= 3e6
