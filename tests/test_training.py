"""Objectives, schedules and metrics against closed forms, torch's own schedule and a plain loop."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from callbacks.exit_metrics import ExitMetrics
from callbacks.metrics_csv import MetricsCSV
from costs.network import network_costs
from lightning_modules.early_exit import Joint, OneExit, loss_weights
from lightning_modules.plain import Plain
from lightning_modules.schedules import cosine_then_hold
from networks import heads
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from tests.conftest import stirred

SGD = partial(torch.optim.SGD, lr=0.1)


def network(exits: int = 3) -> EarlyExitNetwork:
    return with_exits(cifar_resnet(14, 4, (3, 8, 8)), range(1, exits), heads.light)


def trainer(epochs: int = 1, **options) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def loader(n: int = 40) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 3, 8, 8), torch.arange(n) % 4), batch_size=8)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=5).filter(any), st.integers(0, 99))
def test_the_joint_loss_is_equation_5(weights: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    n = len(weights)
    logits = [torch.randn(6, 4) for _ in range(n)]
    labels = torch.randint(4, (6,))
    module = Joint(network(n), weights=weights, make_optimizer=SGD)
    one_hot = F.one_hot(labels, 4)
    expected = sum(
        w * -(one_hot * z.softmax(1).log()).sum(1).mean() for w, z in zip(weights, logits, strict=True)
    )  # (1/B) Σ_b Σ_n w_n l
    torch.testing.assert_close(module.loss(logits, labels), torch.as_tensor(expected))


def test_weight_presets_are_the_papers() -> None:
    assert loss_weights("exit_predictor", 3) == loss_weights("auto", 3) == (0.2, 0.3, 0.5)
    assert loss_weights("exit_predictor", 4) == (0.2, 0.2, 0.2, 0.4)
    assert loss_weights("hybrid", 2) == (0.6, 0.4)
    assert loss_weights("sum", 7) == (1.0,) * 7
    assert loss_weights("auto", 7) == (1 / 7,) * 7
    for preset, exits, message in (
        ("exit_predictor", 7, "published for 3 or 4 exits, this network has 7"),
        ("ddi", 3, "one of auto, sum, mean, exit_predictor, hybrid; got 'ddi'"),
        ([1, 2], 3, "3 loss weights of at least 0, one an exit"),
        ([0, 0, 0], 3, "3 loss weights"),
        ([1, -1, 1], 3, "3 loss weights"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_weights(preset, exits)


@pytest.mark.parametrize(
    ("objective", "moved"),
    [
        (partial(Joint), {"chain", "heads.0", "heads.1"}),
        (partial(Plain), {"chain"}),
        (partial(OneExit, exit=2), {"heads.1"}),
    ],
    ids=["joint", "plain", "one exit"],
)
def test_only_the_trained_part_moves_statistics_included(objective, moved: set[str]) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    module = objective(net, make_optimizer=SGD)
    trainer(2).fit(module, loader(), loader())
    for name, value in net.state_dict().items():
        trained = any(name.startswith(part) for part in moved)
        assert torch.equal(value, before[name]) != trained, name


def test_one_exit_gives_the_gradients_of_its_own_cross_entropy() -> None:
    net = network()
    module = OneExit(net, exit=1, make_optimizer=SGD)
    x, y = torch.randn(5, 3, 8, 8), torch.arange(5) % 4
    module.on_train_epoch_start()
    module.loss(module.logits(x), y).backward()
    got = [p.grad.clone() for p in net.heads[0].parameters()]
    expected = torch.autograd.grad(F.cross_entropy(net(x)[0], y), list(net.heads[0].parameters()))
    torch.testing.assert_close(got, list(expected))
    with pytest.raises(ValueError, match="early exit from 1 to 2, got 3"):
        OneExit(net, exit=3, make_optimizer=SGD)


def rates(make, steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_the_schedule_is_torchs_cosine_up_to_epoch_200_and_then_holds() -> None:
    ours = rates(partial(cosine_then_hold, total_steps=220), 220)
    cosine = rates(partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=200, eta_min=1e-4), 201)
    assert ours[:201] == pytest.approx(cosine)
    assert ours[200:] == pytest.approx([1e-4] * 20)


@given(st.integers(2, 400), st.floats(0, 0.5), st.floats(0, 0.4))
def test_any_schedule_ends_at_the_final_rate(steps: int, hold: float, warmup: float) -> None:
    plain = rates(partial(cosine_then_hold, total_steps=steps, hold=hold), steps + 1)
    warm = rates(partial(cosine_then_hold, total_steps=steps, hold=hold, warmup=warmup), steps + 1)
    assert plain[0] == 0.1
    assert warm[-1] == pytest.approx(plain[-1]) == pytest.approx(1e-4)
    assert all(a <= b * (1 + 1e-9) for a, b in zip(warm, plain, strict=True))
    assert warm[int(steps * warmup) + 1 :] == pytest.approx(plain[int(steps * warmup) + 1 :])


def test_a_schedule_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="hold from 0 to below 1, got 1"):
        rates(partial(cosine_then_hold, total_steps=3, hold=1), 1)


def first_confident(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where each sample leaves, from 0, sample by sample."""
    exits, n, _ = logits.shape
    left = []
    for i in range(n):
        k = 0
        while k < exits - 1 and logits[k, i].softmax(0).max() < threshold:
            k += 1
        left.append(k)
    return torch.tensor(left)


def test_metrics_are_those_of_a_plain_loop() -> None:
    net = network()
    # of rising contrast, so that the exits are not all as sure of one as of another
    images, labels = torch.randn(50, 3, 8, 8) * torch.linspace(0.1, 9, 50)[:, None, None, None], torch.arange(50) % 4
    stirred(net)
    for module in net.heads:
        torch.nn.init.normal_(module[-1].weight)
    with torch.no_grad():
        logits = torch.stack(net(images))
    threshold = logits[:2].softmax(-1).amax(-1).quantile(0.7).item() + 1e-5
    callback = ExitMetrics(threshold)
    module = Joint(net, make_optimizer=SGD)
    data = DataLoader(TensorDataset(images, labels), batch_size=7)
    metrics = trainer(callbacks=[callback]).test(module, data, verbose=False)[0]
    costs = network_costs(net).leaving
    exits = first_confident(logits, threshold)
    for k in range(3):
        assert metrics[f"test/exit_{k + 1}/acc"] == pytest.approx(
            accuracy(logits[k], labels, "multiclass", num_classes=4).item()
        )
        assert metrics[f"test/exit_{k + 1}/fraction"] == pytest.approx((exits == k).float().mean().item())
        assert metrics[f"test/exit_{k + 1}/macs"] == costs[k]
    right = [int(logits[k, i].argmax() == labels[i]) for i, k in enumerate(exits.tolist())]
    assert metrics["test/acc"] == pytest.approx(sum(right) / 50)
    assert metrics["test/macs"] == pytest.approx(sum(costs[k] for k in exits.tolist()) / 50)
    counts = network_costs(net)
    server = (exits == 2).double().mean().item() * (counts.segments[2] + counts.heads[2])
    assert metrics["test/server_macs"] == pytest.approx(server)
    assert metrics["test/device_macs"] == pytest.approx(metrics["test/macs"] - server)
    assert len(set(exits.tolist())) > 1  # or the threshold tells nothing
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        ExitMetrics(1.5)


def test_the_csv_widens_merges_and_goes_on(tmp_path) -> None:
    log = MetricsCSV(tmp_path)
    log.begin_phase("one", 0)
    log.log_metrics({"a": 1.0, "epoch": 0}, 9)
    log.log_metrics({"b": 2.0, "epoch": 0}, 9)
    log.log_metrics({"a": 3.0, "epoch": 1}, 19)
    log.begin_phase("two", 20)
    log.log_metrics({"a": 4.0, "c": 5.0, "epoch": 0}, 9)
    text = "phase,epoch,step,a,b,c\none,0,9,1.0,2.0,\none,1,19,3.0,,\ntwo,0,29,4.0,,5.0\n"
    assert (tmp_path / "metrics.csv").read_text() == text
    again = MetricsCSV(tmp_path)
    again.begin_phase("one", 0)
    again.log_metrics({"b": 7.0, "epoch": 1}, 19)  # the run was resumed at step 19: what lies behind is repeated
    again.log_metrics({"a": 8.0, "epoch": 2}, 29)
    assert (tmp_path / "metrics.csv").read_text() == (
        "phase,epoch,step,a,b,c\none,0,9,1.0,2.0,\none,1,19,3.0,7.0,\none,2,29,8.0,,\n"
    )
