"""Geometry, published parameter counts, and torchvision's own models as the second implementation."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import chain_of_densenet, densenet_bc, torchvision_densenet
from networks.backbones.resnet import chain_of_resnet, cifar_resnet, torchvision_resnet
from networks.backbones.vgg import vgg
from running.assembly import build_network
from tests.conftest import ROOT, composed, stirred

CIFAR_DEPTHS = (8, 14, 20, 26, 32, 38, 44, 56, 74, 110, 128)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    assert parameters(alexnet(10)) == 23_272_266
    assert parameters(vgg(16, 10)) == 33_642_442
    assert parameters(cifar_resnet(44, 10, shortcut="B")) == 661_338
    assert parameters(densenet_bc(100, 10)) == 769_162


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_option_a_has_he_et_als_parameters(depth: int, published: float) -> None:
    assert parameters(cifar_resnet(depth, 10)) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_chain_gives_the_logits_of_torchvisions_resnet(name: str) -> None:
    model = stirred(torchvision.models.get_model(name, weights=None, num_classes=7))
    chain = chain_of_resnet(copy.deepcopy(model), (3, 64, 64)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(chain(x), model(x))
    assert parameters(chain) == parameters(model)


def test_a_chain_gives_the_logits_of_torchvisions_densenet() -> None:
    model = stirred(torchvision.models.densenet121(weights=None, num_classes=7))
    chain = chain_of_densenet(copy.deepcopy(model), (3, 64, 64)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(chain(x), model(x))
    assert parameters(chain) == parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", "resnet101", "densenet201"])
def test_the_larger_torchvision_models_too(name: str) -> None:
    model = stirred(torchvision.models.get_model(name, weights=None))
    regroup = chain_of_resnet if name.startswith("resnet") else chain_of_densenet
    chain = regroup(copy.deepcopy(model), (3, 224, 224)).eval()
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(chain(x), model(x))


@pytest.mark.parametrize(
    ("make", "name"),
    [(torchvision_resnet, "resnet18"), (torchvision_densenet, "densenet121")],
    ids=["resnet", "densenet"],
)
def test_default_weights_are_loaded_from_torchvisions_cache(make, name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = stirred(torchvision.models.get_model(name, weights=None))
    file = torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(published.state_dict(), tmp_path / "hub/checkpoints" / file)
    x = torch.randn(2, 3, 64, 64)
    chain = make(name, 1000, (3, 64, 64), weights="DEFAULT").eval()
    torch.testing.assert_close(chain(x), published(x))
    other = make(name, 4, (3, 64, 64), weights="DEFAULT").eval()
    assert other(x).shape == (2, 4)
    torch.testing.assert_close(other.run(x, stop=5), chain.run(x, stop=5))


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of DEFAULT, IMAGENET1K_V1 or null, got 'BEST'"):
        torchvision_resnet("resnet18", 10, weights="BEST")
    with pytest.raises(ValueError, match="for 3 channels, the images have 1"):
        torchvision_resnet("resnet18", 10, (1, 64, 64), weights="DEFAULT")


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_resnet_depth_is_its_weighted_layers(depth: int) -> None:
    chain = cifar_resnet(depth, 10)
    layers = [m for m in chain.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth
    assert chain.stage_lengths == ((depth - 2) // 6,) * 3


@pytest.mark.parametrize("depth", [76, 82, 88, 100])
def test_densenet_depth_is_its_weighted_layers(depth: int) -> None:
    layers = [m for m in densenet_bc(depth, 10).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth


@given(depth=st.integers(-3, 140))
@settings(max_examples=40)
def test_a_depth_that_is_not_of_the_family_is_refused(depth: int) -> None:
    if depth < 8 or (depth - 2) % 6:
        with pytest.raises(ValueError, match=rf"depth 6n\+2, such as \d+ or \d+; got depth {depth}\."):
            cifar_resnet(depth, 10)
    if depth < 10 or (depth - 4) % 6:
        with pytest.raises(ValueError, match=rf"depth 6n\+4, such as \d+ or \d+; got depth {depth}\."):
            densenet_bc(depth, 10)


MAKERS = {
    "resnet8": (lambda c, shape: cifar_resnet(8, c, shape), 1),
    "densenet10": (lambda c, shape: densenet_bc(10, c, shape), 4),
    "alexnet": (alexnet, 15),
    "vgg11": (lambda c, shape: vgg(11, c, shape), 32),
}


@pytest.mark.parametrize(("make", "smallest"), MAKERS.values(), ids=MAKERS)
@given(data=st.data())
@settings(max_examples=8)
def test_any_geometry_that_fits_runs_and_any_other_is_refused(make, smallest: int, data) -> None:
    sides = st.integers(max(1, smallest - 3), smallest + 18)
    height, width = data.draw(sides), data.draw(sides)
    channels, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    if min(height, width) < smallest:
        with pytest.raises(ValueError, match=f"at least {smallest}x{smallest} pixels, got {height}x{width}"):
            make(classes, (channels, height, width))
    else:
        chain = make(classes, (channels, height, width)).eval()
        assert chain(torch.randn(2, channels, height, width)).shape == (2, classes)


def test_torchvision_geometry() -> None:
    assert torchvision_resnet("resnet18", 3, (1, 40, 56)).eval()(torch.randn(2, 1, 40, 56)).shape == (2, 3)
    assert torchvision_densenet("densenet121", 3, (1, 29, 33)).eval()(torch.randn(2, 1, 29, 33)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 29x29"):
        torchvision_densenet("densenet121", 3, (3, 28, 40))


@pytest.mark.parametrize("head", ["exit_predictor", "light", "hybrid", "ddi"])
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/backbone").glob("*.yaml")))
def test_every_backbone_with_every_head(name: str, head: str) -> None:
    cfg = composed(f"backbone={name}", f"method/heads={head}")
    network = build_network(cfg, 4, (3, 32, 32)).eval()
    assert cfg.backbone.name == name
    x = torch.randn(2, 3, 32, 32)
    logits = network(x)
    assert network.num_exits > 1
    assert [tuple(z.shape) for z in logits] == [(2, 4)] * network.num_exits
    torch.testing.assert_close(logits[-1], network.chain(x))
