"""The feature codec: what is sent, bit for bit, and what the quantizer follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet
from networks.backbones.vgg import vgg
from networks.chain import Chain
from networks.edge import quantizable, quantized
from networks.feature_codec import FeatureCodec, bottlenet
from tests.conftest import stirred
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


@pytest.mark.parametrize("batch", [64, 128])
def test_the_limit_is_of_all_columns_of_the_code(batch: int) -> None:
    codec = FeatureCodec((8, 16, 16), 1, channels=1).train()
    y = torch.zeros(batch, 8, 8, 8)
    y[..., 3] = torch.rand(batch, 8, 8)
    codec._follow(y)
    assert 0.5 < codec.limit <= 1
