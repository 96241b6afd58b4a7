"""How a feature codec is trained, what an earlier run brings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

import train
from datamodules.image_data import ImageData
from lightning_modules.early_exit import Joint
from lightning_modules.feature_codec import Codec, Server
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, device_part, with_exits
from networks.feature_codec import FeatureCodec, bottlenet
from networks.gates import gating
from networks.heads import light
from running.assembly import build_data, build_network, build_phases
from running.assembly import record as recorded
from running.command_line import Refused
from running.earlier_run import load_weights, require_same
from storage.run_directory import RunDirectory
from tests.cases import SMALL
from tests.conftest import composed, stirred
from tests.test_coded_networks import coded
from tests.test_feature_codec import layer_by_layer
from tests.tiny import tiny


def trained(module: Any, network: EarlyExitNetwork, steps: int = 2) -> tuple[dict[str, Tensor], list[float]]:
    """What is other after some steps, and the losses."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer, losses = module.fresh_optimizer(), []
    for _ in range(steps):
        module.on_train_epoch_start()
        images = torch.randn(12, 3, 8, 8)
        loss = module.loss(module.logits(images), torch.arange(12) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: v for name, v in network.state_dict().items() if not torch.equal(v, before[name])}, losses


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-2)


@pytest.mark.parametrize(("taps", "cut"), [([1], 1), ([1], 2), ([], 2)])
@pytest.mark.parametrize("phase", [Codec, Server])
def test_the_device_and_later_the_encoder_are_frozen_to_the_bit(phase: type[Server], taps: list[int], cut: int) -> None:
    network = coded(taps, cut, chain=cifar_resnet(8, 5, (3, 8, 8)))
    changed, _ = trained(phase(network, make_optimizer=sgd), network)
    server = [f"chain.blocks.{i}." for i in range(cut, 3)] + ["chain.head.", "codec.decoder."]
    server += ["codec.encoder.", "codec.limit"] if phase is Codec else []
    assert changed.keys() == {name for name in network.state_dict() if name.startswith(tuple(server))}
    assert any(name.endswith("running_mean") for name in changed)


@pytest.mark.parametrize("phase", [Codec, Server])
def test_the_loss_is_the_last_exits_behind_the_quantizer_or_before_there_is_one(phase: type[Server]) -> None:
    network, x, labels = coded([1], 2, bits=1), torch.randn(12, 3, 8, 8), torch.arange(12) % 5
    module = phase(network, make_optimizer=sgd)
    module.on_train_epoch_start()
    with torch.no_grad():
        feature = network.chain.blocks[1](network.chain.blocks[0](x))
        if phase is Codec:
            _, seen = layer_by_layer(network.codec, feature)
        else:  # a bit: nothing, or the limit
            codes = (network.codec.encoder(feature) > network.codec.limit / 2).float()
            seen = network.codec.decoder(codes * network.codec.limit)
        z = network.chain.head(network.chain.blocks[2](seen))
        expected = -z.log_softmax(1)[range(12), labels].mean()
    loss = module.loss(module.logits(x), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_before_there_is_a_codec_the_exits_train_without_it() -> None:
    network = coded([1], 2, bits=1, chain=cifar_resnet(8, 5, (3, 8, 8)))
    module = Joint(network, weights=[0.5, 0.5], make_optimizer=sgd, coded=False)
    plain = EarlyExitNetwork(network.chain, [1], list(network.heads)).eval()
    network.eval()
    x = torch.randn(4, 3, 8, 8)
    labels = torch.arange(4)
    assert all(map(torch.equal, module.logits(x), plain(x)))
    seen = module.validation_step([x, labels], 0)["logits"]
    assert all(map(torch.equal, seen, plain(x)))
    behind = Codec(network, make_optimizer=sgd)
    network.eval()
    assert torch.equal(behind.validation_step([x, labels], 0)["logits"][-1], network(x)[-1])
    assert not torch.allclose(network(x)[-1], plain(x)[-1], atol=0.1)
    changed, _ = trained(Joint(network, weights=[0.5, 0.5], make_optimizer=sgd, coded=False), network)
    assert {name.split(".")[0] for name in changed} == {"chain", "heads"}


@pytest.mark.parametrize(
    ("taps", "cut", "message"),
    [
        ([1, 3], 2, r"cut=2 lies before exit 2, which follows block 3: .* a cut of at least 3, .*"),
        ([2, 3], 1, r"cut=1 lies before exit 1, which follows block 2: .* a cut of at least 3, .*"),
        ([1], 0, r"from 1 to 3, got 0\."),
        ([1], 4, r"from 1 to 3, got 4\."),
        ([1], -1, r"from 1 to 3, got -1\."),
        ([1], 1.0, r"from 1 to 3, got 1\.0\."),
        ([1], True, r"from 1 to 3, got True\."),
        ([], None, r"Without an early exit the codec needs a place: give method\.codec\.cut, from 1 to 3, .*"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_in_one_line(taps: list[int], cut: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*method\.codec\.cut[^\n]*\Z") as caught:
        bottlenet(tiny(5, (3, 8, 8)), taps, cut=cut)
    assert caught.match(message + r"\Z")


def test_parts_that_do_not_go_together_are_refused() -> None:
    chain, codec = tiny(5, (3, 8, 8)), FeatureCodec((8, 4, 4), 1)
    with pytest.raises(ValueError, match=r"\AExpected a cut at or behind the last early exit, got tap 1\.\Z"):
        with_exits(chain, [1, 2], light, codec=codec)
    with pytest.raises(ValueError, match=r"\AExpected a feature codec to train with, there is none; .*\Z"):
        Server(with_exits(chain, [1], light), make_optimizer=sgd)
    chain = cifar_resnet(8, 5, (3, 8, 8))
    with pytest.raises(ValueError, match=r"\AExpected a network with gates or with a feature codec, got both\.\Z"):
        with_exits(chain, [1], light, None, gating(chain, "rnn"), bottlenet(chain, [1]))
    with pytest.raises(ValueError, match="it has no cut"):
        device_part(with_exits(tiny(5, (3, 8, 8)), [], light))


def finished(folder: Path, *overrides: str) -> EarlyExitNetwork:
    """A run directory as a finished run leaves it, of weights that nobody trained."""
    cfg = composed(*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100", *overrides)
    data = build_data(cfg)
    network = build_network(cfg, data.num_classes, data.input_shape)
    stirred(network)
    recorded(cfg, data)
    folder.mkdir()
    directory = RunDirectory(folder)
    directory.write_config(cfg)
    directory.write_network(network.state_dict())
    directory.write_metrics({"test/acc": 0.5})
    return network


METHOD = ["method=feature_codec", "method.phases.choose.choice.points=100"]


PREDICTOR = "method/predictor=proposed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """An Exit Predictor's run, and codecs on top: one that was trained, one with a cut of its own."""
    folder = tmp_path_factory.mktemp("runs")
    finished(folder / "ep", "method=exit_predictor")
    common = [*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100", *METHOD, PREDICTOR]
    command = composed(*common, f"method.from_run={folder / 'ep'}", "method.phases.calibrate.choice.thresholds=0.3")
    train.train(command, folder / "codec")
    return folder


def test_a_run_on_top_of_an_exit_predictors_trains_codec_and_server_alone(runs: Path) -> None:
    assert sorted(path.stem for path in (runs / "codec/checkpoints").iterdir()) == ["codec", "fine_tune"]
    ep, codec = (load_file(runs / name / "network.safetensors") for name in ("ep", "codec"))
    assert codec.keys() - ep.keys() == {name for name in codec if name.startswith("codec.")}
    same = {name for name, value in ep.items() if torch.equal(value, codec[name])}
    # the predictor, the heads, and all before the cut
    assert ep.keys() - same == {name for name in ep if name.startswith(("chain.blocks.2.", "chain.head."))}
    noted = json.loads((runs / "codec/operating_point.json").read_text())
    assert list(noted) == ["calibrate", "choose"]


def test_what_was_sent_and_how_long_it_took_is_in_the_results(runs: Path) -> None:
    metrics = json.loads((runs / "codec/metrics.json").read_text())
    ptflops, last = metrics["test/device_ptflops"], metrics["test/exit_3/fraction"]
    payload = 8 * 8 * 8  # 32x16x16 at the cut
    assert metrics["test/sent_bytes"] == pytest.approx(payload * last)
    assert metrics["test/exit_3/sent_bytes"] == payload
    assert metrics["test/exit_2/sent_bytes"] == metrics["test/exit_1/sent_bytes"] == 0
    assert metrics["test/device_latency_ms"] == pytest.approx(ptflops / 3.62e6)
    assert metrics["test/latency_ms"] == pytest.approx(ptflops / 3.62e6 + last * 8 * payload / 1000)
    exit_3 = metrics["test/exit_3/device_ptflops"] / 3.62e6 + 8 * payload / 1000
    assert metrics["test/exit_3/latency_ms"] == pytest.approx(exit_3)
    assert not [name for name in metrics if "server_latency" in name or "device_sent" in name]


def phases_of(*overrides: str) -> list[str]:
    cfg = composed(*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100", *overrides)
    network = build_network(cfg, 10, (3, 32, 32))
    if OmegaConf.select(cfg, "method.from_run"):
        require_same(cfg, cfg.method.from_run)
    return [phase.name for phase in build_phases(cfg, network)]


def test_phases_whose_result_an_earlier_run_has_are_left_out(runs: Path) -> None:
    ep, codec = f"method.from_run={runs / 'ep'}", f"method.from_run={runs / 'codec'}"
    assert phases_of(*METHOD, PREDICTOR, ep) == ["codec", "fine_tune", "calibrate", "choose"]
    assert phases_of(*METHOD, PREDICTOR, codec) == ["calibrate", "choose"]
    assert phases_of(*METHOD, "method/predictor=separable", codec) == ["calibrate", "predictor", "choose"]


def test_what_an_earlier_run_has_trained_is_what_is_gone_on_with(runs: Path, tmp_path: Path) -> None:
    earlier = load_file(runs / "codec/network.safetensors")
    kept = {"chain", "heads", "codec"}
    for predictor, rooms in ((PREDICTOR, kept | {"predictor"}), ("method/predictor=lenet", kept)):
        cfg = composed(*SMALL, "backbone=resnet8", *METHOD, predictor, f"method.from_run={runs / 'codec'}")
        network = build_network(cfg, 10, (3, 32, 32))
        fresh = {name: value.clone() for name, value in network.state_dict().items()}
        load_weights(cfg, network, RunDirectory(tmp_path / "none"))
        for name, value in network.state_dict().items():
            expected = earlier if name.split(".")[0] in rooms else fresh
            assert torch.equal(value, expected[name]), name


BEHIND = r"\Amethod\.from_run=\S* was trained behind "


REFUSED = {
    "bits": (["method.codec.bits=0"], r"\AExpected method\.codec\.bits to be .* from 1 to 8, got 0\.\Z"),
    "cut": (["method.codec.cut=1"], r"\Amethod\.codec\.cut=1 lies before exit 2, which follows block 2: .*\Z"),
    "no exit": (["method/exits=none"], r"\AWithout an early exit the codec needs a place: give method\.codec\.cut"),
    "gates": (["method/gates=layer_rnn"], r"\Amethod/codec and method/gates cannot be combined: .*\Z"),
    "server alone": (["method.phases.codec=null"],
                     r"\ANo phase of the method trains the feature codec; choose .* or method\.codec=null\.\Z"),
    "other bits": (["method.from_run=RUNS/codec", "method.codec.bits=4"],
                   BEHIND + r"another codec; .* the same method\.codec\.\Z"),
    "other cut": (["method.from_run=RUNS/codec", "method.codec.cut=3"], BEHIND + r"another codec; .*\Z"),
    "no codec": (["method.from_run=RUNS/codec", "method.codec=null"], BEHIND + r"a feature codec; .*\Z"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_data_is_read(case: str, runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ImageData, "setup", lambda self, stage=None: pytest.fail("data was read"))
    overrides, message = REFUSED[case]
    overrides = [text.replace("RUNS", str(runs)) for text in overrides]
    cfg = composed(*SMALL, "backbone=resnet8", "dataset.eval_batch_size=100", *METHOD, *overrides)
    with pytest.raises(Refused, match=message):
        train.train(cfg, tmp_path / "run")


@pytest.mark.parametrize("method", ["early_exit", "exit_predictor", "pruning"])
def test_a_method_without_a_codec_does_not_go_on_from_a_run_behind_one(method: str, runs: Path) -> None:
    cfg = composed(*SMALL, "backbone=resnet8", f"method={method}", f"++method.from_run={runs / 'codec'}")
    with pytest.raises(ValueError, match=BEHIND + r"a feature codec; choose a run without, or go on with .*\Z"):
        require_same(cfg, runs / "codec")
