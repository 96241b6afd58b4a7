"""Weights of few bits as they are kept: packed in files, counted in bytes on the device, cached in evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from costs.footprint import device_bytes
from networks import heads, quantization
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet
from networks.backbones.vgg import ConvUnit
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.edge import quantizable, quantized
from networks.exit_predictor import separable
from networks.packing import pack, packed_state, unpack, unpacked_state
from networks.quantization import QuanConv, quantized_convs, weight_codes
from storage.weights import read_weights, write_weights
from tests.conftest import stirred


@given(bits=st.integers(1, 8), data=st.data())
def test_packing_writes_the_codes_bit_after_bit(bits: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    codes = torch.tensor([(2 * q - (2**bits - 1)) / 2 ** (bits - 1) for q in numbers])
    string = "".join(f"{q:0{bits}b}" for q in numbers)
    string += "0" * (-len(string) % 8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [int(string[i : i + 8], 2) for i in range(0, len(string), 8)]
    assert torch.equal(unpack(packed, bits, len(numbers)), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_of_any_type_and_layout_are_packed(bits: int, dtype: torch.dtype) -> None:
    codes, _ = weight_codes(torch.randn(6, 4, 3, 3), bits)
    other = codes.to(dtype).to(memory_format=torch.channels_last)
    assert torch.equal(unpack(pack(other, bits), bits, codes.numel()).view_as(codes), codes)


def plain_convs(num_classes: int, shape: tuple[int, int, int]) -> Chain:
    """Convolutions with and without BatchNorm, bias and pool: the units of VGG and AlexNet."""
    units = [ConvUnit(3, 5), ConvUnit(5, 7, norm=False, pool=True), ConvUnit(7, 9), ConvUnit(9, 6, stride=2, pool=True)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
    return Chain(nn.Identity(), units, head, [2, 2], shape, num_classes)


BACKBONES: dict[str, Callable[[], Chain]] = {
    "resnet8": lambda: cifar_resnet(8, 4, (3, 16, 16)),
    "resnet8 B": lambda: cifar_resnet(8, 4, (3, 16, 16), "B"),
    "densenet10": lambda: densenet_bc(10, 4, (3, 16, 16)),
    "convs": lambda: plain_convs(4, (3, 16, 16)),
}


def few_bits(make: Callable[[], Chain], bits: int) -> EarlyExitNetwork:
    """All that can be in few bits, and an exit after the second block."""
    chain = make()
    few = quantized(chain, bits, bits, sum(quantizable(chain)))
    return stirred(with_exits(few, [2], heads.hybrid))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_packed_network_is_the_same_to_the_bit(make: Callable[[], Chain], bits: int, tmp_path: Path) -> None:
    network, other = few_bits(make, bits), few_bits(make, bits)
    convs = quantized_convs(network)
    with torch.no_grad():
        next(iter(convs.values())).conv.weight[1] = 0  # a filter of zeros is one too
    images = torch.randn(4, 3, 16, 16)
    write_weights(tmp_path / "packed.safetensors", packed_state(network))
    state = read_weights(tmp_path / "packed.safetensors")
    for name, conv in convs.items():
        weight = conv.conv.weight
        assert f"{name}.conv.weight" not in state
        assert state[f"{name}.conv.weight.packed"].nbytes == math.ceil(weight.numel() * bits / 8)
        assert state[f"{name}.conv.weight.scale"].nbytes == 4 * len(weight)
    other.load_state_dict(unpacked_state(other, state))
    with torch.no_grad():
        assert all(map(torch.equal, network(images), other(images)))
    again = packed_state(other)  # packed from the unpacked
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_state_dict_is_left_as_it_is_where_nothing_is_packed() -> None:
    network = few_bits(BACKBONES["resnet8"], 2)
    state = network.state_dict()
    found = unpacked_state(network, state)
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)
    packed = packed_state(network)
    before = dict(packed)
    unpacked_state(network, packed)
    assert packed == before
    full = cifar_resnet(8, 4)
    assert packed_state(full).keys() == full.state_dict().keys()
    mixed = quantized(full, 32, 2, 6)
    assert packed_state(mixed).keys() == mixed.state_dict().keys()


def test_a_layer_alone_is_packed_too() -> None:
    conv = QuanConv(nn.Conv2d(4, 6, 3), 2, 2)
    state = packed_state(conv)
    assert {"conv.weight.packed", "conv.weight.scale"} <= state.keys()
    conv.load_state_dict(unpacked_state(conv, state))


def test_another_precision_or_shape_is_refused() -> None:
    state = packed_state(few_bits(BACKBONES["resnet8"], 2))
    with pytest.raises(ValueError, match=r"2304 4-bit weights in 1152 bytes, got 576 .* another precision"):
        unpacked_state(few_bits(BACKBONES["resnet8"], 4), state)
    with pytest.raises(ValueError, match=r"2304 1-bit weights in 288 bytes, got 576 .* another precision"):
        unpacked_state(few_bits(BACKBONES["resnet8"], 1), state)
    name = "chain.blocks.1.layers.0.conv.weight"
    few = few_bits(BACKBONES["convs"], 2)
    with pytest.raises(ValueError, match=f"Expected 7 scales for {name}, got "):
        unpacked_state(few, {**packed_state(few), f"{name}.scale": torch.ones(3)})
    with pytest.raises(ValueError, match=r"got 9 elements of torch.float32"):
        unpack(torch.zeros(9), 1, 72)


def test_a_binary_edge_takes_less_than_a_twentieth() -> None:
    chain = cifar_resnet(32, 10)
    bytes_of = {}
    for bits in (1, 2, 32):
        few = quantized(chain, bits, bits, 20)
        state = packed_state(nn.ModuleList(quantized_convs(few).values()))
        bytes_of[bits] = sum(value.nbytes for name, value in state.items() if ".conv." in name)
    weights = 10 * 9 * 16 * 16 + 9 * 16 * 32 + 9 * 9 * 32 * 32
    filters = 10 * 16 + 10 * 32
    assert bytes_of == {32: 4 * weights, 1: weights // 8 + 4 * filters, 2: weights // 4 + 4 * filters}
    assert bytes_of[1] < bytes_of[32] / 20


def test_bytes_on_the_device_by_hand() -> None:
    chain = cifar_resnet(8, 4, (3, 16, 16))
    stem = 4 * (16 * 3 * 9 + 4 * 16)  # and BatchNorm's scale, shift, mean and variance
    block = 4 * (2 * 16 * 16 * 9 + 2 * 4 * 16)
    head = 4 * (16 * 5 * 5 * 4 + 4)
    assert device_bytes(with_exits(chain, [1], heads.hybrid)) == stem + block + head
    few = quantized(chain, 2, 2, 2)
    quanconv = 16 * 16 * 9 * 2 // 8 + 4 * 16 + 4 * 4 * 16
    closing = 4 * 4 * 16
    assert device_bytes(with_exits(few, [1], heads.hybrid)) == stem + 2 * quanconv + closing + head
    second = 4 * (16 * 32 * 9 + 32 * 32 * 9 + 2 * 4 * 32)
    assert device_bytes(EarlyExitNetwork(few), blocks=2) == stem + 2 * quanconv + closing + second
    light = [4 * (channels * 4 + 4) for channels in (16, 32)]
    two = with_exits(few, [1, 2], heads.light)
    assert device_bytes(two) == stem + 2 * quanconv + closing + second + sum(light)
    guided = with_exits(few, [1, 2], heads.light, separable)
    extra = sum(value.nbytes for name, value in guided.predictor.state_dict().items() if "num_batches" not in name)
    assert device_bytes(guided) - device_bytes(two) == extra > 0


def test_without_an_exit_the_device_holds_everything() -> None:
    network = EarlyExitNetwork(cifar_resnet(8, 4))
    buffers = sum(buffer.numel() for name, buffer in network.named_buffers() if "num_batches" not in name)
    assert device_bytes(network) == 4 * (sum(p.numel() for p in network.parameters()) + buffers)


def redrawn() -> QuanConv:
    conv = QuanConv(nn.Conv2d(4, 6, 3), 2, 2).eval()
    nn.init.normal_(conv.conv.weight)
    return conv


def by_optimizer(conv: QuanConv) -> None:
    conv.conv.weight.grad = torch.randn_like(conv.conv.weight)
    torch.optim.SGD([conv.conv.weight], lr=1.0).step()


def in_training(conv: QuanConv) -> None:
    conv.train()(torch.randn(2, 4, 5, 5))
    conv.conv.weight.mul_(-1)
    conv.eval()


CHANGES: dict[str, Callable[[QuanConv], object]] = {
    "in place": lambda conv: conv.conv.weight.mul_(-1),
    "optimizer": by_optimizer,
    "training": in_training,
    "load_state_dict": lambda conv: conv.load_state_dict(redrawn().state_dict()),
    "load_state_dict, assigned": lambda conv: conv.load_state_dict(redrawn().state_dict(), assign=True),
    "channels_last": lambda conv: (conv.conv.weight.mul_(-1), conv.to(memory_format=torch.channels_last)),
    "another parameter": lambda conv: setattr(conv.conv, "weight", nn.Parameter(torch.randn(6, 4, 3, 3))),
    "vector_to_parameters": lambda conv: nn.utils.vector_to_parameters(torch.rand(230) - 0.5, conv.parameters()),
}


def uncached(conv: QuanConv, weight: Tensor, x: Tensor) -> Tensor:
    own = copy.deepcopy(conv.conv)
    own.weight.copy_(weight)
    return QuanConv(own, conv.weight_bits, conv.act_bits, conv.norm).eval()(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_evaluation_follows_the_weights(change: Callable[[QuanConv], object], mode: Callable) -> None:
    conv, x = redrawn(), torch.randn(2, 4, 6, 6)
    for _ in range(3):
        with mode():
            conv(x)
        with torch.no_grad():
            change(conv)
        with mode():
            torch.testing.assert_close(conv(x), uncached(conv, conv.conv.weight, x))


def test_evaluation_follows_weights_that_are_not_its_own() -> None:
    conv, x = redrawn(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for _ in range(10):  # later tensors may take the place of earlier ones in memory
            weight = torch.randn(6, 4, 3, 3)
            torch.testing.assert_close(functional_call(conv, {"conv.weight": weight}, (x,)), uncached(conv, weight, x))
            del weight


def test_evaluation_quantizes_the_weights_once(monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(quantization, "weight_codes", lambda w, bits: (calls.append(bits), weight_codes(w, bits))[1])
    conv, x = redrawn(), torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        outputs = [conv(x) for _ in range(3)]
    assert calls == [2]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(conv(x), outputs[0])  # and with gradients, anew
    copy.deepcopy(conv).to("meta")
