"""The Exit Predictor's method: what it imitates, what stays frozen, what its phases choose, and runs it starts from."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch.optim import SGD
from torchmetrics.functional.classification import binary_auroc

import train
from datamodules.image_data import ImageData, Splits
from evaluation.runs import load_runs
from evaluation.tracing import Images
from inference.executor import Executor
from inference.predicted import Predicted
from inference.thresholds import Confidence
from lightning_modules.exit_predictor import Distillation
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exit_predictor import separable
from networks.heads import light
from running.command_line import Refused
from tests.cases import SMALL
from tests.conftest import composed, stirred
from tests.test_evaluate import evaluated

COMMAND = ["method=exit_predictor", "backbone=resnet8", "method.phases.choose.choice.points=400"]


class Noise(ImageData):
    """Images of noise, never augmented unless asked."""

    input_shape, class_names = (3, 16, 16), ["a", "b", "c"]

    def load(self) -> Splits:
        # of all contrasts, so that the exits are not as sure of one as of another
        images = (torch.rand(60, 3, 16, 16) * torch.linspace(10, 255, 60)[torch.randperm(60), None, None, None]).byte()
        return self.split_in_memory((images[:40], torch.arange(40) % 3), (images[40:], torch.arange(20) % 3))


def network() -> EarlyExitNetwork:
    net = with_exits(cifar_resnet(8, 3, (3, 16, 16)), (1, 2), light, separable)
    stirred(net.chain)
    for head in net.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.4)
    return net


def distilled(net: EarlyExitNetwork, data: ImageData, epochs: int = 1) -> tuple[pl.Trainer, Distillation]:
    module = Distillation(net, Confidence([0.6, 0.7]), make_optimizer=lambda p: SGD(p, 0.05))
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, data)
    return trainer, module


def test_the_loss_is_the_papers_sum_of_binary_cross_entropies() -> None:
    net = network()
    module = Distillation(net, Confidence([0.6, 0.7]), make_optimizer=SGD)
    net.eval()
    images = torch.randn(30, 3, 16, 16) * torch.linspace(0.1, 3, 30)[:, None, None, None]
    total, labels = 0.0, []
    for x in images.split(1):  # equations 6 to 9, sample by sample
        confidences = [z.softmax(1).max().item() for z in net(x)[:2]]
        u = [float(c >= threshold) for c, threshold in zip(confidences, (0.6, 0.7), strict=True)]
        s = [1 / (1 + torch.exp(-z)) for z in net.predictor(x)[0]]
        total += sum(-(y * torch.log(p) + (1 - y) * torch.log(1 - p)).item() for p, y in zip(s, u, strict=True))
        labels.append(u)
    targets = module.targets([images])
    assert targets.tolist() == labels
    assert {0.0, 1.0} == set(targets.flatten().tolist())  # or the thresholds tell nothing
    assert module.loss(module.logits(images), targets).item() == pytest.approx(total / 30, rel=1e-4)


def test_only_the_predictor_learns_and_the_statistics_of_the_network_stay() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    distilled(net, Noise(batch_size=8, val_fraction=0.2))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("predictor.")}


@pytest.mark.parametrize("augmented", [False, True])
def test_without_augmentation_the_network_is_asked_once(augmented: bool, monkeypatch) -> None:
    asked = []
    original = Distillation.imitated

    def counts(self: Distillation, images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Distillation, "imitated", counts)
    data = Noise(batch_size=8, val_fraction=0.2, pad=0, flip=augmented)
    distilled(network(), data, epochs=3)
    assert sum(asked) == (32 * 3 if augmented else 32)
    assert data.splits is not None
    assert len(data.splits.train.tensors) == 2  # the column is taken away again


def test_asked_once_or_at_every_step_it_learns_the_same(monkeypatch) -> None:
    nets = []
    for once in (True, False):
        torch.manual_seed(0)
        nets.append(network())
        if not once:
            monkeypatch.setattr(Noise, "augments", True)
        distilled(nets[-1], Noise(batch_size=8, val_fraction=0.2, pad=0, flip=False), epochs=2)
    first, second = (dict(net.predictor.named_parameters()) for net in nets)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_balance_auroc_and_accuracy_are_those_of_torchmetrics() -> None:
    net, data = network(), Noise(batch_size=8, eval_batch_size=7, val_fraction=0.2)
    trainer, module = distilled(net, data)
    found = trainer.test(module, data, verbose=False)[0]
    net.eval()
    images = data.normalize(data.splits.test.tensors[0])
    logits, scores = net(images), net.predictor(images).sigmoid()
    for k, threshold in enumerate((0.6, 0.7)):
        labels = (logits[k].softmax(1).amax(1) >= threshold).int()
        assert 0 < labels.sum() < len(labels)
        assert found[f"test/exit_{k + 1}/label_balance"] == pytest.approx(labels.double().mean().item())
        auroc = binary_auroc(scores[:, k], labels).item()
        assert found[f"test/exit_{k + 1}/predictor_auroc"] == pytest.approx(auroc, abs=1e-6)
        right = ((scores[:, k] >= 0.5) == labels).double().mean().item()
        assert found[f"test/exit_{k + 1}/predictor_acc"] == pytest.approx(right)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """An early-exit run of two batches, and the Exit Predictor on top of it."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100"]
    train.train(composed(*common, "method=early_exit"), folder / "ee")
    train.train(composed(*common, *COMMAND, f"method.from_run={folder / 'ee'}"), folder / "ep")
    train.train(composed(*common, "method=pruning", f"method.from_run={folder / 'ee'}"), folder / "pruned")
    return folder


def test_it_starts_from_a_finished_run(runs: Path) -> None:
    ee, ep = (load_file(runs / name / "network.safetensors") for name in ("ee", "ep"))
    assert all(torch.equal(ep[name], value) for name, value in ee.items())
    assert {name.partition(".")[0] for name in ep.keys() - ee.keys()} == {"predictor"}
    assert [path.name for path in (runs / "ep/checkpoints").iterdir()] == ["predictor.ckpt"]


def test_the_test_is_under_the_point_that_the_phases_chose(runs: Path) -> None:
    noted = json.loads((runs / "ep/operating_point.json").read_text())
    assert list(noted) == ["calibrate", "choose"]
    assert noted["choose"]["thresholds"] == noted["calibrate"]["thresholds"]
    [run] = load_runs([runs / "ep"])
    assert isinstance(run.point, Predicted)
    metrics = json.loads((runs / "ep/metrics.json").read_text())
    for k, gamma in enumerate(run.point.gammas(3), start=1):
        assert metrics[f"test/exit_{k}/prediction_threshold"] == pytest.approx(gamma)
    executor = Executor(run.network, run.point)
    right = spent = device = count = 0
    for images, labels in islice(Images(run.config).batches("test", torch.device("cpu")), 2):  # as debug=fast tests
        label, _, _, macs, device_macs = executor(images)
        right, count = right + int((label == labels).sum()), count + len(labels)
        spent, device = spent + int(macs.sum()), device + int(device_macs.sum())
    assert metrics["test/acc"] == pytest.approx(right / count, abs=1.01 / count)
    assert metrics["test/macs"] == pytest.approx(spent / count, rel=1e-2)
    assert metrics["test/device_macs"] == pytest.approx(device / count, rel=1e-2)
    assert metrics["test/server_macs"] == pytest.approx(metrics["test/macs"] - metrics["test/device_macs"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=resnet14"], r"it has backbone.depth=8, backbone.name=resnet8: choose the same"),
        (["method/heads=light"], r"it has method.heads._target_=networks.heads.exit_predictor"),
        (["dataset.val_fraction=0.2"], r"it has dataset.val_fraction=0.1"),
        (["method.phases.choose.choice.more=0"], r"above 0 and at most 1, got 0"),
        (["method.phases.choose.choice.prediction=[0.1]"], r"Expected 2 thresholds, one for each early exit"),
        (["method.phases.calibrate.choice.thresholds=1.5"], r"from 0 to 1.*got 1.5"),
        (["method.phases.calibrate.choice.grid=[]"], r"Expected choice.grid to be a list"),
        (["method.phases.predictor=null"], r"No phase of the method trains the Exit Predictor"),
    ],
)
def test_what_cannot_be_is_refused_before_data_is_read(overrides, message, runs: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ImageData, "setup", lambda self, stage=None: pytest.fail("data was read"))
    command = [*SMALL, "backbone=resnet8", *COMMAND[:1], f"method.from_run={runs / 'ee'}", *overrides]
    with pytest.raises(Refused, match=message):
        train.train(composed(*command), tmp_path / "run")


def test_an_unfinished_run_and_a_predictor_that_nobody_trains_are_refused(runs: Path, tmp_path) -> None:
    shutil.copytree(runs / "ee", tmp_path / "ee")
    (tmp_path / "ee/metrics.json").unlink()
    with pytest.raises(Refused, match="directory of a finished run"):
        train.train(composed(*SMALL, *COMMAND, f"method.from_run={tmp_path / 'ee'}"), tmp_path / "run")
    with pytest.raises(Refused, match="choose method=exit_predictor or method/predictor=null"):
        train.train(composed(*SMALL, "backbone=resnet8", "method/predictor=proposed"), tmp_path / "run")
    with pytest.raises(Refused, match="Expected a network with an early exit for the Exit Predictor, got 1 exit"):
        train.train(composed(*SMALL, *COMMAND, "method/exits=none"), tmp_path / "run")


def test_the_pruned_network_is_smaller_on_the_device_alone(runs: Path) -> None:
    ee, pruned = (json.loads((runs / name / "metrics.json").read_text()) for name in ("ee", "pruned"))
    assert pruned["test/exit_2/macs"] < 0.95 * ee["test/exit_2/macs"]
    [run] = load_runs([runs / "pruned"])
    weights = load_file(runs / "ee/network.safetensors")
    kept = run.network.chain.blocks[2].branch[0].weight
    assert len(kept) == len(weights["chain.blocks.2.branch.0.weight"])  # the server's filters are all there


def test_what_an_earlier_phase_chose_is_needed_to_go_on(runs: Path, tmp_path) -> None:
    command = composed(
        *SMALL, "backbone=resnet8", "dataset.eval_batch_size=100", *COMMAND, f"method.from_run={runs}/ee"
    )
    for content in (None, "{", '{"calibrate": {"policy": "confidence", "thresholds": [0.5]}, "x"', '{"calibrate": 5}'):
        folder = tmp_path / str(content is None) / str(len(content or ""))
        shutil.copytree(runs / "ep", folder)
        (folder / "metrics.json").unlink()
        (folder / "operating_point.json").unlink()
        if content is not None:
            (folder / "operating_point.json").write_text(content)
        with pytest.raises(Refused, match=r"operating_point.json|Expected an operating point"):
            train.train(command, folder)


def test_pruned_runs_can_be_compared_alone(runs: Path, tmp_path) -> None:
    folder = evaluated(f"run={runs / 'pruned'}", f"folder={tmp_path}", "points=9")
    assert (folder / "pruning.png").stat().st_size > 5000
    assert set(pd.read_csv(folder / "on_device.csv").network) == {"EE, 10 % pruned"}


def test_the_comparisons_are_what_replaying_each_by_hand_gives(runs: Path, tmp_path) -> None:
    names = ",".join(str(runs / name) for name in ("ep", "pruned"))
    lambdas = [0.15, 0.2]
    folder = evaluated(
        f"runs=[{names}]", f"folder={tmp_path}", "points=49", f"on_device.lambdas={lambdas}", "on_device.at=0.2"
    )
    assert {"on_device.png", "on_device.svg", "pruning.png", "on_device.md"} <= {path.name for path in folder.iterdir()}
    table = pd.read_csv(folder / "on_device.csv")
    assert set(table.network) == {"EE", "EE + oracle", "EE + EP", "EE, 10 % pruned"}
    loaded = {run.config.method.name: run for run in load_runs([runs / "ep", runs / "pruned"])}
    images, labels = zip(*Images(loaded["exit_predictor"].config).batches("test", torch.device("cpu")), strict=True)
    for row in table[table.network != "EE + oracle"].to_dict("records"):
        values = [row["threshold_1"], row["threshold_2"]]
        policy = Confidence(values)
        if row["network"] == "EE + EP":
            policy = Predicted(values, [row["prediction_1"], row["prediction_2"]])
        executor = Executor(loaded["pruning" if "pruned" in row["network"] else "exit_predictor"].network, policy)
        parts = [executor(batch) for batch in images]
        label, device = (torch.cat([getattr(part, name) for part in parts]) for name in ("label", "device_macs"))
        assert (label == torch.cat(labels)).double().mean().item() == pytest.approx(row["test/acc"], abs=6e-3)
        assert device.double().mean().item() == pytest.approx(row["test/device_macs"], rel=1e-2)
    text = (folder / "on_device.md").read_text()
    assert "λ = 0.2, 0.2" in text
