"""The energy model against the hybrid-network paper's table III, its claims, and sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from costs.energy import Chip, layer_sizes, network_energy
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.edge import quantized
from networks.exit_predictor import separable
from networks.heads import hybrid, light
from networks.quantization import QuanConv
from tests.conftest import composed

PER_10K = 10  # mJ for 10,000 images, the paper's unit, from µJ an image
# convolutions at the edge -> published and computed, 1, 2 and 4 bits; the edge with its exit, 100 classes
EDGES = {
    10: ((261, 262.8), (295, 295.2), (363, 359.9)),
    16: ((213, 213.5), (264, 262.7), (365, 361.3)),
    20: ((236, 236.4), (299, 297.7), (424, 420.2)),
    24: ((203, 204.8), (278, 278.5), (429, 425.8)),
}
CLOUDS = {10: 2624.2, 16: 1901.6, 20: 1385.5, 24: 873.0}  # computed, for an image that gets there


def layer_energies(module: nn.Module, image: torch.Tensor, chip: Chip) -> dict[str, float]:
    return {name: chip.layer(*size) for name, size in layer_sizes(module, image).items()}


@pytest.fixture(scope="module")
def chip() -> Chip:
    return instantiate(composed().energy)


def resnet32(classes: int, bits: int, edge: int, exit: bool = True) -> EarlyExitNetwork:
    chain = cifar_resnet(32, classes)
    chain = quantized(chain, bits, bits, edge) if bits < 32 else chain
    return with_exits(chain, [edge // 2] if exit else [], hybrid)


def mj(uj: float) -> float:
    return PER_10K * uj


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("column", "bits"), list(enumerate((1, 2, 4))))
def test_table_iii(edge: int, column: int, bits: int, chip: Chip) -> None:
    published, computed = EDGES[edge][column]
    energy = network_energy(resnet32(100, bits, edge), chip)
    assert mj(energy.leaving[0]) == pytest.approx(computed, abs=0.05)
    assert mj(energy.leaving[0]) == pytest.approx(published, rel=0.011)
    assert mj(energy.server) == pytest.approx(CLOUDS[edge], abs=0.05)


def test_the_network_in_full_precision(chip: Chip) -> None:
    energy = network_energy(resnet32(100, 32, 0, exit=False), chip)
    assert mj(energy.backbone) == pytest.approx(4026.3, abs=0.05)
    assert mj(energy.stem) == pytest.approx(36.3, abs=0.05)
    stages = [mj(sum(energy.blocks[i : i + 5])) for i in (0, 5, 10)]
    assert stages == pytest.approx([1365.9, 1238.7, 1380.0], abs=0.05)
    assert mj(energy.heads[-1]) == pytest.approx(5.5, abs=0.05)
    assert mj(network_energy(resnet32(10, 32, 0, exit=False), chip).backbone) == pytest.approx(4021.4, abs=0.05)


def adaptive(bits: int, edge: int, classes: int, leaving: float, chip: Chip) -> float:
    energy = network_energy(resnet32(classes, bits, edge), chip)
    return leaving * energy.leaving[0] + (1 - leaving) * energy.leaving[1]


@pytest.mark.parametrize(
    ("edge", "bits", "classes", "leaving", "times", "published"),
    [
        (10, 1, 10, None, 1.48, 1.5),
        (20, 1, 100, None, 2.61, 2.6),
        (20, 1, 10, None, 2.62, 2.6),
        (20, 1, 10, 0.593, 5.45, 5.5),
        (24, 4, 100, 1 - 406 / 873.0, 4.84, 4.8),  # the share that table III's cloud column implies
        (24, 2, 100, 1 - 478 / 873.0, 5.32, 5.3),
    ],
)
def test_the_claimed_reductions(
    edge: int, bits: int, classes: int, leaving: float | None, times: float, published: float, chip: Chip
) -> None:
    full = network_energy(resnet32(classes, 32, 0, exit=False), chip).backbone
    if leaving is None:
        ours = network_energy(resnet32(classes, bits, edge, exit=False), chip).backbone
    else:
        ours = adaptive(bits, edge, classes, leaving, chip)
    assert full / ours == pytest.approx(times, abs=0.005)
    assert full / ours == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("edge", "cloud", "times"), [(429, 406, 4.82), (278, 478, 5.33)])
def test_the_claims_for_cifar100_follow_from_the_published_table(
    edge: int, cloud: int, times: float, chip: Chip
) -> None:
    full = network_energy(resnet32(100, 32, 0, exit=False), chip).backbone
    assert mj(full) / (edge + cloud) == pytest.approx(times, abs=0.005)


def test_table_iv_with_one_exit(chip: Chip) -> None:
    ours = mj(adaptive(1, 20, 10, 0.593, chip))
    assert ours == pytest.approx(737, abs=0.5)  # published 729
    # of what the network with 100 classes takes
    assert 4026.3 / ours == pytest.approx(5.46, abs=0.005)


def test_a_layer_by_hand(chip: Chip) -> None:
    assert chip.layer(1000, 10, 20, 30) == pytest.approx(4.6 * 1000 + 80 * 60)
    assert chip.layer(1000, 10, 20, 30, 1, 1) == pytest.approx(0.2 * 1000 + 2.5 * 60 + 4.6 * 30)
    assert chip.layer(1000, 10, 20, 30, 4, 4) == pytest.approx(0.5 * 1000 + 10 * 60 + 4.6 * 30)
    # the wider of the two, memory at its own bits
    assert chip.layer(1000, 10, 20, 30, 2, 8) == pytest.approx(0.9 * 1000 + 2.5 * (20 + 8 * 50) + 4.6 * 30)
    assert chip.layer(1000, 10, 20, 30, 1, 32) == pytest.approx(0.9 * 1000 + 2.5 * (10 + 32 * 50) + 4.6 * 30)
    assert chip.layer(1000, 10, 20, 30, 4, 32) == pytest.approx(4.6 * 1000 + 2.5 * (40 + 32 * 50) + 4.6 * 30)
    assert chip.layer(1000, 10, 20, 30, 32, 4) == pytest.approx(4.6 * 1000 + 2.5 * (320 + 4 * 50))


def test_layers_of_a_module_by_hand(chip: Chip) -> None:
    grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    net = nn.Sequential(grouped, QuanConv(nn.Conv2d(8, 2, 1), 2, 4), nn.Flatten(), nn.Linear(32, 3))
    found = layer_energies(net, torch.zeros(1, 4, 4, 4), chip)
    expected = {
        "0": chip.layer(8 * 16 * 2 * 9, 8 * 2 * 9, 64, 128),
        "1": chip.layer(2 * 16 * 8, 16, 128, 32, 2, 4),
        "3": chip.layer(96, 96, 32, 3),
    }
    assert found == pytest.approx(expected)
    assert net.training


def test_an_lstm_costs_its_macs_and_weights(chip: Chip) -> None:
    found = layer_energies(nn.LSTM(10, 10), torch.zeros(3, 1, 10), chip)
    assert found[""] == pytest.approx(chip.layer(3 * 4 * 10 * 20, 4 * 10 * 20, 30, 30))


def test_the_predictor_is_counted(chip: Chip) -> None:
    chain = cifar_resnet(8, 10)
    energy = network_energy(with_exits(chain, [1, 2], light, separable), chip)
    bare = network_energy(with_exits(cifar_resnet(8, 10), [1, 2], light), chip)
    assert energy.leaving == pytest.approx(bare.leaving)
    predictor = separable(3, input_shape=(3, 32, 32))
    assert energy.predictor == pytest.approx(
        sum(layer_energies(predictor, torch.zeros(1, 3, 32, 32), chip).values()) / 1e6
    )
    assert energy.predictor > 0 == bare.predictor


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "dear", True])
def test_energies_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"energy\.mac to be a number of pJ of at least 0, got"):
        Chip("some", value, 1, 1, 1, 1)  # type: ignore[arg-type]


def test_another_chip_by_config() -> None:
    dear = instantiate(composed("energy.memory_bit=5", "energy.mac=0").energy)
    assert dear.layer(1000, 10, 20, 30) == pytest.approx(160 * 60)
