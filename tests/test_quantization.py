"""The quantizers and QuanConv against formulas of their own: all levels looked at, numpy in float64, plain autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.quantization import QuanConv, clip_latent_weights, codes_of, per_filter, unit, weight_codes

BITS = (1, 2, 3, 4, 8)
MIXED = [(1, 1), (2, 2), (4, 4), (8, 8), (1, 32), (32, 1), (2, 8), (32, 4), (32, 32)]
bits_of = st.integers(1, 8)
numbers = st.floats(-2, 2, width=32)


def levels(bits: int) -> np.ndarray:
    """The spec's: (2q - Z)/Z."""
    z = 2**bits - 1
    return np.array([(2 * q - z) / z for q in range(z + 1)])


def quantize(x: Tensor, bits: int) -> Tensor:
    """The level next to each value, by looking at all of them; of two as near, the upper one."""
    if bits == 32:
        return x.clamp(-1, 1)
    grid = torch.from_numpy(levels(bits)).flip(0)
    return grid[(x.detach().double()[..., None] - grid).abs().argmin(-1)]


def effective(weight: Tensor, bits: int) -> Tensor:
    """α · Wq in float64."""
    if bits == 32:
        return weight.double()
    w = weight.detach().double().flatten(1)
    wq = quantize(w / w.abs().amax(1, keepdim=True), bits)
    return ((w * wq).sum(1, keepdim=True) / (wq * wq).sum(1, keepdim=True) * wq).view_as(weight)


def layer(weight_bits: int, act_bits: int, **conv: int | bool) -> QuanConv:
    """A QuanConv, 4 to 6 channels, with some latent weights beyond 1 and a BatchNorm that is no identity."""
    made = QuanConv(nn.Conv2d(4, 6, 3, **conv), weight_bits, act_bits)  # type: ignore[arg-type]
    nn.init.normal_(made.conv.weight, std=0.6)
    for vector in (made.norm.weight, made.norm.bias, made.norm.running_mean, made.norm.running_var):
        nn.init.uniform_(vector, 0.3, 1)
    return made


@given(x=st.lists(numbers, min_size=1, max_size=50), bits=bits_of)
def test_every_value_goes_to_the_nearest_level(x: list[float], bits: int) -> None:
    codes = codes_of(torch.tensor(x), bits)
    integers = codes.double().numpy() * 2 ** (bits - 1)
    assert set(integers) <= set(levels(bits) * (2**bits - 1))
    away = np.abs(np.clip(x, -1, 1)[:, None] - levels(bits)).min(1)
    np.testing.assert_allclose(np.abs(np.clip(x, -1, 1) - codes.double().numpy() * unit(bits)), away, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_levels_are_reached_and_stay_where_they_are(bits: int) -> None:
    np.testing.assert_allclose(codes_of(torch.linspace(-1, 1, 5000), bits).unique() * unit(bits), levels(bits))
    reached = codes_of(torch.from_numpy(levels(bits)).float(), bits)
    np.testing.assert_allclose(reached * unit(bits), levels(bits), rtol=1e-6)


@given(x=st.lists(numbers, min_size=1, max_size=50), bits=bits_of)
def test_codes_are_exact_in_half_precision(x: list[float], bits: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        codes = codes_of(torch.tensor(x), bits, dtype)
        assert codes.dtype == dtype
        assert torch.equal(codes.float(), codes_of(torch.tensor(x), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_scales_are_those_of_least_squares(bits: int) -> None:
    weight = torch.randn(7, 5, 3, 3) * torch.logspace(-4, 1, 7).view(-1, 1, 1, 1)
    codes, scale = weight_codes(weight, bits)
    made = (codes * per_filter(scale, 4)).double()
    torch.testing.assert_close(made, effective(weight, bits), rtol=2**-15, atol=0)
    if bits == 1:  # equation 2
        torch.testing.assert_close(scale.double(), weight.double().abs().mean((1, 2, 3)), rtol=2**-16, atol=0)
    error = (weight.double() - made).square().sum((1, 2, 3))
    for factor in (0.9, 0.99, 0.999, 1.001, 1.01, 1.1):
        assert ((weight.double() - factor * made).square().sum((1, 2, 3)) > error).all()
    mantissas = np.frexp(scale.double().numpy())[0] * 2**16
    assert (mantissas == np.round(mantissas)).all()


@given(bits=bits_of, seed=st.integers(0, 10**6), size=st.integers(1, 80), exponent=st.floats(-8, 2))
def test_quantized_weights_quantize_to_themselves(bits: int, seed: int, size: int, exponent: float) -> None:
    weight = torch.randn(4, size, 1, 3, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    weight[1] = 0
    weight[2, : size // 2] = 0
    codes, scale = weight_codes(weight, bits)
    assert_quantized(codes * per_filter(scale, 4), bits, codes, scale)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-30, 0.3e-20, 0.6e-20, 1e-20, 1.4e-20, 3e-20, 1e-12])
@pytest.mark.parametrize("bits", BITS)
def test_so_do_the_smallest_weights_and_large_filters(bits: int, largest: float) -> None:
    weight = torch.cat([torch.linspace(-1, 1, 64) * largest, torch.randn(4608 - 64) * largest / 10]).view(1, -1, 3, 3)
    codes, scale = weight_codes(weight.clamp(-largest, largest), bits)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert_quantized(codes * per_filter(scale, 4), bits, codes, scale)


def assert_quantized(weight: Tensor, bits: int, codes: Tensor, scale: Tensor) -> None:
    again = weight_codes(weight, bits)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize(("weight_bits", "act_bits"), MIXED)
def test_forward_is_the_naive_one_in_float64(weight_bits: int, act_bits: int) -> None:
    conv = layer(weight_bits, act_bits, stride=2, padding=1).eval()
    x = torch.randn(2, 4, 5, 6)
    xq = np.pad(quantize(conv.norm(x), act_bits).double().detach().numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    w, bias = effective(conv.conv.weight, weight_bits).detach().numpy(), conv.conv.bias.detach().numpy()
    expected = np.zeros((2, 6, 3, 3))
    for n, c, i, j in np.ndindex(expected.shape):
        window = xq[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        expected[n, c, i, j] = (window * w[c]).sum() + bias[c]
    assert conv(x).dtype == torch.float32
    np.testing.assert_allclose(conv(x).detach(), expected, rtol=1e-4, atol=1e-4)


def reference(conv: QuanConv, x: Tensor) -> Tensor:
    """Fig. 2 with gradients straight through: to activations and to weights where these are within [-1, 1]."""
    x = conv.norm(x).clamp(-1, 1)
    xq = x + (quantize(x, conv.act_bits).float() - x).detach()
    w = conv.conv.weight
    if conv.weight_bits != 32:
        inside = w.clamp(-1, 1)
        w = inside + (effective(w, conv.weight_bits).float() - inside).detach()
    c = conv.conv
    return F.conv2d(xq, w, c.bias, c.stride, c.padding, c.dilation, c.groups)


GEOMETRIES = ({}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2, "dilation": 2, "padding": 2})


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("weight_bits", "act_bits"), MIXED)
def test_gradients_are_those_of_straight_through_estimation(weight_bits: int, act_bits: int, geometry: dict) -> None:
    ours = layer(weight_bits, act_bits, **geometry)
    theirs = copy.deepcopy(ours)
    assert (ours.conv.weight.abs() > 1).any()
    images = torch.randn(3, 4, 7, 7)
    found = []
    for conv, forward in ((ours, ours), (theirs, lambda x: reference(theirs, x))):
        x = images.clone().requires_grad_()
        out = forward(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append({"out": out, "x": x.grad, **{name: p.grad for name, p in conv.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(ours.norm.running_var, theirs.norm.running_var)


def test_gradients_pass_at_the_very_bounds() -> None:
    edge = [-1.001, -1.0, -0.999, 0.0, 0.999, 1.0, 1.001]
    passes = torch.tensor([0.0, 1, 1, 1, 1, 1, 0])
    identity = nn.BatchNorm2d(1, eps=0).eval()
    conv = QuanConv(nn.Conv2d(1, 7, 1, bias=False), 2, 2, identity)
    conv.conv.weight.data = torch.tensor(edge).view(7, 1, 1, 1)
    x = torch.tensor(edge).view(1, 1, 7, 1).requires_grad_()
    conv(x)[:, 4:].sum().backward()
    assert torch.equal(conv.conv.weight.grad.flatten() != 0, (passes * torch.tensor([0, 0, 0, 0, 1, 1, 1])).bool())
    assert torch.equal((x.grad.flatten() != 0).float(), passes)


def test_32_bits_are_the_pre_activation_layer() -> None:
    conv = layer(32, 32)
    x, twin = torch.randn(2, 4, 6, 6), copy.deepcopy(conv.norm)
    torch.testing.assert_close(conv(x), conv.conv(F.hardtanh(twin(x))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("weight_bits", "act_bits"), MIXED[:6])
def test_bf16_computes_with_the_same_codes(monkeypatch, weight_bits: int, act_bits: int, training: bool) -> None:
    seen: list[tuple[Tensor, ...]] = []
    true = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *rest: (seen.append((x, w)), true(x, w, *rest))[1])
    conv, x = layer(weight_bits, act_bits, bias=False).train(training), torch.randn(2, 4, 9, 9)
    full = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x)
    for bits, ours, theirs in zip((act_bits, weight_bits), seen[0], seen[1], strict=True):
        if bits != 32:
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(theirs.float(), ours)
    exact = 32 not in (weight_bits, act_bits)  # then only the sum is rounded
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=2**-8 if exact else 0.05, atol=1e-6 if exact else 0.05)


def test_latent_weights_are_clipped_where_they_are_quantized() -> None:
    network = nn.ModuleList([layer(1, 1), layer(2, 32), layer(32, 2), nn.Conv2d(4, 6, 3)])
    nn.init.constant_(network[3].weight, 3)
    before = copy.deepcopy(network)
    clip_latent_weights(network)
    for few in (0, 1):
        assert torch.equal(network[few].conv.weight, before[few].conv.weight.clamp(-1, 1))
        assert network[few].conv.weight.abs().max() == 1
    for full in (2, 3):
        assert all(map(torch.equal, network[full].parameters(), before[full].parameters()))


@pytest.mark.parametrize("bits", [0, 9, 16, 31, -1, 33, 2.0, True, "2", None])
def test_bits_that_cannot_be_are_refused(bits: object) -> None:
    for given_bits, name in (((bits, 1), "weight_bits"), ((1, bits), "act_bits")):
        with pytest.raises(ValueError, match=f"{name} to be a whole number of bits from 1 to 8, or 32, got {bits}"):
            QuanConv(nn.Conv2d(2, 2, 1), *given_bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_what_is_no_number_is_not_hidden(bits: int) -> None:
    layer = QuanConv(nn.Conv2d(2, 3, 1, bias=False), bits, bits).eval()
    images = torch.randn(4, 2, 3, 3)
    images[0, 0, 0, 0] = torch.nan
    assert layer(images)[0, :, 0, 0].isnan().all()
    assert torch.isfinite(layer(images)[1:]).all()
