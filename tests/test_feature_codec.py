"""The feature codec: what is sent, bit for bit; what it leaves as it is; how it is trained; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from datamodules.image_data import ImageData
from inference.executor import Executor
from inference.policies import FixedExit, Never, Policy
from inference.replay import curve, replay
from inference.thresholds import Confidence
from inference.trace import Trace, record
from inference.travel import Prediction
from lightning_modules.early_exit import Joint
from lightning_modules.feature_codec import Codec, Server
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet
from networks.backbones.vgg import vgg
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, device_part, with_exits
from networks.edge import quantizable, quantized
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
from tests.tiny import tiny

bits_of = st.integers(1, 8)


def made(shape: tuple[int, int, int], **options: Any) -> FeatureCodec:
    """A codec in eval mode that uses all of its codes: with statistics of its own, its limit half of what comes."""
    codec = FeatureCodec(shape, 1, **options)
    stirred(codec)
    with torch.no_grad():
        codec.limit.copy_(codec.encoder(torch.randn(64, *shape)).max() / 2)
    return codec


def bare(bits: int, limit: float, shape: tuple[int, int, int] = (1, 1, 1)) -> FeatureCodec:
    """The quantizer alone."""
    codec = FeatureCodec(shape, 1, spatial=1, channels=1, bits=bits).eval()
    codec.encoder = codec.decoder = nn.Identity()
    codec.limit.fill_(limit)
    return codec.eval()


# feature, height and width by, channels by, bits -> codes, bytes
PAYLOADS = [
    ((128, 16, 16), 2, 4, 8, (32, 8, 8), 2048),  # VGG16-BN, section V-C
    ((32, 16, 16), 2, 4, 8, (8, 8, 8), 512),  # ResNet44
    ((128, 16, 16), 2, 4, 1, (32, 8, 8), 256),
    ((64, 5, 7), 2, 4, 8, (16, 3, 4), 192),
    ((11, 5, 7), 2, 4, 3, (3, 3, 4), 14),  # 108 bits
    ((6, 10, 4), 3, 1, 5, (6, 4, 2), 30),
    ((7, 4, 4), 1, 3.5, 7, (2, 4, 4), 28),
    ((3, 4, 4), 4, 100, 1, (1, 1, 1), 1),
    ((8, 1, 1), 2, 4, 5, (2, 1, 1), 2),
]


@pytest.mark.parametrize(("shape", "spatial", "channels", "bits", "codes", "payload"), PAYLOADS)
def test_codes_and_bytes_by_hand(shape, spatial, channels, bits, codes, payload) -> None:
    codec = made(shape, spatial=spatial, channels=channels, bits=bits)
    assert (codec.code_shape, codec.payload_bytes) == (codes, payload)
    encoded = codec.encode(torch.randn(3, *shape))
    assert (encoded.shape, encoded.dtype) == ((3, *codes), torch.uint8)
    assert encoded.max() <= 2**bits - 1
    sent = codec.pack(encoded)
    assert (sent.shape, sent.dtype) == ((3, payload), torch.uint8)
    assert codec.decode(encoded).shape == (3, *shape)


@pytest.mark.parametrize(
    ("make", "taps", "shape"),
    [
        (lambda: vgg(16, 100), (1, 3), (128, 16, 16)),
        (lambda: cifar_resnet(44, 100, shortcut="B"), (1, 8), (32, 16, 16)),
    ],
)
def test_64_times_fewer_bytes_at_the_papers_cuts(make: Callable[[], Chain], taps, shape) -> None:
    with torch.device("meta"):
        codec = bottlenet(make(), taps)
    assert (codec.shape, codec.cut) == (shape, taps[-1])
    assert 4 * math.prod(codec.shape) == 64 * codec.payload_bytes


@settings(max_examples=40)
@given(
    bits=bits_of, shape=st.tuples(*[st.integers(1, 5)] * 3), count=st.integers(1, 3), seed=st.integers(0, 99),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)  # fmt: skip
def test_what_is_sent_is_the_codes_bit_after_bit(bits, shape, count, seed, layout) -> None:
    torch.manual_seed(seed)
    codec = FeatureCodec(shape, 1, spatial=1, channels=1, bits=bits)
    codes = torch.randint(2**bits, (count, *shape), dtype=torch.uint8)
    strings = ["".join(f"{code:0{bits}b}" for code in image.flatten().tolist()) for image in codes]
    length = -(-len(strings[0]) // 8)
    strings = [string.ljust(8 * length, "0") for string in strings]
    sent = codec.pack(codes.to(memory_format=layout))
    assert codec.payload_bytes == length
    assert sent.tolist() == [[int(string[i : i + 8], 2) for i in range(0, 8 * length, 8)] for string in strings]
    back = codec.unpack(sent)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


def test_payloads_of_another_codec_are_refused() -> None:
    codec = FeatureCodec((4, 4, 4), 1)
    for wrong in (torch.zeros(2, 5), torch.zeros(4), torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64)):
        sent = wrong if wrong.shape == (2, 4) else wrong.byte()
        with pytest.raises(ValueError, match=r"\AExpected payloads of 4 bytes, \(N, 4\) uint8, got .*\Z"):
            codec.unpack(sent)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [*({"bits": bits} for bits in (1, 2, 5, 8)), {"spatial": 1, "signed": True}, {"spatial": 3}]
)
@pytest.mark.parametrize("shape", [(8, 6, 6), (8, 5, 7)])
@torch.no_grad()
def test_the_server_gets_what_the_codes_say_and_no_more(shape, options: dict[str, Any], precision: str) -> None:
    codec, x = made(shape, **options), torch.randn(5, *shape)
    with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        codes = codec.encode(x)
        assert len(codes.unique()) >= min(16, 2**codec.bits)
        behind = codec.decode(codec.unpack(codec.pack(codes)))
        assert torch.equal(codec(x), behind)
    assert behind.std() > 0


@settings(max_examples=40)
@given(bits=bits_of, limit=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
@torch.no_grad()
def test_inside_the_limit_the_error_is_at_most_half_a_step(bits: int, limit: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.cat([torch.rand(40) * limit, limit * (1 + torch.rand(5)), -torch.rand(5), torch.tensor([0.0, limit])])
    codec, step = bare(bits, limit), limit / (2**bits - 1)
    codes, seen = codec.encode(x.view(-1, 1, 1, 1)).flatten(), codec(x.view(-1, 1, 1, 1)).flatten()
    for value, code, decoded in zip(x.tolist(), codes.tolist(), seen.tolist(), strict=True):
        assert decoded == pytest.approx(code * step, rel=1e-5)
        assert abs(decoded - min(max(value, 0), limit)) <= step / 2 + 1e-5 * limit
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)


def layer_by_layer(codec: FeatureCodec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and feature without a quantizer, written down with functions; BatchNorm takes the batch's statistics."""

    def normalized(y: Tensor, norm: Any) -> Tensor:
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        return (y - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    size = codec.encoder[1].weight.shape[-1]
    x = F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
    y = normalized(F.conv2d(x, codec.encoder[1].weight, stride=size), codec.encoder[2]).relu()
    z = normalized(F.conv_transpose2d(y, codec.decoder[0].weight, stride=size), codec.decoder[1]).relu()
    return y, z[..., : codec.shape[1], : codec.shape[2]]


@pytest.mark.parametrize("shape", [(8, 6, 6), (8, 5, 7)])
def test_while_the_encoder_trains_nothing_is_quantized(shape: tuple[int, int, int]) -> None:
    codec, x = made(shape, bits=1).train(), torch.randn(9, *shape)
    _, expected = layer_by_layer(codec, x)
    torch.testing.assert_close(codec(x), expected, atol=1e-5, rtol=1e-5)
    codec.encoder.eval()  # the decoder and the server train on
    limit, z = codec.limit.clone(), codec(x)
    assert not torch.allclose(z, expected, atol=0.05)
    assert torch.equal(codec.limit, limit)
    with torch.no_grad():
        codes = codec.decoder(codec.encode(x) * codec.limit)[..., : shape[1], : shape[2]]
    torch.testing.assert_close(z, codes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_limit_follows_the_one_of_the_least_squared_error(bits: int) -> None:
    codec = made((8, 6, 6), bits=bits).train()
    codec.limit.fill_(0.7)
    for _ in range(3):
        x = torch.randn(20, 8, 6, 6) * 10 ** torch.randn(20, 1, 1, 1)
        y, _ = layer_by_layer(codec, x)
        numbers, steps, before = y.detach().flatten().double(), 2**bits - 1, codec.limit.item()
        codec(x)
        errors = {}
        for candidate in [numbers.max().item() * k / 20 for k in range(1, 21)]:
            levels = torch.tensor([candidate * q / steps for q in range(steps + 1)], dtype=torch.float64)
            errors[candidate] = (numbers[:, None] - levels).square().amin(1).mean().item()
        best = before + (codec.limit.item() - before) / 0.05
        nearest = min(errors, key=lambda candidate: abs(candidate - best))
        assert best == pytest.approx(nearest, rel=1e-3)
        assert errors[nearest] <= min(errors.values()) * (1 + 1e-3)
    for _ in range(200):
        codec(x)
    assert codec.limit.item() == pytest.approx(nearest, rel=1e-3)


def test_a_batch_of_zeros_leaves_a_limit_to_divide_by() -> None:
    codec = made((4, 4, 4)).train()
    nn.init.zeros_(codec.encoder[2].weight)
    nn.init.zeros_(codec.encoder[2].bias)
    for _ in range(3000):
        codec._follow(torch.zeros(9))
    assert 0 < codec.limit < 1e-30
    codec.eval()
    assert torch.isfinite(codec(torch.randn(2, 4, 4, 4))).all()


def few_bits(closed: bool) -> Chain:
    chain = cifar_resnet(8, 5, (3, 8, 8))
    return quantized(chain, 2, 2, quantizable(chain)[0] if closed else sum(quantizable(chain)))


@pytest.mark.parametrize(
    ("make", "signed"),
    [
        (lambda: densenet_bc(10, 5, (3, 16, 16)), True),
        (lambda: cifar_resnet(8, 5, (3, 16, 16)), False),
        (lambda: tiny(5, (3, 16, 16)), False),
        (lambda: few_bits(closed=False), True),  # raw sums, inside the part of few bits
        (lambda: few_bits(closed=True), False),
    ],
    ids=["densenet", "resnet", "convolutions", "few bits, inside", "few bits, at their end"],
)
def test_the_decoder_gives_negative_numbers_where_the_feature_has_some(make: Callable[[], Chain], signed: bool) -> None:
    torch.manual_seed(1)
    chain = stirred(make())
    codec = bottlenet(chain, [1])
    stirred(codec)
    with torch.no_grad():
        feature = chain.run(torch.randn(8, *chain.input_shape), stop=1)
        behind = codec.decode(torch.randint(256, (8, *codec.code_shape), dtype=torch.uint8))
    assert (feature.min() < 0) == signed  # or the test is of another kind of feature
    assert (behind.min() < 0) == signed
    assert isinstance(codec.encoder[-1], nn.ReLU)


@pytest.mark.parametrize("bits", [3, 8])
@torch.no_grad()
def test_fewer_channels_of_the_code_are_those_of_the_largest_filters(bits: int) -> None:
    codec, x = made((24, 5, 6), bits=bits), torch.randn(4, 24, 5, 6)
    codes, norms = codec.encode(x), [(filter**2).sum().item() for filter in codec.encoder[1].weight]
    lean, kept = codec.narrowed(4)
    assert kept.tolist() == sorted(sorted(range(6), key=lambda i: -norms[i])[:4])
    assert torch.equal(lean.encode(x), codes[:, kept])
    assert lean.payload_bytes == {3: 14, 8: 36}[bits]  # 4 channels of 3x3
    assert torch.equal(lean.unpack(lean.pack(codes[:, kept])), codes[:, kept])
    others = codes.clone()
    others[:, [i for i in range(6) if i not in kept]] = 0
    torch.testing.assert_close(lean.decode(codes[:, kept]), codec.decode(others))
    assert torch.equal(codec.encode(x), codes)
    assert codec.payload_bytes == {3: 21, 8: 54}[bits]
    for channels in (0, 7):
        with pytest.raises(ValueError, match=rf"\AExpected from 1 to 6 channels .*, got {channels}\.\Z"):
            codec.narrowed(channels)


PLACES = [([1], 1), ([1, 2], 2), ([1], 3), ([1, 2], 3), ([], 1), ([], 2), ([], 3)]


def coded(taps: list[int], cut: int, bits: int = 4, seed: int = 0, chain: Chain | None = None) -> EarlyExitNetwork:
    """Exits of many minds, also behind the codec."""
    torch.manual_seed(seed)
    chain = tiny(5, (3, 8, 8)) if chain is None else chain
    network = with_exits(chain, taps, light, codec=bottlenet(chain, taps, cut=cut, bits=bits))
    stirred(network)
    images = torch.randn(64, *chain.input_shape) + 3 * torch.randn(64, 3, 1, 1)
    with torch.no_grad():
        feature = network.on_device(images)[1]
        network.codec.limit.copy_(network.codec.encoder(feature).max() / 2)
        for z, head in zip(network(images), (*network.heads, chain.head), strict=True):
            head[-1].weight *= 2 / z.std()
            head[-1].bias.copy_((head[-1].bias - z.mean(0)) * 2 / z.std())
    return network


@pytest.mark.parametrize(("taps", "cut"), PLACES)
@torch.no_grad()
def test_the_device_and_its_exits_are_as_they_were(taps: list[int], cut: int) -> None:
    network = coded(taps, cut, bits=1)
    plain = EarlyExitNetwork(network.chain, taps, list(network.heads))
    x = torch.randn(6, 3, 8, 8)
    assert (network.cut, plain.cut) == (cut, taps[-1] if taps else None)
    with_codec, without = network(x), plain(x)
    assert all(map(torch.equal, with_codec[:-1], without[:-1]))
    assert not torch.allclose(with_codec[-1], without[-1], atol=0.1)
    assert all(map(torch.equal, network.ungated(x, coded=False), without))
    early, feature = network.on_device(x)
    assert all(map(torch.equal, early, without[:-1]))
    assert torch.equal(feature, plain.chain.run(x, stop=cut))
    device = device_part(network)
    assert all(map(torch.equal, device(x)[:-1], without[:-1]))
    assert not device(x)[-1].any()


@pytest.mark.parametrize(("taps", "cut"), PLACES)
@torch.no_grad()
def test_through_the_payload_is_through_the_network(taps: list[int], cut: int) -> None:
    network = coded(taps, cut)
    images = torch.randn(40, 3, 8, 8) + 3 * torch.randn(40, 3, 1, 1)
    logits = network(images)
    early, feature = network.on_device(images)
    sent = network.codec.pack(network.codec.encode(feature))
    assert sent.shape == (40, network.codec.payload_bytes)
    answered = network.on_server(network.codec.decode(network.codec.unpack(sent)))
    assert torch.equal(answered, logits[-1])
    policy: Policy = Confidence(0.6) if taps else Never()
    seen, on_device = (Executor(part, policy)(images) for part in (network, device_part(network)))
    assert torch.equal(seen.exit, on_device.exit)
    assert torch.equal(seen.device_macs, on_device.macs)
    gone = torch.stack([z.softmax(1).amax(1) >= 0.6 for z in early] + [torch.ones(40, dtype=torch.bool)])
    exit = gone.int().argmax(0)
    assert exit.bincount(minlength=len(logits)).min() > 0  # some at each
    expected = torch.stack([z.argmax(1) for z in (*early, answered)])[exit, torch.arange(40)]
    assert torch.equal(seen.exit, exit + 1)
    assert torch.equal(seen.label, expected)
    assert torch.equal(on_device.label[exit < len(taps)], expected[exit < len(taps)])


class Prices(NamedTuple):
    """MACs of ``tiny(5, (3, 8, 8))`` by hand: convolutions in · out · 9 · pixels, heads in · 5, codec 4 · in · out."""

    blocks = (27 * 8 * 64, 72 * 12 * 16, 108 * 12 * 16)
    heads = {1: 8 * 5, 2: 12 * 5, 3: 12 * 5}
    coding = {1: 4 * 8 * 2 * 4, 2: 4 * 12 * 3 * 4, 3: 4 * 12 * 3 * 4}  # on each side


def walked(network: EarlyExitNetwork, policy: Policy, x: Tensor) -> tuple[int, int, int, int]:
    """One image: label, exit, MACs, MACs on the device; what crosses the cut does so in bytes."""
    codec, macs, device = network.codec, 0, 0
    x = x[None]
    for i, block in enumerate(network.chain.blocks, start=1):
        x, macs = block(x), macs + Prices.blocks[i - 1]
        if i in network.taps:
            k = network.taps.index(i) + 1
            if isinstance(policy, Confidence) or policy == FixedExit(k):
                z, macs = network.heads[k - 1](x)[0], macs + Prices.heads[i]
                if policy == FixedExit(k) or z.softmax(0).max() >= policy.thresholds[k - 1]:
                    return int(z.argmax()), k, macs, macs
        if i == codec.cut:
            device = macs + Prices.coding[i]
            x, macs = codec.decode(codec.unpack(codec.pack(codec.encode(x)))), macs + 2 * Prices.coding[i]
    z = network.chain.head(x)[0]
    return int(z.argmax()), len(network.taps) + 1, macs + Prices.heads[3], device


@cache
def seen_by(place: int, seed: int) -> tuple[EarlyExitNetwork, Tensor, Trace]:
    """A network, 17 images and their trace."""
    taps, cut = PLACES[place]
    network = coded(taps, cut, bits=1 + 2 * seed, seed=seed)
    images = torch.randn(17, 3, 8, 8) + 3 * torch.randn(17, 3, 1, 1)
    return network, images, record(network, zip(images.split(5), torch.arange(17).remainder(5).split(5), strict=True))


@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(place=st.integers(0, 6), seed=st.integers(0, 1), count=st.integers(1, 17), data=st.data())
def test_executor_replay_and_a_plain_loop_agree(place: int, seed: int, count: int, data: st.DataObject) -> None:
    (taps, _), (network, images, trace) = PLACES[place], seen_by(place, seed)
    images, trace = images[:count], trace.rows(torch.arange(count))
    policy: Policy = Never()
    if taps:
        near = trace.logits[:-1].softmax(-1).amax(-1).sort(1).values.tolist()
        middles = [[(a + b) / 2 for a, b in pairwise(row) if b - a > 2e-5] for row in near]
        thresholds = [data.draw(st.sampled_from([0.0, *row, math.inf])) for row in middles]
        others = [Never(), *map(FixedExit, range(1, len(taps) + 2))]
        policy = data.draw(st.sampled_from([*[Confidence(thresholds)] * 4, *others]))
    with torch.inference_mode():
        expected = [walked(network, policy, x) for x in images]
    executor, outcome = Executor(network, policy, costs=trace.costs["macs"]), replay(policy, trace)
    alone = Prediction(*map(torch.cat, zip(*(executor(x[None]) for x in images), strict=True)))
    for seen in (executor(images), outcome.prediction, alone):
        columns = (seen.label, seen.exit, seen.macs, seen.device_macs)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    for kind, column in (("macs", 2), ("device_macs", 3)):
        assert outcome.cost(trace, kind).tolist() == [row[column] for row in expected]
        if isinstance(policy, Confidence):
            point = curve(Confidence(), torch.tensor([thresholds], dtype=torch.float64), trace)
            assert point.costs[kind] == sum(row[column] for row in expected) / count


@pytest.mark.parametrize(("taps", "cut"), PLACES)
def test_answers_that_get_better_pay_the_encoder_on_the_device(taps: list[int], cut: int) -> None:
    network, images = coded(taps, cut), torch.randn(3, 3, 8, 8)
    *earlier, last = Executor(network, Never()).anytime(images)
    heads = sum(Prices.heads[tap] for tap in taps)
    assert last.device_macs.tolist() == [sum(Prices.blocks[:cut]) + heads + Prices.coding[cut]] * 3
    assert last.macs.tolist() == [sum(Prices.blocks) + heads + 2 * Prices.coding[cut] + Prices.heads[3]] * 3
    assert torch.equal(last.label, network(images)[-1].argmax(1))
    for k, seen in enumerate(earlier, start=1):
        spent = sum(Prices.blocks[: taps[k - 1]]) + sum(Prices.heads[tap] for tap in taps[:k])
        assert seen.device_macs.tolist() == seen.macs.tolist() == [spent] * 3


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


BAD_RATIOS: dict[str, list[Any]] = {
    r"method\.codec\.bits to be a whole number from 1 to 8": [0, 9, 2.5, True, -1, None, "8"],
    r"method\.codec\.spatial to be a whole number of at least 1": [0, -2, 1.5, True, None],
    r"method\.codec\.channels, a ratio, to be a number of at least 1": [0, 0.5, math.nan, math.inf, True, "4"],
}


def test_ratios_and_bits_that_cannot_be_are_refused_in_one_line() -> None:
    chain = tiny(5, (3, 8, 8))
    for message, values in BAD_RATIOS.items():
        key = message.split(".")[2].split(" ")[0].rstrip(",")
        for value in values:
            with pytest.raises(ValueError, match=rf"\AExpected {message}, got {value}\.\Z"):
                bottlenet(chain, [1], **{key: value})
            with pytest.raises(ValueError, match=message):
                FeatureCodec((8, 4, 4), 1, **{key: value})


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


@pytest.mark.parametrize("batch", [64, 128])
def test_the_limit_is_of_all_columns_of_the_code(batch: int) -> None:
    codec = FeatureCodec((8, 16, 16), 1, channels=1).train()
    y = torch.zeros(batch, 8, 8, 8)
    y[..., 3] = torch.rand(batch, 8, 8)
    codec._follow(y)
    assert 0.5 < codec.limit <= 1
